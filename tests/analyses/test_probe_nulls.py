"""Every probe where there is nothing to read: a model without training, inputs out of order, the model itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from wonderland import documents

import mismatch
from mismatch.probes import PROBES
from mismatch.stages.opening import Opened
from mismatch.stages.probe.config import ProbeConfig
from mismatch.stages.runner import stage_of

SCRIPT = Path(__file__).resolve().parents[2] / "analyses" / "probe_nulls.py"
ASKED = [name for name in PROBES if name not in ("needles", "kv_lookup")]
"""The toy's context of 128 tokens has no room for prompts of the others."""


@pytest.fixture(scope="module")
def script():
    found = importlib.util.spec_from_file_location("probe_nulls", SCRIPT)
    module = importlib.util.module_from_spec(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "probe_nulls", module)  # a dataclass looks itself up there
        found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setting(toy):
    config = ProbeConfig(
        model="toy", swap=("layer2.attn:identity",), seq_len=96, lengths=("120",), depths=("0.1",),
        samples=4, probes=tuple(ASKED),
    )  # fmt: skip
    texts = {"data": documents(20), "calibration_data": documents(3, seed=1)}
    opened = Opened(config, teacher=mismatch.load(toy[:2]), given=texts)
    return stage_of("probe").prepare(opened).asked.setting


@pytest.fixture(scope="module")
def found(script, setting, toy):
    table = script.nulls(mismatch.load((toy.model, toy.tokenizer)), setting, 2, ASKED)
    return table.set_index(["probe", "stat"])


def test_every_probe_has_a_null(script):
    assert {reading.probe for reading in script.READINGS} == set(PROBES)
    for reading in script.READINGS:
        # What cannot be asked in one of the two ways says why.
        assert reading.why or set(reading.controls) == {"shuffled", "random"}


def test_the_model_itself_is_the_null_of_all(found):
    assert (found["identity_shift"] == 0).all()


@pytest.mark.parametrize(
    "probe, stat, within",
    [
        ("induction", "gain", 0.1),
        ("heads", "best_induction", 0.002),
        ("heads", "best_previous", 0.01),
        ("order_sensitivity", "change[keep=1]", 0.02),
        ("generation", "agreed", 0.5),
        ("rope_bands", "norm_share[band=4]", 0.03),
        ("shift_invariance", "kl[shift=1]", 1e-9),
        ("memory", "kl_change[without=memory]", 0.01),
    ],
)
def test_without_training_it_reads_chance(found, probe, stat, within):
    row = found.loc[(probe, stat)]
    assert row["random"] == pytest.approx(row["chance"], abs=within)


def test_without_training_no_position_is_a_line_of_the_stream(found):
    for stat in ("r2", "distance_r2"):
        assert found.loc[("position_decoding", stat), "random"] < 0.1


def test_training_is_read(found):
    """The control of the controls: on the trained model these are not at chance."""
    for probe, stat, least in (
        ("heads", "best_previous", 0.3),
        ("order_sensitivity", "change[keep=1]", 0.3),
        ("generation", "agreed", 47),
    ):
        assert found.loc[(probe, stat), "trained_lo"] > least
    assert found.loc[("order_sensitivity", "change[keep=1]"), "nope"] < 1e-5


def test_what_is_put_out_of_order(script, setting):
    """The second copy, the question and the key stay as they were; what they need does not."""
    from mismatch.probes import load_probe

    plain, mixed = load_probe("induction")(setting), script.shuffled("induction", setting)
    second = plain.start + plain.half
    np.testing.assert_array_equal(plain.ids[:, second:], mixed.ids[:, second:])
    first = slice(plain.start, second)
    assert (plain.ids[:, first] != mixed.ids[:, first]).any(1).all()
    np.testing.assert_array_equal(
        np.sort(plain.ids[:, first], axis=1), np.sort(mixed.ids[:, first], axis=1)
    )
    (plain,) = load_probe("passkey")(setting).cells.values()
    (mixed,) = script.shuffled("passkey", setting).cells.values()
    asked = int(plain.scored.any(0).argmax()) - script.ASKED
    np.testing.assert_array_equal(plain.ids[:, asked:], mixed.ids[:, asked:])
    assert (plain.ids[:, :asked] != mixed.ids[:, :asked]).any(1).all()
