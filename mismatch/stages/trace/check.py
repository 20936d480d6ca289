"""What a trace would do, worked out from the model's config alone: plan, warnings, cost. `mismatch check` prints it."""

from __future__ import annotations

import dataclasses
import html
from dataclasses import dataclass
from typing import Any

from mismatch.errors import UsageError
from mismatch.report.words import plan_lines, subject
from mismatch.runs.plan import SwapPlan
from mismatch.stages.estimate import Estimate, estimate
from mismatch.stages.opening import Opened
from mismatch.stages.swapped import warned
from mismatch.stages.trace.config import TraceConfig


@dataclass(frozen=True)
class Check:
    """SwapPlan, warnings and cost of a trace."""

    plan: SwapPlan
    estimate: Estimate
    config: TraceConfig

    def text(self) -> str:
        """For a person."""
        c = self.config
        controls = f"; controls {', '.join(c.controls)}" if c.controls else ""
        lines = [
            f"model   {c.model} ({c.dtype})",
            *(f"{subject(self.plan):8}{line}" for line in plan_lines(self.plan)),
            f"text    {c.data}, up to {c.tokens:,} tokens in windows of {c.seq_len}{controls}",
            *self.estimate.lines(),
            *(f"warning: {text}" for text in self.plan.warnings),
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For a machine."""
        return {
            "plan": dataclasses.asdict(self.plan),
            "estimate": dataclasses.asdict(self.estimate),
            "config": self.config.to_dict(),
        }

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.text())}</pre>"


def checked(opened: Opened[TraceConfig], tokens: int | None = None) -> Check:
    """Resolve the swap on the model's config and build it, and its controls, on the meta device.

    Args:
        opened: its command.
        tokens: that there are; None: as many as were asked for.

    Raises:
        MismatchError: whatever a trace would refuse of model, swap and controls; no such text. That there is no
            tokenizer is a warning: the plan needs none.
    """
    opened.fit()
    config, students = opened.config, opened.planned()
    plan = warned(students[0].plan, config.seq_len, config.controls)
    try:
        _ = opened.tokenizer
    except UsageError as error:
        found = f"a trace would be refused, and the text was not read: {error.message.strip()}"
        plan = dataclasses.replace(plan, warnings=(*plan.warnings, found))
    else:
        opened.documents("evaluation")
    first = [student.plan.first for student in students]
    needs = estimate(opened.skeleton, first, config, tokens)
    return Check(plan, needs, config)
