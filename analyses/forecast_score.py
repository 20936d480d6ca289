"""Which number that is known before training says what a swap will cost, and how much of it repair will recover?

    python analyses/forecast_record.py              the rows: half an hour of CPU
    python analyses/forecast_score.py               seconds

Spearman's r of each number with the damage and with the gap that each stage closes, 95 % by resampling cells (cells of
one layer or one mechanism are alike, so these intervals are rather too narrow). Then the forecast of `forecast.py` is
put to the test: every cell is forecast from a record that holds no cell of its layer, and again from one that holds
none of its mechanism, choice of the numbers and interval included; beside it the mean of that record, and where the
mechanism is known the mean of its own cells. The swaps of `FRESH` are forecast from all of these. Negative results are
kept. Writes figures/forecast_score/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from forecast import MISS, NUMBERS, Forecast, forecast
from forecast_record import FRESH
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

import mismatch
from mismatch.report import style
from mismatch.runs.files import json_text

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "figures" / "forecast_score"
STAGES = ("closed-form", "local", "block")
OUTCOMES = {"kl": "damage", **{f"closed {stage}": f"closed by {stage}" for stage in STAGES}}
BEFORE = {
    "kl": "KL of the swap",
    "kl_zero": "KL of zero there",
    "kl_mean": "KL of the mean there",
    "kl_linear": "KL of the best linear map there",
    "of_zero": "KL of the swap / of zero",
    "of_linear": "KL of the swap / of linear",
    "linear_of_zero": "KL of linear / of zero",
    "guess": "quadratic guess at the KL",
    "local_error": "error on the teacher's input",
    "mapped_error": "same, best linear map behind it",
    "removed": "share of it that the map removes",
    "turn": "1 - cos(update, teacher's)",
    "size": "|update| / |teacher's|",
    "step": "|teacher's update| / |stream|",
    "step_student": "|update| / |stream|",
    "step_error": "|error| / |stream|",
    "layer": "layer",
}
"""Every number that is known before training."""
HOLD_DAMAGE = ("kl", "of_zero", "of_linear")
"""They hold the damage, and cannot predict it."""
COLOURS = {
    "infini": ("#d55e00", "o"),
    "nope": ("#e69f00", "^"),
    "sliding_window": ("#0072b2", "s"),
    "linear_attention": ("#009e73", "D"),
    "gated_deltanet": ("#cc79a7", "v"),
}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    every = table(HERE / "rows")
    fresh = every.set_index(["layer", "mechanism"]).index.isin(FRESH)
    cells = every[~fresh]
    record = as_record(cells)
    unseen(as_record(every[fresh]), record).to_csv(HERE / "fresh.csv", index=False)
    known = correlations(cells)
    scored = pd.concat([scores(record, by) for by in ("layer", "mechanism")], ignore_index=True)
    told = summary(scored)
    said = verdict(known, told)
    cells.to_csv(HERE / "cells.csv", index=False)
    known.to_csv(HERE / "correlations.csv", index=False)
    made = {"cells": len(cells), "verdict": said, "scores": told.to_dict("records")}
    made |= {"versions": mismatch.versions()}
    picture = style.to_bytes(draw(scored, known, told), "png")
    (HERE / "forecast_score.png").write_bytes(picture)
    scored.to_csv(HERE / "forecast_score.csv", index=False)
    (HERE / "forecast_score.json").write_text(json_text(made))
    print(known.to_string(index=False, float_format=lambda x: f"{x:.2f}"))
    print(told.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    print(said)


def table(rows: Path) -> pd.DataFrame:
    """Every row that is there, with the ratios that are made from its numbers."""
    read = [json.loads(path.read_text()) for path in sorted(rows.glob("*.json"))]
    cells = pd.DataFrame(read)
    cells["of_zero"] = cells["kl"] / cells["kl_zero"]
    cells["of_linear"] = cells["kl"] / cells["kl_linear"]
    cells["linear_of_zero"] = cells["kl_linear"] / cells["kl_zero"]
    cells["removed"] = 1 - cells["mapped_error"] / cells["local_error"]
    return cells


def as_record(cells: pd.DataFrame) -> pd.DataFrame:
    """What the forecast reads: mechanisms as they stand in a swap, the numbers that a repair has, gaps."""
    kept = cells[["layer", *NUMBERS, *(f"closed {stage}" for stage in STAGES)]]
    return kept.assign(mechanism=cells["swap"].str.partition(":")[2])


# ---- which number predicts ----------------------------------------------------------------------


def correlations(cells: pd.DataFrame) -> pd.DataFrame:
    """outcome, number, n, spearman, lo, hi; `best` marks the largest |r| of an outcome, and `less_lo`, `less_hi` are by
    how much |r| falls short of it on the same resampled cells."""
    rows = []
    for outcome in OUTCOMES:
        mine = cells[cells[outcome].notna()]
        draws = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
        y = mine[outcome].to_numpy(float)
        names = [name for name in BEFORE if outcome != "kl" or name not in HOLD_DAMAGE]
        of = {name: mine[name].to_numpy(float) for name in names}
        r = {name: float(spearman(x[None], y[None])[0]) for name, x in of.items()}
        sampled = {name: spearman(x[draws], y[draws]) for name, x in of.items()}
        best = max(names, key=lambda name: np.nan_to_num(abs(r[name])))
        for name in names:
            less = np.abs(sampled[best]) - np.abs(sampled[name])
            (lo, hi), (less_lo, less_hi) = (
                np.nanquantile(values, [0.025, 0.975]) for values in (sampled[name], less)
            )
            rows.append((outcome, name, len(mine), r[name], lo, hi, name == best, less_lo, less_hi))
    heads = ("outcome", "number", "n", "spearman", "lo", "hi", "best", "less_lo", "less_hi")
    return pd.DataFrame(rows, columns=heads)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's r of each row of two matrices `rows cells`; nan where all of a row is one number."""
    x, y = (stats.rankdata(part, axis=1) - (part.shape[1] + 1) / 2 for part in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


# ---- are the forecasts worth anything -----------------------------------------------------------


def scores(record: pd.DataFrame, by: str) -> pd.DataFrame:
    """Every cell and stage, forecast from the record without its layer, or without its mechanism."""
    rows = []
    for left_out, held in record.groupby(by, sort=False):
        rest = record[record[by] != left_out]
        for cell in held.to_dict("records"):
            for stage, measured, told in forecasts(cell, rest):
                gaps = rest[f"closed {stage}"]
                rows.append(
                    {
                        "left_out": by, "stage": stage, "layer": cell["layer"],
                        "mechanism": cell["mechanism"].partition("(")[0], "forecast": told.value,
                        "lo": told.lo, "hi": told.hi, "measured": measured,
                        "inside": told.has(measured), "used": " + ".join(told.used) or "mean",
                        "mean": gaps.mean(),
                        "own_mean": gaps[rest["mechanism"] == cell["mechanism"]].mean(),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def forecasts(cell: dict[str, Any], record: pd.DataFrame) -> Iterator[tuple[str, float, Forecast]]:
    """Stage, the share that it closed, and its forecast, for the stages that were run."""
    numbers = {name: cell[name] for name in NUMBERS}
    for stage in STAGES:
        measured = cell[f"closed {stage}"]
        if not np.isnan(measured):
            told = forecast(cell["mechanism"], numbers, stage, record)
            if told is not None:
                yield stage, measured, told


def unseen(fresh: pd.DataFrame, record: pd.DataFrame) -> pd.DataFrame:
    """swap, stage, forecast, lo, hi, measured, inside, and the numbers that leave the range of the record."""
    rows = []
    for cell in fresh.to_dict("records"):
        out = [n for n in NUMBERS if not record[n].min() <= cell[n] <= record[n].max()]
        rows += [
            {
                "swap": f"layer{cell['layer']}:{cell['mechanism']}", "stage": stage, "forecast": told.value,
                "lo": told.lo, "hi": told.hi, "measured": measured, "inside": told.has(measured),
                "beyond_record": " + ".join(out),
            }
            for stage, measured, told in forecasts(cell, record)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def summary(scored: pd.DataFrame) -> pd.DataFrame:
    """left_out, stage, cells, error: mean absolute, of the forecast, of the mean and of the mechanism's own mean; what
    the forecast saves against the mean, 95 % by resampling cells; coverage, mean width, the numbers used most."""
    rows = []
    for (by, stage), mine in scored.groupby(["left_out", "stage"], sort=False):
        errors, mean, own = (
            (mine[name] - mine["measured"]).abs().to_numpy()
            for name in ("forecast", "mean", "own_mean")
        )
        draws = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
        saves_lo, saves_hi = np.quantile((mean - errors)[draws].mean(1), [0.025, 0.975])
        rows.append(
            {
                "left_out": by, "stage": stage, "cells": len(mine), "error": errors.mean(),
                "error_mean": mean.mean(), "error_own_mean": own.mean(),
                "saves_lo": saves_lo, "saves_hi": saves_hi, "coverage": mine["inside"].mean(),
                "width": (mine["hi"] - mine["lo"]).mean(), "used": mine["used"].mode()[0],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def verdict(known: pd.DataFrame, told: pd.DataFrame) -> str:
    """Which number is best for what, and whether the forecast beats the mean."""
    parts = []
    for outcome, mine in known.groupby("outcome", sort=False):
        best = mine[mine["best"]].iloc[0]
        level = mine[~mine["best"] & (mine["less_lo"] <= 0)]
        text = (
            f"{OUTCOMES[outcome]}: {BEFORE[best['number']]} ({best.spearman:+.2f} [{best.lo:+.2f}, {best.hi:+.2f}], "
            f"{best.n} cells"
        )
        if len(level):
            text += f"; {len(level)} others not worse beyond their interval"
        parts.append(f"{text})")
    lines = ["Best rank correlation with " + "; ".join(parts) + "."]
    for row in told.itertuples():
        word = (
            "better than the mean" if row.saves_lo > 0
            else "worse than the mean" if row.saves_hi < 0
            else "no better than the mean beyond its interval"
        )  # fmt: skip
        lines.append(
            f"A {row.left_out} left out, {row.stage}: error {100 * row.error:.0f} points against "
            f"{100 * row.error_mean:.0f} of the mean ({word}), {100 * row.coverage:.0f} % of {row.cells} inside the "
            f"{100 * (1 - MISS):.0f} % interval."
        )
    return " ".join(lines)


# ---- the picture --------------------------------------------------------------------------------


@style.styled
def draw(scored: pd.DataFrame, known: pd.DataFrame, told: pd.DataFrame) -> Figure:
    """Forecast against measured for each stage, twice; beside it the rank correlations."""
    figure: Any = style.new_figure(style.WIDTH, 4.1)
    left, right = figure.subfigures(1, 2, width_ratios=[1.72, 1])
    axes = left.subplots(2, 3, sharex=True, sharey=True)
    for line, by in zip(axes, ("layer", "mechanism"), strict=True):
        for ax, stage in zip(line, STAGES, strict=True):
            _forecasts(ax, scored[(scored["left_out"] == by) & (scored["stage"] == stage)])
            for one in told[(told["left_out"] == by) & (told["stage"] == stage)].itertuples():
                words = f"error {100 * one.error:.0f}, mean's {100 * one.error_mean:.0f}\n"
                words += f"{100 * one.coverage:.0f} % of {one.cells} inside"
                ax.text(-3, 108, words, fontsize=5.5, color=style.FAINT).set_in_layout(False)
        line[0].set_ylabel(f"measured gap closed, %\n({by} left out)", fontsize=7)
    for ax, stage in zip(axes[0], STAGES, strict=True):
        ax.set_title(stage, fontweight="bold", pad=18)
    for ax in axes[1]:
        ax.set_xlabel("forecast, %", fontsize=7)
    _ranks(right.subplots(), known)
    handles = [
        Line2D([], [], ls="none", marker=mark, ms=4, color=colour, label=name)
        for name, (colour, mark) in COLOURS.items()
    ]
    left.legend(
        handles=handles, frameon=False, fontsize=6.5, loc="outside lower center", ncols=5,
        handletextpad=0.1, columnspacing=0.8,
    )  # fmt: skip
    style.frame(
        figure,
        "How much of the damage will repair recover? Forecast before, scored after",
        "SmolLM2-135M, attention of one layer replaced. Left: each mark is one swap, forecast from a record without "
        "its layer (above) or without its mechanism (below); bars: 90 % interval (CV+); dotted: forecast = measured. "
        "Above the panels: mean absolute error in points, that of the record's mean, share of swaps inside the "
        "interval. Right: Spearman's r over swaps of what is known before training; bold: the largest |r|; a dot: not "
        "worse than it beyond the 95 % interval.",
    )
    return figure


def _forecasts(ax: Axes, mine: pd.DataFrame) -> None:
    ax.plot([0, 100], [0, 100], color=style.FAINT, lw=0.6, ls=":")
    for name, (colour, mark) in COLOURS.items():
        some = 100 * mine[mine["mechanism"] == name][["forecast", "lo", "hi", "measured"]]
        ax.hlines(some["measured"], some["lo"], some["hi"], color=colour, alpha=0.3, lw=0.8)
        ax.scatter(
            some["forecast"],
            some["measured"],
            s=11,
            color=colour,
            marker=mark,
            zorder=3,
            linewidth=0,
        )
    ticks = [0, 50, 100]
    ax.set(xlim=(-3, 105), ylim=(-3, 105), xticks=ticks, yticks=ticks, aspect="equal")


def _ranks(ax: Axes, known: pd.DataFrame) -> None:
    wide = known.pivot(index="number", columns="outcome", values="spearman")
    wide = wide.loc[list(BEFORE), list(OUTCOMES)]
    ax.pcolormesh(wide, cmap=style.SIGNED_MAP, vmin=-1, vmax=1, edgecolor="white", lw=0.8)
    for row in known[known["spearman"].notna()].itertuples():
        dot = "" if row.best or row.less_lo > 0 else "\u00b7"
        ax.text(
            wide.columns.get_loc(row.outcome) + 0.5, wide.index.get_loc(row.number) + 0.5,
            f"{row.spearman:.2f}{dot}".replace("-", "\u2212"), ha="center", va="center", fontsize=5.5,
            fontweight="bold" if row.best else "normal",
            color="white" if abs(row.spearman) > 0.7 else style.INK,
        )  # fmt: skip
    heads = ["damage", "closed-\nform", "local", "block"]
    ax.set_xticks(np.arange(len(heads)) + 0.5, heads)
    ax.set_yticks(np.arange(len(wide)) + 0.5, [BEFORE[name] for name in wide.index])
    ax.tick_params(length=0, labelsize=5.8, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.set_facecolor(style.MISSING)
    ax.invert_yaxis()


if __name__ == "__main__":
    main()
