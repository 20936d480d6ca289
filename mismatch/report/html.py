"""The report of one run: one file that opens anywhere, offline. The verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mismatch.report.figures import Drawn, ReportFigure
from mismatch.report.page import Html, document, join, picture, tag
from mismatch.report.sections import Section, closing, state
from mismatch.report.words import kind
from mismatch.runs.folder import Run


def page(
    run: Run,
    figures: Sequence[ReportFigure],
    sections: Sequence[Section],
    drawn: Mapping[str, Drawn],
) -> str:
    """The report as text.

    Args:
        run: what it is about.
        figures: of its stage.
        sections: of its stage, in their order; the first one opens the page.
        drawn: the figures by name (`figures.draw_all`).
    """
    placed = {
        item.name for part in sections for item in part.body if isinstance(item, ReportFigure)
    }
    others = tuple(one for one in figures if one.name not in placed)
    first, *rest = sections or (Section("", ()),)
    parts = [first, Section("", others), *rest, *closing(run)]
    return document(
        f"mismatch: {run.run_id}",
        tag("h1", f"mismatch {kind(run)} of {run.manifest.get('model', 'a model')}"),
        tag("p", f"{run.manifest.get('swap', '')} · run {run.run_id}", class_="faint"),
        state(run),
        *(_section(part, drawn) for part in parts),
    )


def _section(part: Section, drawn: Mapping[str, Drawn]) -> Html:
    heading = [tag("h2", part.title)] if part.title else []
    return join([*heading, *_shown(part.body, drawn)])


def _shown(body: Iterable[Html | ReportFigure], drawn: Mapping[str, Drawn]) -> list[Html]:
    return [_figure(x, drawn[x.name]) if isinstance(x, ReportFigure) else x for x in body]


def _figure(figure: ReportFigure, drawn: Drawn) -> Html:
    heading = tag("h3", figure.title)
    if not drawn.views:
        return join([heading, tag("p", f"Not drawn: {drawn.missing}.")])
    caption = f"{figure.reading} Numbers, in the run folder: figures/{figure.name}.csv"
    return join([heading, picture(drawn.views, caption)])
