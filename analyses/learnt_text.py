"""What should a repair learn from: calibration text of one kind, or what the model writes itself?

    python analyses/learnt_text.py                 about 25 minutes of CPU; goes on where it was stopped
    python analyses/learnt_text.py --only speeches one of the five

`infini(segment=64)` at layer 12 of SmolLM2, as many tokens and steps each, rungs closed-form and local, judged on the
same pages of `wiki`. Learnt from speeches (`sotu`) alone; from speeches and text that the model wrote, in three shares;
and, as what is to be had at best, from other pages of the encyclopaedia that is judged on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import mismatch
from mismatch import data, environment
from mismatch.report import style

SWAP = "layer12:infini(segment=64)"
SIZES: dict[str, Any] = {"tokens": 65536, "judged": 8192, "looked": 2048, "epochs": 3}
SHARES = {"speeches": 0.0, "a quarter written": 0.25, "half written": 0.5, "three quarters": 0.75}
BEST = "the same source"
CASES = (*SHARES, BEST)
COLOURS = {"closed-form": "#0072b2", "local": "#d55e00"}
HERE = Path(__file__).resolve().parent.parent / "figures" / "learnt_text"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CASES, help="one of the five, in this process")
    parser.add_argument("--model", default="smollm2", help="what to repair")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for case in [args.only] if args.only else CASES:
        if not _file(args.output, case).exists():
            climb(case, args)
    if all(_file(args.output, case).exists() for case in CASES):
        report(args.output)


def climb(case: str, args: argparse.Namespace) -> None:
    """One repair, saved."""
    started = time.process_time()
    pages, judged = data.split(data.read("wiki"))
    climbed = mismatch.repair(
        args.model,
        SWAP,
        data=judged,
        calibration=pages if case == BEST else "sotu",
        written=SHARES.get(case, 0.0),
        rungs=tuple(COLOURS),
        max_minutes=None,
        pays=0.0,
        controls=(),
        traced=0,
        probes=(),
        progress=True,
        **SIZES,
    ).climbed
    made = {
        "case": case, "model": args.model, "swap": SWAP, **SIZES, "rungs": climbed["rungs"], "notes": climbed["notes"],
        "cpu_seconds": time.process_time() - started, "versions": environment.versions(),
    }  # fmt: skip
    _file(args.output, case).write_text(json.dumps(made, indent=2) + "\n")


def report(folder: Path) -> None:
    """Table, picture and the answer in a sentence."""
    found = table([json.loads(_file(folder, case).read_text()) for case in CASES])
    found.to_csv(folder / "learnt_text.csv", index=False)
    (folder / "learnt_text.png").write_bytes(style.to_bytes(draw(found), "png"))
    print(found.to_string(index=False), verdict(found), sep="\n", file=sys.stdout)


def table(made: list[dict[str, Any]]) -> pd.DataFrame:
    """A row per text and rung: KL, gap closed, their intervals."""
    names = ("name", "kl", "lo", "hi", "gap_closed", "gap_lo", "gap_hi", "tokens", "kept")
    return pd.DataFrame(
        [
            {"learnt": one["case"]} | {n: rung[n] for n in names}
            for one in made
            for rung in one["rungs"][1:]
        ]
    )


def verdict(found: pd.DataFrame) -> str:
    """How much of what the judged source itself would add do written words add?"""
    last = found[found["name"] == "local"].set_index("learnt")["gap_closed"]
    best = last[list(SHARES)[1:]].idxmax()
    speeches, written, source = (100 * last[name] for name in ("speeches", best, BEST))
    if written <= speeches:
        return f"Text that the model writes does not help: {written:.0f} % closed, speeches alone {speeches:.0f} %."
    return (
        f"Text that the model writes helps: {speeches:.0f} % closed from speeches alone, {written:.0f} % with {best}; "
        f"other pages of the judged source {source:.0f} %."
    )


@style.styled
def draw(found: pd.DataFrame) -> Figure:
    """Gap closed of each text, both rungs, with intervals."""
    picture = Figure(figsize=(style.WIDTH, 2.4), layout="constrained")
    ax = picture.subplots()
    for offset, (rung, colour) in zip((-0.12, 0.12), COLOURS.items(), strict=True):
        rows = found[found["name"] == rung]
        x = 100 * rows["gap_closed"]
        bars = [x - 100 * rows["gap_lo"], 100 * rows["gap_hi"] - x]
        y = [CASES.index(name) + offset for name in rows["learnt"]]
        ax.errorbar(x, y, xerr=bars, fmt="o", color=colour, ms=5, capsize=2, lw=0.9, label=rung)
        for value, at in zip(x, y, strict=True):
            above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
            ax.annotate(f"{value:.0f}", (value, at), fontsize=7, **above)
    words = {"speeches": "speeches (sotu) alone", BEST: "other pages of wiki"}
    ax.set_yticks(range(len(CASES)), [words.get(case, case) for case in CASES])
    ax.invert_yaxis()
    ax.grid(axis="x", lw=0.4, color="#dddddd")
    ax.set_xlabel("gap closed, % (95 % over documents)")
    ax.set_title(f"{SWAP} of SmolLM2 repaired, judged on wiki: what it learnt from")
    ax.legend(frameon=False, loc="lower right")
    return picture


def _file(folder: Path, case: str) -> Path:
    return folder / f"{case.replace(' ', '-')}.json"


if __name__ == "__main__":
    main()
