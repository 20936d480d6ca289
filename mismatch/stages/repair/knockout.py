"""Is a repaired mechanism used, or was it trained around?

"Repaired" may mean "bypassed": in LoLCATs' hybrids the linear branch may contribute nothing (arXiv 2510.05901). Each
branch that a mechanism names is taken out, one at a time, and the held-out KL is measured again on the same tokens: the
difference is paired, with its interval.

    used       without it the KL grows by more than `MATTERS` of what the repair left, whole interval
    bypassed   it grows by less, whole interval (or falls): the repair does not need the branch
    open       the interval holds that border, or there is none: too little text to say

What remains keeps its weight (`Mechanism.branches`), so the reading is what the branch adds to this student, not what a
student trained without it would do.

Text hardly asks for what the far branch holds. So, where the probe `needles` is asked, its prompts whose needle lies
beyond the local part are put to swap and repaired model with all branches, with each one alone and with none: what the
far branch alone retrieves, before the repair and after it. Rows: `needles`, `logprob[kept=all]`, `[kept=local]`, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from mismatch.forward.heldout import Evaluated, HeldOut
from mismatch.mechanisms.base import Mechanism
from mismatch.models.layout import Layout
from mismatch.probes.base import Measure, Subject, rows
from mismatch.probes.inputs import Prompts
from mismatch.probes.needles import Needles
from mismatch.probes.retrieval_prompts import Replies, ask
from mismatch.report.intervals import side
from mismatch.runs.table import under
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair
from mismatch.stages.repair.plan import ALL, NONE, Branch
from mismatch.surgery.operate import Student

MATTERS = 0.1
"""A branch without which the KL grows by less than this share does not matter."""

ONE_BY_ONE = 4
"""At most so many parts are read apart."""


def knocked_out(
    held_out: HeldOut,
    student: Student,
    parts: Sequence[ModulePair],
    repaired: Evaluated,
) -> list[Branch]:
    """Every branch of every part taken out in turn; a part without branches is there as not applicable. Of more than
    `ONE_BY_ONE` parts a branch is taken out of all at once: one by one would be a run of the model for each.

    Args:
        held_out: text, with the teacher's side.
        student: the repaired model.
        parts: its swapped modules.
        repaired: the same model as it is, on that text.
    """
    found = []
    for where, together in _taken(parts):
        mechanisms = [one for one in (_outermost(part.student) for part in together) if one]
        names = dict.fromkeys(name for one in mechanisms for name in one.branch_names)
        for name in names:
            with ExitStack() as out:
                for one in mechanisms:
                    if name in one.branch_names:
                        out.enter_context(one.branches()[name])
                without = held_out.evaluate(student.layout)
            kl = without.kl.mean()[:3]
            more = (without.kl - repaired.kl).mean()[:3]
            said = verdict(more, MATTERS * repaired.kl.mean().value)
            found.append(Branch(together[0].layer, where, name, *kl, *more, said))
        if not names:
            found.append(Branch(together[0].layer, where, None))
    return found


def _taken(parts: Sequence[ModulePair]) -> Iterator[tuple[str, Sequence[ModulePair]]]:
    """What loses a branch at a time, and its name."""
    if len(parts) > ONE_BY_ONE:
        yield f"all {len(parts)} modules", parts
    else:
        yield from ((part.where, [part]) for part in parts)


def verdict(more: tuple[float, float, float], border: float) -> str:
    """`used`, `bypassed` or `open`, from the interval of the growth of the KL."""
    return {"above": "used", "below": "bypassed"}.get(side(*more[1:], border), "open")


def needle_rows(
    probe: Needles,
    teacher: Layout,
    students: Sequence[Student],
    parts: Sequence[ModulePair],
    reach: int,
) -> list[dict[str, Any]]:
    """What each branch alone retrieves, as rows without run id; none where no part has two branches or more, or no
    needle lies beyond the local part.

    Args:
        probe: with its prompts.
        teacher: the untouched model.
        students: the swap as it was, and the repaired model.
        parts: the swapped modules.
        reach: tokens that the local parts of all mechanisms hold.
    """
    far = [prompts for prompts in probe.cells.values() if beyond(prompts, reach)]
    mine = {s.name: _mechanisms(s.layout.model, parts) for s in students}
    names = list(
        dict.fromkeys(n for found in mine.values() for one in found for n in one.branch_names)
    )
    if not far or len(names) < 2:
        return []
    subjects = [Subject.teacher(teacher), *map(Subject.of, students)]
    answers: dict[str, list[Measure]] = {subject.name: [] for subject in subjects}
    for kept in (ALL, *names, NONE):
        with ExitStack() as out:
            for one in (one for found in mine.values() for one in found):
                for name, without in one.branches().items():
                    if kept not in (ALL, name):
                        out.enter_context(without)
            found = [ask(subjects, prompts, probe.setting) for prompts in far]
        for name in answers:
            replies = Replies.joined([cell[name] for cell in found])
            answers[name].append(replies.per_token(under("logprob", kept=kept)))
    return rows("needles", answers, {s.name: s.swapped for s in subjects})


def beyond(prompts: Prompts, reach: int) -> bool:
    """Whether the needle of every prompt ends beyond what the local part holds when the answer begins."""
    return int(prompts.scored.any(0).argmax()) - 1 - prompts.needle[1] > reach


def _mechanisms(model: nn.Module, parts: Sequence[ModulePair]) -> list[Mechanism]:
    found = (_outermost(model.get_submodule(part.path)) for part in parts)
    return [one for one in found if one is not None]


def _outermost(module: nn.Module) -> Mechanism | None:
    """The outermost mechanism that has branches: a wrapper stands around the one that it holds."""
    every = (one for one in module.modules() if isinstance(one, Mechanism) and one.branch_names)
    return next(every, None)
