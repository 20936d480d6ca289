"""Words of how sure a scan is: layers and heads whose ranks are known, tasks that agree and that do not."""

from __future__ import annotations

import numpy as np
import pytest
from plans import scan_plan
from wonderland import documents

import mismatch
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.runs.intervals import SAMPLES
from mismatch.stages.scan.sure import agreement, agreement_lines, how_sure, ranking, sure_lines
from mismatch.stages.scan.unit_sums import UnitSums


def units(prices, of=8, noise=0.0, over=SAMPLES):
    draw = np.random.default_rng(0)
    return UnitSums.of(
        {
            key: PerDocument(10 * (price + noise * draw.normal(size=of)), np.full(of, 10), over)
            for key, price in prices.items()
        }
    )


def by_layer(order, name="a"):
    return {f"{name}@{layer}": float(price) for layer, price in enumerate(order)}


@pytest.fixture
def plan():
    up = [*range(8)]
    return scan_plan(
        units={
            "text": units(by_layer(up)),
            "passkey": units(by_layer(up[::-1])),
            "needles": units(by_layer(up), noise=50.0),
            "kv_lookup": units(by_layer([0.0] * 8)),
        }
    )


def test_ranks_and_the_cheapest_quarter(plan):
    lines = sure_lines(plan, "text", "a", ["7", "0"], "layer")
    assert lines == [
        "    ranks         7: 8 [8, 8]   0: 1 [1, 1]   (1 is the cheapest; samples drawn again 200 times)",
        "    cheapest 2: the same layers in 100% of the draws, 2.00 of 2 kept on average",
    ]
    unsure = ranking(plan, "needles", "a")
    assert unsure.same < 0.9
    # Where no layer differs, or too little was asked, there is no ranking.
    assert ranking(plan, "kv_lookup", "a") is None
    assert ranking(plan, "induction", "a") is None
    assert ranking(plan, "text", "b") is None
    few = scan_plan(units={"text": units(by_layer(range(8)), of=3)})
    assert sure_lines(few, "text", "a", ["0"], "layer") == []
    short = scan_plan(units={"text": units(by_layer(range(3)))})
    assert ranking(short, "text", "a") is None


def test_tasks_that_agree_and_tasks_that_do_not(plan):
    found = agreement(plan, ("text", "passkey", "kv_lookup"), "a")
    assert [(one, other, shared.shared, shared.of) for one, other, shared in found] == [
        ("text", "passkey", 0, 8)
    ]
    assert agreement_lines(plan, ("text", "passkey"), ["a"], "layer") == [
        "The cheapest quarter of layers, one task beside another",
        "  a",
        "    text and passkey share 0 of 2; chance 0.5, p = 1.000",
    ]
    assert agreement_lines(plan, ("text",), ["a"], "layer") == []


def test_heads_are_places_of_their_own():
    prices = {f"a@{layer}.{head}": 10.0 * layer + head for layer in range(2) for head in range(3)}
    heads = scan_plan(units={"text": units(prices)}, by="kv-head")
    assert sure_lines(heads, "text", "a", ["1.2"], "kv head")[0].startswith(
        "    ranks         1.2: 6 [6, 6]"
    )
    page = how_sure(heads, ("text",), ["a"], "kv head")
    assert ">1.2<" in page and "6 [6, 6]" in page


def test_a_scan_always_says_how_sure_it_is(toy):
    made = mismatch.scan(
        (toy.model, toy.tokenizer), "infini(segment=16); identity", data=documents(8), tasks=["text"],
        calibration_data=documents(3, seed=1), tokens=512, seq_len=64, controls=(), scored=1.0,
    )  # fmt: skip
    text = made.words()
    assert (
        text.count("(1 is the cheapest; documents drawn again 200 times)") == 1
    )  # not of identity
    assert "    cheapest 1: the same layers in " in text
    sure = ranking(made.plan, "text", "infini(segment=16)")
    cells = made.cells[made.cells["student"] == "infini(segment=16)"].sort_values("value")
    assert [one.place for one in sure.ranks] == cells["layer"].tolist()
    page = how_sure(made.plan, ("text",), ["infini(segment=16)"], "layer")
    assert f"{sure.ranks[0].rank} [{sure.ranks[0].lo}, {sure.ranks[0].hi}]" in page
