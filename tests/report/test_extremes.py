"""A table with infinite numbers: its report is written, and says so where a figure cannot be drawn."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from synthetic import synthetic

from mismatch.report.figures import ReportFigure, draw_all
from mismatch.report.sections import state
from mismatch.runs.folder import Run


def made(value):
    table = synthetic()
    table.loc[table["metric"] == "kl", ["value", "lo", "hi"]] = value
    run = Run(None, {"status": "done", "kind": "trace"}, {"spec": "", "clauses": []})
    run.__dict__["table"] = table
    return run


def figure(error):
    def fails(table, **_):
        raise error

    return ReportFigure("f", "F", fails, lambda *a, **k: pd.DataFrame(), "how")


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e308])
def test_a_figure_that_fails_on_infinite_numbers_says_so(value):
    drawn = draw_all(made(value), [figure(ValueError("Axis limits cannot be NaN or Inf"))])["f"]
    assert drawn.views == ()
    assert "numbers of the table are infinite or beyond 1e+100 (Axis limits" in drawn.missing
    assert "are infinite or beyond 1e+100: are the weights whole?" in state(made(value))


def test_a_fault_of_a_figure_is_not_hidden():
    with pytest.raises(ValueError, match="a fault"):
        draw_all(made(0.5), [figure(ValueError("a fault"))])
    assert "infinite" not in state(made(0.5))
