"""Is a repaired mechanism used, or was it trained around?

"Repaired" may mean "bypassed": in LoLCATs' hybrids the linear branch may contribute nothing (arXiv 2510.05901). Each
branch that a mechanism names is taken out, one at a time, and the held-out KL is measured again on the same tokens: the
difference is paired, with its interval over documents.

    used       without it the KL grows by more than `MATTERS` of what the repair left, whole interval
    bypassed   it grows by less, whole interval (or falls): the repair does not need the branch
    open       the interval holds that border: too few documents to tell

What remains keeps its weight (`Mechanism.branches`), so the reading is what the branch adds to this student, not what a
student trained without it would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mismatch.forward.heldout import Evaluated, HeldOut
from mismatch.mechanisms.base import Mechanism
from mismatch.stages.repair.rungs.module_pair import Part
from mismatch.surgery.operate import Student

MATTERS = 0.1
"""A branch without which the KL grows by less than this share does not matter."""


@dataclass(frozen=True)
class Knocked:
    """One branch taken out, or a part without branches (`branch` None).

    Attributes:
        layer, where, branch: which.
        kl, lo, hi: of the repaired model without it, nats per token.
        more, more_lo, more_hi: that minus the KL with it, paired over documents.
        verdict: used, bypassed, open, or not applicable.
    """

    layer: int
    where: str
    branch: str | None
    kl: float = float("nan")
    lo: float = float("nan")
    hi: float = float("nan")
    more: float = float("nan")
    more_lo: float = float("nan")
    more_hi: float = float("nan")
    verdict: str = "not applicable"


def knocked_out(
    held_out: HeldOut,
    student: Student,
    parts: Sequence[Part],
    repaired: Evaluated,
    seed: int = 0,
) -> list[Knocked]:
    """Every branch of every part taken out in turn; a part without branches is there as not applicable.

    Args:
        held_out: text, with the teacher's side.
        student: the repaired model.
        parts: its swapped places.
        repaired: the same model as it is, on that text.
        seed: of the bootstrap.
    """
    found = []
    for part in parts:
        branches = list(_branches(part))
        for name, mechanism in branches:
            with mechanism.branches()[name]:
                without = held_out.evaluate(student.layout)
            kl = without.kl.mean(seed)[:3]
            more = (without.kl - repaired.kl).mean(seed)[:3]
            said = verdict(more, MATTERS * repaired.kl.mean(seed).value)
            found.append(Knocked(part.layer, part.where, name, *kl, *more, said))
        if not branches:
            found.append(Knocked(part.layer, part.where, None))
    return found


def verdict(more: tuple[float, float, float], border: float) -> str:
    """`used`, `bypassed` or `open`, from the growth of the KL and its interval; without one, from the growth alone."""
    lo, hi = (more[0] if np.isnan(x) else x for x in more[1:])
    if lo > border:
        return "used"
    return "bypassed" if hi < border else "open"


def _branches(part: Part) -> Iterator[tuple[str, Mechanism]]:
    """The branches of the outermost mechanism that has some: a wrapper stands around the one that it holds."""
    for module in part.student.modules():
        if isinstance(module, Mechanism) and module.branch_names:
            for name in module.branch_names:
                yield name, module
            return
