"""From the clauses of a swap to the slots of one model, or to an error before any weight is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from mismatch.errors import SpecError
from mismatch.registry import did_you_mean, mechanisms
from mismatch.registry.card import REQUIRED, Arg, Card
from mismatch.spec.clauses import Call, Clause, Spec, Target, Value, listed
from mismatch.spec.heads import PLACES, Heads, check_heads, heads_of, refuse_shared

INSIDE = {
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""Slots inside another slot: they are gone when that one is replaced. All slots of a layer are inside `block`."""


@dataclass(frozen=True)
class Placement:
    """One mechanism in one slot of one layer. `layer` is None for the final norm.

    `heads` are the query heads that it takes, ascending; none: all of the slot.
    """

    layer: int | None
    slot: str
    call: Call
    clause_index: int
    heads: tuple[int, ...] = ()


def check(spec: Spec) -> Spec:
    """Check names, slots and arguments against the mechanisms' cards.

    Returns:
        The spec with each argument in its declared type and in the order of the Config's fields; those
        equal to the default are left out.

    Raises:
        SpecError: unknown mechanism, argument or slot; a value of another type, outside its bounds or
            choices; a missing argument.
    """
    clauses = []
    for clause in spec.clauses:
        call = _checked(clause.call, spec.text)
        check_heads(Clause(clause.target, call), spec.text)
        _slot(clause, spec.text)
        clauses.append(Clause(clause.target, call))
    return Spec(tuple(clauses), spec.text)


def format(spec: Spec) -> str:
    """The canonical text: one space after `;` and `,`, arguments in declared order, defaults left out.

    A clause whose mechanism is not known, or is given wrong arguments, keeps its arguments as written.
    """
    clauses = []
    for clause in spec.clauses:
        try:
            clauses.append(Clause(clause.target, _checked(clause.call, spec.text)))
        except SpecError:
            clauses.append(clause)
    return str(Spec(tuple(clauses)))


def explicit(spec: Spec) -> str:
    """The text with every argument written out, the defaults too: its meaning stays when a default changes.

    Raises:
        SpecError: as `check`.
    """
    checked = check(spec)
    clauses = tuple(Clause(c.target, _written_out(c.call, spec.text)) for c in checked.clauses)
    return str(Spec(clauses, spec.text))


def _written_out(call: Call, text: str) -> Call:
    given = dict(call.args)
    defaults = {arg.name: arg.default for arg in _card(call, text).args}
    args = []
    for key, value in {**defaults, **given}.items():
        if value == ():  # the grammar has no empty list
            continue
        args.append((key, _written_out(value, text) if isinstance(value, Call) else value))
    return Call(call.name, tuple(args), call.at)


def resolve(
    spec: Spec,
    n_layers: int,
    slots: Collection[str],
    family_name: str,
    lacks: Mapping[str, str] | None = None,
    heads: Heads | None = None,
) -> tuple[Placement, ...]:
    """Every slot that the swap touches, clause by clause, layers ascending.

    Args:
        spec: from `parse`; it is checked here.
        n_layers: of the model.
        slots: that the model's family has, in computation order.
        family_name: for the error.
        lacks: why the family lacks a slot.
        heads: how many the model has; needed for clauses that name some.

    Raises:
        SpecError: a layer, slot or head that the model does not have, one named twice in one clause, or a second
            replacement in one slot or head.
    """
    checked = check(spec)
    found: list[Placement] = []
    for index, clause in enumerate(checked.clauses):
        target = clause.target
        slot = _slot(clause, spec.text)
        some = heads_of(target, heads, spec.text)
        at_slots: list[tuple[int | None, str]] = []
        if target.kind != "final_norm":
            for name in _expand(slot, slots, family_name, lacks or {}, clause, spec.text):
                at_slots += [(layer, name) for layer in _layers(target, n_layers, spec.text)]
        if target.kind in ("norms", "final_norm"):
            at_slots.append((None, "final_norm"))
        order = {name: at for at, name in enumerate(slots)}
        at_slots.sort(key=lambda p: (p[0] is None, p[0] or 0, order.get(p[1], 0)))
        for layer, name in at_slots:
            placement = Placement(layer, name, clause.call, index, some)
            refuse_shared(placement, found, spec.text, target)
            _refuse_twice(placement, found, spec.text, clause)
            found.append(placement)
    return tuple(found)


def _fail(message: str, text: str, at: int, hint: str | None = None) -> NoReturn:
    raise SpecError(message, text=text, at=at, hint=hint)


def _card(call: Call, text: str) -> Card:
    try:
        return mechanisms().card(call.name, SpecError)
    except SpecError as error:
        _fail(error.message, text, call.at, error.hint)


def _checked(call: Call, text: str) -> Call:
    card = _card(call, text)
    if card.free:
        return _passed_on(call, text)
    given: dict[str, Value] = {}
    columns: dict[str, tuple[int, int]] = {}
    for index, ((key, value), (key_at, value_at)) in enumerate(
        zip(call.args, call.columns, strict=True)
    ):
        arg = card.arg(key)
        if key == "":
            arg = _unnamed(call, card, index, value, text, key_at)
        if arg is None:
            _fail(f"`{call.name}` has no argument `{key}`", text, key_at, _names(card, key))
        if arg.name in given:
            _fail(f"`{call.name}` got `{arg.name}` twice", text, key_at)
        given[arg.name] = _value(arg, value, text, value_at)
        columns[arg.name] = (key_at, value_at)
    for arg in card.args:
        if arg.default is REQUIRED and arg.name not in given:
            example = (
                f"{call.name}(infini)" if arg.type == "Call" else f"{call.name}({arg.name}=...)"
            )
            _fail(
                f"`{call.name}` needs `{arg.name}`: {arg.allowed}",
                text,
                call.at,
                f"write `{example}`",
            )
    kept = [
        (arg.name, given[arg.name])
        for arg in card.args
        if arg.name in given and not _same(given[arg.name], arg.default)
    ]
    where = tuple(columns[key] for key, _ in kept)
    return replace(call, args=tuple(kept), columns=where)


def _passed_on(call: Call, text: str) -> Call:
    """A call whose arguments only the class itself can check, when it is built."""
    args = []
    for (key, value), (at, _) in zip(call.args, call.columns, strict=True):
        if key == "":
            _fail(f"`{call.name}` takes named arguments only, got {_shown(value)}", text, at)
        args.append((key, _checked(value, text) if isinstance(value, Call) else value))
    return replace(call, args=tuple(args))


def _unnamed(call: Call, card: Card, index: int, value: Value, text: str, at: int) -> Arg:
    """The field that an argument without a key means: a mechanism by its type, a number by its order."""
    if isinstance(value, Call):
        arg = next((a for a in card.args if a.type == "Call"), None)
        if arg is None:
            _fail(
                f"`{call.name}` takes named arguments only, got `{value}`", text, at, _names(card)
            )
        return arg
    if index >= len(card.args):
        _fail(f"`{call.name}` takes {len(card.args)} arguments", text, at, _names(card))
    return card.args[index]


def _same(value: object, default: object) -> bool:
    return type(value) is type(default) and value == default


def _names(card: Card, word: str | None = None) -> str:
    names = [arg.name for arg in card.args if arg.type != "Call"]
    if not names:
        return f"`{card.name}` takes no arguments"
    return f"arguments: {', '.join(names)}" if word is None else did_you_mean(word, names)


def _value(arg: Arg, value: Value, text: str, at: int) -> Value:
    """The value in the argument's type. A word is a mechanism where one is wanted."""
    if arg.type == "Call":
        inner = Call(value, at=at) if isinstance(value, str) else value
        if isinstance(inner, Call):
            return _checked(inner, text)
    elif not isinstance(value, Call):
        if value is None and not arg.optional and "none" in (arg.choices or ()):
            return "none"  # a choice of that name, not the absence of a value
        if arg.type == "list" and isinstance(value, str):
            value = (value,)
        try:
            return arg.accept(value)
        except ValueError:
            pass
    hint = (
        did_you_mean(value, map(str, arg.choices))
        if arg.choices and isinstance(value, str)
        else None
    )
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    rule = arg.refusal(value) if plain else f"must be {arg.allowed}, got {_shown(value)}"
    _fail(f"`{arg.name}` {rule}", text, at, hint)


def _shown(value: Value) -> str:
    if isinstance(value, (str, Call)):
        return f"`{value}`"
    if isinstance(value, tuple):
        return f"`{listed(value)}`"
    return str(value).lower() if value is None or isinstance(value, bool) else repr(value)


def _slot(clause: Clause, text: str) -> str:
    """The slot of a clause, once it is clear that the mechanism may go there."""
    card = _card(clause.call, text)
    allowed: tuple[str, ...] = tuple(card.facts.get("slots", ()))
    target = clause.target
    if target.kind in ("norms", "final_norm"):
        slot, at = target.kind, target.at
    elif target.slot is not None:
        slot, at = target.slot, target.slot_at
    elif allowed:
        return allowed[0]
    else:
        _fail(
            f"`{card.name}` declares no slot",
            text,
            clause.call.at,
            f"name one, as in `{target}.attn:{clause.call}`",
        )
    wanted = {"norms": ("norm1", "norm2")}.get(slot, (slot,))
    general = "norms" in allowed and _is_norm(slot)
    if allowed and slot not in allowed and not general and not set(wanted) <= set(allowed):
        _fail(
            f"`{card.name}` cannot go into the slot `{slot}`",
            text,
            at,
            f"slots of `{card.name}`: {', '.join(allowed)}",
        )
    return slot


def _is_norm(slot: str) -> bool:
    return slot.startswith("norm") or slot == "final_norm"


def _expand(
    slot: str,
    slots: Collection[str],
    family_name: str,
    lacks: Mapping[str, str],
    clause: Clause,
    text: str,
) -> tuple[str, ...]:
    """The slots of one layer that a clause means: `norms` is all of them."""
    if slot == "norms":
        return tuple(name for name in slots if name.startswith("norm"))
    if slot not in slots:
        reason = f" ({lacks[slot]})" if slot in lacks else ""
        at = clause.target.slot_at if clause.target.slot else clause.call.at
        _fail(
            f"{family_name} has no slot `{slot}`{reason}",
            text,
            at,
            f"slots of {family_name}: {', '.join(slots)}",
        )
    return (slot,)


def _layers(target: Target, n_layers: int, text: str) -> list[int]:
    if target.kind != "layers":
        return list(range(n_layers))
    found: list[int] = []
    for item in target.ranges:
        first = n_layers - 1 if item.first is None else item.first
        last = n_layers - 1 if item.last is None else item.last
        for end in (first, last):
            if end >= n_layers:
                # `20-last` of a model with 12 layers is out of range too, not merely empty.
                _fail(
                    f"layer {end} does not exist: the model has {n_layers} layers (0-{n_layers - 1})",
                    text,
                    item.at,
                )
        for layer in range(first, last + 1, item.step):
            if layer in found:
                _fail(f"layer {layer} is named twice in `{target}`", text, item.at)
            found.append(layer)
    return found


def _refuse_twice(new: Placement, found: list[Placement], text: str, clause: Clause) -> None:
    """One replacement per slot; a mechanism that wraps what it finds (`stacks`) may come on top."""
    if mechanisms().card(new.call.name).facts.get("stacks") is True:
        return
    where = "`final_norm`" if new.layer is None else f"layer {new.layer} `{new.slot}`"
    at, hint = (
        clause.target.at,
        "one replacement per slot; wrappers such as `parallel` may come on top",
    )
    for old in found:
        if old.layer != new.layer or old.clause_index == new.clause_index:
            continue
        if old.heads and new.heads:
            continue
        names = f"`{old.call.name}` and `{new.call.name}`"
        if old.slot == new.slot or (old.heads and new.slot in PLACES):
            _fail(f"{where} is replaced twice: by {names}", text, at, hint)
        for outer, inner in ((old, new), (new, old)):
            if outer.layer is not None and (
                outer.slot == "block" or inner.slot in INSIDE.get(outer.slot, ())
            ):
                _fail(
                    f"layer {new.layer} `{inner.slot}` lies inside `{outer.slot}`: replaced by {names}",
                    text,
                    at,
                    hint,
                )
