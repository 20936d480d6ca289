"""report.html of a run of any stage: the figures and sections that its stage registers, on one page. No torch."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from mismatch import registry
from mismatch.report import html
from mismatch.report.figures import ReportFigure, draw_all
from mismatch.report.words import kind
from mismatch.runs.environment import private
from mismatch.runs.files import write_atomic
from mismatch.runs.folder import Run, load_run


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
    data = page(run, folder).encode()
    write_atomic(path, lambda file: file.write(data))
    return path


def page(run: Run, folder: Path | None = None) -> str:
    """The report as text; with a folder, the figures are also written there (png, svg, csv, json).

    Raises:
        RunError: a file cannot be written.
    """
    stage = _stage(run)
    shown = figures(run)
    return private(html.page(run, shown, stage.sections(run), draw_all(run, shown, folder)))


def figures(run: Run) -> tuple[ReportFigure, ...]:
    """The figures of a run, as its stage registers them."""
    return tuple(_stage(run).figures(run))


def _stage(run: Run) -> Any:
    """What has the figures and sections of a run: the report module of its stage, else the stage itself."""
    name, known = kind(run), registry.stages()
    module = known.card(name).facts.get("report")
    return known.get(name)(name) if module is None else import_module(module)
