"""Infini-attention's failure in small: gates stand still, the memory answers everybody the same, retrieval is lost.

    python analyses/infini_failure.py             about 30 minutes of CPU, one thread; each part is kept as a csv and
    python analyses/infini_failure.py --only gates    is not run again while it is there (gates, memory, or a student)

Hugging Face's failed experiment (blog, August 2024) on SmolLM2, `infini(segment=64)`, one layer at a time:
gates      layer 12 repaired alone (stage `local`) with four learning rates of the gates. Adam moves a number by about
           the sum of its rates at most: does the gate obey, and what does it change?
memory     at swap time, in all 30 layers: how much the read of the memory varies with the query (share of its norm),
           beside the local branch; and with a sharper feature map
retrieval  layer 18, which carries the passkey: its log-probability against the number of segment borders between needle
           and question, before and after repair, with one sink, and with the teacher's attention kept and a tenth of
           Infini-attention beside it
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import mismatch
from mismatch.report import style

GATE_RATES = (3e-5, 3e-4, 1e-2, 3e-2)
USUAL, RAISED = 3e-4, 3e-2
NEEDED = 4.0
"""sigmoid(4) = .98: how far a gate must go to decide for one branch."""
REPAIR: dict[str, Any] = {
    "stages": ("local",), "controls": (), "train_tokens": 12288, "self_generated": 0.0, "seq_len": 512,
    "tokens": 4096, "val_tokens": 1024, "epochs": 12, "max_minutes": None,
}  # fmt: skip
MAPS = {"elu": "infini(segment=64)", "softmax": "infini(segment=64, feature_map=softmax)"}
STUDENTS = {
    "infini": ("layer18:infini(segment=64)", None, "#d55e00", "as swapped"),
    "repaired": ("layer18:infini(segment=64)", RAISED, "#882255", "repaired"),
    "sink": ("layer18:infini(segment=64, sinks=1)", None, "#56b4e9", "a sink"),
    "sink_repaired": ("layer18:infini(segment=64, sinks=1)", RAISED, "#0072b2", "a sink, repaired"),
    "parallel": (
        "layer18:parallel(infini(segment=64), alpha=0.1)",
        None,
        "#009e73",
        "beside the teacher's, 0.1",
    ),
}
"""What is in the layer, the gate rate of its repair (None: none), colour, words."""
SLIGHT = 0.1
"""Nats per key that count as nothing lost."""
PROMPTS: dict[str, Any] = {
    "probes": ("passkey",),
    "lengths": ("128", "512"),
    "depths": ("0", "0.5"),
    "batch_size": 8,
}
HERE = Path(__file__).resolve().parent.parent / "figures" / "infini_failure"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("gates", "memory", *STUDENTS), help="one part")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    teacher = mismatch.load("smollm2")
    parts: dict[str, Callable[[], pd.DataFrame]] = {
        "gates": lambda: gates(teacher),
        "memory": lambda: memory(teacher),
    }
    parts |= {name: functools.partial(retrieval, teacher, name) for name in STUDENTS}
    for name, measure in parts.items():
        path = args.output / f"{name}.csv"
        if args.only in (None, name) and not path.exists():
            measure().to_csv(path, index=False)
    if not all((args.output / f"{name}.csv").exists() for name in parts):
        return
    moved, read = (pd.read_csv(args.output / f"{name}.csv") for name in ("gates", "memory"))
    found = pd.concat([pd.read_csv(args.output / f"{name}.csv") for name in STUDENTS])
    made = {
        "model": "smollm2", "repair": REPAIR, "prompts": PROMPTS,
        "verdict": verdict(moved, read, found), "versions": mismatch.versions(),
    }  # fmt: skip
    picture = style.to_bytes(draw(moved, read, found), "png")
    (args.output / "infini_failure.png").write_bytes(picture)
    found.to_csv(args.output / "infini_failure.csv", index=False)
    (args.output / "infini_failure.json").write_text(json.dumps(made, indent=2) + "\n")
    print(moved.round(4).to_string(index=False))
    print(found[found["stat"] == "lost"].round(3).to_string(index=False))
    print("\n".join(made["verdict"]))


def repaired(teacher: mismatch.Teacher, swap: str, gate_rate: float, **more: Any) -> Any:
    return mismatch.repair(teacher, swap, gate_lr=gate_rate, **(REPAIR | more))


def gates(teacher: mismatch.Teacher) -> pd.DataFrame:
    """gate_lr, steps, travel (sum of the rates), moved (most of all heads), lowest and highest gate, KL."""
    rows = []
    store = tempfile.TemporaryDirectory(prefix="mismatch-")  # the teacher runs once for all rates
    for rate in GATE_RATES:
        result = repaired(teacher, "layer12:infini(segment=64)", rate, activations_dir=store.name)
        stage = result.plan.stages[-1]
        start, end = (np.array(x) for x in next(iter(stage.gates.values())))
        share = 1 / (1 + np.exp(-end))
        rows.append(
            {
                "gate_lr": rate, "steps": stage.steps, "travel": travel(rate, stage.steps),
                "moved": np.abs(end - start).max(), "lowest": share.min(), "highest": share.max(),
                "kl": stage.kl, "lo": stage.lo, "hi": stage.hi, "kl_before": result.plan.stages[0].kl,
            }
        )  # fmt: skip
    store.cleanup()
    return pd.DataFrame(rows)


def travel(rate: float, steps: int, warm: float = 0.05) -> float:
    """The sum of the learning rates of a warm-up and a cosine to zero: about half of rate times steps."""
    at = np.arange(steps)
    rising = np.minimum(1, (at + 1) / max(1.0, warm * steps))
    return float(rate * (rising * 0.5 * (1 + np.cos(np.pi * at / max(1, steps)))).sum())


def memory(teacher: mismatch.Teacher) -> pd.DataFrame:
    """feature_map, branch, layer, head, value: variation of what a branch gives over the queries of a segment."""
    parts = []
    for name, mechanism in MAPS.items():
        table = mismatch.probe(
            teacher,
            swap=f"all:{mechanism}",
            probes=("memory",),
            controls=(),
            seq_len=256,
            samples=4,
        ).table
        rows = table[table["stat"].str.startswith("query_variation") & (table["student"] == "swap")]
        rows = rows[["stat", "layer", "head", "value", "lo", "hi"]].assign(feature_map=name)
        parts.append(rows)
    return pd.concat(parts, ignore_index=True)


def retrieval(teacher: mismatch.Teacher, name: str) -> pd.DataFrame:
    """student, stat, segments, value, lo, hi: nats per key lost by segment borders; text KL; exact keys."""
    swap, rate, *_ = STUDENTS[name]
    # The KL is measured below: in a repair it only says whether to keep it.
    student = (
        mismatch.swap(teacher, swap)
        if rate is None
        else repaired(teacher, swap, rate, tokens=2048).student
    )
    table = mismatch.probe(teacher, student, controls=(), **PROMPTS).table
    rows = []
    for row in table[(table["student"] == "swap") & (table["metric"] == "passkey")].itertuples():
        if row.stat.startswith("logprob_minus_teacher[segments="):
            segments = int(row.stat.partition("segments=")[2].rstrip("]"))
            ends = sorted((-row.lo, -row.hi))
            rows.append(
                {
                    "stat": "lost",
                    "segments": segments,
                    "value": -row.value,
                    "lo": ends[0],
                    "hi": ends[1],
                }
            )
        elif row.stat in ("exact", "logprob_absent"):
            rows.append({"stat": row.stat, "value": row.value, "lo": row.lo, "hi": row.hi})
    traced = mismatch.trace(
        teacher, student, controls=(), metrics=("kl",), tokens=1536, seq_len=192, batch_size=8
    ).table
    kl = traced[(traced.metric == "kl") & (traced.stat == "mean") & (traced.site == "logits")]
    kl = kl[(kl.position == "all") & (kl.student == "swap")].iloc[0]
    rows.append({"stat": "kl", "value": kl.value, "lo": kl.lo, "hi": kl.hi})
    return pd.DataFrame(rows).assign(student=name)


def verdict(moved: pd.DataFrame, read: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """One sentence a claim, each with the numbers it rests on."""
    rates = moved.set_index("gate_lr")
    slow, fast = rates.loc[USUAL], rates.loc[RAISED]
    still = slow["moved"] < NEEDED / 10 and slow["moved"] <= 1.5 * slow["travel"]
    better = "lowers" if fast["hi"] < slow["lo"] else "does not measurably change"
    said = [
        f"gates stand still at the usual rate: {'holds' if still else 'does not hold'}: at {USUAL:g} they move by "
        f"{slow['moved']:.3f} at most (sum of the rates {slow['travel']:.3f}), at {RAISED:g} by {fast['moved']:.2f} "
        f"({fast['travel']:.2f}); freeing them {better} the KL of layer 12: {with_interval(slow, 'kl')} against "
        f"{with_interval(fast, 'kl')}"
    ]
    by = read.groupby(["feature_map", "stat", "layer"])["value"].mean()
    elu, sharper = (by[name]["query_variation[branch=memory]"] for name in MAPS)
    local = by["elu"]["query_variation[branch=local]"]
    same = elu.max() < local.min()
    said.append(
        f"the memory ignores the query: {'holds' if same else 'depends on the layer'}: its read varies by "
        f"{100 * elu.min():.1f} to {100 * elu.max():.1f} % over a segment's queries in {len(elu)} layers (local branch "
        f"{100 * local.min():.0f} to {100 * local.max():.0f} %); a softmax feature map {100 * sharper.min():.1f} to "
        f"{100 * sharper.max():.1f} %"
    )
    lost = found[found["stat"] == "lost"].set_index(["student", "segments"]).sort_index()
    kl = found[found["stat"] == "kl"].set_index("student")
    for name in STUDENTS:
        mine = lost.loc[name]
        each = ", ".join(f"{borders:g}: {with_interval(row)}" for borders, row in mine.iterrows())
        said.append(
            f"retrieval, {STUDENTS[name][3]}: {how_it_falls(mine)}; nats per key lost by borders {each}; "
            f"text KL {with_interval(kl.loc[name])}"
        )
    return said


def how_it_falls(lost: pd.DataFrame) -> str:
    """In words, what segment borders do to the key: each costs more, the first costs all, or none does."""
    near, first, last = lost.iloc[0], lost.iloc[1], lost.iloc[-1]
    if lost["hi"].max() < SLIGHT:
        return "keeps"
    if lost["value"].is_monotonic_increasing and last["lo"] > first["hi"]:
        return "falls with each compression"
    if first["lo"] > near["hi"]:
        return "falls at the first border"
    return (
        "is lost without any border too" if near["lo"] > SLIGHT else "falls at no border for sure"
    )


def with_interval(row: pd.Series, value: str = "value") -> str:
    return style.interval(row[value], row["lo"], row["hi"])


@style.styled
def draw(moved: pd.DataFrame, read: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Gates against the sum of their rates; the memory's answer by layer; the key by segment borders."""
    figure = style.new_figure(style.WIDTH, 5.4)
    grid = figure.add_gridspec(2, 2)
    left, middle, right = (figure.add_subplot(at) for at in (grid[0, 0], grid[0, 1], grid[1, :]))
    left.plot([1e-3, 10], [1e-3, 10], color=style.FAINT, lw=0.6, ls=":")
    left.axhspan(NEEDED, 20, color="#e8f3ea", lw=0)
    left.plot(moved["travel"], moved["moved"], "o-", color="#d55e00", ms=4, lw=1)
    for row in moved.itertuples():
        left.annotate(
            f"rate {row.gate_lr:g}", (row.travel, row.moved), xytext=(6, -7), textcoords="offset points", fontsize=7,
        )  # fmt: skip
    left.set(xscale="log", yscale="log", xlim=(1e-3, 100), ylim=(1e-3, 20))
    left.set(xlabel="sum of the gates' learning rates", ylabel="largest move of a gate")
    style.plain_log(left.xaxis, left.yaxis)
    left.set_title("gates, layer 12", loc="left", fontweight="bold")
    for branch, name, colour, words in (
        ("local", "elu", "#0072b2", "local branch"),
        ("memory", "softmax", "#009e73", "memory, softmax map"),
        ("memory", "elu", "#d55e00", "memory, elu + 1"),
    ):
        mine = read[
            (read["stat"] == f"query_variation[branch={branch}]") & (read["feature_map"] == name)
        ]
        by = mine.groupby("layer")["value"].agg(["mean", "min", "max"])
        middle.plot(by.index, by["mean"], color=colour, lw=1.1, label=words)
        middle.fill_between(by.index, by["min"], by["max"], color=colour, alpha=0.18, lw=0)
    middle.set(yscale="log", xlabel="layer", ylabel="variation over queries / norm")
    style.plain_log(middle.yaxis)
    middle.set_title("what the query changes", loc="left", fontweight="bold")
    middle.legend(frameon=False, fontsize=7)
    kl = found[found["stat"] == "kl"].set_index("student")["value"]
    for at, (name, (_, _, colour, words)) in enumerate(STUDENTS.items()):
        mine = found[(found["student"] == name) & (found["stat"] == "lost")].sort_values("segments")
        error = [mine["value"] - mine["lo"], mine["hi"] - mine["value"]]
        right.errorbar(
            mine["segments"] + 0.04 * at, mine["value"], error, color=colour, marker="o", ms=3, lw=1,
            label=f"{words} (text KL {kl[name]:.3f})",
        )  # fmt: skip
    right.axhline(0, color=style.FAINT, lw=0.5)
    right.set(xlabel="segment borders between needle and question", ylabel="lost, nats per key")
    right.set_title("passkey, layer 18", loc="left", fontweight="bold")
    right.legend(frameon=False, fontsize=7, loc="upper center", ncols=2, bbox_to_anchor=(0.6, 1.04))
    style.frame(
        figure,
        "Infini-attention's failure in one layer of smollm2",
        "Top left: dotted, as far as the sum of the rates; green, far enough to decide for one branch; KL on text from "
        f"left to right {', '.join(f'{kl:.4f}' for kl in moved['kl'])}. Top right: mean over heads, bands from lowest "
        "to highest. Below: 8 prompts a cell, 95 % intervals.",
    )
    return figure


if __name__ == "__main__":
    main()
