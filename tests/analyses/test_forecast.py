"""The forecast: planted records, intervals that cover, what is refused; a repair that writes it down and scores it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from scripts import script

import mismatch
from mismatch import registry
from mismatch.mechanisms.parts.calling import first_of
from mismatch.stages import runner
from mismatch.stages.repair import forecast
from mismatch.stages.repair import forecast_readings as foretold
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.forecast import MISS, NUMBERS, SHARES, Swap
from mismatch.stages.repair.ladder import Ladder
from mismatch.stages.repair.ladder_stages.activation_store import Store
from mismatch.stages.repair.ladder_stages.module_pair import pairs_of
from mismatch.stages.repair.ladder_stages.stage_result import StageResult
from mismatch.stages.repair.report import page as repair_page

KNOWN, NEW = "planted0", "planted(never=tried)"
TRUTH = 0.35
"""Share closed for each e-fold of `of_zero`."""


def planted(seed: int = 0, noise: float = 0.05, useless: bool = False) -> pd.DataFrame:
    """Eight layers by five mechanisms. What is closed follows `of_zero`, or nothing."""
    rng, rows = np.random.default_rng(seed), []
    for layer in range(8):
        for mechanism in range(5):
            numbers = {name: float(rng.uniform(0.1, 1.0)) for name in NUMBERS}
            closed = 0.5 if useless else 0.9 + TRUTH * np.log(numbers["of_zero"])
            rows.append(
                {
                    "model": "toy", "n_layers": 4, "d_model": 32, "slot": "attn", "tokens": 8192,
                    "epochs": 3, "seq_len": 512, "layer": layer, "mechanism": f"planted{mechanism}", **numbers,
                    "closed local": float(np.clip(closed + noise * rng.normal(), 0, 1)),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def swap(mechanism: str = KNOWN, **changes) -> Swap:
    facts = {"slot": "attn", "modules": 1, "n_layers": 4, "d_model": 32}
    numbers = changes.pop("numbers", dict.fromkeys(NUMBERS, 0.5))
    return Swap(mechanism, **{**facts, **changes}, numbers=numbers)


# ---- planted records ----------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", [KNOWN, NEW])
def test_the_interval_covers(mechanism):
    inside = []
    for seed in range(40):
        fresh = planted(1000 + seed).iloc[seed]
        told = forecast.forecast(
            swap(mechanism, numbers={n: fresh[n] for n in NUMBERS}), "local", planted(seed)
        )
        inside.append(told.has(fresh["closed local"]))
    # The promise is 1 - 2 MISS at least, and 1 - MISS is usual; 0.1 is two standard errors of 40 draws.
    assert np.mean(inside) == pytest.approx(1 - MISS, abs=0.1)


def test_a_perfect_predictor_gets_a_narrow_interval_and_is_named():
    told = forecast.forecast(swap(), "local", planted(noise=0.0))
    assert told.used == ("of_zero",)
    assert told.value == pytest.approx(0.9 + TRUTH * np.log(0.5), abs=1e-6)
    assert told.hi - told.lo < 1e-6
    assert told.cells == 40


def test_useless_numbers_leave_the_mean():
    """A constant gap: no number can do better than the mean, and ties go to it."""
    record = planted(useless=True, noise=0.0)
    told = forecast.forecast(swap(), "local", record)
    assert told.used == ()
    assert told.value == pytest.approx(record["closed local"].mean())


def test_noise_widens():
    widths = []
    for noise in (0.01, 0.05, 0.2):
        told = forecast.forecast(swap(), "local", planted(noise=noise))
        widths.append(told.hi - told.lo)
    assert widths == sorted(widths)


def test_a_number_that_was_not_measured_is_not_used():
    told = forecast.forecast(swap(numbers={"removed": 0.5}), "local", planted())
    assert "of_zero" not in told.used


def test_a_share_stays_between_nothing_and_all():
    told = forecast.forecast(swap(numbers={"of_zero": 1e-6}), "local", planted(noise=0.1))
    assert 0.0 <= told.lo <= told.hi <= 1.0
    assert told.value == 0.0


# ---- outside of the record ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layers": 12}, "the record is of toy (4 layers of width 32), this model has 12 of 32"),
        ({"modules": 2}, "the record holds one swapped module at a time, here are 2"),
        ({"slot": "mlp"}, "the record holds swaps of attn, not of mlp"),
        (
            {"numbers": {"of_zero": 9.0}},
            "its KL over that of deleting the module is 9, in the record",
        ),
        ({"numbers": {"of_zero": 0.0}}, "is 0, in the record"),
        ({"numbers": {"removed": float("nan")}}, "is nan, in the record"),
    ],
)
def test_what_lies_outside_is_refused_in_words(change, words, monkeypatch):
    monkeypatch.setattr(forecast, "shipped", planted)
    told = forecast.foretell(swap(**change), ("local",), 24576)
    assert words in told.why_not
    assert told.stages == {}


def test_another_budget_is_said_and_an_unknown_stage_is_left_out(monkeypatch):
    monkeypatch.setattr(forecast, "shipped", planted)
    told = forecast.foretell(swap(), ("local", "window"), 24576)
    assert list(told.stages) == ["local"]
    assert told.note == ""
    more = forecast.foretell(swap(), ("local",), 245760)
    assert "10 times as many tokens" in more.note
    assert "expect more" in more.note


def test_the_record_that_is_shipped_is_whole():
    record = forecast.shipped()
    assert (record[[name for name in NUMBERS if name not in SHARES]] > 0).all(axis=None)
    assert record["removed"].between(0, 1).all()
    for call, slot in set(zip(record["mechanism"], record["slot"], strict=True)):
        assert slot == registry.mechanisms().card(call.partition("(")[0]).facts["slots"][0]
    for stage in ("closed-form", "local", "block"):
        closed = record[f"closed {stage}"].dropna()
        assert len(closed) >= 20
        assert closed.between(0, 1).all()


# ---- scores -------------------------------------------------------------------------------------


def test_an_undone_stage_counts_as_what_was_there_and_one_left_out_does_not_count():
    one = forecast.Forecast(0.5, 0.3, 0.6)
    told = forecast.Foretold({"closed-form": one, "local": one, "block": one}, {}, "a record")
    said = told.scored(
        [
            StageResult("swap", gap_closed=0.0),
            StageResult("closed-form", gap_closed=0.4, tokens=10),
            StageResult("local", gap_closed=-0.2, tokens=10, kept=False),
            StageResult("block", gap_closed=0.4, tokens=0),
        ]
    ).stages
    assert said["closed-form"].measured == 0.4
    assert said["local"].measured == 0.4
    assert said["local"].has(0.4)
    assert said["block"].measured is None


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


# ---- in a repair --------------------------------------------------------------------------------

SETTINGS = {
    "train_tokens": 1024, "tokens": 256, "val_tokens": 128, "seq_len": 64, "batch_size": 4, "epochs": 1,
    "max_minutes": None, "trace_tokens": 0, "probes": (), "stages": ("closed-form", "local"),
}  # fmt: skip


@pytest.fixture
def of_the_toy(monkeypatch, toy_teacher):
    """A record of models like the toy, wide enough for any swap of it; no figures."""
    layout = toy_teacher.layout

    def record() -> pd.DataFrame:
        found = planted().assign(n_layers=layout.n_layers, d_model=layout.d_model)
        found.loc[0, list(NUMBERS)], found.loc[1, list(NUMBERS)] = 1e-9, 1e9
        return found

    monkeypatch.setattr(forecast, "shipped", record)
    monkeypatch.setattr(runner, "write_html", lambda _folder: None)


def test_it_is_written_down_before_the_first_stage(of_the_toy, toy_folder, tmp_path, monkeypatch):
    def stopped(_self, _name):
        raise KeyboardInterrupt

    monkeypatch.setattr(Ladder, "_closed_form", stopped)
    config = RepairConfig(
        model=str(toy_folder),
        swap=("layer1:infini(segment=8)",),
        output=str(tmp_path / "run"),
        **SETTINGS,
    )
    with pytest.raises(KeyboardInterrupt):
        runner.command("repair", config, progress=False)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "forecast  local: gap closed" in log
    assert "(90 %), from" in log
    assert "trained on given text alone, none of it self-generated" in log


def test_it_is_scored_after(of_the_toy, toy_teacher):
    result = mismatch.repair(toy_teacher, "layer1:infini(segment=8)", **SETTINGS)
    told = result.plan.forecast
    local = told.stages["local"]
    assert set(told.numbers) == set(NUMBERS)
    assert local.measured == pytest.approx(
        max(0.0, *result.stages["gap_closed"][result.stages["kept"]])
    )
    within = local.lo <= local.measured <= local.hi
    assert local.has(local.measured) == within
    line = next(line for line in result.summary().splitlines() if line.startswith("local"))
    word = "inside" if within else "outside"
    assert f"]: {word}" in line
    page = str(repair_page.stages(result.plan))
    assert "forecast of the gap closed, 90 % interval" in page
    assert f"<td>{word}</td>" in page


def test_two_modules_get_no_forecast_and_the_reason(of_the_toy, toy_teacher, capsys):
    result = mismatch.repair(toy_teacher, "layers1-2:infini(segment=8)", progress=True, **SETTINGS)
    assert result.plan.forecast.stages == {}
    assert (
        "no forecast: the record holds one swapped module at a time, here are 2"
        in capsys.readouterr().err
    )


def test_a_diagnosis_forecasts_too(of_the_toy, toy_teacher):
    result = mismatch.diagnose(
        toy_teacher,
        swap="layer1:infini(segment=8)",
        fit_tokens=512,
        tokens=256,
        seq_len=64,
        heads=0,
    )
    assert set(result.plan.forecast.numbers) == set(NUMBERS)
    assert "  forecast  local: gap closed" in result.summary()
    assert "the interval was not tried for that" in result.summary()
    none = mismatch.diagnose(
        toy_teacher,
        swap="layers1-2:infini(segment=8)",
        fit_tokens=512,
        tokens=256,
        seq_len=64,
        heads=0,
    )
    assert "no forecast: the record holds one swapped module at a time" in none.summary()


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
        return foretold.errors(dataclasses.replace(part, student=Spoilt(spoil)), store, held)

    turned = read(lambda y: y @ turn + 1.0)
    assert turned["removed"] > 0.95
    assert turned["mapped_error"] == pytest.approx((1 - turned["removed"]) * turned["local_error"])
    noise = read(lambda y: torch.randn(y.shape, generator=generator))
    assert noise["mapped_error"] > 10 * turned["mapped_error"]
