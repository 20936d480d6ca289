"""The forecast of a repair: planted records, intervals that cover, and what the script says of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from scripts import script

import mismatch
from mismatch.mechanisms.parts.calling import first_of
from mismatch.stages.repair.ladder_stages.activation_store import Store
from mismatch.stages.repair.ladder_stages.module_pair import pairs_of

forecast = script("forecast")
KNOWN, NEW = "planted0", "planted(never=tried)"
TRUTH = 0.35
"""Share closed for each e-fold of `of_zero`."""


def planted(seed: int = 0, noise: float = 0.05, useless: bool = False) -> pd.DataFrame:
    """Eight layers by five mechanisms. What is closed follows `of_zero`, or nothing."""
    rng, rows = np.random.default_rng(seed), []
    for layer in range(8):
        for mechanism in range(5):
            numbers = {name: float(rng.uniform(0.1, 1.0)) for name in forecast.NUMBERS}
            closed = 0.5 if useless else 0.9 + TRUTH * np.log(numbers["of_zero"])
            rows.append(
                {
                    "layer": layer, "mechanism": f"planted{mechanism}", **numbers,
                    "closed local": float(np.clip(closed + noise * rng.normal(), 0, 1)),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def told_of(numbers=None, record=None, mechanism: str = KNOWN):
    """The forecast of the stage local."""
    numbers = dict.fromkeys(forecast.NUMBERS, 0.5) if numbers is None else numbers
    return forecast.forecast(mechanism, numbers, "local", planted() if record is None else record)


# ---- planted records ----------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", [KNOWN, NEW])
def test_the_interval_covers(mechanism):
    inside = []
    for seed in range(40):
        fresh = planted(1000 + seed).iloc[seed]
        told = told_of({n: fresh[n] for n in forecast.NUMBERS}, planted(seed), mechanism)
        inside.append(told.has(fresh["closed local"]))
    # The promise is 1 - 2 MISS at least, and 1 - MISS is usual; 0.1 is two standard errors of 40 draws.
    assert np.mean(inside) == pytest.approx(1 - forecast.MISS, abs=0.1)


def test_a_perfect_predictor_gets_a_narrow_interval_and_is_named():
    told = told_of(record=planted(noise=0.0))
    assert told.used == ("of_zero",)
    assert told.value == pytest.approx(0.9 + TRUTH * np.log(0.5), abs=1e-6)
    assert told.hi - told.lo < 1e-6


def test_useless_numbers_leave_the_mean():
    """A constant gap: no number can do better than the mean, and ties go to it."""
    record = planted(useless=True, noise=0.0)
    told = told_of(record=record)
    assert told.used == ()
    assert told.value == pytest.approx(record["closed local"].mean())


def test_noise_widens():
    widths = []
    for noise in (0.01, 0.05, 0.2):
        told = told_of(record=planted(noise=noise))
        widths.append(told.hi - told.lo)
    assert widths == sorted(widths)


def test_a_number_that_was_not_measured_is_not_used():
    told = told_of({"removed": 0.5})
    assert "of_zero" not in told.used


def test_a_share_stays_between_nothing_and_all():
    told = told_of({"of_zero": 1e-6}, planted(noise=0.1))
    assert 0.0 <= told.lo <= told.hi <= 1.0
    assert told.value == 0.0


# ---- the scripts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("useless", "words"), [(False, "better than the mean"), (True, "no better than the mean")]
)
def test_the_script_says_whether_forecasts_beat_the_mean(useless, words):
    module = script("forecast_score")
    record = planted(noise=0.02, useless=useless).query("layer < 4")
    for stage in module.STAGES:
        record[f"closed {stage}"] = record["closed local"]
    told = module.summary(module.scores(record, "layer"))
    cells = record.assign(**{n: record["of_zero"] ** 2 for n in module.BEFORE if n not in record})
    known = module.correlations(cells)
    said = module.verdict(known, told)
    assert f"A layer left out, local: error {100 * told['error'][1]:.0f} points" in said
    assert f"({words}" in said
    best = known[known["best"] & (known["outcome"] == "closed local")]["number"].item()
    assert useless or best in ("of_zero", *cells.columns.difference(record.columns))


def test_a_map_removes_what_is_linear(toy_teacher):
    """A part that gives the teacher's output turned and shifted is right up to a linear map; one of noise is not."""
    student = mismatch.swap(toy_teacher, "layer1.attn:identity")
    (part,) = pairs_of(toy_teacher.layout, student)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(2, 90, (4, 64), generator=generator) for _ in range(8)]
    store, held = (Store(toy_teacher.layout, [part], some) for some in (batches[:6], batches[6:]))
    d = toy_teacher.layout.d_model
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    original = part.student

    class Spoilt(torch.nn.Module):
        def __init__(self, spoil):
            super().__init__()
            self.spoil = spoil

        def forward(self, *args, **kwargs):
            return self.spoil(first_of(original(*args, **kwargs)))

    def read(spoil):
        return script("forecast_record").errors(
            dataclasses.replace(part, student=Spoilt(spoil)), store, held
        )

    turned = read(lambda y: y @ turn + 1.0)
    assert turned["mapped_error"] < 0.05 * turned["local_error"]
    noise = read(lambda y: torch.randn(y.shape, generator=generator))
    assert noise["mapped_error"] > 10 * turned["mapped_error"]
