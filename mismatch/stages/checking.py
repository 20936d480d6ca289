"""What a trace would do, worked out from the config of the model alone, before any weight is loaded."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch import registry, spec
from mismatch.config import ELSEWHERE, ProbeConfig, RunConfig, TraceConfig, load
from mismatch.errors import OutputError, UsageError
from mismatch.mechanisms.parts.user_module import configured
from mismatch.models.layout import Layout, family_of
from mismatch.models.load import read_config
from mismatch.report.words import plan_lines
from mismatch.runs.folder import check_resume
from mismatch.stages.estimate import Estimate, estimate
from mismatch.surgery import loading as checkpoint
from mismatch.surgery.controls import control_specs
from mismatch.surgery.operate import Plan, Student, operate, placed
from mismatch.texts.documents import Documents, calibration_and_evaluation, read
from mismatch.texts.windows import Windows, windows


@dataclass(frozen=True)
class Text:
    """What is measured on, cut into windows, and what mechanisms may calibrate on (None: none of them does)."""

    held_out: Documents
    calibration: Documents | None
    cut: Windows


@dataclass(frozen=True)
class Check:
    """Plan, warnings and cost of a trace."""

    plan: Plan
    estimate: Estimate
    config: TraceConfig
    warnings: tuple[str, ...]

    def text(self) -> str:
        """For a person."""
        c = self.config
        controls = f"; controls {', '.join(c.controls)}" if c.controls else ""
        lines = [
            f"model   {c.model} ({c.dtype})",
            *(f"swap    {line}" for line in plan_lines(plan_dict(self.plan))),
            f"text    {c.data}, {c.tokens} tokens in windows of {c.seq_len}{controls}",
            *self.estimate.lines(),
            *(f"warning: {text}" for text in self.warnings),
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For a machine."""
        return {
            "plan": plan_dict(self.plan, self.warnings),
            "estimate": dataclasses.asdict(self.estimate),
            "config": self.config.to_dict(),
        }

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.text())}</pre>"


def check(config: TraceConfig) -> Check:
    """Resolve the swap on the model's config and build it, and its controls, on the meta device.

    Raises:
        MismatchError: whatever a trace would refuse of model, swap and controls.
    """
    skeleton, students = planned(config)
    needs = estimate(skeleton, [student.plan.first for student in students], config)
    return Check(students[0].plan, needs, config, plan_warnings(students[0].plan, config.seq_len))


def planned(config: TraceConfig | ProbeConfig) -> tuple[Layout, list[Student]]:
    """The model on the meta device, and on it the swap and its controls.

    Raises:
        MismatchError: whatever would be refused of model, swap and controls.
    """
    model_config, _ = read_config(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    family_of(model_config)
    check_context(model_config, config)
    skeleton = checkpoint.skeleton(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    students = [_on_meta(skeleton, config.swap_spec)]
    controls = control_specs(config.controls, students[0].plan)
    return skeleton, students + [_on_meta(skeleton, spec_) for spec_ in controls.values()]


def check_context(model_config: Any, config: TraceConfig | ProbeConfig) -> None:
    """Whether a window fits into what the model was made for.

    Raises:
        UsageError: it does not.
    """
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and config.seq_len > limit:
        raise UsageError(
            f"--seq-len {config.seq_len} is longer than the context of {config.model}: {limit} tokens",
            hint=f"take --seq-len {limit} or less",
        )


def check_settings(run: Path, config: RunConfig) -> None:
    """Whether the unfinished run in a folder may go on with these settings.

    Raises:
        RunError: no run there.
        OutputError: that run is done, or was started with other settings; says which.
    """
    check_resume(run)
    then, now = load(run / "config.yaml", kind=type(config)).to_dict(), config.to_dict()
    fields = [name for name in now if name not in ELSEWHERE and then[name] != now[name]]
    if fields:
        lines = [f"  {name}: {then[name]!r} then, {now[name]!r} now" for name in fields]
        raise OutputError(
            f"the run in {run} was started with other settings:\n" + "\n".join(lines),
            hint="resume it with the same settings, or start a new run without --resume",
        )


def read_text(
    config: TraceConfig | ProbeConfig,
    data: Any,
    calibration: Any,
    tokenizer: Any,
    *,
    swapped: bool = False,
) -> Text:
    """Read the held-out text and cut it. The calibration text is read only if something calibrates on it.

    Args:
        config: the settings.
        data, calibration: held-out and calibration text, as `mismatch.texts.documents.read` takes them.
        tokenizer: of the model.
        swapped: the swap is there already; only the controls may still calibrate.

    Raises:
        DataError: text that is missing, unreadable, empty, shorter than a window, or in both texts.
    """
    if _calibrates(config, swapped) or calibration == data:
        learnt, held_out = calibration_and_evaluation(calibration, data)
    else:
        learnt, held_out = None, read(data)
    cut = windows(held_out, tokenizer, config.seq_len, config.tokens, config.seed)
    return Text(held_out, learnt, cut)


def _calibrates(config: TraceConfig | ProbeConfig, swapped: bool) -> bool:
    clauses = [] if swapped else spec.check(config.swap_spec).clauses
    calls = [call for clause in clauses for call in clause.call.nested()]
    calls += [spec.Call(control) for control in config.controls]
    found = (configured(call) for call in calls)
    return any(cls.calibrator(config) is not None for cls, config in found)


def plan_warnings(plan: Plan, seq_len: int) -> tuple[str, ...]:
    """What the user should know before believing the numbers."""
    found = []
    for clause in plan.clauses:
        arg = registry.mechanisms().card(clause.mechanism).arg("segment")
        segment = clause.args.get("segment", None if arg is None else arg.default)
        if segment is not None and segment >= seq_len:
            found.append(
                f"layer {clause.layer}: one segment of {segment} tokens holds the whole window of {seq_len}, so the "
                "memory is never read; take a smaller segment or a longer --seq-len"
            )
    return tuple(found)


def plan_dict(plan: Plan, warned: Iterable[str] = ()) -> dict[str, Any]:
    """The content of plan.json."""
    clauses = [dataclasses.asdict(clause) for clause in plan.clauses]
    return {"spec": plan.spec, "clauses": clauses, "warnings": list(warned)}


def _on_meta(skeleton: Layout, parsed: spec.Spec) -> Student:
    return operate(skeleton, placed(parsed, skeleton), spec=spec.format(parsed))
