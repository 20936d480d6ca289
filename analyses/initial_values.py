"""What are initial values from the attention worth to a recurrent mixer in its place, before and after training?

    python analyses/initial_values.py               layer 12, nothing set and all, 64 steps, one seed: 8 minutes of CPU
    python analyses/initial_values.py --full        layers 12, 18 and 24, each part, 600 steps, three seeds: a day
    python analyses/initial_values.py --only rwkv   one mechanism

It goes on where it was stopped.

Attention of one layer of SmolLM2 is replaced by a mixer whose initial values are set by the stage `inherit`, each part
alone and all together; then the output projection is fitted in closed form, then the layer trains alone, the same steps
for all, on the same windows of `sotu`. Evaluated on documents of `wiki` in windows of 512, before the steps and after
them: the share closed of the KL that deleting the attention costs, paired by document. Beside them the best linear map
of one token. What keeps the last tokens exactly, alone and with a codebook of all others, is not trained: it needs no
gradient. No part, no rate and no step was chosen on these documents, but one of eight was in view when the parts
were first tried. CPU seconds are those of the three stages. Writes figures/initial_values/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import mismatch
from mismatch.forward.heldout import HeldOut
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.stages.opening import Opened
from mismatch.stages.repair.config import INITIAL_VALUES, RepairConfig
from mismatch.stages.repair.judge import Judge, Selection
from mismatch.stages.repair.ladder import Ladder, Texts
from mismatch.stages.repair.stage import Repair
from mismatch.stages.repair.trainable import trainable

MECHANISMS = {
    "gated_deltanet": "gated_deltanet",
    "mamba2": "mamba2",
    "mamba2, norm before": "mamba2(norm=before)",
    "rwkv": "rwkv",
}
UNTRAINED = {
    "last 8 tokens": "sliding_window(window=8, sinks=1)",
    "last 8 tokens, codebook": "linear_attention(feature_map=codebook, window=8, sinks=1, decay=learned)",
    "last 16 tokens": "sliding_window(window=16, sinks=1)",
    "last 16 tokens, codebook": "linear_attention(feature_map=codebook, window=16, sinks=1, decay=learned)",
}
"""Exact near tokens and the first one, alone and with 64 codes for all others: closed form, no steps."""
ARMS: dict[str, tuple[str, ...]] = {
    "random": (),
    "mean half-life": ("mean-half-life",),
    "median half-life": ("half-life",),
    "value scale": ("value-scale",),
    "centred keys": ("keys",),
    "gate fit": ("gate",),
    "all": INITIAL_VALUES,
}
CONTROLS = {
    "zero": "zero",
    "linear": "linear",
    "last 64 and first": "sliding_window(window=64, sinks=1)",
}
SMALL: dict[str, Any] = {
    "arms": ("random", "all"),
    "layers": (12,),
    "seeds": (1,),
    "tokens": 4096,
    "train_tokens": 12288,
    "steps": 64,
}
FULL: dict[str, Any] = {
    "arms": tuple(ARMS),
    "layers": (12, 18, 24),
    "seeds": (1, 2, 3),
    "tokens": 8192,
    "train_tokens": 65536,
    "steps": 600,
}
COLOURS = {"before": "#d55e00", "after": "#0072b2"}
HERE = Path(__file__).resolve().parent.parent / "figures" / "initial_values"


class Bench:
    """The teacher, the texts of one seed, and its side of the evaluation text at one layer, for all rows."""

    def __init__(self, layer: int, seed: int, sizes: dict[str, Any], store: Path) -> None:
        self.layer, self.steps, self.store = layer, sizes["steps"], store
        config = RepairConfig(
            model="smollm2",
            swap=(f"layer{layer}:gated_deltanet",),
            seed=seed,
            seq_len=512,
            tokens=sizes["tokens"],
            train_tokens=sizes["train_tokens"],
            self_generated=0.0,
            retrieval_text=0.0,
            max_minutes=None,
            stages=("inherit", "closed-form", "local"),
            controls=(),
            probes=(),
            trace_tokens=0,
        )
        self.opened = Opened(config, progress=True)
        self.opened.fit()
        self.texts = Repair("repair").prepare(self.opened).texts
        self.opened.load()
        layout = self.opened.teacher.layout
        self.held_out = HeldOut(layout, self.texts.evaluation, layer, 1)
        self.batches = Texts(
            [torch.from_numpy(batch.ids) for batch in self.texts.train.batches(1)],
            [torch.from_numpy(batch.ids) for batch in self.texts.validation.batches(1)],
            {"text": self.texts.train.fingerprint, "look": self.texts.validation.fingerprint},
        )

    def untrained(self, call: str) -> dict[str, Any]:
        """A control as it is built."""
        return {"after": kept(self.held_out.evaluate(self._student(call).layout).kl)}

    def arm(self, call: str, parts: tuple[str, ...]) -> dict[str, Any]:
        """One mechanism with some of its initial values, before and after the steps."""
        began = time.process_time()
        student = self._student(call)
        swapped = time.process_time() - began
        config = dataclasses.replace(
            self.opened.config, swap=(f"layer{self.layer}:{call}",), initial_values=parts
        )
        learner = trainable(self.opened.teacher.layout, config, student)
        ladder = Steps(
            config,
            self.opened.teacher.layout,
            learner,
            Judge(self.held_out, Selection(why_not="nothing is undone")),
            self.batches,
            folder=self.store,
            state=None,
            fingerprint={},
            stopping=lambda: False,
            say=print,
        )
        ladder.steps = self.steps
        ladder._run_teacher()
        began = time.process_time()
        notes = [note for name in ("inherit", "closed_form") for note in ladder.ran(name).notes]
        before = time.process_time() - began
        found: dict[str, Any] = {"before": kept(self.held_out.evaluate(learner.student.layout).kl)}
        found |= {"swap_seconds": swapped, "notes": notes}
        if call in UNTRAINED.values():
            return found | {"cpu_seconds": [before, 0.0], "steps": 0}
        began = time.process_time()
        looks = [look.error for look in ladder.ran("local").looks]
        found |= {"after": kept(self.held_out.evaluate(learner.student.layout).kl)}
        return {
            **found,
            "cpu_seconds": [before, time.process_time() - began],
            "looks": looks,
            "steps": self.steps,
        }

    def _student(self, call: str) -> Any:
        config = dataclasses.replace(self.opened.config, swap=(f"layer{self.layer}:{call}",))
        child = self.opened.child(config)
        calibration = None
        if call.startswith(("rwkv", "linear")):
            tokens = 4096 if call in UNTRAINED.values() else 16384
            calibration = self.opened.calibration(tokens, self.texts.documents)
        return child.students(calibration)[0]


class Steps(Ladder):
    """A ladder whose every stage takes the same steps, and which undoes none."""

    steps = 0

    def ran(self, name: str) -> Any:
        """What a stage did."""
        return getattr(self, f"_{name}")(name)

    def _planned(self, key: str, loss: Any, learning: Any, seconds: float) -> tuple[int, int]:
        return self.steps, 4


def kept(kl: PerDocument) -> dict[str, Any]:
    return {"total": kl.sums.tolist(), "count": kl.counts.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the study; hours of CPU")
    every = MECHANISMS | UNTRAINED
    parser.add_argument("--only", choices=every, nargs="*", help="these mechanisms")
    parser.add_argument("--layers", type=int, nargs="*", help="these layers")
    parser.add_argument("--arms", choices=ARMS, nargs="*", help="these arms")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = FULL if args.full else SMALL
    folder = args.output / ("full" if args.full else "small")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mismatch-") as store:
        for layer in args.layers or sizes["layers"]:
            for seed in sizes["seeds"]:
                measure(args, layer, seed, sizes, folder, Path(store))
    frame = table(folder)
    frame.to_csv(folder / "table.csv", index=False)
    for layer in sorted(set(frame["layer"])):
        picture = figure(frame[frame["layer"] == layer])
        picture.savefig(folder / f"layer{layer}.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


def measure(
    args: Any, layer: int, seed: int, sizes: dict[str, Any], folder: Path, store: Path
) -> None:
    """The rows of one layer and seed that are not there yet."""
    controls: list[tuple[str, str, Any]] = [
        ("control", name, call) for name, call in CONTROLS.items()
    ]
    arms = [
        (mechanism, arm, parts)
        for arm, parts in ARMS.items()
        if arm in (args.arms or sizes["arms"])
        for mechanism in args.only or MECHANISMS | UNTRAINED
        if mechanism in MECHANISMS or arm == ("all" if "codebook" in mechanism else "random")
    ]
    bench = None
    for mechanism, arm, what in [*controls, *arms]:
        file = folder / f"layer{layer}-seed{seed}-{_words(mechanism)}-{_words(arm)}.json"
        if file.exists():
            continue
        bench = Bench(layer, seed, sizes, store) if bench is None else bench
        print(layer, seed, mechanism, arm, flush=True)
        control = mechanism == "control"
        made = (
            bench.untrained(what)
            if control
            else bench.arm((MECHANISMS | UNTRAINED)[mechanism], what)
        )
        made |= {"layer": layer, "seed": seed, "mechanism": mechanism, "arm": arm}
        made |= {"sizes": sizes, "versions": mismatch.versions()}
        file.write_text(json.dumps(made, indent=1) + "\n")


def _words(text: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in text).split())


def table(folder: Path) -> pd.DataFrame:
    """A row per layer, mechanism, arm and time: KL and the share closed of the KL of `zero`, seeds together."""
    found: dict[tuple[int, str, str, str], dict[int, PerDocument]] = {}
    cost: dict[tuple[int, str, str, str], list[float]] = {}
    for file in sorted(folder.glob("layer*.json")):
        made = json.loads(file.read_text())
        for at, when in enumerate(("before", "after")):
            if when not in made:
                continue
            key = (made["layer"], made["mechanism"], made["arm"], when)
            sums, counts = (np.array(made[when][name]) for name in ("total", "count"))
            found.setdefault(key, {})[made["seed"]] = PerDocument(sums, counts, positive=True)
            cost.setdefault(key, []).append(made.get("cpu_seconds", [0.0, 0.0])[at])
    order = {name: at for at, name in enumerate(("control", *MECHANISMS, *UNTRAINED))}
    arms = {name: at for at, name in enumerate((*CONTROLS, *ARMS))}
    rows = []
    for key in sorted(found, key=lambda k: (k[0], order[k[1]], arms[k[2]], k[3] == "after")):
        layer, mechanism, arm, when = key
        zero = found[layer, "control", "zero", "after"]
        seeds = sorted(set(found[key]) & set(zero))
        mine, theirs = (_together([one[seed] for seed in seeds]) for one in (found[key], zero))
        row = {"layer": layer, "mechanism": mechanism, "arm": arm, "when": when}
        row |= dict(zip(("kl", "kl_lo", "kl_hi"), mine.mean()[:3], strict=True))
        closed = mine.gap_closed(theirs)[:3]
        row |= dict(zip(("closed", "closed_lo", "closed_hi"), closed, strict=True))
        rows.append(row | {"cpu_seconds": float(np.mean(cost[key])), "seeds": len(seeds)})
    return pd.DataFrame(rows)


def _together(found: list[PerDocument]) -> PerDocument:
    """The documents of several seeds as one text."""
    sums, counts = (np.concatenate([getattr(one, n) for one in found]) for n in ("sums", "counts"))
    return PerDocument(sums, counts, positive=True)


def figure(frame: pd.DataFrame) -> Figure:
    """What each arm closes before and after the steps, a panel per mechanism; the linear map as a line."""
    mechanisms = [name for name in MECHANISMS if name in set(frame["mechanism"])]
    tall = 0.24 * frame["arm"].nunique() + 0.35
    picture = Figure(figsize=(8.0, tall * len(mechanisms) + 1.0), layout="constrained")
    picture.suptitle(f"Attention of layer {frame['layer'].iloc[0]} of SmolLM2 replaced", fontsize=9)
    lines = frame[(frame["mechanism"] == "control") & (frame["arm"] == "linear")]
    panels = picture.subplots(len(mechanisms), 1, sharex=True, squeeze=False)[:, 0]
    for ax, mechanism in zip(panels, mechanisms, strict=True):
        mine = frame[frame["mechanism"] == mechanism]
        arms = list(dict.fromkeys(mine["arm"]))
        for when, colour in COLOURS.items():
            rows = mine[mine["when"] == when]
            bars = [
                rows["closed"] - rows["closed_lo"],
                rows["closed_hi"] - rows["closed"],
            ]
            at = [arms.index(arm) for arm in rows["arm"]]
            label = "closed form" if when == "before" else "and the steps"
            ax.errorbar(
                100 * rows["closed"],
                at,
                xerr=[100 * bar for bar in bars],
                fmt="o",
                color=colour,
                ms=4,
                capsize=2,
                lw=0.9,
                label=label,
            )
        for row in lines.itertuples():
            ax.axvline(100 * row.closed, color="#777777", lw=0.8, ls="--")
        ax.set_yticks(range(len(arms)), arms, fontsize=8)
        ax.set_ylim(len(arms) - 0.5, -0.5)
        ax.set_title(mechanism, loc="left", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    panels[-1].set_xlabel(
        "share of zero's KL closed, % (95 % over documents); dashed: the best linear map"
    )
    return picture


if __name__ == "__main__":
    main()
