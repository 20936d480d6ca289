"""What an earlier run says about the same swap: retrieval and copying, which ordinary text does not show. No torch."""

from __future__ import annotations

from typing import Any

from mismatch import spec
from mismatch.errors import UsageError
from mismatch.runs.folder import Run, load_run
from mismatch.stages.diagnose.config import DiagnoseConfig
from mismatch.stages.probe.words import WORSE, headlines, named


def earlier_run(config: DiagnoseConfig) -> Run | None:
    """The earlier run of the same swap.

    Raises:
        RunError: no run there, or one without numbers.
        UsageError: it is of another swap.
    """
    if config.earlier_run is None:
        return None
    run = load_run(config.earlier_run)
    if config.student is not None and run.config.get("student") is not None:
        return run  # whether it is this student its weights tell
    theirs, ours = run.config.get("swap") or [], config.subject
    theirs = [theirs] if isinstance(theirs, str) else theirs
    if not theirs or spec.format(spec.parse(theirs)) != ours:
        raise UsageError(
            f"the run in {config.earlier_run} is of another swap: {'; '.join(theirs) or 'none'}; this one is {ours}",
            hint="give a trace or probes of the same swap, or leave --earlier-run out",
        )
    return run


def readings_of(
    run: Run | None, sha256: str, student: str | None = None
) -> tuple[dict[str, Any], ...]:
    """For each probe that was asked, the paired difference to the teacher where it is worst.

    Args:
        run: from `earlier_run`.
        sha256: of the teacher's weights.
        student: of the weights of one that was trained elsewhere; None: it was swapped here.

    Returns:
        probe, what (`passkey logprob, length 256, depth 0.1`), teacher, value, lo, hi: the difference and its interval.

    Raises:
        UsageError: it is of another model, or of another student.
    """
    if run is None:
        return ()
    if student is not None and run.manifest.get("student_info", {}).get("sha256") != student:
        raise UsageError(
            f"the run in {run.path} is of another student",
            hint="give a trace or probes of this very student, or leave --earlier-run out",
        )
    if run.manifest.get("model_info", {}).get("sha256") != sha256:
        raise UsageError(
            f"the run in {run.path} is of another model",
            hint="give a trace or probes of this very model, or leave --earlier-run out",
        )
    data, found = headlines(run.table, run.dictionary), []
    if data.empty:
        return ()
    mine = data[(data["student"] == "swap") & data["applies"] & data["difference"].notna()]
    for probe, sign in WORSE.items():
        rows = mine[mine["metric"] == probe]
        if rows.empty:
            continue
        worst = max(rows.itertuples(), key=lambda row: sign * row.difference)
        numbers = ("teacher", "difference", "difference_lo", "difference_hi")
        teacher, value, lo, hi = (float(getattr(worst, name)) for name in numbers)
        found.append(
            {"probe": probe, "what": named(worst), "teacher": teacher, "value": value, "lo": lo, "hi": hi}
        )  # fmt: skip
    return tuple(found)
