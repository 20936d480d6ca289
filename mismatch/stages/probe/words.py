"""What probes answered: in words, and the passkey over length and depth as the field draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mismatch import registry
from mismatch.errors import UsageError
from mismatch.report import quantity as q
from mismatch.report import style
from mismatch.report.words import columns, plan_lines
from mismatch.runs.table import conditions

ROWS = 16
"""Headline rows of one probe in a terminal; the others are in the table."""


def headlines(table: pd.DataFrame, dictionary: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """The headline of every probe in a table: teacher, each student, and its paired difference to the teacher.

    Returns:
        Rows metric, stat, unit, layer, head, site, student, teacher, value, lo, hi, difference, difference_lo,
        difference_hi, n, applies; one for each student, layer, head and condition of the headline. `applies` is False
        where the probe cannot be asked of this model.
    """
    out = []
    for metric in probes_of(table):
        quantity = q.quantity(metric, dictionary)
        rows = {_address(row): row for row in table[table["metric"] == metric].itertuples()}
        mine = [row for row in rows.values() if conditions(row.stat)[0] == quantity.stat]
        for row in sorted(mine, key=_order):
            if row.student == "teacher":
                continue
            stat = row.stat.replace(quantity.stat, f"{quantity.stat}_minus_teacher", 1)
            teacher = rows.get(_address(row, student="teacher"))
            shift = rows.get(_address(row, stat=stat))
            out.append(
                {
                    "metric": metric,
                    "stat": row.stat,
                    "unit": quantity.unit,
                    "layer": row.layer,
                    "head": row.head,
                    "site": row.site,
                    "student": row.student,
                    "teacher": np.nan if teacher is None else teacher.value,
                    "value": row.value,
                    "lo": row.lo,
                    "hi": row.hi,
                    "difference": np.nan if shift is None else shift.value,
                    "difference_lo": np.nan if shift is None else shift.lo,
                    "difference_hi": np.nan if shift is None else shift.hi,
                    "n": row.n,
                    "applies": row.n > 0,
                }
            )
    return pd.DataFrame(out)


def _address(row: Any, **other: str) -> tuple[Any, ...]:
    """What tells a row of one probe from the others, with some of it changed."""
    named = {name: getattr(row, name) for name in ("student", "stat", "site", "position")} | other
    places = (-1 if pd.isna(place) else int(place) for place in (row.layer, row.head))
    return (*named.values(), *places)


def _order(row: Any) -> tuple[Any, ...]:
    """By student, layer and head as in the table, conditions by number."""
    who = {"teacher": 0, "swap": 1}.get(row.student, 2)
    places = [-1 if pd.isna(place) else int(place) for place in (row.layer, row.head)]
    given = sorted(conditions(row.stat)[1].items())
    return (who, row.student, *places, len(given), [(k, str(type(v)), v) for k, v in given])


def probes_of(table: pd.DataFrame) -> list[str]:
    """The probes that a table holds, in the order of the list of probes."""
    known = registry.probes().names()
    return [name for name in dict.fromkeys(table["metric"]) if name in known]


def probe_summary(
    table: pd.DataFrame,
    plan: Mapping[str, Any],
    dictionary: Mapping[str, Any] | None = None,
) -> str:
    """The end of `mismatch probe` in a terminal; readable without colour."""
    parts = ["swap", *(f"  {line}" for line in plan_lines(plan))]
    parts += [f"  warning: {text}" for text in plan.get("warnings", [])]
    return "\n".join([*parts, *answer_lines(table, dictionary)])


def answer_lines(table: pd.DataFrame, dictionary: Mapping[str, Any] | None = None) -> list[str]:
    """The headlines of every probe in a table, as lines of text; none without probes."""
    if not probes_of(table):
        return []
    found, parts = headlines(table, dictionary), []
    for metric in probes_of(table):
        rows = found[found["metric"] == metric]
        quantity = q.quantity(metric, dictionary)
        parts += ["", f"{metric}: {quantity.stat}, {quantity.unit}", columns(_lines(rows))]
        if len(rows) and rows.groupby("student").size().max() > ROWS:
            parts.append(f"  ... {len(rows)} rows in all, in the table")
    return parts


def named(row: Any) -> str:
    """`order_sensitivity change, layer 16, keep 0`: what a headline is of, without the student."""
    stat, given = conditions(row.stat)
    said = [
        f"{name} {getattr(row, name)}" for name in ("layer", "head") if pd.notna(getattr(row, name))
    ]
    said += [row.site] if row.site in ("resid_pre", "resid_mid", "mlp_out", "resid_post") else []
    said += [f"{k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in given.items()]
    return ", ".join([f"{row.metric} {stat}", *said])


def _lines(rows: pd.DataFrame) -> list[list[str]]:
    lines = [["", "teacher", "student", "student - teacher", "95 % interval"]]
    for student, part in rows.groupby("student", sort=False):
        for row in part.head(ROWS).itertuples():
            name = ", ".join([str(student), *named(row).split(", ")[1:]])
            teacher = style.number(row.teacher)
            if not row.applies:
                lines.append([name, teacher, "not applicable", "", ""])
                continue
            band = (
                f"[{style.number(row.difference_lo)}, {style.number(row.difference_hi)}]"
                if pd.notna(row.difference_lo)
                else "-"
            )
            alone = pd.isna(row.difference)  # read of this student only: its own interval
            value = style.interval(row.value, row.lo, row.hi) if alone else style.number(row.value)
            lines.append([name, teacher, value, _signed(row.difference), band])
    return lines


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + style.number(value)


def passkey_data(
    table: pd.DataFrame,
    stat: str = "exact",
    *,
    plan: Mapping[str, Any] | None = None,
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
    wide = found.pivot_table(
        index=["student", "length", "depth"],
        columns="kind",
        values=["value", "lo", "hi"],
        sort=True,
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
    plan: Mapping[str, Any] | None = None,
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


def _segments(plan: Mapping[str, Any] | None) -> str:
    found = {
        c["args"]["segment"] for c in (plan or {}).get("clauses", []) if "segment" in c["args"]
    }
    return "" if not found else f"Segments of {', '.join(map(str, sorted(found)))} tokens. "
