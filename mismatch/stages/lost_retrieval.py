"""Retrieval and copying that a swap lost, as probes read it, and the swap that keeps retrieval.

Ordinary text hardly asks for what stands far back, so no KL shows this loss, and training on text brings little of it
back. What keeps it is to keep the exact keys and values of the few far tokens that are worth it: `kv_slots`. With 96 of
them layer 18 of SmolLM2-135M read needles and passkey as well as the teacher; their choice is learned by `repair`.

A loss is told of where the paired interval lies wholly below 0, it is at least `LOST`, and the teacher itself can do
what is asked. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from mismatch.runs.plan import Replaced
from mismatch.runs.table import SWAP
from mismatch.stages.base import Finding

LOST = {"passkey": 1.0, "needles": 0.3, "kv_lookup": 0.3, "induction": 0.5, "copying": 0.5}
"""Nats that a probe must have lost: per key, per token of the answer, per token of a copy."""
ABLE = {"passkey": -5.0, "needles": -1.15, "kv_lookup": -1.15}
"""The teacher can do it where it reads more: half of what guessing digits costs."""
SLOTS = 96
"""Far tokens that a kv head keeps: enough for needles and passkey at layer 18 of SmolLM2."""
UNITS = {
    "passkey": "nats per key",
    "needles": "nats per answer token",
    "kv_lookup": "nats per answer token",
}


def keeping(clauses: Iterable[Replaced]) -> str | None:
    """`layer18:kv_slots(slots=96, segment=64)` in place of the attention that was swapped; None: nothing of that kind
    was, or it has slots already."""
    layers: list[int] = []
    segments: set[Any] = set()
    for clause in clauses:
        if clause.slot != "attn" or clause.heads or clause.layer is None:
            return None
        if clause.mechanism == "kv_slots":
            return None
        layers.append(clause.layer)
        segments.add(clause.args.get("segment", clause.args.get("window")))
    if not layers:
        return None
    where = f"layer{layers[0]}" if len(layers) == 1 else f"layers[{','.join(map(str, layers))}]"
    segment = segments.pop() if len(segments) == 1 else None
    own = f", segment={segment}" if isinstance(segment, int) else ""
    return f"{where}:kv_slots(slots={SLOTS}{own})"


def command(model: str, clauses: Iterable[Replaced]) -> str | None:
    """The repair that trains what keeps retrieval."""
    swap = keeping(clauses)
    return None if swap is None else f'mismatch repair --model {model} --swap "{swap}"'


def lost_retrieval(table: pd.DataFrame, clauses: Sequence[Replaced], model: str) -> Finding | None:
    """The finding of a run that asked passkey, needles or kv_lookup; None: nothing is lost, or nothing was asked.

    Args:
        table: of the run.
        clauses: what was replaced.
        model: for the command.
    """
    lost = {name: row for name in ABLE if (row := _lost(table, name)) is not None}
    if not lost or not clauses:
        return None
    said = "; ".join(
        f"{name} {row['value']:+.2f} [{row['lo']:+.2f}, {row['hi']:+.2f}] {UNITS[name]} from the teacher's "
        f"{row['teacher']:.2f}"
        for name, row in lost.items()
    )
    after = command(model, clauses)
    more = " Keep the exact keys and values of the far tokens that are worth it." if after else ""
    return Finding(
        "high",
        f"retrieval is lost ({', '.join(lost)})",
        f"{said}. Ordinary text does not show it, and training on text alone brings little of it back.{more}",
        {f"{name}_{part}": value for name, row in lost.items() for part, value in row.items()},
        after,
    )


def _lost(table: pd.DataFrame, name: str) -> Mapping[str, float] | None:
    """The reading of a probe over all of its prompts, where it is a loss."""
    rows = table[(table["metric"] == name) & (table["stage"] == "surgery")]
    swap = rows[(rows["student"] == SWAP) & (rows["stat"] == "logprob_minus_teacher")]
    teacher = rows[(rows["student"] == "teacher") & (rows["stat"] == "logprob")]
    if swap.empty or teacher.empty:
        return None
    own, less = float(teacher["value"].iloc[0]), swap.iloc[0]
    value, lo, hi = (float(less[part]) for part in ("value", "lo", "hi"))
    if not (hi < 0 and -value >= LOST[name] and own >= ABLE[name]):
        return None
    return {"value": value, "lo": lo, "hi": hi, "teacher": own}
