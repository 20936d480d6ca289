"""The rows of the options of Infini-attention: counted against the published form as swapped, document by document."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scripts import script

from mismatch import spec
from mismatch.metrics.sums.per_document import PerDocument

options = script("infini_options")
COUNTS = np.array([100, 120, 90, 110, 100])
PLAIN = np.array([5.0, 7.0, 4.0, 5.0, 6.0])


def found(share):
    return SimpleNamespace(kl=PerDocument(share * PLAIN, COUNTS, positive=True))


def test_the_gap_is_that_of_the_published_form(tmp_path):
    shares = {("as swapped", "as published"): 1.0, ("trained", "the whole"): 0.01}
    for (kind, name), share in shares.items():
        file = options._file(tmp_path, kind, name)
        options.write(file, found(share), {"cpu_seconds": 20.0, "steps": 288} if share < 1 else {})
    frame = options.table(tmp_path)
    assert list(frame["row"]) == ["as published", "the whole"]
    assert list(frame["closed"]) == pytest.approx([0.0, 0.99])
    assert list(frame["kl"]) == pytest.approx(
        [PLAIN.sum() / COUNTS.sum(), 0.01 * PLAIN.sum() / COUNTS.sum()]
    )
    assert frame["closed_lo"][1] == pytest.approx(0.99)  # every document alike
    assert (frame["kl_lo"] < frame["kl"]).all()
    assert (frame["kl"] < frame["kl_hi"]).all()
    axes = options.figure(frame).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["as published", "the whole"]
    assert any(text.get_text() == "99.0 %" for text in axes.texts)


def test_every_row_is_a_swap_and_has_a_file_of_its_own(tmp_path):
    rows = [(kind, name) for kind, named in options.KINDS.items() for name in named]
    assert len({options._file(tmp_path, *row) for row in rows}) == len(rows)
    for kind, name in rows:
        text = options.KINDS[kind][name]
        spec.check(spec.parse([text if kind != "repair" else text[0]]))
