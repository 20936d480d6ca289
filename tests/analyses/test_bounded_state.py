"""Rows of attention with a bounded state: points of the curve over bytes, and what is drawn of a cache that grows."""

from __future__ import annotations

import json

import pytest
from scripts import script

from mismatch import spec

state = script("bounded_state")
ROWS = state.ROWS


def found(kilobytes, value):
    readings = {name: [value, value - 0.01, value + 0.01] for name in state.NAMES}
    return {"seconds": 1.0, "bytes": kilobytes and kilobytes * 1000, "512": readings}


def test_every_row_is_a_swap_and_has_a_file_of_its_own(tmp_path):
    for layers, rows in ROWS.items():
        assert len({state._file(tmp_path, name) for name in rows}) == len(rows)
        for row in rows.values():
            spec.check(
                spec.parse(
                    [f"{row.places[0] if row.places else state.PLACES[layers][0]}:{row.mechanism}"]
                )
            )


def test_seeds_of_one_budget_are_one_point_of_the_line_and_a_growing_cache_a_level(tmp_path):
    rows = {
        "shared, 8 MB": (8000, 0.1),
        "shared, 8 MB, seed 1": (7990, 0.3),
        "shared, 4 MB": (4000, 0.5),
        "random, 96 slots": (3800, 2.0),
        "sliding_window(64, 1)": (None, 3.0),
    }
    for name, one in rows.items():
        state._file(tmp_path, name).write_text(json.dumps(found(*one)))
    frame = state.table(tmp_path, "all")
    axis = state.curves(frame).axes[0]
    [curve] = [
        line
        for line in axis.lines
        if line.get_linestyle() == "-" and len(line.get_xdata()) == 2 and line.get_linewidth() == 1
    ]
    assert list(curve.get_xdata()) == pytest.approx([4.0, 7.995])
    assert list(curve.get_ydata()) == pytest.approx([0.5, 0.2])
    _, labels = axis.get_legend_handles_labels()
    assert labels.count(f"{state.SHARED_OUT}, float16") == 3
    assert {"random, 96 slots", "sliding_window(64, 1)"} < set(labels)
    [level] = [line for line in axis.lines if line.get_label() == "sliding_window(64, 1)"]
    assert set(level.get_ydata()) == {3.0}


def test_a_line_for_every_row_of_one_layer(tmp_path):
    for name, one in {"shared, 100 kB": (97, 0.1), "sliding_window(64, 1)": (None, 3.0)}.items():
        state._file(tmp_path, name).write_text(json.dumps(found(*one)))
    made = state.lines(state.table(tmp_path, "18"), "18")
    names = [label.get_text() for label in made.axes[0].get_yticklabels()]
    assert names == ["shared, 100 kB  (97 kB)", "sliding_window(64, 1)  (grows)"]
