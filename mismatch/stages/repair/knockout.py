"""Is a repaired mechanism used, or was it trained around?

"Repaired" may mean "bypassed": in LoLCATs' hybrids the linear branch may contribute nothing (arXiv 2510.05901). Each
branch that a mechanism names is taken out, one at a time, and the held-out KL is measured again on the same tokens: the
difference is paired, with its interval.

    used       without it the KL grows by more than `MATTERS` of what the repair left, whole interval
    bypassed   it grows by less, whole interval (or falls): the repair does not need the branch
    open       the interval holds that border, or there is none: too little text to say

What remains keeps its weight (`Mechanism.branches`), so the reading is what the branch adds to this student, not what a
student trained without it would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mismatch.forward.heldout import Evaluated, HeldOut
from mismatch.mechanisms.base import Mechanism
from mismatch.report.intervals import side
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair
from mismatch.stages.repair.plan import Branch
from mismatch.surgery.operate import Student

MATTERS = 0.1
"""A branch without which the KL grows by less than this share does not matter."""


def knocked_out(
    held_out: HeldOut,
    student: Student,
    parts: Sequence[ModulePair],
    repaired: Evaluated,
) -> list[Branch]:
    """Every branch of every part taken out in turn; a part without branches is there as not applicable.

    Args:
        held_out: text, with the teacher's side.
        student: the repaired model.
        parts: its swapped modules.
        repaired: the same model as it is, on that text.
    """
    found = []
    for part in parts:
        branches = list(_branches(part))
        for name, mechanism in branches:
            with mechanism.branches()[name]:
                without = held_out.evaluate(student.layout)
            kl = without.kl.mean()[:3]
            more = (without.kl - repaired.kl).mean()[:3]
            said = verdict(more, MATTERS * repaired.kl.mean().value)
            found.append(Branch(part.layer, part.where, name, *kl, *more, said))
        if not branches:
            found.append(Branch(part.layer, part.where, None))
    return found


def verdict(more: tuple[float, float, float], border: float) -> str:
    """`used`, `bypassed` or `open`, from the interval of the growth of the KL."""
    return {"above": "used", "below": "bypassed"}.get(side(*more[1:], border), "open")


def _branches(part: ModulePair) -> Iterator[tuple[str, Mechanism]]:
    """The branches of the outermost mechanism that has some: a wrapper stands around the one that it holds."""
    for module in part.student.modules():
        if isinstance(module, Mechanism) and module.branch_names:
            for name in module.branch_names:
                yield name, module
            return
