"""What the probes must find on the real model, without being told: the two facts that ordinary text hides."""

from __future__ import annotations

import pytest

import mismatch
from mismatch.stages.probe.words import headlines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def difference(table, student="swap"):
    rows = headlines(table)
    return rows[rows["student"] == student].set_index("stat")["difference"]


def test_position_at_layer_16_carries_copying(smollm2):
    teacher = mismatch.load((smollm2.model, smollm2.tokenizer))
    given = {"probes": ("induction",), "controls": ()}
    lost = difference(mismatch.probe(teacher, swap="layer16:nope", **given).table)
    kept = difference(mismatch.probe(teacher, swap="layer24:nope", **given).table)
    assert lost["nll_second"] > 6  # measured: +7.0 to +7.2 nats
    assert abs(kept["nll_second"]) < 0.5


def test_layer_18_alone_carries_the_passkey(smollm2):
    teacher = mismatch.load((smollm2.model, smollm2.tokenizer))
    given = {"probes": ("passkey",), "controls": (), "lengths": ("256",), "depths": ("0.1",)}
    found = {}
    for layer in (12, 18, 20):
        swap = f"layer{layer}:infini(segment=64, gate_init=-30)"  # local attention alone
        result = mismatch.probe(teacher, swap=swap, **given)
        found[layer] = difference(result.table)["logprob"]
        table = result.table[(result.table["student"] == "teacher")].set_index("stat")["value"]
        assert table["logprob"] > -0.2 and table["exact"] == 1
        assert table["logprob_absent"] < -12
    assert found[18] < -7  # measured: -9.5
    assert found[12] > -0.3 and found[20] > -1.5
