"""How sure a ranking is: against enumeration, against numbers whose spread is known, and on rankings that are certain
or nothing but noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mismatch.errors import RunError
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.runs.intervals import BLOCKS, DOCUMENTS, SAMPLES
from mismatch.stages.scan.reliability import Overlap, cheapest, overlaps, reliability
from mismatch.stages.scan.unit_sums import MOST, UnitSums


@pytest.mark.parametrize(("of", "sizes"), [(6, (2, 3)), (7, (3, 3)), (5, (4, 2)), (6, (6, 1))])
def test_chance_is_that_of_all_pairs_of_sets(of, sizes):
    first = frozenset(range(sizes[0]))
    shared = [len(first & set(other)) for other in itertools.combinations(range(of), sizes[1])]
    for count in range(max(0, sum(sizes) - of), min(sizes) + 1):
        found = Overlap(count, sizes, of)
        assert found.p == pytest.approx(np.mean([at >= count for at in shared]))
        assert found.chance == pytest.approx(np.mean(shared))
        # The layers that are kept agree exactly as well by chance as those that are replaced.
        kept = Overlap(of - sum(sizes) + count, (of - sizes[0], of - sizes[1]), of)
        assert kept.p == pytest.approx(found.p)


def test_the_overlaps_that_the_field_published():
    """Qwen2.5-3B: 9 of 36 layers; two rankings share 8 of 9, another two share 2."""
    assert Overlap(8, (9, 9), 36).p < 1e-5
    assert Overlap(2, (9, 9), 36).chance == 2.25
    assert Overlap(2, (9, 9), 36).text() == "share 2 of 9; chance 2.2, p = .738"
    assert Overlap.between({1, 2, 3}, [3, 4], 10) == Overlap(1, (3, 2), 10)
    pairs = overlaps({"a": {1}, "b": {1}, "c": {2}}, 3)
    assert [(one, other, found.shared) for one, other, found in pairs] == [
        ("a", "b", 1), ("a", "c", 0), ("b", "c", 0),
    ]  # fmt: skip


def of(sums, counts=None, units=DOCUMENTS):
    counts = np.full(len(next(iter(sums.values()))), 10) if counts is None else np.array(counts)
    return UnitSums.of(
        {key: PerDocument(np.array(row, float), counts, units) for key, row in sums.items()}
    )


def test_sums_are_those_of_the_documents():
    found = of({"a@0": [1.0, 2.0, 4.0], "a@1": [0.5, 0.0, 0.0]}, [10, 0, 30])
    assert found.counts == (10, 30)  # a document without tokens takes no part
    assert found.means(["a@1", "a@0"]).tolist() == [0.5 / 40, 5.0 / 40]
    assert not found.enough
    many = of({"a@0": np.arange(1000.0)}, np.arange(1000) + 1)
    assert len(many.counts) <= MOST and many.enough
    assert many.means(["a@0"])[0] == pytest.approx(
        np.arange(1000).sum() / (np.arange(1000) + 1).sum()
    )


def test_sums_that_do_not_fit_are_refused():
    for counts, sums in (((10, 10), {"a@0": (1.0,)}), ((0, 0), {}), ((), {})):
        with pytest.raises(RunError, match="a cell needs a number for each of"):
            UnitSums(DOCUMENTS, counts, sums)


@pytest.mark.parametrize("units", [DOCUMENTS, SAMPLES])
@pytest.mark.parametrize("n", [4, 8, 30])
def test_the_spread_of_the_draws_is_the_standard_error_of_the_mean(units, n):
    """s / sqrt(n) with the unbiased s: what n - 1 of n gives, and n of n does not."""
    row = np.random.default_rng(n).normal(size=n)
    drawn = of({"a@0": row}, np.ones(n, int), units).drawn(["a@0"], 0, 40_000)[:, 0]
    assert drawn.std() == pytest.approx(row.std(ddof=1) / math.sqrt(n), rel=0.03)
    assert drawn.mean() == pytest.approx(row.mean(), abs=0.03)


def test_neighbours_of_one_long_text_are_drawn_together():
    """Blocks of windows that go together spread further than single windows do."""
    row = np.repeat(np.random.default_rng(0).normal(size=8), 4)
    alone = of({"a@0": row}).drawn(["a@0"], 0, 4000).std()
    together = of({"a@0": row}, units=BLOCKS).drawn(["a@0"], 0, 4000).std()
    assert together > 1.4 * alone


def test_all_cells_are_drawn_on_the_same_documents():
    """A layer that is dearer in every document alike is dearer in every draw, however hard documents differ."""
    row = 100 * np.random.default_rng(1).normal(size=8)
    drawn = of({"a@0": row, "a@1": row + 0.01}).drawn(["a@0", "a@1"], 0)
    assert (drawn[:, 1] > drawn[:, 0]).all()
    np.testing.assert_array_equal(
        drawn, of({"a@0": row, "a@1": row + 0.01}).drawn(["a@0", "a@1"], 0)
    )


def sure(units, count):
    keys = list(units.sums)
    places = [int(key.partition("@")[2]) for key in keys]
    prices, drawn = units.means(keys), units.drawn(keys, 0)
    chosen = cheapest(places, prices, count)
    again = [cheapest(places, row, count) for row in drawn]
    return reliability(places, prices, drawn, chosen, again, units.over)


def test_a_ranking_that_is_certain_and_one_that_is_noise():
    draw = np.random.default_rng(0)
    certain = of({f"a@{at}": 100.0 * at + draw.normal(size=12) for at in range(10)})
    noise = of({f"a@{at}": draw.normal(size=12) for at in range(10)})
    found, lost = sure(certain, 4), sure(noise, 4)
    assert (found.same, found.kept, found.sure) == (1.0, 4.0, (0, 1, 2, 3))
    assert [(one.place, one.rank, one.lo, one.hi) for one in found.ranks] == [
        (at, at + 1, at + 1, at + 1) for at in range(10)
    ]
    assert lost.same < 0.5 and lost.kept < 3.9
    assert np.mean([one.hi - one.lo for one in lost.ranks]) > 4
    # The share in which each is chosen adds up to what is chosen.
    assert sum(one.chosen for one in lost.ranks) == pytest.approx(4)
    assert all(one.lo <= one.hi for one in lost.ranks)


def test_a_draw_without_a_choice_is_another_choice():
    units = of({f"a@{at}": np.full(6, float(at)) for at in range(3)})
    keys = list(units.sums)
    found = reliability(
        range(3), units.means(keys), units.drawn(keys, 0, 2), {0}, [{0}, None], "documents"
    )
    assert (found.same, found.kept, found.draws) == (0.5, 0.5, 2)
