"""The ways to a choice: from a scan, greedily, by giving one layer back, or without looking.

Each gives the choice and the facts of plan.json that say how it was made, and how sure it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mismatch.errors import RunError, UsageError
from mismatch.runs.folder import Run
from mismatch.stages.opening import Opened
from mismatch.stages.plan import answers, gates
from mismatch.stages.plan.choose import Score, choose
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.plan.greedy import Step, greedy
from mismatch.stages.plan.measured import Choice
from mismatch.stages.plan.numbers import Numbers, at_random, spaced
from mismatch.stages.plan.plan import Predicted, StepPlan
from mismatch.stages.plan.restore import check_better, restored
from mismatch.stages.plan.scores import SCORES
from mismatch.stages.runner import work
from mismatch.stages.scan.cells import Cell
from mismatch.stages.scan.config import ScanConfig
from mismatch.stages.scan.prepared import Prepared as ScanPrepared
from mismatch.stages.scan.reliability import Overlap, Reliability, reliability
from mismatch.stages.scan.stage import Scan, sweep_of
from mismatch.stages.scan.unit_sums import DRAWS, UnitSums
from mismatch.stages.scan.words import teacher_reads

Way = tuple[Choice, dict[str, Any]]


def from_scan(config: PlanConfig, cells: ScanPrepared, run: Run) -> Way:
    """What a scan chooses.

    Raises:
        UsageError: it has not what the choice needs, or no choice stays within the budgets.
        RunError: it kept no numbers of single documents.
    """
    names = [str(t) for t in config.templates]
    _check_scan(run, names)
    check_asked(config, cells, run.plan.units)
    reads = {
        task: (abs(reading), run.plan.tasks[task].chance)
        for task in answers.ANSWERS
        if task in run.plan.units and (reading := teacher_reads(run.table, task)) is not None
    }
    able = answers.check(config, reads)
    numbers = Numbers.of(run.plan, names, cells.layers, able)
    chosen, facts = _cheapest(config, numbers)
    predicted = Predicted(sum(s.kl for s in chosen), sum(s.charged for s in chosen))
    return _by_name(chosen), {**facts, "scan": run.run_id, "predicted_by_scan": predicted}


def scanned(opened: Opened[PlanConfig], scanning: Opened[ScanConfig], cells: ScanPrepared) -> Run:
    """A scan of its own: it is kept whatever becomes of the plan, and can be chosen from again."""
    folder = opened.folder
    if folder is not None:
        output = str(scan_beside(folder.path))
        scanning.config = dataclasses.replace(scanning.config, output=output)
    scanning.take(opened.teacher)
    return work(Scan("scan"), scanning, cells, write=folder is not None).run


def scan_beside(path: Path) -> Path:
    """Where the scan of a plan is written."""
    return path.with_name(f"{path.name}-scan")


def by_restoring(opened: Opened[PlanConfig], cells: ScanPrepared) -> Way:
    """What giving one layer back chooses: those that regain least.

    Raises:
        UsageError: as `check_better`.
    """
    config = opened.config
    (task,) = (task for task in cells.tasks if task.name == "text")

    def given_back(config: PlanConfig) -> UnitSums:
        sweep = sweep_of(opened.teacher, config, cells.cells, cells.calibration)
        size = config.batch_size * config.seq_len
        runs = (1 + len(cells.cells)) * sum(1 for _ in task.batches(size))
        with opened.bar(runs, "giving one back", "run") as bar:
            return restored(sweep, cells.cells, task, config, bar.update, opened.ranks)

    units = opened.fitting(given_back, "while layers were given back")
    check_better(units)
    places = {cell.key: (cell.name, cell.layer) for cell in cells.cells if cell.layer is not None}
    chosen, facts = _cheapest(config, Numbers(places, {"text": units}))
    return _by_name(chosen), facts


def by_gates(opened: Opened[PlanConfig], cells: ScanPrepared) -> Way:
    """Layers whose gates answers leave closed; what each half of the prompts would choose stands beside it."""
    config = opened.config
    able = answers.check(config, teacher_answers(opened, cells))
    asked = [task for task in cells.tasks if task.name in able]

    def opened_gates(config: PlanConfig) -> np.ndarray:
        sweep = sweep_of(opened.teacher, config, cells.cells, cells.calibration)
        with opened.bar(2 * gates.STEPS, "gates", "step") as bar:
            size = config.batch_size * config.seq_len
            return gates.learnt(sweep, cells.cells, asked, size, bar.update)

    found = opened.ranks.from_first(opened.fitting(opened_gates, "while gates were learnt"))

    def taken(prices: np.ndarray) -> tuple[Score, ...]:
        return choose(gate_scores(cells.cells, prices), config.layers)

    chosen = taken(found.mean(0))
    layers = {score.layer for score in chosen}
    first, second = ({score.layer for score in taken(half)} for half in found)
    there = len(cells.cells)
    overlaps = {
        "one another, learnt from either half of the prompts": Overlap.between(
            first, second, there
        ),
        "even": Overlap.between(layers, spaced(cells.layers, len(layers)), there),
    }
    scores = gate_scores(cells.cells, found.mean(0))
    facts = {"scores": scores, "answers": able, "overlaps": overlaps}
    return _by_name(chosen), facts


def gate_scores(cells: Sequence[Cell], prices: np.ndarray) -> tuple[Score, ...]:
    """How far each layer's gate stood open, as what it costs to replace it."""
    return tuple(
        Score(cell.layer, cell.name, math.nan, cost=float(price))
        for cell, price in zip(cells, prices, strict=True)
        if cell.layer is not None
    )


def without_looking(config: PlanConfig, cells: ScanPrepared) -> Way:
    """Evenly spaced layers, or layers at random."""
    layers, count = [cell.layer for cell in cells.cells if cell.layer is not None], config.layers
    assert count is not None  # the settings ask for it
    found = (
        spaced(layers, count) if config.score == "even" else at_random(layers, count, config.seed)
    )
    return {str(config.templates[0]): found}, {}


def greedily(opened: Opened[PlanConfig], cells: ScanPrepared) -> Way:
    """What a scan after every chosen layer chooses."""
    config = opened.config
    able: tuple[str, ...] = ()
    if SCORES[config.score].answers:
        able = answers.check(config, teacher_answers(opened, cells))
    wanted = {"text", *(["passkey"] if config.keep_retrieval else []), *able}
    asked = tuple(task for task in cells.tasks if task.name in wanted)
    there, most = len(cells.cells), len(cells.layers)
    # After each step the cells of one layer are gone.
    runs = sum(there - round(at * there / most) for at in range(min(config.layers or most, most)))

    def taken(config: PlanConfig) -> tuple[Step, ...]:
        sweep = sweep_of(opened.teacher, config, cells.cells, cells.calibration)
        size = config.batch_size * config.seq_len
        batches = sum(1 for task in asked for _ in task.batches(size))
        with opened.bar(runs * batches, "greedy", "run") as bar:
            return greedy(sweep, cells.cells, asked, config, able, bar.update, opened.ranks)

    steps = opened.fitting(taken, "while layers were taken")
    choice: dict[str, list[int]] = {}
    for step in steps:
        assert step.cell.layer is not None  # candidates are of one layer each
        choice.setdefault(step.cell.name, []).append(step.cell.layer)
    path = (
        StepPlan(
            *(step.cell.layer, step.cell.name, step.kl.value, step.kl.lo, step.kl.hi, step.lost),
            again=step.again,
        )
        for step in steps
        if step.cell.layer is not None
    )
    return choice, {"steps": tuple(path)}


def teacher_answers(
    opened: Opened[PlanConfig], cells: ScanPrepared
) -> dict[str, tuple[float, float]]:
    """What the teacher loses of its answers (`answers.asked`)."""
    layout = opened.teacher.layout

    def asked(config: PlanConfig) -> dict[str, tuple[float, float]]:
        return answers.asked(layout, cells.tasks, config.batch_size * config.seq_len)

    return opened.fitting(asked, "while the teacher was asked")


def check_asked(config: PlanConfig, cells: ScanPrepared, asked: Collection[str]) -> None:
    """Whether the choice has the passkey that it needs."""
    if config.keep_retrieval and "passkey" not in asked:
        raise UsageError(
            "--keep-retrieval needs a passkey, and none is measured: "
            + cells.left_out.get("passkey", "the scan left it out"),
            hint="take a --length that fits, or leave --keep-retrieval out",
        )


def _check_scan(run: Run, names: Sequence[str]) -> None:
    """Whether a scan is of these mechanisms, asked text, and kept what it found in single documents."""
    there = [column.name for column in run.plan.columns]
    if missing := [name for name in names if name not in there]:
        raise UsageError(
            f"the scan {run.run_id} has no `{missing[0]}`",
            hint=f"it has {', '.join(sorted(there))}; scan it, or leave --scan out",
        )
    if "text" not in run.plan.tasks:
        raise UsageError(
            f"the scan {run.run_id} did not ask for text, so no layer has a KL to choose by",
            hint="scan with the task text, or leave --scan out",
        )
    if "text" not in run.plan.units:
        raise RunError(
            f"the scan {run.run_id} kept no numbers of single documents: it was made by an earlier version",
            hint="scan again, or leave --scan out",
        )


def _cheapest(config: PlanConfig, numbers: Numbers) -> tuple[tuple[Score, ...], dict[str, Any]]:
    """The best choice if prices add up, what other documents would have chosen, and what other scores choose."""
    limits = {
        "budget_kl": config.budget_kl,
        "budget_lost": config.budget_retrieval if config.keep_retrieval else None,
    }
    costs = numbers.costs()
    scores = numbers.scores(costs, config.score)
    chosen = choose(scores, config.layers, **limits)
    found = {score.layer for score in chosen}
    facts: dict[str, Any] = {
        "scores": tuple(scores),
        "reliability": sure(config, numbers, scores, found, limits),
        "answers": numbers.able if SCORES[config.score].answers else (),
    }
    others = {"even": spaced(sorted({s.layer for s in scores}), len(found))}
    for other, kind in SCORES.items():
        known = kind.scanned and (numbers.able or not kind.answers)
        if SCORES[config.score].scanned and known and other != config.score:
            best = choose(numbers.scores(costs, other), len(found))
            others[other] = tuple(score.layer for score in best)
    there = len({s.layer for s in scores})
    facts["overlaps"] = {name: Overlap.between(found, of, there) for name, of in others.items()}
    return chosen, facts


def sure(
    config: PlanConfig,
    numbers: Numbers,
    scores: Sequence[Score],
    chosen: Collection[int],
    limits: dict[str, float | None],
) -> Reliability | None:
    """How sure the choice is; None: too few documents or prompts to draw from, or no layer differs from another."""
    over = numbers.over(config.score, config.keep_retrieval)
    if over is None:
        return None
    layers = sorted({score.layer for score in scores})
    which = [[at for at, s in enumerate(scores) if s.layer == layer] for layer in layers]
    drawn = numbers.drawn(config.seed)
    prices, prices_drawn = (
        np.stack([costs.prices(config.score)[..., at].min(-1) for at in which], -1)
        for costs in (numbers.costs(), drawn)
    )
    if len(set(prices.tolist())) < 2:
        return None
    again: list[Collection[int] | None] = []
    for at in range(DRAWS):
        try:
            found = choose(numbers.scores(drawn[at], config.score), config.layers, **limits)
            again.append({score.layer for score in found})
        except UsageError:  # these documents leave no choice within the budgets
            again.append(None)
    return reliability(layers, prices, prices_drawn, chosen, again, over)


def _by_name(chosen: Sequence[Score]) -> Choice:
    choice: dict[str, list[int]] = {}
    for score in chosen:
        choice.setdefault(score.mechanism, []).append(score.layer)
    return choice
