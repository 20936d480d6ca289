"""The verdict of `analyses/one_or_all.py` follows planted numbers."""

from __future__ import annotations

from types import ModuleType

import pandas as pd
import pytest
from scripts import script


def by_document(module: ModuleType, together_of) -> pd.DataFrame:
    """Eight documents; layer i costs document d (i + 1)(d + 1); `together_of(k)` times their sum together."""
    places = [(layer,) for layer in range(30)] + [s for k in module.NUMBERS for s in module.sets(k)]
    rows = [
        (
            " ".join(map(str, layers)), len(layers), document,
            (document + 1) * sum(i + 1 for i in layers) * together_of(len(layers)), 10,
        )
        for layers in places
        for document in range(8)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["layers", "k", "document", "kl", "n"])


def test_the_ratio_of_together_to_alone_is_paired_by_document():
    module = script("one_or_all")
    found = module.ratios(by_document(module, lambda k: 1 if k == 1 else 0.5 + k / 8))
    assert (
        found[["ratio", "lo", "hi"]].nunique(axis=1).eq(1).all()
    )  # documents differ, their ratio does not
    pooled = found[found["layers"] == "pooled"].set_index("k")["ratio"]
    assert pooled.to_dict() == pytest.approx({k: 0.5 + k / 8 for k in module.NUMBERS})
    said = module.verdict(found.assign(name="infini"))
    assert "depends on mechanism and number" in said[0]
    assert "2 layers 0.75 [0.75, 0.75] less" in said[1]
    assert "4 layers 1.00 [1.00, 1.00] additive" in said[1]
    assert "30 layers 4.25 [4.25, 4.25] more" in said[1]


def test_sets_of_layers_are_even_and_whole():
    module = script("one_or_all")
    for k in module.NUMBERS:
        assert all(len(set(layers)) == k and max(layers) < 30 for layers in module.sets(k))
    assert module.sets(30) == [tuple(range(30))]
    assert module.REPAIRED in module.sets(4)


@pytest.mark.parametrize(
    ("after", "word"), [(0.10, "holds"), (0.18, "does not hold"), (0.02, "holds")]
)
def test_repair_of_several_is_held_against_the_sum_of_single_ones(after, word):
    module = script("one_or_all")
    rows = [("5", 1, 0.1, 0.05), ("13", 1, 0.1, 0.05), ("5 13", 2, 0.2, after)]
    mended = pd.DataFrame(rows, columns=["layers", "k", "before", "after"]).assign(zero=0.2)
    mended["gap_closed"] = 1 - mended["after"] / mended["before"]
    for end, off in (("lo", -0.05), ("hi", 0.05)):
        mended[f"gap_{end}"] = mended["gap_closed"] + off
        mended[f"after_{end}"] = mended["after"] + off / 10
    said = module.repair_verdict(mended)
    assert f"Sequential repair scales to 2 layers: {word}." in said
    assert "0.200 -> 0.100 nats, 50% [45%, 55%]" in said
