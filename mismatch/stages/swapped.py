"""What the stages about one swap share: its plan in plan.json, what to know before believing numbers, its texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from mismatch import registry, spec
from mismatch.mechanisms.parts.user_module import configured
from mismatch.runs.plan import SwapPlan
from mismatch.stages.opening import Opened
from mismatch.texts.documents import Documents
from mismatch.texts.windows import Windows


def warned(plan: SwapPlan, seq_len: int, controls: Sequence[str] = ()) -> SwapPlan:
    """The plan with what the user should know before believing the numbers."""
    found = []
    if controls and not plan.clauses:
        found.append(
            f"no control is measured ({', '.join(controls)}): nothing was swapped in this student, so there is no "
            "slot for one"
        )
    for clause in plan.clauses:
        arg = registry.mechanisms().card(clause.mechanism).arg("segment")
        segment = clause.args.get("segment", None if arg is None else arg.default)
        if segment is not None and segment >= seq_len:
            found.append(
                f"layer {clause.layer}: one segment of {segment} tokens holds the whole window of {seq_len}, so the "
                "memory is never read; take a smaller segment or a longer --seq-len"
            )
    return dataclasses.replace(plan, warnings=(*plan.warnings, *found))


def calibrates(clauses: Iterable[spec.Clause], controls: Iterable[str] = ()) -> bool:
    """Whether anything in a swap, or a control, sets itself from calibration text."""
    calls = [call for clause in clauses for call in clause.call.nested()]
    calls += [spec.Call(control) for control in controls]
    found = (configured(call) for call in calls)
    return any(cls.calibrator(config) is not None for cls, config in found)


def swap_texts(opened: Opened[Any]) -> tuple[Windows | None, Documents]:
    """Calibration windows and evaluation documents of a swap and its controls; None: none of them calibrates.

    Raises:
        DataError: text that is missing, unreadable, empty, too short, or in both.
    """
    wanted = swap_calibrates(opened)
    calibration, held_out = opened.apart(calibrates=wanted)
    return opened.calibration(calibration) if wanted else None, held_out


def swap_calibrates(opened: Opened[Any]) -> bool:
    """Whether the swap of a command or one of its controls sets itself from calibration text."""
    # The swap of a student exists already; only the controls may still calibrate.
    clauses = () if opened.has_student else spec.check(opened.swap_config.swap_spec).clauses
    plan = opened.planned()[0].plan
    return calibrates(clauses, opened.config.controls if plan.clauses else ())
