"""The passkey over length and depth, as the field draws it: length across, depth down, a panel for each student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mismatch.errors import UsageError
from mismatch.report import quantity as q
from mismatch.report import readout, style
from mismatch.runs.plan import SwapPlan
from mismatch.runs.table import conditions


def passkey_data(
    table: pd.DataFrame,
    stat: str = "exact",
    *,
    plan: SwapPlan | None = None,
    dictionary: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Every cell of the passkey probe.

    Args:
        table: the long table.
        stat: exact (share of keys) or logprob (nats per key).
        plan, dictionary: not needed; as the other figures take them.

    Returns:
        Rows student, length, depth, exact, logprob, each with lo and hi, n; the teacher first.

    Raises:
        UsageError: the table has no passkey.
    """
    rows = table[table["metric"] == "passkey"]
    read = rows["stat"].map(conditions)
    cells = [(name, given) for name, given in read]
    keep = [name in ("exact", "logprob") and "depth" in given for name, given in cells]
    if not any(keep):
        raise UsageError("the table has no passkey probe", hint="mismatch probe --probes passkey")
    found = rows[keep].assign(
        kind=[name for (name, _), kept in zip(cells, keep, strict=True) if kept],
        length=[int(given["length"]) for (_, given), kept in zip(cells, keep, strict=True) if kept],
        depth=[given["depth"] for (_, given), kept in zip(cells, keep, strict=True) if kept],
    )
    wide = found.pivot(
        index=["student", "length", "depth"],
        columns="kind",
        values=["value", "lo", "hi"],
    )
    wide.columns = [kind if part == "value" else f"{kind}_{part}" for part, kind in wide.columns]
    wide = wide.reset_index()
    order = {name: i for i, name in enumerate(["teacher", *q.students(table)])}
    return wide.sort_values(
        ["student", "length", "depth"], key=lambda c: c.map(order) if c.name == "student" else c
    ).reset_index(drop=True)


@style.styled
def passkey(
    table: pd.DataFrame,
    stat: str = "exact",
    *,
    plan: SwapPlan | None = None,
    dictionary: Mapping[str, Any] | None = None,
    width: float = style.WIDTH,
) -> Figure:
    """Draw retrieval over length and depth: length across, depth down, one panel a student, one scale from 0 to 1.

    The colour is the share of keys found; the number in each cell is the mean log-probability of the key, which tells
    a near miss from a loss.

    Args:
        table: the long table.
        stat: the one that is coloured.
        plan: of the run; segments are named in the caption.
        dictionary: of the run.
        width: of the figure, in inches.

    Raises:
        UsageError: the table has no passkey.
    """
    data = passkey_data(table, stat, dictionary=dictionary)
    who = list(dict.fromkeys(data["student"]))
    lengths, depths = sorted(data["length"].unique()), sorted(data["depth"].unique())
    figure = style.new_figure(width, 1.25 + 0.27 * len(depths))
    axes = figure.subplots(1, len(who), sharey=True, squeeze=False)[0]
    norm = Normalize(0, 1)
    for axis, student in zip(axes, who, strict=True):
        part = data[data["student"] == student].set_index(["depth", "length"])
        _cells(axis, part, depths, lengths, norm)
        _read_out(axis, data, student)
        axis.set_title(student, fontweight="bold")
    axes[0].set_ylabel("depth of the key")
    figure.supxlabel("")
    bar = figure.colorbar(
        ScalarMappable(norm, mpl.colormaps["viridis"]), ax=list(axes), pad=0.012, aspect=12
    )
    bar.set_label("share of keys found", fontsize=6.5)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(length=2, labelsize=6.5)
    style.frame(
        figure,
        "Passkey retrieval: length of the text (tokens) by depth of the key",
        "Colour: share of keys whose every digit is the likeliest (exact match). Number: mean "
        "log-probability of the key, nats. Depth 0 is the start of the text. "
        f"{_segments(plan)}Run {' '.join(table['run_id'].unique())}.",
    )
    return figure


def _read_out(ax: Axes, data: pd.DataFrame, student: str) -> None:
    """What each cell reads out: both readings, and the other students at the same length and depth."""
    cells = iter(ax.patches)
    for (depth, length), rows in data.groupby(["depth", "length"]):
        cell = next(cells)
        found = {row.student: row for row in rows.itertuples()}
        if student not in found or pd.isna(found[student].exact):
            continue
        mine = found.pop(student)
        said = {
            "share of keys found": style.interval(mine.exact, mine.exact_lo, mine.exact_hi),
            "log-probability, nats": style.interval(mine.logprob, mine.logprob_lo, mine.logprob_hi),
            **{
                name: f"{style.number(row.exact)}, {style.number(row.logprob)} nats"
                for name, row in found.items()
            },
        }
        text = readout.lines(f"{student}, {length} tokens, depth {depth:g}", said)
        readout.read_out(cell, f"cell-{student}-{length}-{depth:g}", [text])


def _cells(
    ax: Axes, part: pd.DataFrame, depths: Sequence[float], lengths: Sequence[int], norm: Normalize
) -> None:
    scale = mpl.colormaps["viridis"]
    for i, depth in enumerate(depths):
        for j, length in enumerate(lengths):
            known = (depth, length) in part.index and pd.notna(part.loc[(depth, length), "exact"])
            value = float(part.loc[(depth, length), "exact"]) if known else 0.0
            colour = scale(norm(value)) if known else style.MISSING
            ax.add_patch(
                Rectangle((j - 0.5, i - 0.5), 1, 1, fc=colour, ec="white", lw=0.6,
                          hatch=None if known else "////")
            )  # fmt: skip
            if known:
                ax.text(
                    j, i, style.number(float(part.loc[(depth, length), "logprob"])),
                    ha="center", va="center", fontsize=6.5,
                    color="white" if value < 0.6 else style.INK,
                )  # fmt: skip
    ax.set_xlim(-0.5, len(lengths) - 0.5)
    ax.set_ylim(len(depths) - 0.5, -0.5)
    ax.set_xticks(range(len(lengths)), [str(x) for x in lengths])
    ax.set_yticks(range(len(depths)), [f"{x:g}" for x in depths])
    ax.set_xlabel("tokens")
    ax.tick_params(length=0)


def _segments(plan: SwapPlan | None) -> str:
    clauses = () if plan is None else plan.clauses
    found = {c.args["segment"] for c in clauses if "segment" in c.args}
    return "" if not found else f"Segments of {', '.join(map(str, sorted(found)))} tokens. "
