"""report.html: one file that opens anywhere, offline. The verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mismatch.errors import UsageError
from mismatch.report import quantity as q
from mismatch.report import style
from mismatch.report.page import Html, document, grid, join, pairs, picture, tag
from mismatch.report.plates import Plate, kind, plates
from mismatch.runs.files import write_atomic
from mismatch.runs.folder import Run, load_run
from mismatch.stages.plan.figure import plan_summary
from mismatch.stages.probe import words as probes
from mismatch.stages.repair.report.page import sections
from mismatch.stages.scan.words import scan_summary, scan_verdict
from mismatch.stages.trace.report.controls_figure import output_data
from mismatch.stages.trace.report.words import count, total, verdict, worst_sites


def write_html(run_dir: Path | str, output: Path | str | None = None) -> Path:
    """Write the report of a finished run, and its figures into figures/.

    Args:
        run_dir: the run folder.
        output: write the page there and leave the run folder as it is; default: report.html in it.

    Raises:
        RunError: no run there, or a file cannot be written.
    """
    run = load_run(run_dir)
    folder = Path(run_dir) / "figures" if output is None else None
    path = Path(run_dir) / "report.html" if output is None else Path(output)
    data = page(run, draw(run, folder)).encode()
    write_atomic(path, lambda file: file.write(data))
    return path


def draw(run: Run, folder: Path | None = None) -> dict[str, bytes | str]:
    """Draw every plate; in a folder, also as png, svg, csv and json.

    Returns:
        For each plate its svg, or a sentence that says why the table does not allow it.

    Raises:
        RunError: a file cannot be written.
    """
    drawn: dict[str, bytes | str] = {}
    for plate in plates(run):
        try:
            figure, data = plate.draw(run), plate.data(run)
        except UsageError as missing:
            drawn[plate.name] = missing.message
            continue
        if folder is None:
            drawn[plate.name] = style.to_bytes(figure, "svg")
            continue
        made = {
            "title": plate.title,
            "reading": plate.reading,
            "run_id": run.run_id,
            "from": "metrics.parquet",
            "by": f"{plate.function.__module__}.{plate.function.__name__}",
            "versions": run.manifest.get("versions", {}),
        }
        drawn[plate.name] = style.save(figure, folder, plate.name, data, made)
    return drawn


def page(run: Run, drawn: Mapping[str, bytes | str]) -> str:
    """The report as text, with the figures that `draw` gave."""
    head = (
        f"mismatch: {run.run_id}",
        tag("h1", f"mismatch {kind(run)} of {run.manifest.get('model', 'a model')}"),
        tag("p", f"{run.manifest.get('swap', '')} · run {run.run_id}", class_="faint"),
        _state(run),
    )
    end = (
        tag("h2", "What each metric is, and what it cannot see"),
        _glossary(run),
        tag("h2", "How to do it again"),
        _again(run),
        tag("h2", "Environment"),
        _environment(run),
    )
    figures = [_plate(plate, drawn[plate.name]) for plate in plates(run)]
    if kind(run) == "scan":
        said = tag("pre", scan_summary(run.table, run.plan))
        told = tag("p", scan_verdict(run.table, run.plan), class_="verdict")
        return document(*head, told, *figures, tag("h2", "Worst and best layers"), said, *end)
    if kind(run) == "plan":
        model = str(run.manifest.get("model", "MODEL"))
        said = tag("pre", plan_summary(run.table, run.plan, model))
        return document(*head, said, *figures, *end)
    if kind(run) == "diagnose":
        told = tag("p", run.plan.get("verdict", ""), class_="verdict")
        said = (tag("h2", "Findings"), _findings(run), tag("h2", "What was replaced"), _plan(run))
        return document(*head, told, *figures, *said, *end)
    if kind(run) == "repair":
        named = dict(zip((plate.name for plate in plates(run)), figures, strict=True))
        said = sections(run, named)
        return document(*head, *said, tag("h2", "What was replaced"), _plan(run), *end)
    asked = (
        (tag("h2", "Answers to the probes"), _probes(run)) if probes.probes_of(run.table) else ()
    )
    if kind(run) == "probe":
        return document(*head, *asked, tag("h2", "What was replaced"), _plan(run), *figures, *end)
    return document(
        *head,
        tag("p", verdict(run.table, run.dictionary), class_="verdict"),
        _output(run),
        tag("h2", "What was replaced"),
        _plan(run),
        tag("h2", "Findings"),
        _findings(run),
        tag("h2", "Figures"),
        *figures,
        *asked,
        tag("h2", "Worst sites"),
        _worst(run),
        tag("h2", "Floors, and which tokens count"),
        _floors(run),
        *end,
    )


def _probes(run: Run) -> Html:
    """The headlines; a probe of many layers or heads shows the first ones."""
    found = probes.headlines(run.table, run.dictionary)
    found = found.groupby(["metric", "student"], sort=False).head(probes.ROWS)
    rows = [
        (
            probes.named(r),
            r.student,
            style.number(r.teacher),
            style.number(r.value) if r.applies else "not applicable",
            style.interval(r.difference, r.difference_lo, r.difference_hi) if r.applies else "",
        )
        for r in found.itertuples()
    ]
    heads = ("probe", "student", "teacher", "reading", "minus the teacher, 95 % interval")
    return grid(heads, rows, numbers=(2, 3, 4))


def _state(run: Run) -> Html:
    status = run.manifest.get("status")
    if status == "done":
        return Html("")
    return tag("p", f"This run is not finished: its status is {status}.", class_="warning")


def _output(run: Run) -> Html:
    try:
        data = output_data(run.table, dictionary=run.dictionary)
    except UsageError as missing:
        return tag("p", missing.message)
    rows = [
        (
            f"swap − {r.against}" if r.against else r.student,
            style.number(r.value),
            f"[{style.number(r.lo)}, {style.number(r.hi)}]" if pd.notna(r.lo) else "-",
            f"{r.n:,}",
        )
        for r in data.itertuples()
    ]
    heads = ("output KL, nats per token", "mean", "95 % interval over documents", "tokens")
    marked = [i for i, r in enumerate(data.itertuples()) if r.student == "swap" and not r.against]
    return grid(heads, rows, numbers=(1, 2, 3), marked=marked)


def _findings(run: Run) -> Html:
    if not run.findings:
        return tag("p", "None.")
    return join(
        tag(
            "div",
            tag("h3", tag("span", f["severity"], class_="tag"), f["title"]),
            tag("p", f["text"]),
            tag("pre", f["next"]) if f.get("next") else Html(""),
            class_=f"finding {f['severity']}",
        )
        for f in run.findings
    )


def _plan(run: Run) -> Html:
    clauses = run.plan.get("clauses", [])
    if not clauses:
        return tag("p", "The plan was not written.")
    rows = [
        (
            c["path"],
            f"{c['old']} → {c['new']}",
            f"{c['mechanism']}({', '.join(f'{k}={v}' for k, v in c.get('args', {}).items())})",
            *(count(total(c.get(k))) for k in ("inherited", "new_parameters", "dropped")),
        )
        for c in clauses
    ]
    heads = ("where", "module", "mechanism", "inherited", "new", "dropped")
    notes = dict.fromkeys(note for c in clauses for note in c.get("notes", []))
    limits = dict.fromkeys(
        f"{c['mechanism']}: {c['identity']}" for c in clauses if c.get("identity")
    )
    return join(
        [
            grid(heads, rows, numbers=(3, 4, 5)),
            *(tag("p", text, class_="warning") for text in run.plan.get("warnings", [])),
            *(tag("p", note) for note in notes),
            *(tag("p", f"Equal to the teacher at: {limit}", class_="faint") for limit in limits),
            tag("details", tag("summary", "tensors by name"), *(_tensors(c) for c in clauses)),
        ]
    )


def _tensors(clause: dict[str, Any]) -> Html:
    kinds = ("inherited", "new_parameters", "dropped")
    rows = [
        (kind.replace("_parameters", ""), name, f"{int(size):,}")
        for kind in kinds
        for name, size in (clause.get(kind) or {}).items()
    ]
    return join([tag("h3", clause["path"]), grid(("", "tensor", "numbers"), rows, numbers=(2,))])


def _plate(plate: Plate, drawn: bytes | str) -> Html:
    if isinstance(drawn, str):
        return join([tag("h3", plate.title), tag("p", f"Not drawn: {drawn}.")])
    caption = f"{plate.reading} Numbers, in the run folder: figures/{plate.name}.csv"
    return join([tag("h3", plate.title), picture(drawn, plate.title, caption)])


def _worst(run: Run) -> Html:
    worst = worst_sites(run.table, dictionary=run.dictionary)
    if worst.empty:
        return tag("p", "No site is above the floor.")
    numbers = [c for c in worst if c not in ("layer", "site", "swapped")]
    rows = [
        (row["layer"], row["site"], *(style.number(row[c]) for c in numbers))
        for _, row in worst.iterrows()
    ]
    words = "Free running, by rel_l2; swapped layers in colour. "
    if "share_of_mean" in numbers:
        words += "share of mean: 1 = as bad as replacing the part by its mean."
    places = range(2, 2 + len(numbers))
    marked = [i for i, swapped in enumerate(worst["swapped"]) if swapped]
    heads = ("layer", "site", *(c.replace("_", " ") for c in numbers))
    return join([tag("p", words), grid(heads, rows, numbers=places, marked=marked)])


def _floors(run: Run) -> Html:
    rows = []
    facts = run.dictionary.get("metrics", {})
    for metric in dict.fromkeys(run.table["metric"]):
        quantity = q.quantity(metric, run.dictionary)
        floor = q.floor_of(run.table, quantity, list(run.table["site"].unique()))
        tokens = _TOKENS.get(str(facts.get(metric, {}).get("mask")), "see its card")
        rows.append((metric, "not measured" if floor is None else style.number(floor), tokens))
    words = (
        "The floor is what a metric reads at most when nothing changed: the teacher against itself in "
        "another batch shape. A shift at or below it is none."
    )
    heads = ("metric", "floor", "tokens that count")
    return join([tag("p", words), grid(heads, rows, numbers=(1,))])


_TOKENS = {
    "valid": "all real tokens",
    "bulk": "real tokens without position 0 and massive ones",
    "sample": "a sample of the real tokens without position 0 and massive ones",
    "has_target": "real tokens that have a next token",
}


def _glossary(run: Run) -> Html:
    metrics = run.dictionary.get("metrics", {})
    if not metrics:
        return tag("p", "The run has no metrics.json.")
    rows = [
        (tag("code", name), facts.get("summary", ""), facts.get("blind", "not said"))
        for name, facts in metrics.items()
    ]
    cards = [
        join([tag("h3", name), tag("pre", facts.get("text", ""))])
        for name, facts in metrics.items()
    ]
    whole = tag("details", tag("summary", "definitions, units, sources"), *cards)
    return join([grid(("metric", "what it asks", "what it cannot see"), rows), whole])


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
    left_out = ("command", "model", "swap", "run_id")
    return pairs({k: v for k, v in run.manifest.items() if k not in left_out and v is not None})
