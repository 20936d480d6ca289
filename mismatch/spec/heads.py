"""Heads of a layer as the place of a mechanism: which ones are meant, and who may take them.

`layer18.heads[0-5,8]` are query heads. `layer18.kv_heads[2]` are the query heads that read kv head 2: of H query and
KV kv heads, those from 2 H / KV to 3 H / KV - 1. A mechanism can take heads if what it gives before the output
projection is the heads of the attention, one by one: its class has the fact `heads`, which is true, or the argument
and the value that it needs for that, as in `("init", "inherit")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mismatch.errors import SpecError
from mismatch.registry import mechanisms
from mismatch.spec.clauses import Call, Clause, Target

if TYPE_CHECKING:
    from mismatch.spec.placement import Placement

PLACES = ("attn", "rope")
"""The slots that have heads. `rope` is the attention, where positions enter."""


@dataclass(frozen=True)
class Heads:
    """How many heads the attention of a model has."""

    query: int
    kv: int

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.query // self.kv


def check_heads(clause: Clause, text: str) -> None:
    """Refuse a clause whose mechanism cannot take heads, or whose slot has none.

    Raises:
        SpecError: it names heads, and one of the two is so.
    """
    target = clause.target
    if not target.heads:
        return
    known = mechanisms()
    for call in clause.call.nested():
        needs = known.card(call.name).facts.get("heads", False)
        if needs is True:
            continue
        if needs and _argument(call, needs[0]) == needs[1]:
            continue
        words = f"`{call.name}` without {needs[0]}={needs[1]}" if needs else f"`{call.name}`"
        able = [name for name in known.names() if known.card(name).facts.get("heads")]
        raise SpecError(
            f"{words} cannot take some heads: what it gives is not the heads of the attention, one by one",
            text=text,
            at=call.at,
            hint=f"mechanisms that can: {', '.join(able)}",
        )
    if target.slot not in (None, *PLACES):
        raise SpecError(
            f"the slot `{target.slot}` has no heads",
            text=text,
            at=target.heads_at,
            hint="heads are those of the slot `attn`",
        )


def _argument(call: Call, name: str) -> object:
    """What an argument of a checked call is: arguments equal to the default are left out of it."""
    arg = mechanisms().card(call.name).arg(name)
    return call.arguments().get(name, None if arg is None else arg.default)


def heads_of(target: Target, model: Heads | None, text: str) -> tuple[int, ...]:
    """The query heads that a target means, ascending; none: it names no heads.

    Raises:
        SpecError: a head that the model does not have, or one named twice.
    """
    if not target.heads:
        return ()
    assert model is not None
    query = target.heads_kind == "heads"
    count, word = (model.query, "query head") if query else (model.kv, "kv head")
    found: list[int] = []
    for item in target.heads:
        first = count - 1 if item.first is None else item.first
        last = count - 1 if item.last is None else item.last
        for end in (first, last):
            if end >= count:
                raise SpecError(
                    f"{word} {end} does not exist: the model has {count} {word}{'s' * (count > 1)}"
                    + (f" (0-{count - 1})" if count > 1 else " (0)"),
                    text=text,
                    at=item.at,
                )
        for head in range(first, last + 1, item.step):
            if head in found:
                raise SpecError(
                    f"{word} {head} is named twice in `{target}`", text=text, at=item.at
                )
            found.append(head)
    if not query:
        found = [kv * model.group + at for kv in found for at in range(model.group)]
    return tuple(sorted(found))


def refuse_shared(new: Placement, found: Sequence[Placement], text: str, target: Target) -> None:
    """One replacement a head; heads are those of the model's own attention.

    Raises:
        SpecError: a head that an earlier clause took, or an attention that it replaced or wrapped.
    """
    if not new.heads:
        return
    for old in found:
        if old.layer != new.layer or old.slot not in PLACES:
            continue
        if not old.heads:
            raise SpecError(
                f"layer {new.layer} `{old.slot}` is already changed by `{old.call.name}`, and heads are those of the "
                "model's own attention",
                text=text,
                at=target.heads_at,
                hint="put what takes all heads behind what takes some, or into the other heads",
            )
        if both := sorted({*old.heads} & {*new.heads}):
            raise SpecError(
                f"layer {new.layer} head {both[0]} is replaced twice: by `{old.call.name}` and `{new.call.name}`",
                text=text,
                at=target.heads_at,
                hint="one replacement a head",
            )


def said(heads: Sequence[int]) -> str:
    """`head 3`, `heads 0-5,8`."""
    return f"head{'s' * (len(heads) > 1)} {named(heads)}"


def named(heads: Sequence[int]) -> str:
    """Query heads, ascending, as they are written: `0-5,8`."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and runs[-1][-1] == head - 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return ",".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)
