"""Faults that are known, planted into a layer of the trained toy: each must be named, and nothing else."""

from __future__ import annotations

import faults
import pytest
from wonderland import documents

import mismatch
from mismatch.stages.diagnose.corrections import CAUSES

SMALL = {
    "fit_tokens": 1024, "tokens": 512, "seq_len": 64, "scored": 1.0, "calibration_tokens": 256,
    "controls": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    return {"data": documents(8), "calibration_data": documents(8, seed=1)}


@pytest.fixture
def diagnose(toy_teacher, texts):
    faults.plant()
    return lambda swap, **more: mismatch.diagnose(toy_teacher, swap, **texts, **SMALL | more)


@pytest.mark.parametrize(
    ("kind", "correction", "cause", "least"),
    [
        ("scaled", "scale", "distribution", 0.9),
        ("rotated", "linear", "distribution", 0.9),
        ("shifted", "mean", "distribution", 0.9),
        ("delayed", "delay", "position", 0.6),
        ("first", "first", "premise", 0.9),
        ("sizes", "size", "premise", 0.3),
        ("head", "head 1", None, 0.0),
    ],
)
def test_each_fault_is_named(diagnose, kind, correction, cause, least):
    # At layer 0 the shift costs 15 times what deleting the module does, so that muting the part returns 94 % of it.
    layer = 0 if kind in ("shifted", "head") else 2
    found = diagnose(f"layer{layer}:fault(kind={kind})", heads=2 if kind == "head" else 0).found
    assert found.leading == correction
    share = found.get(correction).share
    # What stood outside of the window cannot be known: the last token of a delayed update stays wrong.
    assert share.value > (0.8 if kind == "delayed" else 0.97)
    assert share.lo <= share.value <= share.hi
    if cause is None:  # a head that is gone is none of the three
        assert found.unexplained.value > 0.15
        return
    best = max(found.causes, key=lambda name: found.causes[name].value)
    assert best == cause
    assert found.causes[cause].value > least
    others = [n for name, names in CAUSES.items() if name != cause for n in names]
    if kind in ("scaled", "shifted"):
        assert max(found.get(name).share.value for name in others) < 0.2


def test_the_numbers_that_were_planted_are_found(diagnose):
    place = diagnose("layer2:fault(kind=scaled)", heads=0).found.places[0]
    assert place["fitted"]["scale"] == pytest.approx(0.5, rel=1e-6)
    assert place["fitted"]["size"] == pytest.approx(2.0, rel=1e-6)
    assert place["forced_error"] == pytest.approx(1.0, rel=1e-6)
    assert place["linear_error"] < 1e-10
    delayed = diagnose("layer2:fault(kind=delayed)", heads=0).found.places[0]["fitted"]
    taps = [delayed[name] for name in ("tap_before", "tap_own", "tap_behind")]
    assert taps == pytest.approx([0, 0, 1], abs=0.02)
    rope = diagnose("layer2:nope", heads=0).found
    assert rope.places[0]["fitted"]["rope"] == pytest.approx(1.0, rel=1e-4)
    assert rope.leading == "rope"
    assert max(rope.causes, key=lambda name: rope.causes[name].value) == "position"


def test_nothing_wrong_is_nothing_to_explain(diagnose):
    for swap in ("layer2:fault(kind=same)", "layer1:identity; layer2.mlp:identity"):
        made = diagnose(swap)
        assert made.found.damage.value == 0.0
        assert made.found.corrections == ()
        assert made.leading is None
        assert made.verdict == "Nothing to explain: the output does not move (KL 0 nats, rounding)."
        assert [finding.title for finding in made.findings] == ["nothing to explain"]


def test_a_deleted_part_is_explained_by_nothing(diagnose):
    """What is not there cannot be scaled, delayed or turned; its mean is all that can be put back."""
    found = diagnose("layer2:zero").found
    assert found.leading in (None, "mean")
    assert found.get("mean").share.value < 0.5
    assert found.unexplained.value > 0.5
    for name in ("scale", "delay", "rope", "size"):
        assert found.get(name).does_nothing
        assert found.get(name).share.value == 0.0
    assert (
        found.get("linear").share == found.get("mean").share
    )  # of no input, a map is its constant
    assert found.places[0]["forced_error"] == pytest.approx(1.0)
