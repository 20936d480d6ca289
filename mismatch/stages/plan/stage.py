"""`mismatch plan`: scan, choose, evaluate the choice on text that chose nothing, and name the swap to go on with."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from mismatch.errors import DataError, UsageError
from mismatch.runs.folder import Run, check_output, load_run
from mismatch.stages.base import Outcome, Stage
from mismatch.stages.chosen_on import ChosenOn
from mismatch.stages.opening import Opened
from mismatch.stages.plan import answers, ways
from mismatch.stages.plan.choose import enough
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.plan.measured import Choice, Measured, evaluate, swap_of
from mismatch.stages.plan.plan import Budgets, ChoicePlan
from mismatch.stages.plan.result import Planned
from mismatch.stages.plan.scores import SCORES
from mismatch.stages.scan.config import ScanConfig
from mismatch.stages.scan.prepared import Prepared as ScanPrepared
from mismatch.stages.scan.prepared import prepare
from mismatch.stages.scan.stage import task_plan
from mismatch.stages.scan.tasks import Task, tasks
from mismatch.stages.text_role import Text


@dataclass(frozen=True)
class Prepared:
    """What a plan works with.

    Attributes:
        scan: a finished scan to choose from; None: one is made.
        choice: what it chooses, with the facts of plan.json; None where there is no finished scan.
        scanning: the scan that is made, opened.
        cells: what it will do.
        tasks: what the choice is evaluated on: text behind that of the scan, and other keys.
        left_out: tasks that this model cannot be asked, with the reason.
    """

    scan: Run | None
    choice: tuple[Choice, dict[str, Any]] | None
    scanning: Opened[ScanConfig]
    cells: ScanPrepared
    tasks: tuple[Task, ...]
    left_out: dict[str, str]


class Plan(Stage[PlanConfig, Prepared]):
    help = "Choose the layers that a mechanism replaces at least cost, and measure them together."
    Config = PlanConfig
    Result = Planned
    examples = (
        "mismatch plan --model smollm2 --mechanism gated_deltanet --layers 8 --keep-retrieval",
        'mismatch plan --model smollm2 --mechanism "sliding_window(64, 1)" --budget-kl 0.2 --scan runs/SCAN',
    )
    report = "mismatch.stages.plan.report"
    plan = "mismatch.stages.plan.plan:ChoicePlan"
    subject = "mechanism"
    distributed = True
    student = False

    def check(self, config: PlanConfig, *, overwrite: bool = False) -> None:
        if config.folder is not None and config.makes_scan:
            check_output(ways.scan_beside(config.folder), overwrite=overwrite)

    def prepare(self, opened: Opened[PlanConfig]) -> Prepared:
        config = opened.config
        scan = None if config.scan is None else load_run(config.scan)
        if scan is not None and scan.manifest["kind"] != "scan":
            raise UsageError(
                f"the run in {config.scan} is no scan",
                hint="give a folder that `mismatch scan` made of this very model",
            )
        if scan is not None and scan.plan.by != "layer":
            raise UsageError(
                f"the scan in {config.scan} is by {scan.plan.by}, and a plan chooses whole layers",
                hint="make one by layer; heads are chosen by hand, as in --swap layer18.kv_heads[2]:...",
            )
        scanning = opened.child(config.scan_config())
        cells = prepare(scanning, beside=config.controls)
        choice = None
        if scan is not None:
            choice = ways.from_scan(config, cells, scan)
        else:
            enough(config.layers, {cell.layer for cell in cells.cells}, map(str, config.templates))
            ways.check_asked(config, cells, {task.name for task in cells.tasks})
        asked, left_out = self._tasks(opened, scanning, scan)
        return Prepared(scan, choice, scanning, cells, asked, left_out)

    def _tasks(
        self, opened: Opened[PlanConfig], scanning: Opened[ScanConfig], scan: Run | None
    ) -> tuple[tuple[Task, ...], dict[str, str]]:
        """The tasks on which the choice is evaluated: on documents that chose nothing, and with other keys.

        Raises:
            DataError: there are no such documents.
        """
        config, given = opened.config, scanning.texts["evaluation"]
        opened.texts |= {k: v for k, v in scanning.texts.items() if k == "calibration"}
        if scan is not None:
            assert scan.path is not None
            chosen = ChosenOn.of(scan.path)
            if (told := scan.manifest.get("texts", {}).get("evaluation")) is not None:
                opened.earlier["selection"] = told
        else:
            chosen = ChosenOn(
                "this plan",
                frozenset(given.digests),
                "give more text, or take fewer --selection-tokens",
            )
            if config.score not in ("even", "random"):
                opened.texts["selection"] = given
        documents = given.documents
        try:
            cut = opened.cut("evaluation", chosen.without(documents), config.tokens)
        except DataError:
            if not config.allow_overlap:
                raise
            # What stands behind the windows that chose, of the same documents.
            used = len(given.cut)
            whole = opened.cut("evaluation", documents, used * config.seq_len + config.tokens)
            if len(whole) <= used:
                raise
            cut = whole.part(slice(used, None))
            opened.texts["evaluation"] = Text(documents, cut, chosen.read_in(documents, cut))
        # The keys of a scan are those of its seed.
        seed = max(config.seed, 0 if scan is None else int(scan.manifest.get("seed", 0))) + 1
        other = dataclasses.replace(config, seed=seed)
        return tasks(other, None, cut, opened.tokenizer, opened.model_config)

    def announce(self, opened: Opened[PlanConfig], prepared: Prepared) -> str:
        config, scan = opened.config, prepared.scan
        if scan is not None:
            return f"{super().announce(opened, prepared)}\nscan    {config.scan}, {scan.run_id}"
        text = prepared.cells.text(prepared.scanning.config)
        if config.method == "greedy":
            most = config.layers or len(prepared.cells.layers)
            text += f"\ngreedy  a scan for every chosen layer: up to {most} times the above"
        elif not config.makes_scan:
            text = f"{super().announce(opened, prepared)}\nscore   {config.score}, without a scan"
        return text

    def loaded(self, opened: Opened[PlanConfig], prepared: Prepared) -> None:
        scan, config = prepared.scan, opened.config
        if scan is None:
            if config.keep_retrieval or SCORES[config.score].answers:
                answers.check(config, ways.teacher_answers(opened, prepared.cells))
            return
        if scan.manifest.get("model_info", {}).get("sha256") != opened.teacher.info.sha256:
            raise UsageError(
                f"the run in {scan.path} is of another model",
                hint="give a folder that `mismatch scan` made of this very model",
            )

    def run(self, opened: Opened[PlanConfig], prepared: Prepared) -> Outcome | None:
        config, started = opened.config, time.monotonic()
        choice, facts = _choice(opened, prepared)
        chosen = time.monotonic()
        count = 2 + len(config.controls) + sum(map(len, choice.values()))

        def evaluated(config: PlanConfig) -> Measured:
            size = config.batch_size * config.seq_len
            runs = count * sum(1 for task in prepared.tasks for _ in task.batches(size))
            with opened.bar(runs, "evaluating", "run") as bar:
                return evaluate(
                    opened.teacher,
                    config,
                    choice,
                    prepared.tasks,
                    prepared.cells.calibration,
                    bar.update,
                    opened.ranks,
                )

        measured = opened.fitting(evaluated, "while the choice was evaluated")
        if not opened.ranks.first:
            return None
        seconds = {"choice": chosen - started, "evaluation": time.monotonic() - chosen}
        rows = [
            *measured.rows(),
            *(row | {"stage": "plan"} for row in measured.sums.teacher_rows()),
        ]
        return Outcome(rows, _plan(config, prepared, choice, measured, facts), seconds=seconds)


def _plan(
    config: PlanConfig,
    prepared: Prepared,
    choice: Choice,
    measured: Measured,
    facts: dict[str, Any],
) -> ChoicePlan:
    # What the choice could not be asked it cannot be evaluated on either: one reason is enough.
    notes = (
        f"{task} is not measured: {why}"
        for task, why in prepared.left_out.items()
        if task not in prepared.cells.left_out
    )
    return ChoicePlan(
        model=config.model,
        swap=swap_of(config, choice),
        method=config.method,
        score=config.score,
        choice={name: tuple(sorted(layers)) for name, layers in choice.items()},
        n_layers=prepared.cells.n_layers,
        among=prepared.cells.layers,
        budgets=Budgets(
            config.budget_kl, config.budget_retrieval if config.keep_retrieval else None
        ),
        tasks={task.name: task_plan(task) for task in measured.sums.tasks},
        notes=(*prepared.cells.notes(), *notes),
        **facts,
    )


def _choice(opened: Opened[PlanConfig], prepared: Prepared) -> ways.Way:
    config, cells = opened.config, prepared.cells
    if prepared.choice is not None:
        return prepared.choice
    if config.method == "greedy":
        return ways.greedily(opened, cells)
    if config.makes_scan:
        return ways.from_scan(config, cells, ways.scanned(opened, prepared.scanning, cells))
    if config.score == "restore_one":
        return ways.by_restoring(opened, cells)
    if config.score == "gates":
        return ways.by_gates(opened, cells)
    return ways.without_looking(config, cells)
