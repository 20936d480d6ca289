"""Does the score that chose the better layers still do so after a repair, with other keys and on another text?

    python analyses/selectors_repaired.py --scan RUN                a few minutes of CPU a row
    python analyses/selectors_repaired.py --scan RUN --layers 8 --scores kl even
    python analyses/selectors_repaired.py --draw                    table and figure of what is there

Goes on from `selector_study.py`, which chose the sets. Each set is replaced and repaired alike (initial values, closed
form, 64 steps of each layer alone, a quarter of the text retrieval-shaped; messages before 1945), and measured before
and after it on two texts, each with keys of its own seed: `wiki`, and messages since 1945. No document chose, trained
or validated; validation takes those that chose. Both texts together give the intervals, over documents and prompts.
Writes figures/selectors/repaired.csv and .png.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from selector_study import COLOURS, SCORES, TASKS, Study, arguments, band, config_of, costs_of, lost
from torch import Tensor

import mismatch
from mismatch.forward.shared_prefix import Stored, run_prefix
from mismatch.forward.verify import prove_student
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.stages.chosen_on import ChosenOn
from mismatch.stages.opening import Opened
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.plan.measured import cells_of, swap_of
from mismatch.stages.plan.stage import Plan, Prepared
from mismatch.stages.scan.cells import Cell
from mismatch.stages.scan.stage import sweep_of
from mismatch.stages.scan.sweep import Sweep

TEXTS = {"wiki": 0, "sotu:late": 1}
"""Where it is measured, and the seed of prompts and new tensors."""
SETTINGS: dict[str, Any] = {
    "stages": ("inherit", "closed-form", "local"),
    "order": "joint",
    "train_data": "sotu:early",
    "train_tokens": 8192,
    "self_generated": 0.0,
    "epochs": 2,
    "max_minutes": None,
    "min_gain": 0.0,
    "tokens": 1024,
    "val_tokens": 1024,
    "controls": (),
    "probes": (),
    "trace_tokens": 0,
}
STATES = ("swapped", "repaired")
LEAST = 0.01
"""Nats that an axis shows at least."""


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    if not args.draw:
        if args.scan is None:
            parser.error("--scan RUN, or --draw")
        study = AfterRepair(mismatch.load_run(args.scan), args.output)
        for layers in args.layers:
            for score in args.scores:
                study.row(layers, score)
    frame = table(args.output)
    frame.to_csv(args.output / "repaired.csv", index=False)
    figure(frame).savefig(args.output / "repaired.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


@dataclass
class Remembering(Sweep):
    """A sweep that runs the teacher once over a batch: every row asks the same ones."""

    kept: dict[bytes, tuple[Tensor, Stored[int]]] = field(default_factory=dict)

    def _standing(self, cell: Cell) -> AbstractContextManager[object]:
        return super()._standing(cell) if cell.placements else nullcontext()

    def _streams(self, ids: Tensor, starts: set[int]) -> tuple[Tensor, Stored[int]]:
        key = ids.numpy().tobytes()
        if key not in self.kept:
            self.kept[key] = run_prefix(self.teacher, ids, range(self.teacher.n_layers))
        final, streams = self.kept[key]
        own: Stored[int] = Stored()
        for start in starts - {0}:
            own.keep(start, streams[start])
        return final, own


class AfterRepair(Study):
    """Rows of one scan, before and after the repair."""

    def row(self, layers: int, score: str) -> None:
        """One set."""
        path = self.folder / "repaired" / f"{layers}_{score.replace(' ', '_')}.json"
        if path.exists():
            return
        started = time.process_time()
        layout, chosen = self.teacher.layout, self.set_of(layers, score)
        config = config_of(self.scan, self.mechanism, layers)
        swap = swap_of(config, {self.mechanism: chosen})
        repaired = mismatch.repair(
            self.teacher, swap, data=self.seen, seq_len=config.seq_len, **SETTINGS
        )
        cost = time.process_time() - started
        assert repaired.student is not None
        prove_student(layout, repaired.student.layout, min(chosen))
        costs: dict[str, Any] = {state: {} for state in STATES}
        for text, (config, prepared) in self.asked.items():
            cell, _, _ = cells_of(config, {self.mechanism: chosen}, layout)
            sweep = sweep_of(self.teacher, config, (cell,), prepared.cells.calibration)
            costs["swapped"][text] = self.lost(config, prepared, sweep, cell)
            there = Cell("repaired", None, (), cell.first)
            sweep = Sweep(layout, repaired.student, config.seed)
            costs["repaired"][text] = self.lost(config, prepared, sweep, there)
        row = {
            "mechanism": self.mechanism,
            "layers": layers,
            "n_layers": layout.n_layers,
            "score": score,
            "set": chosen,
            "swap": swap,
            "costs": costs,
            "stages": json.loads(repaired.stages.to_json(orient="records")),
            "repair_seconds": round(cost, 1),
            "cpu_seconds": round(time.process_time() - started, 1),
            "versions": mismatch.versions(),
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row) + "\n")

    def set_of(self, layers: int, score: str) -> tuple[int, ...]:
        """As `selector_study.py` measured it, or chosen now."""
        path = self.folder / f"{layers}_{score.replace(' ', '_')}.json"
        if path.exists():
            return tuple(json.loads(path.read_text())["set"])
        config, prepared = self.asked["wiki"]
        return self.chosen(dataclasses.replace(config, layers=layers), prepared, score)[0]

    @functools.cached_property
    def seen(self) -> Any:
        """The documents that chose."""
        documents = mismatch.read_documents("wiki")
        assert self.scan.path is not None
        fresh = set(ChosenOn.of(self.scan.path).without(documents).hashes)
        return documents.without([one in fresh for one in documents.hashes])

    @functools.cached_property
    def asked(self) -> dict[str, tuple[PlanConfig, Prepared]]:
        """What is asked on each text, and the settings there; the same of every set."""
        found = {}
        for text, seed in TEXTS.items():
            config = config_of(self.scan, self.mechanism, layers=1)
            opened = Opened(dataclasses.replace(config, data=text, seed=seed), teacher=self.teacher)
            opened.fit()
            found[text] = opened.config, Plan("plan").prepare(opened)
        return found

    @functools.cached_property
    def ran(self) -> dict[bytes, tuple[Tensor, Stored[int]]]:
        """What the teacher made of each batch."""
        return {}

    def lost(
        self, config: PlanConfig, prepared: Prepared, sweep: Sweep, cell: Cell
    ) -> dict[str, Any]:
        """What a student costs on each task, by document or prompt."""
        own = Remembering(sweep.teacher, sweep.base, sweep.seed, sweep.calibrations, kept=self.ran)
        return costs_of(config, prepared, own, cell)


def rows_of(output: Path) -> list[dict[str, Any]]:
    """What was measured."""
    found = [json.loads(path.read_text()) for path in sorted(output.glob("*/repaired/*.json"))]
    return sorted(
        found, key=lambda one: (one["mechanism"], one["layers"], SCORES.index(one["score"]))
    )


def both(costs: dict[str, Any], task: str, texts: Sequence[str] = tuple(TEXTS)) -> PerDocument:
    """What a set costs on one task, the documents of several texts as one."""
    found = [lost(costs[text][task]) for text in texts if task in costs[text]]
    sums, counts = (np.concatenate([getattr(one, n) for one in found]) for n in ("sums", "counts"))
    return PerDocument(sums, counts, found[0].units)


def table(output: Path) -> pd.DataFrame:
    """A line a mechanism, number of layers, score and state: cost, paired difference to even spacing and to `kl`; cost
    on each text alone."""
    rows = rows_of(output)
    at = {(one["mechanism"], one["layers"], one["score"]): one for one in rows}
    lines = []
    for one in rows:
        for state in STATES:
            names = ("mechanism", "layers", "score")
            line: dict[str, Any] = {name: one[name] for name in names} | {"state": state}
            for task in TASKS:
                costs = one["costs"][state]
                mine = both(costs, task)
                line |= band(f"{task} lost", mine.mean())
                for name in ("even", "kl"):
                    if (of := at.get((one["mechanism"], one["layers"], name))) is not None:
                        line |= band(
                            f"{task} minus {name}", (mine - both(of["costs"][state], task)).mean()
                        )
                line |= {
                    f"{task} lost, {text}": both(costs, task, [text]).mean().value
                    for text in TEXTS
                    if task in costs[text]
                }
            lines.append(line | {"repair_seconds": one["repair_seconds"]})
    return pd.DataFrame(lines)


def figure(frame: pd.DataFrame) -> Figure:
    """Before and after the repair, a row a mechanism and number of layers, a panel a task."""
    groups = list(frame.groupby(["mechanism", "layers"], sort=False))
    made = Figure(figsize=(11, 1.0 + 0.16 * len(frame) + 0.6 * len(groups)), layout="constrained")
    axes = made.subplots(len(groups), len(TASKS), squeeze=False)
    for line, ((mechanism, layers), rows) in zip(axes, groups, strict=True):
        there = [score for score in SCORES if score in set(rows["score"])]
        for axis, (task, title) in zip(line, TASKS.items(), strict=True):
            for one in rows.to_dict("records"):
                before = one["state"] == "swapped"
                colour = COLOURS[SCORES.index(one["score"])]
                value, lo, hi = (one[f"{task} lost{end}"] for end in ("", " lo", " hi"))
                axis.errorbar(
                    value,
                    there.index(one["score"]) + (-0.17 if before else 0.17),
                    xerr=[[value - lo], [hi - value]],
                    fmt="o",
                    markersize=4,
                    markerfacecolor="white" if before else colour,
                    color=colour,
                    lw=1.0,
                )
            axis.axvline(0, color="#cccccc", lw=0.6, zorder=0)
            axis.set_title(title, fontsize=7.5)
            axis.tick_params(labelsize=7)
            if max(map(abs, axis.get_xlim())) < LEAST:  # rounding alone
                axis.set_xlim(-LEAST, LEAST)
            axis.locator_params(axis="x", nbins=5)
            axis.set_yticks(range(len(there)), there if task == "text" else [])
            axis.set_ylim(len(there) - 0.5, -0.5)
        line[0].set_ylabel(f"{str(mechanism).partition('(')[0]}\n{layers} layers", fontsize=7.5)
    made.suptitle(
        "SmolLM2-135M: layers chosen by each score, replaced together (open) and repaired (filled); 95 % intervals",
        fontsize=9,
    )
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
