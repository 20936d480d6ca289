"""What a trace would do, worked out from the model's config alone: plan, warnings, cost. `mismatch check` prints it."""

from __future__ import annotations

import dataclasses
import html
from dataclasses import dataclass
from typing import Any

from mismatch.report.words import plan_lines
from mismatch.stages.estimate import Estimate, estimate
from mismatch.stages.opening import Opened
from mismatch.stages.swapped import plan_dict, plan_warnings
from mismatch.stages.trace.config import TraceConfig
from mismatch.surgery.operate import Plan


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


def checked(opened: Opened[TraceConfig]) -> Check:
    """Resolve the swap on the model's config and build it, and its controls, on the meta device.

    Raises:
        MismatchError: whatever a trace would refuse of model, swap and controls.
    """
    config, students = opened.config, opened.planned()
    needs = estimate(opened.skeleton, [student.plan.first for student in students], config)
    return Check(students[0].plan, needs, config, plan_warnings(students[0].plan, config.seq_len))
