"""A figure inside a page: its marks have their texts, and nothing of one figure reaches into another."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import synthetic as s

from mismatch.report import heatmap, heatmap_cells, readout, style
from mismatch.report import quantity as q
from mismatch.report.figures import inline
from mismatch.stages.trace.report import controls_figure as controls
from mismatch.stages.trace.report import position_figure as position
from mismatch.stages.trace.report import profile_figure as profile

D = {"dictionary": s.DICTIONARY}
EVIL = '<script>alert("x")</script>'

pytestmark = pytest.mark.pages


@pytest.fixture(scope="module")
def table():
    return s.synthetic(layers=6, swapped=(2,))


def titles(html: str) -> list[str]:
    return [title.text or "" for title in ElementTree.fromstring(html).iter("title")]


@pytest.mark.parametrize(
    "draw",
    [
        lambda t: heatmap.heatmap(t, **D),
        lambda t: heatmap.heatmap(t, "lens_kl", **D),
        lambda t: profile.depth_profile(t, **D),
        lambda t: position.by_position(t, plan=s.PLAN, **D),
        lambda t: controls.output_shift(t, **D),
    ],
    ids=["heatmap", "one-metric", "profile", "position", "controls"],
)
def test_every_mark_of_a_figure_has_its_text(draw, table):
    figure = draw(table)
    wanted = [text for texts in readout.texts_of(figure).values() for text in texts if text]
    assert wanted
    assert sorted(titles(inline(figure, "f", "a figure"))) == sorted(wanted)


def test_a_cell_reads_out_value_interval_floor_and_controls(table):
    quantity = q.quantity("rel_l2", s.DICTIONARY)
    cells = q.cells(table, quantity)
    texts = heatmap_cells.readouts(table, cells, quantity)
    at = cells[(cells["site"] == "attn_out") & (cells["layer"] == 2)].index[0]
    found = dict(line.split(": ", 1) for line in texts[at].splitlines()[1:])
    assert texts[at].startswith("swap, layer 2, swapped, attn_out\n")
    for name, student in (("rel_l2", "swap"), ("control zero", "zero"), ("control mean", "mean")):
        row = table[
            (table["student"] == student) & (table["metric"] == "rel_l2")
            & (table["layer"] == 2) & (table["site"] == "attn_out")
        ].iloc[0]  # fmt: skip
        band = style.interval(row["value"], row["lo"], row["hi"])
        assert found[name] == (band if student == "swap" else style.number(row["value"]))
    assert found["floor"] == style.number(q.floor_of(table, quantity, q.BLOCK_SITES))
    other = heatmap_cells.readouts(table, cells, quantity, beside={"B": cells})
    assert f"B: {found['rel_l2']}" in other[at]


def test_what_was_not_measured_reads_out_nothing(table):
    fewer = table[~((table["layer"] == 4) & (table["site"] == "mlp_out"))]
    quantity = q.quantity("rel_l2", s.DICTIONARY)
    cells = q.cells(fewer, quantity)
    texts = heatmap_cells.readouts(fewer, cells, quantity)
    assert [not text for text in texts] == list(cells["kind"] == "missing")
    html = inline(heatmap.heatmap(fewer, "rel_l2", **D), "f", "a figure")
    assert len(titles(html)) == (cells["kind"] != "missing").sum()


def test_two_figures_of_a_page_share_no_id(table):
    figures = [inline(heatmap.heatmap(table, **D), name, name) for name in ("a", "b")]
    ids = [set(re.findall(r' id="([^"]+)"', html)) for html in figures]
    assert ids[0]
    assert not ids[0] & ids[1]
    for html, known in zip(figures, ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= known


def test_text_in_a_figure_cannot_act(table):
    figure = heatmap.heatmap(table.assign(run_id=EVIL), "rel_l2", **D)
    html = inline(figure, "f", EVIL)
    assert "<script" not in html
    assert "<!--" not in html
    root = ElementTree.fromstring(html)
    assert root.get("aria-label") == EVIL
    assert any("<script>" in (text.text or "") for text in root.iter("text"))


def test_marks_that_cannot_be_told_apart_get_no_text():
    figure = style.new_figure(3, 2)
    (line,) = figure.subplots().plot([1, 2, 3], [1, 2, 3], marker="o")
    readout.read_out(line, "points", ["one", "two"])
    assert titles(inline(figure, "f", "a figure")) == []


def test_two_artists_of_one_name_are_a_mistake():
    figure = style.new_figure(3, 2)
    ax = figure.subplots()
    for _ in range(2):
        readout.read_out(ax.plot([1], [1], marker="o")[0], "points", ["one"])
    with pytest.raises(ValueError, match="two artists of a figure are called `points`"):
        readout.texts_of(figure)


def test_a_shorter_svg_draws_the_same_numbers(table):
    figure = heatmap.heatmap(table, "rel_l2", **D)
    svg = style.to_bytes(figure, "svg", as_text=True)
    html = readout.inline(svg, "f", "a figure", readout.texts_of(figure))
    assert len(html) < len(svg)  # with the texts in it
    mesh = next(g for g in ElementTree.fromstring(html).iter("g") if "cells" in g.get("id", ""))
    assert len(mesh) == 5 * 6
    number = re.compile(r"-?\d+(?:\.\d+)?")
    drawn = [[float(x) for x in number.findall(cell.get("d", ""))] for cell in mesh]
    before = re.search(rb'<g id="cells-0-rel_l2">(.*?)</g>', svg, re.DOTALL)[1].decode()
    for box, path in zip(drawn, re.findall(r' d="([^"]*)"', before), strict=True):
        x, y = np.array([float(v) for v in number.findall(path)]).reshape(-1, 2).T
        assert box[0] == pytest.approx(x[0], abs=0.006)
        assert sorted({round(v, 2) for v in (*x, *y)}) == pytest.approx(sorted(set(box)), abs=0.011)


def test_views_are_the_metrics_that_are_not_at_a_glance(table):
    assert list(heatmap_cells.views(table, s.DICTIONARY).values()) == [
        {"metric": "frechet"},
        {"metric": "lens_kl"},
    ]
    many = pd.concat([table] * 2).assign(layer=lambda t: t["layer"] * 400)
    assert heatmap_cells.views(many, s.DICTIONARY) == {}  # their cells would not fit into a page
