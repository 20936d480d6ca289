"""A figure shows the numbers of the table, and says what is not a number."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import synthetic as s
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from mismatch.errors import RunError, UsageError
from mismatch.report import heatmap, style
from mismatch.report import quantity as q
from mismatch.stages.trace.report import controls_figure as controls
from mismatch.stages.trace.report import position_figure as position
from mismatch.stages.trace.report import profile_figure as profile

D = {"dictionary": s.DICTIONARY}

pytestmark = pytest.mark.pages


@pytest.fixture(scope="module")
def table():
    return s.synthetic()


def row(table, **where):
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    assert len(table) == 1
    return table.iloc[0]


def line(axis, gid):
    return next(artist for artist in axis.get_lines() if artist.get_gid() == gid)


def test_the_heatmap_holds_every_number_of_the_table(table):
    data = heatmap.heatmap_data(table, **D)
    assert set(data["metric"]) == set(heatmap.PANELS)
    measured = data[data["kind"] != "missing"]
    for _, cell in measured.sample(40, random_state=0).iterrows():
        found = row(
            table, student="swap", metric=cell["metric"], site=cell["site"], layer=cell["layer"]
        )
        assert (cell["value"], cell["lo"], cell["n"]) == (found["value"], found["lo"], found["n"])
    of_metric = (table["student"] == "swap") & table["site"].isin(q.BLOCK_SITES)
    assert len(measured) == (of_metric & table["metric"].isin(heatmap.PANELS)).sum()


def kinds_of_cells():
    """Two layers with one cell of each kind, at the floor of 1e-3."""
    table = s.synthetic(layers=8, swapped=(2,), floor=1000)
    at = (table["student"] == "swap") & (table["metric"] == "rel_l2") & (table["layer"] == 5)
    table.loc[at & (table["site"] == "attn_out"), "value"] = 1e-5
    return table[~(at & (table["site"] == "mlp_out"))]


def test_zero_floor_missing_and_value_have_four_kinds_and_four_colours():
    cells = q.cells(kinds_of_cells(), q.quantity("rel_l2", s.DICTIONARY))
    kind = cells.set_index(["site", "layer"])["kind"]
    assert kind["attn_out", 5] == "floor"
    assert kind["mlp_out", 5] == "missing"
    assert kind["attn_out", 1] == "zero"
    assert kind["attn_out", 2] == "value"
    rgba = heatmap.colours(cells, heatmap.colour_norm([cells], False), False)
    found = {k: {tuple(c) for c in rgba[(cells["kind"] == k).to_numpy()]} for k in set(kind)}
    assert found["zero"] == {to_rgba(style.ZERO)}
    assert found["floor"] == {to_rgba(style.FLOOR)}
    assert found["missing"] == {to_rgba(style.MISSING)}
    special = found["zero"] | found["floor"] | found["missing"]
    assert len(special) == 3
    assert not found["value"] & special
    scale = {tuple(c) for c in mpl.colormaps[style.DISTANCE_MAP](np.linspace(0, 1, 256))}
    assert not scale & special


def test_the_drawn_cells_have_these_colours():
    table = kinds_of_cells()
    figure = heatmap.heatmap(table, "rel_l2", **D)
    cells = q.cells(table, q.quantity("rel_l2", s.DICTIONARY))
    figure.draw_without_rendering()
    drawn = figure.axes[0].collections[0].get_facecolor()
    expected = heatmap.colours(cells, heatmap.colour_norm([cells], False), False)
    np.testing.assert_allclose(drawn, expected)


def test_a_larger_shift_is_darker():
    cells = q.cells(s.synthetic(), q.quantity("rel_l2", s.DICTIONARY))
    cells = cells[cells["kind"] == "value"].sort_values("value").drop_duplicates("value")
    rgba = heatmap.colours(cells, heatmap.colour_norm([cells], False), False)
    light = rgba[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert light[0] > light[-1] + 0.3
    assert (np.diff(light) <= 1e-3).mean() > 0.95


def norm_of(floor, metric="rel_l2"):
    cells = q.cells(s.synthetic(floor=floor), q.quantity(metric, s.DICTIONARY))
    return heatmap.colour_norm([cells], metric == "norm_ratio"), cells


def test_the_scale_ends_at_the_floor_but_spans_at_most_three_decades():
    norm, cells = norm_of(5e3)
    assert norm.vmin == pytest.approx(cells["floor"].max())
    norm, cells = norm_of(1)
    assert norm.vmin > cells["floor"].max() * 100
    assert 100 <= norm.vmax / norm.vmin <= 1000
    assert norm.vmax == cells["value"].max()


def test_a_signed_metric_is_centred_at_no_change():
    norm, cells = norm_of(1, "norm_ratio")
    assert norm(0.0) == 0.5
    assert norm.vmax == -norm.vmin == pytest.approx(cells["value"].abs().max())


def test_panels_that_are_compared_share_one_scale():
    small = q.cells(s.synthetic(), q.quantity("rel_l2", s.DICTIONARY))
    large = small.assign(value=small["value"] * 10)
    norm = heatmap.colour_norm([small, large], False)
    assert norm.vmax == large["value"].max()
    same = small["kind"] == "value"
    assert (
        heatmap.colours(small, norm, False)[same] != heatmap.colours(large, norm, False)[same]
    ).any()


def test_swapped_layers_are_outlined_and_marked():
    axis = heatmap.heatmap(s.synthetic(swapped=(3, 12)), "rel_l2", **D).axes[0]
    outlined = [
        p.get_x() + 0.5 for p in axis.patches if p.get_edgecolor() == to_rgba(style.OUTLINE)
    ]
    marked = [mark.get_xdata()[0] for mark in axis.get_lines() if mark.get_marker() == "v"]
    assert outlined == marked == [3, 12]


def test_kl_at_a_block_is_the_logit_lens_and_one_site_shows_the_students(table):
    axis = heatmap.heatmap(table, metric="kl", site="resid_post", **D).axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["swap", "zero", "mean"]
    assert axis.get_title("left") == "lens_kl (nats per token)"


def test_a_panel_is_drawn_into_the_axis_of_the_caller(table):
    figure = Figure()
    axis = figure.subplots()
    assert heatmap.heatmap(table, "rel_l2", ax=axis, **D) is figure
    with pytest.raises(UsageError, match="3 metrics do not fit on one axis"):
        heatmap.heatmap(table, ax=axis, **D)


def test_what_the_table_lacks_is_said(table):
    with pytest.raises(UsageError, match="no metric `cosine`") as caught:
        heatmap.heatmap(table, "cosine")
    assert "rel_l2" in caught.value.hint
    with pytest.raises(UsageError, match="no `rel_l2` with student=skip"):
        heatmap.heatmap(table, "rel_l2", student="skip", **D)


def test_the_profile_draws_the_numbers_of_the_table(table):
    data = profile.depth_profile_data(table, **D)
    figure = profile.depth_profile(table, **D)
    for axis, metric in zip(figure.axes, profile.METRICS, strict=True):
        for student in ("swap", "zero", "mean"):
            mine = data[(data["student"] == student) & (data["metric"] == metric)]
            mine = mine[mine["value"] != 0]
            drawn = line(axis, f"line-{student}-{metric}")
            np.testing.assert_array_equal(drawn.get_xdata(), mine["layer"].astype(float))
            np.testing.assert_array_equal(drawn.get_ydata(), mine["value"])
            first = row(table, student=student, metric=metric, site="resid_post", layer=12)
            assert (mine.iloc[0]["value"], mine.iloc[0]["hi"]) == (first["value"], first["hi"])


def test_the_profile_draws_the_floor_only_where_it_can_be_seen():
    near = profile.depth_profile(s.synthetic(floor=1e4), "rel_l2", **D).axes[0]
    floor = q.floor_of(s.synthetic(floor=1e4), q.quantity("rel_l2", s.DICTIONARY), ["resid_post"])
    assert line(near, "floor").get_ydata()[0] == floor
    far = profile.depth_profile(s.synthetic(), "rel_l2", **D).axes[0]
    assert any("far below" in text.get_text() for text in far.texts)


def test_the_position_figure_draws_the_numbers_and_the_borders(table):
    data = position.by_position_data(table)
    axis = position.by_position(table, plan=s.PLAN, **D).axes[0]
    for student in ("swap", "zero", "mean"):
        mine = data[data["student"] == student]
        np.testing.assert_array_equal(line(axis, f"points-{student}").get_ydata(), mine["value"])
        assert list(mine["position"]) == s.BINS
        x = line(axis, f"points-{student}").get_xdata() - 1
        assert ((x >= mine["start"] - 1) & (x <= mine["end"] + 1)).all()
    borders = [
        mark.get_gid() for mark in axis.get_lines() if str(mark.get_gid()).startswith("segment")
    ]
    assert borders == ["segment-256", "segment-512", "segment-768"]
    found = row(table, student="zero", metric="kl", position="64-127")
    mine = row(data, student="zero", position="64-127")
    assert (mine["value"], mine["lo"], mine["hi"]) == (found["value"], found["lo"], found["hi"])


def test_an_exact_zero_keeps_its_mark_on_a_log_axis():
    table = s.synthetic(controls=("random",))
    first = (table["student"] == "swap") & table["position"].isin(["0", s.BINS[-1]])
    table.loc[first, ["value", "lo", "hi"]] = 0.0
    figure = position.by_position(table, **D)
    axis = figure.axes[0]
    assert axis.get_yscale() == "log"
    assert figure.get_tightbbox().y0 >= -0.02
    assert len(line(axis, "zeros-swap").get_xdata()) == 2
    assert not [mark for mark in axis.get_lines() if mark.get_gid() == "zeros-random"]
    assert axis.get_ylim()[0] > 1e-3


def test_the_output_figure_holds_means_differences_and_floor(table):
    data = controls.output_data(table)
    assert list(data["student"]) == ["swap", "zero", "mean", "swap", "swap", "floor"]
    assert list(data["against"]) == ["", "", "", "zero", "mean", ""]
    for _, mine in data.iterrows():
        found = row(
            table,
            student=mine["student"],
            stat=mine["stat"],
            metric="kl",
            site="logits",
            position="all",
        )
        assert mine["value"] == found["value"]
    left, right = controls.output_shift(table, **D).axes
    assert line(left, "dot-zero").get_xdata()[0] == s.KL["zero"]
    assert line(right, "dot-swap − mean").get_xdata()[0] == pytest.approx(
        s.KL["swap"] - s.KL["mean"]
    )


@pytest.mark.parametrize("width", [3.4, 7.0])
@pytest.mark.parametrize(
    "table",
    [
        s.synthetic(controls=("zero", "mean", "random")),
        s.synthetic(layers=1, swapped=(0,), controls=()),
        s.synthetic(layers=80, swapped=tuple(range(80))),
        s.identity(),
        s.synthetic().query("student != 'floor'"),
    ],
    ids=["random", "one-layer", "all-of-80", "identity", "no-floor"],
)
def test_nothing_is_cut_off(table, width):
    figures = [
        heatmap.heatmap(table, width=width, **D),
        profile.depth_profile(table, width=width, **D),
        position.by_position(table, plan=s.PLAN, width=width, **D),
        controls.output_shift(table, width=width, **D),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        inside = figure.get_tightbbox()
        assert inside.x0 >= -0.02
        assert inside.y0 >= -0.02
        assert inside.x1 <= figure.get_figwidth() + 0.02
        assert inside.y1 <= figure.get_figheight() + 0.02


def test_a_figure_is_saved_with_its_numbers_and_the_same_bytes(table, tmp_path):
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        figure = heatmap.heatmap(table, "rel_l2", **D)
        data = heatmap.heatmap_data(table, "rel_l2", **D)
        style.save(figure, folder, "map", data, {"by": "test"})
        contents.append({p.suffix: p.read_bytes() for p in folder.iterdir()})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {".png", ".svg", ".csv", ".json"}
    back = pd.read_csv(tmp_path / "a" / "map.csv", float_precision="round_trip")
    np.testing.assert_array_equal(back["value"], data["value"].astype(float))
    with pytest.raises(RunError, match="could not write"):
        style.save(figure, tmp_path / "a" / "map.csv", "map", data, {})


def test_drawing_leaves_the_settings_of_matplotlib_alone(table):
    before = dict(mpl.rcParams)
    style.to_bytes(heatmap.heatmap(table, "rel_l2", **D), "svg")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.06123, "0.0612"), (-3.519, "-3.52"), (2.1e-7, "2.1e-7"), (0.00059, "0.000590"), (123456.0, "123456"),
     (float("nan"), "-"), (100.0, "100"), (1e9, "1e9")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert style.number(value) == text


def test_labels_are_moved_apart_in_their_order():
    moved = style.spread([10.0, 10.5, 30.0, 9.0], 5)
    order = np.argsort(moved)
    assert list(order) == [3, 0, 1, 2]
    assert np.diff(np.sort(moved)).min() > 4.99
    assert moved[2] == 30.0
