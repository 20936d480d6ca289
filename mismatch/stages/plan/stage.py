"""`mismatch plan`: scan, choose, evaluate the choice on text that chose nothing, and name the swap to go on with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch.config import load as load_config
from mismatch.errors import DataError, RunError, UsageError
from mismatch.runs.folder import Run, check_output, load_run
from mismatch.stages.base import Outcome, Stage
from mismatch.stages.opening import Opened
from mismatch.stages.plan.choose import Score, choose, enough
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.plan.greedy import greedy
from mismatch.stages.plan.measured import Choice, Measured, evaluate, swap_of
from mismatch.stages.plan.plan import Budgets, ChoicePlan, Predicted, StepPlan
from mismatch.stages.plan.result import Planned
from mismatch.stages.runner import work
from mismatch.stages.scan.atlas import atlas_data
from mismatch.stages.scan.config import ScanConfig
from mismatch.stages.scan.prepared import Prepared as ScanPrepared
from mismatch.stages.scan.prepared import prepare
from mismatch.stages.scan.stage import Scan, sweep_of, task_plan
from mismatch.stages.scan.tasks import Task, tasks
from mismatch.stages.scan.words import can_do
from mismatch.stages.text_role import Text
from mismatch.texts.windows import Windows, windows


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
    alone = "spread the scan: torchrun -m mismatch scan ..., then mismatch plan --scan RUN"
    student = False

    def check(self, config: PlanConfig, *, overwrite: bool = False) -> None:
        if config.folder is not None and config.scan is None and config.method != "greedy":
            check_output(scan_beside(config.folder), overwrite=overwrite)

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
            choice = _chosen(config, cells, scan)
        else:
            enough(config.layers, {cell.layer for cell in cells.cells}, map(str, config.templates))
            _check_asked(config, cells, {task.name for task in cells.tasks})
        selection = _selection(scanning, scan)
        asked, left_out = self._tasks(opened, scanning, selection)
        return Prepared(scan, choice, scanning, cells, asked, left_out)

    def _tasks(
        self, opened: Opened[PlanConfig], scanning: Opened[ScanConfig], selection: Windows | None
    ) -> tuple[tuple[Task, ...], dict[str, str]]:
        """The tasks on which the choice is evaluated.

        Raises:
            DataError: the text ends with that of the scan.
        """
        config, held_out = opened.config, scanning.texts["evaluation"].documents
        used = 0 if selection is None else len(selection)
        tokens = used * config.seq_len + config.tokens
        whole = windows(
            held_out,
            opened.tokenizer,
            config.seq_len,
            tokens,
            config.seed,
            answers=config.answers_only,
        )
        if len(whole) <= used:
            raise DataError(
                f"{held_out.source} has {len(whole)} windows of --seq-len {config.seq_len}; the "
                f"choice is made from {used} of them, and none is left to evaluate it on",
                hint="take fewer --selection-tokens, a shorter --seq-len, or longer text",
            )
        rest = whole.part(slice(used, None))
        opened.texts |= {k: v for k, v in scanning.texts.items() if k == "calibration"}
        if selection is not None:
            opened.texts["selection"] = Text(held_out, selection)
        opened.texts["evaluation"] = Text(held_out, rest)
        other = dataclasses.replace(config, seed=config.seed + 1)
        return tasks(other, None, rest, opened.tokenizer, opened.model_config)

    def announce(self, opened: Opened[PlanConfig], prepared: Prepared) -> str:
        config, scan = opened.config, prepared.scan
        if scan is not None:
            return f"{super().announce(opened, prepared)}\nscan    {config.scan}, {scan.run_id}"
        text = prepared.cells.text(prepared.scanning.config)
        if config.method == "greedy":
            most = config.layers or len(prepared.cells.layers)
            text += f"\ngreedy  a scan for every chosen layer: up to {most} times the above"
        return text

    def loaded(self, opened: Opened[PlanConfig], prepared: Prepared) -> None:
        scan = prepared.scan
        if scan is None:
            return
        if scan.manifest.get("model_info", {}).get("sha256") != opened.teacher.info.sha256:
            raise UsageError(
                f"the run in {scan.path} is of another model",
                hint="give a folder that `mismatch scan` made of this very model",
            )

    def run(self, opened: Opened[PlanConfig], prepared: Prepared) -> Outcome:
        config, started = opened.config, time.monotonic()
        choose_ = _greedy if config.method == "greedy" else _exact
        choice, facts = choose_(opened, prepared)
        chosen = time.monotonic()
        count = 2 + len(config.controls) + sum(map(len, choice.values()))
        size = config.batch_size * config.seq_len
        runs = count * sum(1 for task in prepared.tasks for _ in task.batches(size))
        with opened.bar(runs, "evaluating", "run") as bar:
            measured = evaluate(
                opened.teacher,
                config,
                choice,
                prepared.tasks,
                prepared.cells.calibration,
                bar.update,
            )
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
    notes = (f"{task} is not measured: {why}" for task, why in prepared.left_out.items())
    return ChoicePlan(
        model=config.model,
        swap=swap_of(config, choice),
        method=config.method,
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


def _selection(scanning: Opened[ScanConfig], scan: Run | None) -> Windows | None:
    """The windows, from the first one on, that the choice is made from; None: a finished scan had other text.

    Raises:
        UsageError: a finished scan had this text, cut in another way: what chose nothing cannot be told.
    """
    if scan is None:
        return scanning.texts["evaluation"].cut
    assert scan.path is not None
    mine = scanning.config
    trusted = {"trust_remote_code": mine.trust_remote_code}
    theirs = load_config(ScanConfig, scan.path / "config.yaml", trusted)
    held_out = scanning.texts["evaluation"].documents
    there = scan.manifest.get("texts", {}).get("evaluation")
    if there is None:
        raise RunError(f"the scan in {scan.path} does not say on which text it chose")
    seq_len, seed, answers = theirs.seq_len, theirs.seed, theirs.answers_only
    try:
        cut = windows(held_out, scanning.tokenizer, seq_len, there["tokens"], seed, answers=answers)
    except DataError:  # too little text for such windows
        cut = None
    same = cut is not None and cut.fingerprint == there["fingerprint"]
    if same and (seq_len, seed, answers) == (mine.seq_len, mine.seed, mine.answers_only):
        return cut
    if same or ("data" not in scanning.given and theirs.data == mine.data):
        only = "--answers-only" if answers else "--no-answers-only"
        raise UsageError(
            f"the scan in {scan.path} chose on {mine.data} too, cut in another way: the choice would be evaluated on "
            "text that made it",
            hint=f"take --seq-len {seq_len} --seed {seed} {only}, or other --data",
        )
    return None


def _exact(opened: Opened[PlanConfig], prepared: Prepared) -> tuple[Choice, dict[str, Any]]:
    if prepared.choice is not None:
        return prepared.choice
    return _chosen(opened.config, prepared.cells, _scanned(opened, prepared))


def _chosen(config: PlanConfig, cells: ScanPrepared, run: Run) -> tuple[Choice, dict[str, Any]]:
    """What a scan chooses.

    Raises:
        UsageError: it has not what the choice needs, or no choice stays within the budgets.
    """
    scores = scores_of(run, [str(t) for t in config.templates], cells.layers)
    _check_asked(config, cells, set(run.table["metric"]))
    if config.keep_retrieval and not can_do(run.table, "passkey", run.plan):
        raise UsageError(
            "--keep-retrieval, but the model itself does not find the passkey: there is nothing to keep",
            hint="a shorter --length may be easier; or leave --keep-retrieval out",
        )
    budget = config.budget_retrieval if config.keep_retrieval else None
    found = choose(scores, config.layers, budget_kl=config.budget_kl, budget_lost=budget)
    choice: dict[str, list[int]] = {}
    for score in found:
        choice.setdefault(score.mechanism, []).append(score.layer)
    predicted = Predicted(sum(s.kl for s in found), sum(s.charged for s in found))
    facts = {"scan": run.run_id, "scores": tuple(scores), "predicted_by_scan": predicted}
    return choice, facts


def _scanned(opened: Opened[PlanConfig], prepared: Prepared) -> Run:
    """A scan of its own: it is kept whatever becomes of the plan, and can be chosen from again."""
    scanning, folder = prepared.scanning, opened.folder
    if folder is not None:
        output = str(scan_beside(folder.path))
        scanning.config = dataclasses.replace(scanning.config, output=output)
    scanning.take(opened.teacher)
    return work(Scan("scan"), scanning, prepared.cells, write=folder is not None).run


def _check_asked(config: PlanConfig, cells: ScanPrepared, asked: Collection[str]) -> None:
    """Whether the choice has the passkey that it needs."""
    if config.keep_retrieval and "passkey" not in asked:
        raise UsageError(
            "--keep-retrieval needs a passkey, and none is measured: "
            + cells.left_out.get("passkey", "the scan left it out"),
            hint="take a --length that fits, or leave --keep-retrieval out",
        )


def _greedy(opened: Opened[PlanConfig], prepared: Prepared) -> tuple[Choice, dict[str, Any]]:
    config, cells = opened.config, prepared.cells
    wanted = ("text", "passkey") if config.keep_retrieval else ("text",)
    asked = tuple(task for task in cells.tasks if task.name in wanted)
    sweep = sweep_of(opened.teacher, config, cells.cells, cells.calibration)
    there, most = len(cells.cells), len(cells.layers)
    # After each step the cells of one layer are gone.
    runs = sum(there - round(at * there / most) for at in range(min(config.layers or most, most)))
    size = config.batch_size * config.seq_len
    batches = sum(1 for task in asked for _ in task.batches(size))
    with opened.bar(runs * batches, "greedy", "run") as bar:
        steps = greedy(sweep, cells.cells, asked, config, bar.update)
    choice: dict[str, list[int]] = {}
    for step in steps:
        assert step.cell.layer is not None  # candidates are of one layer each
        choice.setdefault(step.cell.name, []).append(step.cell.layer)
    path = (
        StepPlan(step.cell.layer, step.cell.name, step.kl.value, step.kl.lo, step.kl.hi, step.lost)
        for step in steps
        if step.cell.layer is not None
    )
    return choice, {"steps": tuple(path)}


def scan_beside(path: Path) -> Path:
    """Where the scan of a plan is written."""
    return path.with_name(f"{path.name}-scan")


def scores_of(run: Run, names: Sequence[str], layers: Sequence[int]) -> list[Score]:
    """The cells of a scan that may be chosen.

    Raises:
        UsageError: the scan is not of these mechanisms, or asked no text.
    """
    data = atlas_data(run.table)
    data = data[(data["kind"] != "missing") & data["layer"].isin(list(layers))]
    there = set(data["student"])
    if missing := [name for name in names if name not in there]:
        raise UsageError(
            f"the scan {run.run_id} has no `{missing[0]}`",
            hint=f"it has {', '.join(sorted(there))}; scan it, or leave --scan out",
        )
    text = data[data["task"] == "text"].set_index(["student", "layer"])["value"]
    lost = data[data["task"] == "passkey"].set_index(["student", "layer"])["value"]
    if text.empty:
        raise UsageError(
            f"the scan {run.run_id} did not ask for text, so no layer has a KL to choose by",
            hint="scan with the task text, or leave --scan out",
        )
    return [
        Score(int(layer), name, float(kl), float(lost.get((name, layer), 0.0)))
        for (name, layer), kl in text.items()
        if name in names
    ]
