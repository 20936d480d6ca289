"""The report of a trace: its figures, and its sections in their order."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mismatch.errors import UsageError
from mismatch.report import heatmap, heatmap_cells, intervals
from mismatch.report import quantity as q
from mismatch.report.figures import ReportFigure
from mismatch.report.page import Html, grid, join, reading, tag, whole
from mismatch.report.sections import Section, findings, replaced
from mismatch.report.words import subject
from mismatch.runs.folder import Run
from mismatch.stages.probe import report as probes
from mismatch.stages.trace.report.controls_figure import output_data, output_shift
from mismatch.stages.trace.report.position_figure import by_position, by_position_data
from mismatch.stages.trace.report.profile_figure import depth_profile, depth_profile_data
from mismatch.stages.trace.report.words import verdict, worst_sites


def _every_cell(table: pd.DataFrame, *, plan: Any = None, dictionary: Any = None) -> pd.DataFrame:
    """The cells of every view of the heatmap."""
    metrics = heatmap_cells.every_metric(table, dictionary)
    return heatmap.heatmap_data(table, metrics or None, dictionary=dictionary)


FIGURES = (
    ReportFigure(
        "output_shift",
        "Output shift beside the controls",
        output_shift,
        output_data,
        "Left: how far each student's prediction is from the teacher's. zero deletes the module, mean "
        "replaces it by its average: a swap that is not to their left has not yet earned its place. "
        "Right: the same as paired differences; a whisker that crosses 0 does not tell them apart.",
    ),
    ReportFigure(
        "shift_heatmap",
        "Where the shift is",
        heatmap.heatmap,
        _every_cell,
        "Read each panel from left (input) to right (output), and from top to bottom in the order in "
        "which a block computes. Darker is further from the teacher. White before the swap is the "
        "proof that only the swap acts. attn_out and mlp_out are what a block adds; resid_mid and "
        "resid_post are the stream after it was added. A dark update over a pale stream is a large "
        "error of a small correction.",
        views=lambda run: heatmap_cells.views(run.table, run.dictionary),
    ),
    ReportFigure(
        "depth_profile",
        "Does it heal or grow?",
        depth_profile,
        depth_profile_data,
        "Each line starts at the first layer that differs. A falling line: the layers behind repair "
        "the stream. A rising line: they amplify. Compare the swap with zero and mean at the same "
        "layer. rel_l2 is about vectors, lens_kl about what they predict; they may disagree.",
    ),
    ReportFigure(
        "position",
        "Which tokens suffer",
        by_position,
        by_position_data,
        "A line that rises to the right means that late tokens suffer more: context or position was "
        "lost. A jump at a dotted line comes from the border of a segment.",
    ),
)


def figures(run: Run) -> tuple[ReportFigure, ...]:
    """Those of a trace, and those of the probes that were asked with it."""
    return (*FIGURES, *probes.figures(run))


def sections(run: Run) -> list[Section]:
    """The verdict first, then what it rests on."""
    return [
        Section(
            "",
            (
                tag("p", verdict(run.table, run.dictionary, subject(run.plan)), class_="verdict"),
                _output(run),
            ),
        ),
        replaced(run),
        findings(run),
        Section("Figures", figures(run)),
        *probes.answers(run),
        Section("Worst sites", (_worst(run),)),
        Section("Floors, and which tokens count", (_floors(run),)),
    ]


def _output(run: Run) -> Html:
    try:
        data = output_data(run.table, dictionary=run.dictionary)
    except UsageError as missing:
        return tag("p", missing.message)
    rows = [
        (
            f"swap − {r.against}" if r.against else r.student,
            reading(r.value),
            intervals.band(r.lo, r.hi),
            whole(r.n),
        )
        for r in data.itertuples()
    ]
    heads = ("output KL, nats per token", "mean", intervals.named(data["over"]), "tokens")
    marked = [i for i, r in enumerate(data.itertuples()) if r.student == "swap" and not r.against]
    return grid(heads, rows, numbers=(1, 2, 3), marked=marked)


def _worst(run: Run) -> Html:
    worst = worst_sites(run.table, None, run.dictionary)
    if worst.empty:
        return tag("p", "No site is above the floor.")
    numbers = [c for c in worst if c not in ("layer", "site", "swapped")]
    rows = [
        (row["layer"], row["site"], *(reading(row[c]) for c in numbers))
        for _, row in worst.iterrows()
    ]
    words = "Every site above the floor, free running, the worst by rel_l2 first; swapped layers in colour. "
    if "share_of_mean" in numbers:
        words += "share of mean: 1 = as bad as replacing the module by its mean."
    places = range(2, 2 + len(numbers))
    marked = [i for i, swapped in enumerate(worst["swapped"]) if swapped]
    heads = ("layer", "site", *(c if c != "share_of_mean" else "share of mean" for c in numbers))
    return join([tag("p", words), grid(heads, rows, numbers=(0, *places), marked=marked)])


def _floors(run: Run) -> Html:
    rows = []
    facts = run.dictionary.get("metrics", {})
    for metric in dict.fromkeys(run.table["metric"]):
        quantity = q.quantity(metric, run.dictionary)
        floor = q.floor_of(run.table, quantity, list(run.table["site"].unique()))
        tokens = _TOKENS.get(str(facts.get(metric, {}).get("mask")), "see its card")
        rows.append((metric, "not measured" if floor is None else reading(floor), tokens))
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
