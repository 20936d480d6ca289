"""Several finished runs side by side: the same figures, one scale for all, one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mismatch.errors import UsageError
from mismatch.report import heatmap, heatmap_cells, style
from mismatch.report import quantity as q
from mismatch.report.figures import inline
from mismatch.report.page import Cell, Html, document, grid, join, picture, reading, tag
from mismatch.report.words import kind, subject
from mismatch.runs.files import write_atomic
from mismatch.runs.folder import Run, load_run
from mismatch.stages.trace.report.position_figure import by_position
from mismatch.stages.trace.report.profile_figure import depth_profile
from mismatch.stages.trace.report.words import verdict


def compare(
    runs: Sequence[Path | str], output: Path | str = "comparison.html", *, any_data: bool = False
) -> Path:
    """Write one page that compares finished runs. Needs no torch.

    Args:
        runs: run folders, at least two.
        output: the file.
        any_data: compare runs on different data, too; the page then says that they are.

    Raises:
        UsageError: fewer than two runs, runs of many swaps, or runs on different data.
        RunError: a run cannot be read, or the file cannot be written.
    """
    if len(runs) < 2:
        raise UsageError(f"{len(runs)} run given", hint="compare needs at least two run folders")
    loaded = [load_run(run) for run in runs]
    for run in loaded:
        if (made := kind(run)) in ("scan", "plan"):
            raise UsageError(
                f"the run in {run.path} is a {made}, not one swap: there is nothing to set beside another run",
                hint=f"a {made} has its own picture: mismatch report {run.path}",
            )
    same = _same_data(loaded)
    if not same and not any_data:
        lines = [f"  {run.path}: {_described(run)}" for run in loaded]
        raise UsageError(
            "these runs saw different data:\n" + "\n".join(lines),
            hint="trace them on the same --data, --tokens and --seq-len, "
            "or compare them all the same with any_data",
        )
    path = Path(output)
    data = page(loaded, same_data=same).encode()
    write_atomic(path, lambda file: file.write(data))
    return path


def _same_data(runs: Sequence[Run]) -> bool:
    return len({_text(run) for run in runs}) == 1


def _text(run: Run) -> str:
    """The fingerprint of the text that a run saw; its own id where it has none."""
    return str(run.manifest.get("fingerprints", {}).get("evaluation", run.run_id))


def _described(run: Run) -> str:
    """The text that a run saw, in words."""
    text = run.manifest.get("texts", {}).get("evaluation")
    if text is None:
        return f"a {kind(run)} that does not say on which text"
    tokens = f"{text['tokens']:,} tokens in {text.get('windows', '?')} windows"
    return f"{text.get('source', 'a text')}, {tokens} (fingerprint {_text(run)[:12]})"


def letter(index: int) -> str:
    """A, B, ... Z, AA, AB: what a run is called in the figures."""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def labels(runs: Sequence[Run]) -> list[str]:
    """`A layer12:infini`: letter and swap, with the model where there are several."""
    several = len({run.manifest.get("model") for run in runs}) > 1
    return [
        " ".join(
            str(word)
            for word in (
                letter(i),
                run.manifest.get("model") if several else "",
                run.manifest.get("swap", run.run_id),
            )
            if word
        )
        for i, run in enumerate(runs)
    ]


def together(runs: Sequence[Run]) -> pd.DataFrame:
    """The swaps of all runs as students of one table, each under its letter; and their floors."""
    parts = []
    for i, run in enumerate(runs):
        kept = run.table[run.table["student"].isin(["swap", "floor"])]
        parts.append(kept.assign(student=kept["student"].replace("swap", letter(i))))
    return pd.concat(parts, ignore_index=True)


@style.styled
def heatmaps(runs: Sequence[Run], metric: str = "rel_l2", width: float = style.WIDTH) -> Figure:
    """The shift heatmap of one metric, a panel for each run, one colour scale for all.

    Raises:
        UsageError: a run lacks the metric.
    """
    quantity = q.quantity(metric, runs[0].dictionary)
    panels = [q.cells(run.table, quantity) for run in runs]
    norm = heatmap.colour_norm(panels, quantity.signed)
    figure = style.new_figure(width, 0.95 + len(runs) * 1.3)
    axes = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for at, (axis, cells, label) in enumerate(zip(axes, panels, labels(runs), strict=True)):
        beside = {letter(i): other for i, other in enumerate(panels) if i != at}
        texts = heatmap_cells.readouts(runs[at].table, cells, quantity, beside=beside)
        heatmap.draw_panel(axis, cells.assign(row=cells["site"]), quantity, norm, label, texts)
    axes[-1].set_xlabel("layer")
    both = pd.concat([run.table for run in runs])
    style.frame(figure, f"{quantity.label}, free, one scale", heatmap.caption(both, panels))
    return figure


def page(runs: Sequence[Run], *, same_data: bool = True) -> str:
    """The comparison as text."""
    names = labels(runs)
    table = together(runs)
    dictionary: dict[str, Any] = {"metrics": {}}
    for run in runs:
        dictionary["metrics"] |= run.dictionary.get("metrics", {})
    warning = tag(
        "p",
        "These runs saw different data: their numbers differ by the text as well as by the swap.",
        class_="warning",
    )
    shown = (
        _figure("heatmap", "Where the shift is", "One colour scale: equal colours are equal.", {
            q.quantity(metric, dictionary).label: partial(heatmaps, runs, metric)
            for metric in _common(runs)
        }),
        _figure("depth_profile", "Does it heal or grow?", "The swap of each run, without controls.", {
            "all": lambda: depth_profile(table, dictionary=dictionary)
        }),
        _figure("position", "Which tokens suffer", "The swap of each run, without controls.", {
            "all": lambda: by_position(table, dictionary=dictionary)
        }),
    )  # fmt: skip
    return document(
        "mismatch: comparison",
        tag("h1", f"{len(runs)} runs compared"),
        Html("") if same_data else warning,
        _outputs(runs, names),
        *(
            tag("p", tag("b", name), ": ", verdict(run.table, run.dictionary, subject(run.plan)))
            for run, name in zip(runs, names, strict=True)
        ),
        tag("h2", "Figures"),
        *shown,
        tag("h2", "Runs"),
        grid(
            ("letter", "run", "folder", "model", "command"),
            [
                (
                    letter(i),
                    r.run_id,
                    r.path.name if r.path else "-",
                    r.manifest.get("model"),
                    r.manifest.get("command"),
                )
                for i, r in enumerate(runs)
            ],
        ),
    )


def _common(runs: Sequence[Run]) -> list[str]:
    """The metrics that every run has along its layers; with none, the one that the missing figure is told of."""
    each = [heatmap_cells.every_metric(run.table, run.dictionary) for run in runs]
    cells = sum(len(q.BLOCK_SITES) * q.layer_count(run.table) for run in runs)
    common = [metric for metric in each[0] if all(metric in other for other in each)]
    return common[: max(1, heatmap_cells.MOST // max(1, cells))] or ["rel_l2"]


def _figure(name: str, title: str, caption: str, views: Mapping[str, Callable[[], Figure]]) -> Html:
    drawn = []
    for at, (label, draw) in enumerate(views.items()):
        try:
            drawn.append((label, inline(draw(), f"{name}-{at}", f"{title}: {label}")))
        except UsageError as missing:
            return join([tag("h3", title), tag("p", f"Not drawn: {missing.message}.")])
    return join([tag("h3", title), picture(drawn, caption)])


def _outputs(runs: Sequence[Run], names: Sequence[str]) -> Html:
    """Output KL: one row a run, one column a student."""
    found = [_output(run) for run in runs]
    students = list(dict.fromkeys(s for one in found for s in one))
    rows = [
        (name, *(one.get(student, "-") for student in students))
        for name, one in zip(names, found, strict=True)
    ]
    heads = ("run: output KL, nats per token", *students)
    return grid(heads, rows, numbers=range(1, len(heads)))


def _output(run: Run) -> dict[str, Cell]:
    quantity = q.quantity("kl", run.dictionary)
    who = [*q.students(run.table), "floor"]
    where = {"site": "logits", "mode": "free", "student": who}
    if not q.has(run.table, quantity, **where):
        return {}
    rows = q.pick(run.table, quantity, **where).set_index("student")
    return {
        student: reading(rows.loc[student, "value"])
        if student == "floor"
        else reading(*rows.loc[student, ["value", "lo", "hi"]])
        for student in who
        if student in rows.index
    }
