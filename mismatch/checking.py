"""What a trace would do, worked out from the config of the model alone, before any weight is loaded."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mismatch import models, registry, spec, surgery
from mismatch.config import TraceConfig
from mismatch.controls import control_specs
from mismatch.errors import UsageError
from mismatch.estimate import Estimate, estimate
from mismatch.layout import Layout, family_of
from mismatch.report.summary import plan_lines
from mismatch.surgery import Plan, Student


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
    model_config, _ = models.read_config(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    family_of(model_config)
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and config.seq_len > limit:
        raise UsageError(
            f"--seq-len {config.seq_len} is longer than the context of {config.model}: {limit} tokens",
            hint=f"take --seq-len {limit} or less",
        )
    skeleton = Layout.of(models.skeleton(model_config))
    students = [_on_meta(skeleton, config.swap_spec)]
    controls = control_specs(config.controls, students[0].plan)
    students += [_on_meta(skeleton, control) for control in controls.values()]
    needs = estimate(skeleton, [student.plan.first for student in students], config)
    return Check(students[0].plan, needs, config, plan_warnings(students[0].plan, config.seq_len))


def placed(parsed: spec.Spec, layout: Layout) -> tuple[spec.Placement, ...]:
    """The places that a swap touches in this model.

    Raises:
        SpecError: a layer or a slot that the model does not have.
    """
    family = layout.family
    return spec.resolve(parsed, layout.n_layers, family.slot_names(), family.name, family.lacks)


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
    return surgery.operate(skeleton, placed(parsed, skeleton), spec=spec.format(parsed))
