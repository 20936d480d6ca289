"""What the stages about one swap share: its plan in plan.json, what to know before believing numbers, its texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from mismatch import registry, spec
from mismatch.mechanisms.parts.user_module import configured
from mismatch.runs.plan import Replaced, SwapPlan
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


def reach(clauses: Iterable[Replaced]) -> int:
    """Tokens that the local parts of all swapped mechanisms hold: up to there they lack no context."""
    found = [0]
    for clause in clauses:
        card = registry.mechanisms().card(clause.mechanism)
        for name in ("segment", "window"):
            arg = card.arg(name)
            held = clause.args.get(name, None if arg is None else arg.default)
            found += [held] if isinstance(held, int) else []
    return max(found)


def calibration_tokens(
    calls: Iterable[spec.Call], controls: Iterable[str] = (), *, d_model: int
) -> int:
    """Tokens that the largest fit among mechanisms and controls needs; 0: none sets itself from calibration text."""
    every = [inner for call in calls for inner in call.nested()]
    found = [configured(call) for call in (*every, *map(spec.Call, controls))]
    needs = [
        cls.calibration_tokens(config, d_model) for cls, config in found if cls.calibrator(config)
    ]
    return max(needs, default=0)


def swap_texts(opened: Opened[Any]) -> tuple[Windows | None, Documents]:
    """Calibration windows and evaluation documents of a swap and its controls; None: none of them calibrates.

    Raises:
        DataError: text that is missing, unreadable, empty, too short, or in both.
    """
    wanted = swap_calibration(opened)
    calibration, held_out = opened.apart(calibrates=wanted > 0)
    return opened.calibration(wanted, calibration), held_out


def swap_calibration(opened: Opened[Any]) -> int:
    """Calibration tokens that the swap of a command and its controls need; 0: none of them calibrates."""
    # The swap of a student exists already; only the controls may still calibrate.
    clauses = () if opened.has_student else spec.check(opened.swap_config.swap_spec).clauses
    calls = [clause.call for clause in clauses]
    plan = opened.planned()[0].plan
    controls = opened.config.controls if plan.clauses else ()
    return calibration_tokens(calls, controls, d_model=opened.skeleton.d_model)
