"""Words that every stage uses: the lines of a plan, counts of parameters, text in aligned columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mismatch.runs.folder import Run
from mismatch.runs.plan import Replaced, SwapPlan
from mismatch.spec.heads import said


def kind(run: Run) -> str:
    """The command that made the run: trace, probe, diagnose, scan, plan, repair or train."""
    return str(run.manifest.get("kind", "trace"))


def plan_lines(plan: SwapPlan) -> list[str]:
    """One line a clause: what became what, how many numbers were inherited, new, dropped, and the size of a state that
    does not grow."""
    lines = []
    for clause in plan.clauses:
        where = "final" if clause.layer is None else f"layer {clause.layer}"
        counts = ", ".join(
            f"{name} {count(total(sizes))}"
            for name, sizes in (
                ("inherited", clause.inherited),
                ("new", clause.new_parameters),
                ("dropped", clause.dropped),
            )
        )
        heads = f" {said(clause.heads)}" if clause.heads else ""
        if clause.state_bytes is not None:
            counts += f", state {clause.state_bytes:,} bytes a text"
        lines.append(f"{where} {clause.slot}{heads}: {clause.old} -> {called(clause)}  {counts}")
    if not plan.clauses:
        differs = "nothing" if plan.apart is None else plan.apart.text()
        lines.append(f"no module was replaced; not the teacher's own: {differs}")
    return lines


def called(clause: Replaced) -> str:
    """The mechanism with its arguments: `kv_slots(slots=[0, 96])`."""
    listed = (
        f"{key}=[{', '.join(map(str, value))}]"
        if isinstance(value, (list, tuple))
        else f"{key}={value}"
        for key, value in clause.args.items()
    )
    return f"{clause.mechanism}({', '.join(listed)})"


def subject(plan: SwapPlan) -> str:
    """What a run calls the student: a swap, or a student, where nothing was swapped in it."""
    return "swap" if plan.clauses else "student"


def text_lines(run: Run) -> list[str]:
    """One line for each text of a run: how much of it there was, and what was left out."""
    return [f"{role}: {text_line(text)}" for role, text in run.manifest.get("texts", {}).items()]


def text_line(text: Mapping[str, Any]) -> str:
    """A text as the manifest has it: documents and tokens behind the numbers, what was asked for, what was left out."""
    tokens, seq_len = text["tokens"], text.get("seq_len", 1)
    asked = text.get("asked", tokens)
    short = tokens < asked // seq_len * seq_len
    parts = [
        f"{text['source']}, {text['documents']:,} of {text.get('documents_read', text['documents']):,} documents",
        f"{tokens:,} of {asked:,} tokens asked" if short else f"{tokens:,} tokens",
    ]
    if text.get("scored", tokens) < tokens:
        parts.append(f"of which {text['scored']:,} predict an answer and count")
    if text.get("left_out"):
        parts.append(
            f"{text['left_out']:,} of {text['documents_seen']:,} documents looked at fill no window of {seq_len} tokens"
        )
    if text.get("copies"):
        parts.append(f"copies left out: {text['copies']:,}")
    if text.get("overlap"):
        parts.append(
            f"{text['overlap']:,} of these documents chose, calibrated or trained what is evaluated here "
            "(--allow-overlap): the numbers are too good"
        )
    if text.get("more"):
        parts.append(f"what is behind the first {text['more'] >> 20} MB was not read")
    if text.get("revision"):
        parts.append(f"revision {text['revision']}")
    return ", ".join(parts)


def total(sizes: Mapping[str, int]) -> int:
    """Numbers in the tensors of a plan's `inherited`, `new_parameters` or `dropped`."""
    return sum(sizes.values())


def count(n: int) -> str:
    """`1.2M`, `44.2k`, `9`: how many parameters."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(n)


def columns(rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Text in aligned columns: the first to the left, the others to the right."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
