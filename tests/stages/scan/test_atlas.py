"""The atlas and the words of a scan: from a table made by hand, where every number is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from plans import scan_plan, task_plan

from mismatch.errors import UsageError
from mismatch.report import style
from mismatch.report.readout import texts_of
from mismatch.runs.table import as_table
from mismatch.stages.scan import atlas as drawing
from mismatch.stages.scan.atlas import PANELS, atlas, atlas_data, students
from mismatch.stages.scan.plan import ColumnPlan
from mismatch.stages.scan.words import scan_summary, scan_verdict

PLAN = scan_plan(
    columns=(
        ColumnPlan("window", False, ("zero",)),
        ColumnPlan("nope", False, ("zero",)),
        ColumnPlan("zero", True, ()),
    ),
    tasks={"passkey": task_plan(40.0), "induction": task_plan(10.0)},
    notes=("nope is not applicable in layers 3: no RoPE",),
)
CANNOT = replace(PLAN, tasks={"passkey": task_plan(0.1)})
"""The same of a model that cannot find a passkey."""
KL = {"window": [0.0, 0.01, 0.1, 0.02], "nope": [0.2, 0.1, 0.3, None], "zero": [1.0, 0.5, 0.4, 0.3]}
LOST = {
    "window": [0.1, -0.2, 9.0, 1.0],
    "nope": [0.0, 0.0, 0.0, None],
    "zero": [3.0, 2.0, 5.0, 4.0],
}


def row(student, layer, metric, stat, value, spread=0.05, **more):
    known = value is not None
    return {
        "run_id": "r", "stage": "scan", "mode": "free", "student": student, "layer": layer, "site": "logits",
        "metric": metric, "stat": stat, "value": value if known else math.nan,
        "lo": value - spread if known else math.nan, "hi": value + spread if known else math.nan,
        "n": 10, "swapped": True, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def table():
    rows = [row("teacher", None, "passkey", "logprob", -0.07)]
    for name, values in KL.items():
        rows += [row(name, at, "kl", "mean", v, 0.001) for at, v in enumerate(values)]
    for name, values in LOST.items():
        lost = [None if v is None else -v for v in values]
        rows += [row(name, at, "passkey", "logprob_minus_teacher", v) for at, v in enumerate(lost)]
    # Layers 0 and 1 clearly better than zero, layer 2 clearly worse (less log-probability), layer 3 not told apart.
    for at, apart in enumerate([2.9, 2.2, -4.0, 0.01]):
        rows.append(row("window", at, "passkey", "logprob_minus_zero", apart))
    rows.append(row("window", 0, "kl", "mean", 0.5, position="1-3"))  # not the whole: not drawn
    return as_table(rows)


def test_every_cell_has_its_damage_larger_is_worse(table):
    data = atlas_data(table)
    assert len(data) == 2 * 3 * 4
    for task, values in (("text", KL), ("passkey", LOST)):
        for name, expected in values.items():
            mine = data[(data["task"] == task) & (data["student"] == name)].sort_values("layer")
            wanted = [math.nan if v is None else v for v in expected]
            np.testing.assert_allclose(mine["value"], wanted, rtol=1e-12)
    one = data[(data["task"] == "passkey") & (data["student"] == "window") & (data["layer"] == 2)]
    assert (one["lo"].iloc[0], one["hi"].iloc[0]) == pytest.approx((8.95, 9.05))
    assert set(data["unit"]) == {"nats per token", "nats per key"}


def test_kinds_of_cells(table):
    data = atlas_data(table).set_index(["task", "student", "layer"])["kind"]
    assert data["text", "window", 0] == "zero"
    assert data["text", "window", 1] == "value"
    assert data["text", "nope", 3] == data["passkey", "nope", 3] == "missing"
    assert data["passkey", "window", 1] == "value"
    assert data["passkey", "nope", 0] == "zero"
    rows = [row("a", 0, "passkey", "logprob_minus_teacher", -0.01)]
    assert list(atlas_data(as_table(rows))["kind"]) == ["unclear"]


def test_mechanisms_in_the_order_that_was_asked_controls_last(table):
    assert students(table, PLAN) == {"window": False, "nope": False, "zero": True}
    turned = replace(PLAN, columns=PLAN.columns[::-1])
    assert list(students(table, turned)) == ["nope", "window", "zero"]


def test_the_picture(table):
    """Layers down, mechanisms across, the panels side by side on one axis of layers."""
    figure = atlas(table, plan=PLAN)
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels] == [
        "Text: output KL",
        "Retrieval: what the passkey lost",
    ]
    for ax in panels:
        assert [label.get_text() for label in ax.get_xticklabels()] == ["window", "nope", "zero"]
        assert ax.get_ylim() == (3.5, -0.5)
        assert len([p for p in ax.patches if p.get_hatch()]) == 1  # nope in layer 3
        colours = np.asarray(ax.collections[0].get_array())
        assert tuple(colours[3, 1]) == to_rgba(style.MISSING)
    bars = [ax.get_xlabel() for ax in figure.axes if ax not in panels]
    assert bars == ["nats per token", "nats per key"]
    text, key = (np.asarray(ax.collections[0].get_array()) for ax in panels)
    assert tuple(text[0, 0]) == to_rgba(style.ZERO)
    light = text[..., :3].sum(-1)
    assert light[1, 0] > light[2, 0] > light[2, 1] > light[0, 2]  # darker is more
    # A gain is on the other side of the map: purple has more blue than red, orange more red than blue.
    assert key[1, 0, 2] > key[1, 0, 0]
    assert key[2, 0, 0] > key[2, 0, 2]
    assert figure._suptitle.get_text() == "One layer replaced at a time: what it costs (toy)"
    caption = figure._supxlabel.get_text().replace("\n", " ")
    assert "Right of the line: controls" in caption
    assert "Hatched grey" in caption


def test_the_worst_cells_of_the_mechanisms_are_framed_and_numbered(table):
    """Of a panel the four largest, controls not among them, none of them a gain."""
    figure = atlas(table, plan=PLAN)
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    framed = [
        {(p.get_x() + 0.5, p.get_y() + 0.5) for p in ax.patches if not p.get_hatch()}
        for ax in panels
    ]
    assert framed == [{(1, 0), (1, 1), (1, 2), (0, 2)}, {(0, 2), (0, 3), (0, 0)}]
    assert [{t.get_text() for t in ax.texts} for ax in panels] == [
        {".30", ".20", ".10"},
        {"9.0", "1.0", ".10"},
    ]


def test_layers_with_a_number_are_bold():
    rows = [row("a", at, "kl", "mean", 0.1 + abs(at - 5), 0.001) for at in range(10)]
    labels = atlas(as_table(rows)).axes[0].get_yticklabels()
    assert [t.get_text() for t in labels if t.get_fontweight() == "bold"] == ["0", "1", "2", "9"]


def test_where_cells_are_small_they_are_framed_only():
    many = [row("a", at, "kl", "mean", 0.01 + at, 0.001) for at in range(80)]
    axis = atlas(as_table(many)).axes[0]
    assert {p.get_y() + 0.5 for p in axis.patches} == {76, 77, 78, 79}
    assert not axis.texts


@pytest.mark.parametrize(
    "value, written",
    [(0.0012, ".001"), (0.0999, ".100"), (0.27, ".27"), (7.04, "7.0"), (9.94, "9.9"), (10.6, "11")],
)
def test_numbers_fit_into_a_cell(value, written):
    assert drawing._four(value) == written


def test_names_of_mechanisms_are_cut():
    name = "sliding_window(window=64, sinks=1)"
    assert drawing._short(name, True) == "sliding_window\nwindow=64, sinks=1"
    assert drawing._short(name, False) == "sliding_window(window=6…"
    assert drawing._short("nope", True) == "nope"


def test_small_numbers_do_not_look_like_large_ones(table):
    """0.1 nats beside 9: nearer to white than to the end of the map, but not white."""
    data = atlas_data(table)
    cells = data[data["task"] == "passkey"]
    norm = drawing._norm(cells, True)
    assert 0.5 < float(norm(0.1)) < 0.6
    assert float(norm(9.0)) == 1.0
    assert float(norm(-0.1)) == pytest.approx(1 - float(norm(0.1)))


@pytest.mark.parametrize(
    "top, least", [(9.0, 0.3), (0.26, 0.26 / 30), (1.0, 1 / 30), (20, 20 / 30)]
)
def test_ticks_of_the_signed_scale(top, least):
    ticks = drawing._decades(top, least)
    assert ticks == sorted(ticks)
    assert 0.0 in ticks
    assert max(ticks) <= top
    assert 3 <= len(ticks) <= 7
    assert max(ticks) > top / 4


def test_the_same_picture_again_has_the_same_bytes(table):
    assert style.to_bytes(atlas(table, plan=PLAN), "svg") == style.to_bytes(
        atlas(table, plan=PLAN), "svg"
    )


def test_in_words(table):
    assert (
        scan_summary(table, PLAN)
        == """\
warning: nope is not applicable in layers 3: no RoPE

Text: output KL, nats per token
  window
    worst layers  2: 0.100 [0.0990, 0.101]   3: 0.0200 [0.0190, 0.0210]   1: 0.0100 [0.00900, 0.0110]
    best layers   0: 0 [-0.00100, 0.00100]
  nope
    worst layers  2: 0.300 [0.299, 0.301]   0: 0.200 [0.199, 0.201]   1: 0.100 [0.0990, 0.101]
  zero (control)
    worst layers  0: 1.00 [0.999, 1.00]   1: 0.500 [0.499, 0.501]   2: 0.400 [0.399, 0.401]
    best layers   3: 0.300 [0.299, 0.301]

Retrieval: what the passkey lost, nats per key; the teacher reads -0.0700
  window
    worst layers  2: 9.00 [8.95, 9.05]   3: 1.00 [0.950, 1.05]   0: 0.100 [0.0500, 0.150]
    best layers   1: -0.200 [-0.250, -0.150]
    -> layer 2 alone carries it; on text it costs 0.100 nats, number 1 of 4 layers
    against zero: better in 2 layers, worse in 1, not told apart in 1
  nope: exactly 0 in all 3 layers
  zero (control)
    worst layers  2: 5.00 [4.95, 5.05]   3: 4.00 [3.95, 4.05]   0: 3.00 [2.95, 3.05]
    best layers   1: 2.00 [1.95, 2.05]"""
    )


def test_the_verdict_names_what_hangs_on_one_layer(table):
    assert scan_verdict(table, PLAN) == (
        "Retrieval hangs on one layer, in nats per key lost: layer 2 (window 9.00)."
    )
    spread = table[table["student"] != "window"]
    assert scan_verdict(spread, PLAN) == "Retrieval hangs on no single layer."
    assert scan_verdict(table, CANNOT) == ""


def test_a_task_that_the_original_cannot_do_says_nothing(table):
    text = scan_summary(table, CANNOT)
    assert "  the teacher itself cannot do this: nothing follows from these numbers" in text
    assert "alone carries it" not in text


def test_a_table_without_a_scan():
    with pytest.raises(UsageError, match="the table holds no scan"):
        atlas_data(as_table([row("swap", 1, "kl", "mean", 0.1, stage="surgery")]))


def test_every_panel_has_a_task():
    from mismatch.stages.scan.config import TASKS

    assert tuple(panel.task for panel in PANELS) == TASKS


@pytest.fixture(scope="module")
def heads():
    """Two layers of three kv heads; the passkey hangs on head 2 of layer 1."""
    lost = {
        "window": [[0.1, 0.0, 0.2], [0.1, -0.2, 9.0]],
        "zero": [[3.0, 2.0, 4.0], [3.0, 2.0, 9.5]],
    }
    rows = [row("teacher", None, "passkey", "logprob", -0.07)]
    for name, layers in lost.items():
        for layer, values in enumerate(layers):
            for head, x in enumerate(values):
                at = {"head": head}
                rows.append(row(name, layer, "passkey", "logprob_minus_teacher", -x, **at))
                rows.append(row(name, layer, "kl", "mean", 0.01 * (1 + head), 0.001, **at))
    rows.append(row("window", 1, "passkey", "logprob_minus_zero", 0.5, head=2))
    return as_table(rows)


HEADS_PLAN = scan_plan(
    columns=(ColumnPlan("window", False, ("zero",)), ColumnPlan("zero", True, ())),
    tasks={"passkey": task_plan(40.0)},
    layers=(0, 1),
    by="kv-head",
)


def test_a_scan_by_heads_has_a_cell_for_each(heads):
    data = atlas_data(heads)
    mine = data[(data["task"] == "passkey") & (data["student"] == "window")]
    assert [(r.layer, r.head, r.value) for r in mine.itertuples()][-1] == (1, 2, 9.0)
    assert len(mine) == 6


def test_heads_stand_side_by_side_in_the_atlas(heads):
    figure = atlas(heads, plan=HEADS_PLAN)
    axis = figure.axes[0]
    names = [label.get_text() for label in axis.get_xticklabels()]
    assert names == ["window\nkv head 0", "1", "2", "zero\nkv head 0", "1", "2"]
    said = texts_of(figure)["cells-passkey"]
    one = next(text for text in said if text.startswith("window, kv head 2, layer 1"))
    assert "9.00" in one and "minus zero, paired" in one
    assert "control zero, kv head 2" in one and "kv head 1" not in one


def test_heads_in_words(heads):
    text = scan_summary(heads, HEADS_PLAN)
    assert "worst kv heads  1.2: 9.00 [8.95, 9.05]" in text
    assert "-> layer 1 kv head 2 alone carries it; on text it costs 0.0300 nats" in text
    assert "against zero: better in 1 kv heads, worse in 0" in text
    assert scan_verdict(heads, HEADS_PLAN) == (
        "Retrieval hangs on one kv head, in nats per key lost: layer 1 kv head 2 (window 9.00)."
    )
