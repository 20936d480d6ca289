"""Sections that reports of several stages share: the plan, findings, metrics, how to repeat the run, environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mismatch.report.figures import LARGEST, ReportFigure, extremes
from mismatch.report.page import Cell, Html, grid, join, pairs, tag, whole
from mismatch.report.words import called, count, kind, text_line, text_lines, total
from mismatch.runs.folder import Run
from mismatch.runs.plan import Replaced, SwapPlan
from mismatch.spec.heads import said


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading (or none, where the title is empty), and what stands below it.

    A `ReportFigure` in the body stands for the drawn figure; where none of the sections of a stage holds it, the
    report shows it behind the first one.
    """

    title: str
    body: tuple[Html | ReportFigure, ...]


def verdict(text: str) -> Section:
    """The first words of a report, in large type."""
    return Section("", (tag("p", text, class_="verdict"),))


def findings(run: Run) -> Section:
    """What was found, the most severe first, each with the command that comes next."""
    return Section("Findings", tuple(map(_finding, run.findings)) or (tag("p", "None."),))


def _finding(found: dict[str, Any]) -> Html:
    return tag(
        "div",
        tag("h3", tag("span", found["severity"], class_="tag"), found["title"]),
        tag("p", found["text"]),
        tag("pre", found["next"]) if found.get("next") else Html(""),
        class_=f"finding {found['severity']}",
    )


def replaced(run: Run) -> Section:
    """The plan: a row for each clause, what its mechanism notes, and its tensors by name."""
    return Section("What was replaced", (_plan(run),))


def _plan(run: Run) -> Html:
    plan: SwapPlan = run.plan
    clauses = plan.clauses
    rows = [
        (
            f"{c.path}, {said(c.heads)}" if c.heads else c.path,
            f"{c.old} → {c.new}",
            called(c),
            *(_count(total(sizes)) for sizes in (c.inherited, c.new_parameters, c.dropped)),
        )
        for c in clauses
    ]
    heads = ("where", "module", "mechanism", "inherited", "new parameters", "dropped")
    notes = dict.fromkeys(note for c in clauses for note in c.notes)
    limits = dict.fromkeys(f"{c.mechanism}: {c.identity}" for c in clauses if c.identity)
    states = dict.fromkeys(
        f"{c.mechanism}: the state of one text takes at most {c.state_bytes:,} bytes in a layer."
        for c in clauses
        if c.state_bytes is not None
    )
    return join(
        [
            grid(heads, rows, numbers=(3, 4, 5)),
            *(tag("p", text, class_="warning") for text in plan.warnings),
            *(tag("p", note) for note in (*notes, *states)),
            *(tag("p", f"Equal to the teacher at: {limit}", class_="faint") for limit in limits),
            tag("details", tag("summary", "tensors by name"), *(_tensors(c) for c in clauses)),
        ]
    )


def _count(n: int) -> Cell:
    return Cell(count(n), n)


def _tensors(clause: Replaced) -> Html:
    kinds = (
        ("inherited", clause.inherited),
        ("new", clause.new_parameters),
        ("dropped", clause.dropped),
    )
    rows = [(kind, name, whole(size)) for kind, sizes in kinds for name, size in sizes.items()]
    return join(
        [tag("h3", clause.path), grid(("kind", "tensor", "parameters"), rows, numbers=(2,))]
    )


def state(run: Run) -> Html:
    """Warnings: where the run is not finished, and where there was less text than one would think."""
    status = run.manifest.get("status")
    parts = [] if status == "done" else [f"This run is not finished: its status is {status}."]
    parts += _little_text(run)
    if extreme := extremes(run.table):
        parts.append(
            f"{extreme} numbers are infinite or beyond {LARGEST:g}: are the weights whole?"
        )
    return join([tag("p", part, class_="warning") for part in parts])


def _little_text(run: Run) -> list[str]:
    """A warning where there was less text than asked, or where most documents were left out."""
    text = run.manifest.get("texts", {}).get("evaluation")
    if text is None or "asked" not in text:
        return []
    less = text["tokens"] < text["asked"] // text["seq_len"] * text["seq_len"]
    few = 2 * text["left_out"] > text["documents_seen"]
    return [f"The evaluation text: {text_line(text)}."] if less or few else []


def closing(run: Run) -> tuple[Section, ...]:
    """The end of every report."""
    return (
        Section("Text", tuple(tag("p", line) for line in text_lines(run)) or (tag("p", "None."),)),
        Section("What each metric is, and what it cannot see", (_glossary(run),)),
        Section("How to do it again", (_again(run),)),
        Section("Environment", (_environment(run),)),
    )


def _glossary(run: Run) -> Html:
    metrics = run.dictionary.get("metrics", {})
    if not metrics:
        return tag("p", "The run has no metrics.json.")
    rows = [
        (tag("code", name), facts.get("summary", ""), facts.get("blind", "not stated"))
        for name, facts in metrics.items()
    ]
    cards = [
        join([tag("h3", name), *_paragraphs(facts.get("text", ""))])
        for name, facts in metrics.items()
    ]
    more = tag("details", tag("summary", "definitions, units, sources"), *cards)
    asked = grid(("metric", "what it asks", "what it cannot see"), rows)
    return join([tag("div", asked, class_="words"), more])


def _paragraphs(text: str) -> list[Html]:
    """The text of a card; only lists and formulas, which are set in, keep their lines."""
    parts = [part for part in text.split("\n\n") if part.strip()]
    return [tag("p", part, class_="lines" if "\n " in part else None) for part in parts]


def _again(run: Run) -> Html:
    if run.path is None:
        return tag("p", "This run was traced from Python and not written to a folder.")
    return join(
        [
            tag("pre", run.manifest.get("command", "")),
            tag("p", "The same settings, resolved: config.yaml in the run folder."),
            tag("pre", f"mismatch {kind(run)} --config {run.path.name}/config.yaml"),
        ]
    )


def _environment(run: Run) -> Html:
    left_out = ("command", "model", "swap", "run_id", "kind", "status")
    return pairs({k: v for k, v in run.manifest.items() if k not in left_out})
