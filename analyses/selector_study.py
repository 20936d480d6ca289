"""Which score should choose the layers: does any beat even spacing, and how sure is any ranking?

    mismatch scan --model smollm2 --swap "sliding_window(64, 1)" --tasks text,needles,kv_lookup --controls none \\
        --tokens 2048 --seq-len 256 --samples 8 --length 328 --calibration-tokens 2048     13 minutes of CPU
    python analyses/selector_study.py --scan RUN                    every score, 8 and 15 layers: 75 s of CPU a row
    python analyses/selector_study.py --scan RUN --layers 8 --scores kl even            some rows
    python analyses/selector_study.py --scan RUN --ranks            what each score of the scan chooses, and how surely
    python analyses/selector_study.py --draw                        table and figure of what is there

Scores choose from one scan (replace-one KL on text, rise of the NLL of answers to needles and look-ups, HALO's ratio),
by giving one layer back (`restore_one`, 3 more minutes, no repair in between), by gates that the answers teach
(`gates`, half an hour more), or without looking (evenly spaced, three draws at random). A row is one set, replaced
together, on the same other documents and other keys as every other, so scores are compared by paired differences to
even spacing. How sure a choice is comes from drawing documents and prompts again. Nothing is repaired. Rows are kept as
JSON and not made twice. Writes figures/selectors/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import mismatch
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.runs.folder import Run
from mismatch.stages.opening import Opened
from mismatch.stages.plan.choose import choose
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.plan.gates import learnt
from mismatch.stages.plan.measured import cells_of
from mismatch.stages.plan.numbers import Numbers, at_random, spaced
from mismatch.stages.plan.restore import restored
from mismatch.stages.plan.scores import ANSWERS
from mismatch.stages.plan.stage import Plan, Prepared
from mismatch.stages.plan.ways import gate_scores, sure
from mismatch.stages.scan.batches import measure
from mismatch.stages.scan.cells import Cell
from mismatch.stages.scan.reliability import Overlap, Reliability
from mismatch.stages.scan.stage import sweep_of
from mismatch.stages.scan.sweep import Sweep
from mismatch.stages.scan.unit_sums import UnitSums
from mismatch.stages.scan.words import done

HERE = Path(__file__).resolve().parent.parent / "figures" / "selectors"
TASKS = {
    "text": "text KL, nats per token",
    "induction": "copying, nats per token lost",
    "needles": "needles, nats per answer token lost",
    "kv_lookup": "look-up, nats per answer token lost",
}
SCANNED = ("kl", "answer_nll", "halo")
CHOSEN = (*SCANNED, "restore_one", "gates")
SCORES = (*CHOSEN, "even", "random 0", "random 1", "random 2")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ranks", action="store_true", help="choose, and measure nothing")
    args = parser.parse_args()
    if not args.draw:
        if args.scan is None:
            parser.error("--scan RUN, or --draw")
        study = Study(mismatch.load_run(args.scan), args.output)
        ranks, sets = study.ranks(args.layers)
        ranks.to_csv(study.folder / "ranks.csv", index=False)
        sets.to_csv(study.folder / "sets.csv", index=False)
        print(sets.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
        if args.ranks:
            return
        for layers in args.layers:
            for score in args.scores:
                study.row(layers, score)
    frame = table(args.output)
    frame.to_csv(args.output / "table.csv", index=False)
    figure(frame).savefig(args.output / "layers.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


def arguments(text: str) -> argparse.ArgumentParser:
    """What every script of this study is asked."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, help="run folder of a finished scan of one mechanism")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 15], help="to replace")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=SCORES, help="some rows")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    return parser


class Study:
    """All rows of one scan: of its mechanism, on its model."""

    def __init__(self, scan: Run, output: Path) -> None:
        (column,) = scan.plan.columns
        self.scan, self.mechanism = scan, column.name
        self.folder = output / "".join(c if c.isalnum() else "_" for c in column.name).strip("_")
        self.folder.mkdir(parents=True, exist_ok=True)
        able = [task for task in done(scan.table, scan.plan) if task in ANSWERS]
        if not able:
            raise SystemExit("error: the model can answer none of the prompts of this scan")
        self.numbers = Numbers.of(scan.plan, [column.name], range(scan.plan.n_layers), able)

    @cached_property
    def teacher(self) -> Any:
        """The model of the scan."""
        return mismatch.load(self.scan.manifest["model"], device="cpu")

    def ranks(self, numbers: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The rank of each layer by each score of the scan; and the sets, how sure they are and what they share."""
        ranks, sets = [], []
        for layers in numbers:
            config = config_of(self.scan, self.mechanism, layers)
            found = {score: self.cheapest(config, self.numbers, score) for score in SCANNED}
            even = self.chosen(config, None, "even")[0]
            for score, (chosen, how) in found.items():
                line: dict[str, Any] = {
                    **{"layers": layers, "score": score, "set": " ".join(map(str, chosen))},
                    **{"same": how and how.same, "kept": how and how.kept},
                }
                others = {name: of for name, (of, _) in found.items() if name != score}
                for other, of in {**others, "even": even}.items():
                    shared = Overlap.between(chosen, of, self.scan.plan.n_layers)
                    line |= {f"shared with {other}": shared.shared, f"p {other}": shared.p}
                sets.append(line)
                if how is not None and layers == numbers[0]:
                    ranks += [{"score": score, **dataclasses.asdict(one)} for one in how.ranks]
        return pd.DataFrame(ranks), pd.DataFrame(sets)

    def row(self, layers: int, score: str) -> None:
        """One set: how it was chosen, how sure that is, and what it costs in each document and prompt."""
        path = self.folder / f"{layers}_{score.replace(' ', '_')}.json"
        if path.exists():
            return
        started = time.process_time()
        opened = Opened(config_of(self.scan, self.mechanism, layers), teacher=self.teacher)
        opened.fit()
        prepared, config = Plan("plan").prepare(opened), opened.config
        chosen, how = self.chosen(config, prepared, score)
        found = {
            "mechanism": self.mechanism,
            "layers": layers,
            "n_layers": self.scan.plan.n_layers,
            "score": score,
            "answers": self.numbers.able,
            "set": chosen,
            "reliability": None if how is None else dataclasses.asdict(how),
            "costs": self.together(config, prepared, chosen),
            "cpu_seconds": round(time.process_time() - started, 1),
            "versions": mismatch.versions(),
        }
        path.write_text(json.dumps(found) + "\n")

    def chosen(
        self, config: PlanConfig, prepared: Prepared | None, score: str
    ) -> tuple[tuple[int, ...], Reliability | None]:
        """The set of a score, and how sure it is."""
        there = sorted({layer for _, layer in self.numbers.cells.values()})
        layers = config.layers
        assert layers is not None
        if score == "even":
            return spaced(there, layers), None
        if score not in CHOSEN:
            return at_random(there, layers, int(score.partition(" ")[2])), None
        if score in SCANNED:
            return self.cheapest(config, self.numbers, score)
        assert prepared is not None
        if score == "gates":
            prices = self.opened_gates(config, prepared).mean(0)
            scores = gate_scores(prepared.cells.cells, prices)
            return tuple(s.layer for s in choose(scores, layers)), None
        return self.cheapest(config, self.given_back(config, prepared), score)

    @staticmethod
    def cheapest(
        config: PlanConfig, numbers: Numbers, score: Any
    ) -> tuple[tuple[int, ...], Reliability | None]:
        """The layers of the least price, and how sure that is."""
        prices = numbers.scores(numbers.costs(), score)
        found = tuple(s.layer for s in choose(prices, config.layers))
        by = dataclasses.replace(config, score=score, scan=None)
        return found, sure(by, numbers, prices, found, {})

    def given_back(self, config: PlanConfig, prepared: Prepared) -> Numbers:
        """What each layer regains when all are replaced; kept in a file."""
        cells, path = prepared.cells.cells, self.folder / "restored.json"
        if not path.exists():
            (task,) = (task for task in prepared.cells.tasks if task.name == "text")
            sweep = sweep_of(self.teacher, config, cells, prepared.cells.calibration)
            units = restored(sweep, cells, task, config)
            path.write_text(json.dumps(dataclasses.asdict(units)) + "\n")
        places = {cell.key: (cell.name, cell.layer) for cell in cells if cell.layer is not None}
        return Numbers(places, {"text": units_of(json.loads(path.read_text()))})

    def opened_gates(self, config: PlanConfig, prepared: Prepared) -> np.ndarray:
        """How far each layer's gate stood open, by half of the prompts; kept in a file."""
        cells, path = prepared.cells.cells, self.folder / "gates.json"
        if not path.exists():
            asked = [task for task in prepared.cells.tasks if task.name in self.numbers.able]
            sweep = sweep_of(self.teacher, config, cells, prepared.cells.calibration)
            found = learnt(sweep, cells, asked, config.batch_size * config.seq_len)
            path.write_text(json.dumps(found.tolist()) + "\n")
        return np.array(json.loads(path.read_text()))

    def together(
        self, config: PlanConfig, prepared: Prepared, chosen: tuple[int, ...]
    ) -> dict[str, Any]:
        """What the set costs on each task, by document or prompt: others than chose it."""
        cell, _, _ = cells_of(config, {self.mechanism: chosen}, self.teacher.layout)
        sweep = sweep_of(self.teacher, config, (cell,), prepared.cells.calibration)
        return costs_of(config, prepared, sweep, cell)


def costs_of(config: PlanConfig, prepared: Prepared, sweep: Sweep, cell: Cell) -> dict[str, Any]:
    """What a student costs on each task, by document or prompt."""
    asked = tuple(task for task in prepared.tasks if task.name in TASKS)
    sums = measure(sweep, (cell,), asked, batch_tokens=config.batch_size * config.seq_len)
    return {
        task: dataclasses.asdict(units) | {"sums": units.sums[cell.key]}
        for task, units in sums.units().items()
    }


def units_of(read: dict[str, Any]) -> UnitSums:
    """What a file keeps of units."""
    sums = {key: tuple(row) for key, row in read["sums"].items()}
    return UnitSums(read["over"], tuple(read["counts"]), sums)


def config_of(scan: Run, mechanism: str, layers: int) -> PlanConfig:
    """A plan from the scan, on as much text and as many prompts as it had."""
    same = ("model", "data", "seq_len", "samples", "length", "batch_size", "tokens", "seed")
    return PlanConfig(
        **{name: scan.config[name] for name in same},
        calibration_tokens=scan.config["calibration_tokens"],
        selection_tokens=scan.config["tokens"],
        mechanism=mechanism,
        layers=layers,
        scan=str(scan.path),
        controls=(),
    )


def rows_of(output: Path) -> list[dict[str, Any]]:
    """What was measured."""
    found = [json.loads(path.read_text()) for path in sorted(output.glob("*/*_*.json"))]
    return sorted(
        found, key=lambda one: (one["mechanism"], one["layers"], SCORES.index(one["score"]))
    )


def table(output: Path) -> pd.DataFrame:
    """One line a mechanism, number of layers and score."""
    rows = rows_of(output)
    at = {(one["mechanism"], one["layers"], one["score"]): one for one in rows}
    lines = []
    for one in rows:
        group, known = (one["mechanism"], one["layers"]), one["reliability"]
        line: dict[str, Any] = {
            "mechanism": one["mechanism"],
            "layers": one["layers"],
            "score": one["score"],
            "set": " ".join(map(str, one["set"])),
            "same set": math.nan if known is None else known["same"],
            "kept": math.nan if known is None else known["kept"],
        }
        for other in (*CHOSEN, "even"):
            if (beside := at.get((*group, other))) is not None and other != one["score"]:
                shared = Overlap.between(one["set"], beside["set"], one["n_layers"])
                line |= {f"shared with {other}": shared.shared, f"p {other}": shared.p}
        for task, cost in one["costs"].items():
            line |= band(f"{task} lost", lost(cost).mean())
            for name in ("even", "kl"):
                if (of := at.get((*group, name))) is not None:
                    less = lost(cost) - lost(of["costs"][task])
                    line |= band(f"{task} minus {name}", less.mean())
        lines.append(line)
    return pd.DataFrame(lines)


def lost(cost: dict[str, Any]) -> PerDocument:
    """What a set costs on one task, nats per token, document by document."""
    return PerDocument(np.array(cost["sums"]), np.array(cost["counts"]), cost["over"])


def band(name: str, found: Any) -> dict[str, float]:
    return {name: found.value, f"{name} lo": found.lo, f"{name} hi": found.hi}


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#333333", *["#b0b0b0"] * 3)


def figure(frame: pd.DataFrame) -> Figure:
    """What each score's set costs together, a row a mechanism and number of layers, a panel a task."""
    groups = list(frame.groupby(["mechanism", "layers"], sort=False))
    made = Figure(figsize=(11, 1.0 + 0.25 * len(frame) + 0.6 * len(groups)), layout="constrained")
    axes = made.subplots(len(groups), len(TASKS), squeeze=False, sharey="row")
    for line, ((mechanism, layers), rows) in zip(axes, groups, strict=True):
        rows = rows.set_index("score")
        there = [score for score in SCORES if score in rows.index]
        for axis, (task, title) in zip(line, TASKS.items(), strict=True):
            for score, one in rows.iterrows():
                value, lo, hi = (one[f"{task} lost{end}"] for end in ("", " lo", " hi"))
                at = there.index(str(score))
                axis.errorbar(
                    value,
                    at,
                    xerr=[[value - lo], [hi - value]],
                    fmt="o",
                    markersize=4,
                    color=COLOURS[SCORES.index(str(score))],
                    lw=1.2,
                )
            if "even" in rows.index:
                axis.axvline(rows.loc["even", f"{task} lost"], color="#999999", lw=0.8, ls=":")
            axis.axvline(0, color="#cccccc", lw=0.6, zorder=0)
            axis.set_title(title, fontsize=7.5)
            axis.tick_params(labelsize=7)
            axis.locator_params(axis="x", nbins=5)
            axis.set_yticks(range(len(there)), there)
            axis.set_ylim(len(there) - 0.5, -0.5)
        line[0].set_ylabel(f"{mechanism.partition('(')[0]}\n{layers} layers", fontsize=7.5)
    names = ", ".join(frame["mechanism"].unique())
    made.suptitle(
        f"SmolLM2-135M, {names}: layers chosen by each score, replaced together; 95 % intervals",
        fontsize=9,
    )
    return made


if __name__ == "__main__":
    main()
