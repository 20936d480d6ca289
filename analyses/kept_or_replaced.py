"""Adapters, DyT, recurrent layers, windows, positions: does it help to keep the teacher's module, and after repair?

    python analyses/kept_or_replaced.py                 about 18 minutes of CPU; goes on where it was stopped
    python analyses/kept_or_replaced.py --only mamba2   the cells of one mechanism
    python analyses/kept_or_replaced.py --draw          only the picture, from the csv that is there

Layer 12 of SmolLM2. Each mechanism X stands in three columns: in place of the teacher's module; added to it in full
(`parallel(X, alpha=1)`, or X itself where X is an addition by construction); a tenth of it added (`parallel(X,
alpha=0.1)`). Each cell is evaluated as it starts and after a small repair (closed form, then 3 times through 8192
tokens of `sotu` by layerwise distillation), on 2048 tokens of `wiki`: 8 documents in windows of 256. Beside them the
same slot deleted (`zero`) and its best linear map (`linear`), and as a mechanism that knows nothing, `random`. A
combination that means nothing is grey. Writes figures/kept_or_replaced/kept_or_replaced.{csv,json,png}, a row of the
csv per cell.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

import mismatch
from mismatch.report import style

LAYER = 12
MECHANISMS = {
    "lora": "LoRA",
    "qlora": "QLoRA, 4 bits",
    "houlsby": "Houlsby",
    "houlsby(init=houlsby)": "Houlsby, as published",
    "parallel_adapter": "parallel adapter",
    "adapterplus": "Adapter+",
    "adapterplus(init=houlsby)": "Adapter+, as published",
    "dyt": "DyT, both norms",
    "mamba2": "Mamba-2",
    "rwkv": "RWKV-7",
    "sliding_window(window=64)": "window of 64",
    "sliding_window(window=64, sinks=1)": "window of 64, a sink",
    "rope(type=linear, factor=4)": "RoPE, linear, factor 4",
    "yarn(factor=4)": "YaRN, factor 4",
    "random": "random weights",
}
ADAPTERS = tuple(MECHANISMS)[:1] + tuple(MECHANISMS)[2:7]
"""Additions by construction: the teacher's module stays, and nothing replaces it."""
SLOTS = {
    "parallel_adapter": "mlp", "adapterplus": "block", "adapterplus(init=houlsby)": "block", "dyt": "norms",
    "rope(type=linear, factor=4)": "rope", "yarn(factor=4)": "rope",
}  # fmt: skip
"""Where it is not the attention. A position has the controls of the attention it enters."""
COLUMNS = {"replaced": "in place of it", "full": "added in full", "tenth": "a tenth added"}
ALPHAS = {"full": 1.0, "tenth": 0.1}
CONTROLS = ("zero", "linear")
CONTROLLED = {
    "attn": "random", "norms": "dyt", "mlp": "parallel_adapter", "block": "adapterplus",
}  # fmt: skip
"""The mechanism whose first cell measures the controls of a slot."""
SIZES: dict[str, Any] = {
    "train_tokens": 8192,
    "self_generated": 0.0,
    "seq_len": 256,
    "tokens": 2048,
    "val_tokens": 1024,
    "epochs": 3,
}
ROUNDING = 1e-7
"""Nats: less is none."""
HERE = Path(__file__).resolve().parent.parent / "figures" / "kept_or_replaced"


class Case(NamedTuple):
    """One cell: a mechanism in a column."""

    mechanism: str
    column: str

    @property
    def slot(self) -> str:
        return SLOTS.get(self.mechanism, "attn")

    @property
    def swap(self) -> str:
        inner = self.mechanism
        if self.column != "replaced" and inner not in ADAPTERS:
            inner = f"parallel({inner}, alpha={ALPHAS[self.column]})"
        return f"layer{LAYER}.{self.slot}:{inner}"

    @property
    def controls(self) -> tuple[str, ...]:
        first = self.column == ("full" if self.mechanism in ADAPTERS else "replaced")
        return CONTROLS if first and CONTROLLED.get(self.slot) == self.mechanism else ()

    @property
    def refused(self) -> str:
        """Why this cell means nothing; "" when it does."""
        if self.mechanism in ADAPTERS:
            return {
                "replaced": "an addition: nothing is replaced",
                "tenth": "has no such factor",
            }.get(self.column, "")
        if self.mechanism == "qlora" and self.column != "replaced":
            return "is the teacher's, rounded"
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=MECHANISMS, help="one mechanism")
    parser.add_argument("--column", choices=COLUMNS, help="one column")
    parser.add_argument("--draw", action="store_true", help="only the picture")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "kept_or_replaced.csv"
    if not args.draw:
        measure(file, [case for case in cases(args.only) if args.column in (None, case.column)])
    found = pd.read_csv(file)
    made = {
        "model": "smollm2", "layer": LAYER, **SIZES, "stages": ["closed-form", "local"],
        "cpu_seconds": found["cpu_seconds"].sum(), "verdict": verdict(found),
        "versions": mismatch.versions(),
    }  # fmt: skip
    (args.output / "kept_or_replaced.png").write_bytes(style.to_bytes(draw(found), "png"))
    (args.output / "kept_or_replaced.json").write_text(json.dumps(made, indent=2) + "\n")
    shown = [
        "mechanism",
        "column",
        "before",
        "after",
        "after_lo",
        "after_hi",
        "gap_closed",
        "alpha",
    ]
    print(found[shown].round(5).to_string(index=False))
    print("\n".join(made["verdict"]))


def cases(only: str | None = None) -> Iterator[Case]:
    """The cells that mean something, column by column."""
    for column in COLUMNS:
        for mechanism in MECHANISMS:
            case = Case(mechanism, column)
            if only in (None, mechanism) and not case.refused:
                yield case


def measure(file: Path, wanted: list[Case]) -> None:
    """The cells that the file has not yet, each written when it is done."""
    rows = pd.read_csv(file).to_dict("records") if file.exists() else []
    done = {row["swap"] for row in rows}
    teacher = mismatch.load("smollm2")
    with tempfile.TemporaryDirectory(prefix="mismatch-") as store:
        for case in wanted:
            if case.swap not in done:
                print(case.swap, flush=True)
                rows.append(cell(teacher, case, store))
                pd.DataFrame(rows).to_csv(file, index=False)


def cell(teacher: mismatch.Teacher, case: Case, store: str) -> dict[str, Any]:
    """Before and after, with intervals; the controls where this cell measures them."""
    started = time.process_time()
    plan = mismatch.repair(
        teacher, case.swap, stages=("closed-form", "local"), max_minutes=None, min_gain=0.0, trace_tokens=0, probes=(),
        controls=case.controls, activations_dir=store, **SIZES,
    ).plan  # fmt: skip
    students = plan.students
    row: dict[str, Any] = {
        "mechanism": case.mechanism, "column": case.column, "slot": case.slot, "swap": case.swap,
    }  # fmt: skip
    for name, student in (("before", "swap"), ("after", "repaired"), *((c, c) for c in CONTROLS)):
        if student in students:
            row[name], row[f"{name}_lo"], row[f"{name}_hi"] = students[student].kl
    row["gap_closed"], row["gap_lo"], row["gap_hi"] = students["repaired"].gap_closed
    row["after_closed_form"] = plan.stages[1].kl
    row["alpha"] = alpha_of(plan.gates.end) if "parallel(" in case.swap else None
    row["cpu_seconds"] = time.process_time() - started
    return row


def alpha_of(gates: dict[str, list[float]]) -> float:
    """The weight of the branch after repair; of two norms, the one that is further from 0."""
    found = [
        values[0]
        for name, values in gates.items()
        if name.endswith(".alpha") and ".inner." not in name
    ]
    return max(found, key=abs)


def verdict(found: pd.DataFrame) -> list[str]:
    """Is it better to keep the teacher's module: as it starts, and after repair? What does repair do beside it?"""
    at = found.set_index(["mechanism", "column"])
    said = []
    for when, words in (("before", "before repair"), ("after", "after repair")):
        parts = []
        for column in ALPHAS:
            better = {
                name: at.loc[(name, column), f"{when}_hi"]
                < at.loc[(name, "replaced"), f"{when}_lo"]
                for name in MECHANISMS
                if {(name, "replaced"), (name, column)} <= set(at.index)
            }
            parts.append(
                f"{COLUMNS[column]} in {sum(better.values())} of {len(better)} ({_word(better)})"
            )
        said.append(
            f"Keeping the teacher's module is less damage, {words}: " + ", ".join(parts) + "."
        )
    said.append(_branches(found))
    said.append(_repaired(found))
    said.append(_adapters(found))
    return said


def _word(better: dict[str, bool]) -> str:
    """Holds, does not hold, or for which mechanisms: the fewer of the two are named."""
    yes, no = (
        [MECHANISMS[name] for name in better if better[name] == side] for side in (True, False)
    )
    if not (yes and no):
        return "holds" if yes else "does not hold"
    few = f"{', '.join(yes)}" if len(yes) <= len(no) else f"not {', '.join(no)}"
    return f"depends on the mechanism: {few}"


def _branches(found: pd.DataFrame) -> str:
    """What became of the weight of the branch, and whether random weights end worse than a mechanism."""
    turned, worse = [], []
    for column, alpha in ALPHAS.items():
        mine = found[(found["column"] == column) & found["alpha"].notna()].set_index("mechanism")
        less = int((mine["alpha"] < alpha / 2).sum())
        turned.append(
            f"from {alpha:g} to {mine['alpha'].min():.2f} .. {mine['alpha'].max():.2f}, down by more than half in "
            f"{less} of {len(mine)}"
        )
        others = mine.drop(index="random")
        same = int((others["after_hi"] >= mine.loc["random", "after_lo"]).sum())
        worse.append(f"{same} of {len(others)} ({COLUMNS[column]})")
    return (
        f"What repair does beside the teacher's module: it turns alpha {'; '.join(turned)}. Random weights are then "
        f"not measurably worse than the mechanism in {', '.join(worse)}."
    )


def _repaired(found: pd.DataFrame) -> str:
    """The mechanisms instead of the teacher's module, repaired, against the best linear map of the slot."""
    bounds = _bounds(found)
    parts = []
    for row in found[found["column"] == "replaced"].itertuples():
        linear = bounds[_bound_of(row.slot)]
        word = (
            "better than" if row.after_hi < linear["linear_lo"]
            else "worse than" if row.after_lo > linear["linear_hi"] else "no better than"
        )  # fmt: skip
        parts.append(
            f"{MECHANISMS[row.mechanism]} {style.interval(row.after, row.after_lo, row.after_hi)} ({word})"
        )
    return (
        "Left instead of the teacher's module after repair, against its best linear map: "
        + "; ".join(parts)
        + "."
    )


def _adapters(found: pd.DataFrame) -> str:
    mine = found[found["mechanism"].isin(ADAPTERS)]
    exact = mine[mine["before"].abs() <= ROUNDING]["mechanism"]
    rest = [
        f"{MECHANISMS[row.mechanism]} {style.interval(row.before, row.before_lo, row.before_hi)}, after repair "
        f"{style.number(row.after)}"
        for row in mine[mine["before"].abs() > ROUNDING].itertuples()
    ]
    return f"Adapters start at 0 in {len(exact)} of {len(mine)}; not: {'; '.join(rest) or 'none'}."


def _bound_of(slot: str) -> str:
    return "attn" if slot == "rope" else slot


def _bounds(found: pd.DataFrame) -> dict[str, pd.Series]:
    """By slot, the cell that measured its controls."""
    return {row["slot"]: row for _, row in found[found["zero"].notna()].iterrows()}


@style.styled
def draw(found: pd.DataFrame) -> Figure:
    """A panel a column, a line a mechanism: before (ring), after (disc), controls of the slot; grey: means nothing."""
    figure = style.new_figure(style.WIDTH, 4.8)
    grid = figure.add_gridspec(2, len(COLUMNS), height_ratios=(0.04, 1))
    keys = figure.add_subplot(grid[0, :])
    keys.set_axis_off()
    keys.legend(handles=_keys(), frameon=False, fontsize=6.5, loc="center left", ncols=5)
    axes: list[Axes] = []
    for at in range(len(COLUMNS)):
        first = axes[0] if axes else None
        axes.append(figure.add_subplot(grid[1, at], sharex=first, sharey=first))
    order = list(MECHANISMS)[::-1]
    floor = 1e-6
    for ax, column in zip(axes, COLUMNS, strict=True):
        _panel(ax, found, column, order, floor)
        ax.set(xscale="log", xlim=(floor / 4, EDGE), ylim=(-0.6, len(order) - 0.4))
        ax.set_xticks([floor / 2, 1e-4, 1e-2, 1], ["0", "0.0001", "0.01", "1"])
        ax.minorticks_off()
        ax.axvline(floor, color=style.FAINT, lw=0.5, ls=":")
        ax.set_title(COLUMNS[column], fontweight="bold")
        ax.tick_params(axis="y", length=0, labelleft=ax is axes[0])
    axes[0].set_yticks(range(len(order)), [MECHANISMS[name] for name in order])
    axes[1].set_xlabel("KL to the teacher, nats per token")
    style.frame(
        figure,
        f"Layer {LAYER} of smollm2: with and without the teacher's module kept, before and after repair",
        "Bars: 95 % over 8 documents (few: too narrow). At the right of each cell: what repair closes of the gap and, "
        "beside it, what it makes of alpha. Deleted, linear: instead of the teacher's module, before any repair. "
        "Left of the dotted line: 0 up to rounding. Grey: the combination means nothing.",
    )
    return figure


EDGE = 2e3
"""The right of a panel: notes stand there."""
BEFORE, AFTER, ZERO, LINEAR = "#d55e00", "#0072b2", "#777777", "#a6761d"


def _keys() -> list[Line2D | Rectangle]:
    look: dict[str, Any] = {"color": style.INK, "lw": 0}
    return [
        Line2D(
            [], [], **look | {"color": BEFORE}, marker="o", mfc="white", ms=5, label="as it starts"
        ),
        Line2D([], [], **look | {"color": AFTER}, marker="o", ms=5, label="repaired"),
        Line2D([], [], **look | {"color": ZERO}, marker="v", ms=4, label="slot deleted"),
        Line2D([], [], **look | {"color": LINEAR}, marker="D", ms=3.5, label="best linear map"),
        Rectangle(
            (0, 0), 1, 1, fc="#eeeeee", ec=style.MISSING, hatch="////", lw=0, label="not applicable"
        ),
    ]


def _panel(ax: Axes, found: pd.DataFrame, column: str, order: list[str], floor: float) -> None:
    bounds = _bounds(found)
    at = found[found["column"] == column].set_index("mechanism")
    for y, mechanism in enumerate(order):
        case = Case(mechanism, column)
        if case.refused or mechanism not in at.index:
            ax.axhspan(y - 0.4, y + 0.4, fc="#eeeeee", ec=style.MISSING, hatch="////", lw=0)
            continue
        row = at.loc[mechanism]
        bound = bounds.get(_bound_of(case.slot))
        if bound is not None:
            for name, colour, mark, size in (
                ("zero", ZERO, "v", 3.5),
                ("linear", LINEAR, "D", 2.8),
            ):
                error = [[bound[name] - bound[f"{name}_lo"]], [bound[f"{name}_hi"] - bound[name]]]
                ax.errorbar(
                    [bound[name]], [y + 0.27], xerr=error, fmt=mark, ms=size, color=colour, lw=0.7
                )
        ends = [max(row[when], floor / 2) for when in ("before", "after")]
        ax.plot(ends, [y, y - 0.16], color=style.FAINT, lw=0.5, zorder=1)
        for when, colour, height in (("before", BEFORE, y), ("after", AFTER, y - 0.16)):
            x = row[when]
            face = "white" if when == "before" else colour
            if x <= ROUNDING:
                ax.plot([floor / 2], [height], "o", ms=3.8, color=colour, mfc=face)
                continue
            error = [[max(x - row[f"{when}_lo"], 0)], [max(row[f"{when}_hi"] - x, 0)]]
            ax.errorbar([x], [height], xerr=error, fmt="o", ms=3.8, color=colour, mfc=face, lw=1.1)
        ax.annotate(
            _note(row), (EDGE, y - 0.02), ha="right", va="center", fontsize=5.5, color=style.INK
        )


def _note(row: pd.Series) -> str:
    """Share of the gap that is closed and the branch's weight after repair."""
    if row["before"] <= ROUNDING:
        return "exact"
    share = 100 * row["gap_closed"]
    closed = f"{share:.0f} %" if share < 99 else f"{min(share, 99.9):.1f} %"
    return closed if pd.isna(row["alpha"]) else f"{closed}\nα {row['alpha']:.2f}"


if __name__ == "__main__":
    main()
