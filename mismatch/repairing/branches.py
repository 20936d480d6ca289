"""Is a repaired mechanism used, or was it trained around?

"Repaired" may mean "bypassed": in LoLCATs' hybrids the linear branch may contribute nothing (arXiv 2510.05901). Each
branch that a mechanism names is taken out, one at a time, and the held-out KL is judged again.
"""

from __future__ import annotations

from collections.abc import Sequence

from mismatch.repairing.judge import Judge, Judged
from mismatch.repairing.part import Part
from mismatch.surgery import Student

MATTERS = 0.1
"""A branch without which the KL grows by less than this share does not matter."""


def bypassed(judge: Judge, student: Student, parts: Sequence[Part], repaired: Judged) -> list[str]:
    """One line for each branch of each part: what the KL is without it."""
    notes = []
    whole = repaired.mean_kl()[0]
    for part in parts:
        branches = part.student.branches() if hasattr(part.student, "branches") else {}
        for name, without in branches.items():
            with without:
                kl = judge.judge(student.layout).mean_kl()[0]
            line = f"{part.where} without its {name}: KL {whole:.4f} -> {kl:.4f}"
            if kl < whole * (1 + MATTERS):
                line += f": repaired by bypass, the {name} branch is not used"
            notes.append(line)
    return notes
