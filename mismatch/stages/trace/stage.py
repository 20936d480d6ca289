"""`mismatch trace`: teacher and swapped model side by side, every site of every layer, and where they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from mismatch import registry
from mismatch.errors import ModelError, UsageError
from mismatch.forward import hooks
from mismatch.metrics.sums.per_document import Units
from mismatch.models.folder import saved_dtypes
from mismatch.models.layout import Layout
from mismatch.models.offloaded import offloaded
from mismatch.models.quantised import is_quantised
from mismatch.models.upcast import in_float32
from mismatch.runs.batch_size import is_memory
from mismatch.runs.site_names import SITES
from mismatch.stages.base import SEVERITIES, Finding, Outcome, Stage
from mismatch.stages.opening import Opened
from mismatch.stages.probe.questions import Questions, answers, questions_behind
from mismatch.stages.swapped import swap_texts, warned
from mismatch.stages.trace.batches import measure
from mismatch.stages.trace.check import Check, checked
from mismatch.stages.trace.config import TraceConfig
from mismatch.stages.trace.evidence import Evidence
from mismatch.stages.trace.findings import findings_of
from mismatch.stages.trace.meters import Collector
from mismatch.stages.trace.result import Traced
from mismatch.surgery.loading import load
from mismatch.surgery.operate import Student
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class Prepared:
    """Plan and cost, evaluation windows, calibration windows (None: nothing calibrates), probes behind the trace."""

    check: Check
    cut: Windows
    calibration: Windows | None
    probes: Questions | None


class Trace(Stage[TraceConfig, Prepared]):
    help = "Run teacher and swapped model side by side and measure where they differ."
    Config = TraceConfig
    Result = Traced
    examples = (
        'mismatch trace --model smollm2 --swap "layer12:infini"',
        'mismatch trace --model ./my-model --swap "layers[8-15].attn:sliding_window(window=256)" --tokens 65536',
    )
    report = "mismatch.stages.trace.report.page"
    plan = "mismatch.runs.plan:SwapPlan"
    resumable = True
    distributed = True

    def prepare(self, opened: Opened[TraceConfig]) -> Prepared:
        opened.planned()  # refuses what model, swap and controls do not allow
        if opened.skeleton.parallel and "resid_mid" in (opened.config.sites or ()):
            raise UsageError(
                "--sites resid_mid: attention and MLP of this model read the same stream, and none is between them",
                hint="leave it out",
            )
        calibration, held_out = swap_texts(opened)
        cut = opened.cut("evaluation", held_out, opened.config.tokens)
        return Prepared(checked(opened, cut.tokens), cut, calibration, questions_behind(opened))

    def announce(self, opened: Opened[TraceConfig], prepared: Prepared) -> str:
        return prepared.check.text()

    def run(self, opened: Opened[TraceConfig], prepared: Prepared) -> Outcome | None:
        config, teacher, cut = opened.config, opened.teacher, prepared.cut
        students = opened.students(prepared.calibration)
        swap, counted = students[0], int(cut.scored.sum())
        collector = Collector(
            teacher.layout,
            {s.name: s.layout for s in students},
            {s.name: s.plan for s in students},
            config.metrics or default_metrics(),
            units=Units.by(cut.doc, cut.offset),
            n_pos=cut.seq_len,
            n_tokens=counted,
            sample=min(1.0, config.moment_tokens / counted),
            seed=config.seed,
            everywhere=config.metrics is not None,
            sites=config.sites or SITES,
        )
        plan = warned(swap.plan, cut.seq_len, config.controls)
        if opened.folder is not None:
            opened.folder.write_plan(plan)
            opened.folder.log(
                f"{len(cut)} windows of {cut.n_docs} documents, {len(students)} students"
            )
        reference = _float32(opened)

        def fill(config: TraceConfig) -> None:
            parts = enumerate(cut.batches(config.batch_size))
            windows = sum(len(batch.ids) for i, batch in parts if opened.ranks.mine(i))
            with opened.bar(windows, f"{cut.n_docs} documents", "window") as bar:
                measure(
                    teacher.layout,
                    students,
                    collector,
                    cut,
                    batch_size=config.batch_size,
                    reference=reference,
                    ranks=opened.ranks,
                    state=opened.state(),
                    fingerprint=opened.fingerprints(),
                    progress=bar.update,
                    run=_backend(config.backend),
                )

        opened.fitting(fill, "in the trace")
        asked = prepared.probes
        answered = [] if asked is None else answers(asked, teacher, students).rows
        if not opened.ranks.first:
            return None
        rows = [*collector.rows(), *answered]
        floor = "the text in another batch shape" if reference is None else "the model in float32"
        return Outcome(rows, plan, {"floor": floor}, memory={"swap": swap})

    def findings(
        self, opened: Opened[TraceConfig], outcome: Outcome, table: pd.DataFrame
    ) -> Sequence[Finding]:
        swap: Student = outcome.memory["swap"]
        n_layers = opened.teacher.layout.n_layers
        return findings_of(
            Evidence(
                table,
                swap.plan.layers,
                n_layers,
                opened.config.model,
                swap.plan.clauses,
                swap.plan.apart,
            )
        )

    def exit_code(self, config: TraceConfig, result: Traced) -> int:
        if config.fail_on is None:
            return 0
        limit = SEVERITIES.index(config.fail_on)
        reached = any(SEVERITIES.index(f.severity) >= limit for f in result.findings)
        return 3 if reached else 0


def _float32(opened: Opened[TraceConfig]) -> Layout | None:
    """The model in float32, for the floor of a run in another dtype: read anew where its file holds more."""
    teacher, config = opened.teacher, opened.config
    if teacher.model.dtype == torch.float32 or not opened.ranks.first or offloaded(teacher.model):
        return None
    coded = is_quantised(teacher.model)
    path = Path(teacher.info.path) if teacher.info.path else None
    try:
        if path is not None and (
            coded or saved_dtypes(path) != {str(teacher.model.dtype).removeprefix("torch.")}
        ):
            return load(
                path,
                dtype="float32",
                device=teacher.layout.embedding_device,
                trust_remote_code=config.trust_remote_code,
                allow_pickle=config.allow_pickle,
            ).layout
        # What its codes were made of is not here.
        return None if coded else in_float32(teacher.layout)
    except (MemoryError, RuntimeError, ModelError) as error:
        if not isinstance(error, ModelError) and not is_memory(error):
            raise
        return None  # the floor is then that of another batch shape alone


def _backend(name: str) -> Callable[..., torch.Tensor]:
    if name == "hooks":
        return hooks.run
    from mismatch.forward import nnsight_backend

    return nnsight_backend.run


def default_metrics() -> tuple[str, ...]:
    """Every metric but those that cost much beside another one that says the same (`default = False`)."""
    known = registry.metrics()
    return tuple(name for name in known.names() if known.card(name).facts.get("default", True))
