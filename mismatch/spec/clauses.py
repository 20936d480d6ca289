"""What a swap consists of: clauses, their targets and calls, each with the column where it stands in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Union

SLOTS = (
    "norm1",
    "attn",
    "rope",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "norm1_post",
    "norm2",
    "mlp",
    "gate_proj",
    "up_proj",
    "down_proj",
    "norm2_post",
    "norms",
    "block",
)
"""Every slot that some family has. `final_norm` is a target of its own, for it belongs to no layer."""

TARGETS = ("layer", "layers", "all", "norms", "final_norm")

HEADS = ("heads", "kv_heads")
"""What may stand behind the slot: query heads, or kv heads, each of which stands for its group of query heads."""

Value = Union[int, float, bool, str, None, tuple[str, ...], tuple[int | float, ...], "Call"]

WORD = re.compile(r"[A-Za-z_][\w./-]*")
LITERALS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Call:
    """A mechanism and its arguments: `infini(segment=64)`.

    An argument without a key has the key "" until `check` gives it the name of its field.
    """

    name: str
    args: tuple[tuple[str, Value], ...] = ()
    at: int = field(default=0, compare=False, repr=False)
    columns: tuple[tuple[int, int], ...] = field(default=(), compare=False, repr=False)
    """For each argument the columns of its key and of its value."""

    def arguments(self) -> dict[str, Value]:
        """The keyword arguments of the mechanism's Config. A mechanism among them stays a Call."""
        return dict(self.args)

    def printable(self) -> dict[str, object]:
        """The arguments for JSON: a mechanism among them is its text."""
        return {k: str(v) if isinstance(v, Call) else v for k, v in self.args}

    def nested(self) -> Iterator[Call]:
        """This call, then the calls among its arguments, outermost first."""
        yield self
        for _, value in self.args:
            if isinstance(value, Call):
                yield from value.nested()

    def foreign(self) -> tuple[str, ...]:
        """The classes among them that are named by their path, `module:Class`: importing one runs its code."""
        return tuple(call.name for call in self.nested() if ":" in call.name)

    def __str__(self) -> str:
        if not self.args:
            return self.name
        parts = [
            # A mechanism that comes first needs no key: it is the only argument of its type.
            _text(value)
            if not key or (index == 0 and isinstance(value, Call))
            else f"{key}={_text(value)}"
            for index, (key, value) in enumerate(self.args)
        ]
        return f"{self.name}({', '.join(parts)})"


def _text(value: Value) -> str:
    if isinstance(value, Call):
        return str(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return listed(value)
    if isinstance(value, str):
        if WORD.fullmatch(value) and value not in LITERALS:
            return value
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def listed(value: tuple[str, ...] | tuple[int | float, ...]) -> str:
    """A list as it is written: `[a, b]`, `[0, 16]`."""
    return f"[{', '.join(str(item) for item in value)}]"


@dataclass(frozen=True)
class Range:
    """Layers (or heads) `first` to `last`, both included, every `step`-th. None stands for the model's last one."""

    first: int | None
    last: int | None
    step: int = 1
    at: int = field(default=0, compare=False, repr=False)

    def __str__(self) -> str:
        ends = ["last" if end is None else str(end) for end in (self.first, self.last)]
        if ends[0] == ends[1]:
            return ends[0]
        return "-".join(ends) + (f"/{self.step}" if self.step > 1 else "")


@dataclass(frozen=True)
class Target:
    """Where a mechanism goes: `kind` is "layers", "all", "norms" or "final_norm".

    `heads` are those of a layer that are meant, counted as `heads_kind` says; none: the whole slot.
    """

    kind: str
    ranges: tuple[Range, ...] = ()
    slot: str | None = None
    at: int = field(default=0, compare=False, repr=False)
    slot_at: int = field(default=0, compare=False, repr=False)
    heads_kind: str = ""
    heads: tuple[Range, ...] = ()
    heads_at: int = field(default=0, compare=False, repr=False)

    def __str__(self) -> str:
        text = self.kind
        if self.kind == "layers":
            inside = ",".join(map(str, self.ranges))
            if len(self.ranges) > 1:
                text = f"layers[{inside}]"
            else:
                text = f"layers{inside}" if "-" in inside else f"layer{inside}"
        text = text if self.slot is None else f"{text}.{self.slot}"
        return f"{text}.{self.heads_kind}[{','.join(map(str, self.heads))}]" if self.heads else text


@dataclass(frozen=True)
class Clause:
    """One `target:mechanism`."""

    target: Target
    call: Call

    def __str__(self) -> str:
        return f"{self.target}:{self.call}"


@dataclass(frozen=True)
class Spec:
    """A whole swap. `text` is what the columns count in."""

    clauses: tuple[Clause, ...]
    text: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        return "; ".join(map(str, self.clauses))
