"""The figures of each kind of run: what draws them, what gives their numbers, and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from mismatch.report import heatmap
from mismatch.runs.folder import Run
from mismatch.stages.diagnose.figure import diagnosis_data, diagnosis_figure
from mismatch.stages.plan import figure as plan
from mismatch.stages.probe.words import passkey, passkey_data, probes_of
from mismatch.stages.repair.report.before_after_figure import before_after, before_after_data
from mismatch.stages.repair.report.curve_figure import repair_data, repair_plate
from mismatch.stages.repair.report.gates_figure import gates_data, gates_figure
from mismatch.stages.scan import atlas
from mismatch.stages.trace.report.controls_figure import output_data, output_shift
from mismatch.stages.trace.report.position_figure import by_position, by_position_data
from mismatch.stages.trace.report.profile_figure import depth_profile, depth_profile_data


@dataclass(frozen=True)
class Plate:
    """One figure of the report: what draws it, what gives its numbers, and how to read it."""

    name: str
    title: str
    function: Callable[..., Figure]
    numbers: Callable[..., pd.DataFrame]
    reading: str
    planned: bool = False
    """The drawing asks for the plan."""
    planned_data: bool = False
    """So do the numbers."""

    def draw(self, run: Run) -> Figure:
        plan = {"plan": run.plan} if self.planned else {}
        return self.function(run.table, dictionary=run.dictionary, **plan)

    def data(self, run: Run) -> pd.DataFrame:
        plan = {"plan": run.plan} if self.planned_data else {}
        return self.numbers(run.table, dictionary=run.dictionary, **plan)


PLATES: tuple[Plate, ...] = (
    Plate(
        "output_shift",
        "Output shift beside the controls",
        output_shift,
        output_data,
        "Left: how far each student's prediction is from the teacher's. zero deletes the part, mean "
        "replaces it by its average: a swap that is not to their left has not yet earned its place. "
        "Right: the same as paired differences; a whisker that crosses 0 does not tell them apart.",
    ),
    Plate(
        "shift_heatmap",
        "Where the shift is",
        heatmap.heatmap,
        heatmap.heatmap_data,
        "Read each panel from left (input) to right (output), and from top to bottom in the order in "
        "which a block computes. Darker is further from the teacher. White before the swap is the "
        "proof that only the swap acts. attn_out and mlp_out are what a block adds; resid_mid and "
        "resid_post are the stream after it was added. A dark update over a pale stream is a large "
        "error of a small correction.",
    ),
    Plate(
        "depth_profile",
        "Does it heal or grow?",
        depth_profile,
        depth_profile_data,
        "Each line starts at the first layer that differs. A falling line: the layers behind repair "
        "the stream. A rising line: they amplify. Compare the swap with zero and mean at the same "
        "layer. rel_l2 is about vectors, lens_kl about what they predict; they may disagree.",
    ),
    Plate(
        "position",
        "Which tokens suffer",
        by_position,
        by_position_data,
        "A line that rises to the right means that late tokens suffer more: context or position was "
        "lost. A jump at a dotted line comes from the border of a segment.",
        planned=True,
    ),
)

PROBE_PLATES = (
    Plate(
        "passkey",
        "Passkey retrieval",
        passkey,
        passkey_data,
        "Yellow is found, dark is lost. A column that is dark from some length on is a context that ends there; dark "
        "rows are a depth that was forgotten. For a mechanism with segments look at how many segments lie between key "
        "and question, not at the depth. The number tells how near a miss was: about -15 is not knowing the key.",
        planned=True,
    ),
)


SCAN_PLATES = (
    Plate(
        "atlas",
        "Atlas: one layer replaced at a time",
        atlas.atlas,
        atlas.atlas_data,
        "Each row is a layer, each column a mechanism, each panel a question. Read a column down: where is it cheap. "
        "Read a row across the panels: a layer that is pale on text and dark on retrieval carries something that "
        "ordinary text does not ask for, and should be kept. A mechanism no paler than `zero` in its row has not "
        "earned its place there.",
        planned=True,
    ),
)


PLAN_PLATES = (
    Plate(
        "plan",
        "The choice: alone, added up, together",
        plan.plan_figure,
        plan.plan_data,
        "Grey: each chosen layer replaced alone. Blue: these added up, which is what the choice was made by. Orange: "
        "all of them replaced together. Green: the control in the same places. Orange to the right of blue is damage "
        "that no scan of single layers shows; orange to the right of green is no better than deleting.",
        planned=True,
    ),
)


REPAIR_PLATES = (
    Plate(
        "repair",
        "The repair curve",
        repair_plate,
        repair_data,
        "Each point is the student after a rung, on text that was neither learnt from nor used to choose. Lower is "
        "nearer to the teacher. Dashed: controls, which the repaired swap must be below to have earned its place. "
        "Hollow: a rung that made it worse and was undone.",
        planned=True,
        planned_data=True,
    ),
    Plate(
        "before_after",
        "The shift before and after",
        before_after,
        before_after_data,
        "Pairs of panels on one scale: what is paler below than above was mended. Read the stream (resid_post) from "
        "the swap to the right: what stays dark at its end is what the prediction still lacks. An update (attn_out, "
        "mlp_out) that is darker after the repair is one that learnt to answer for another.",
        planned=True,
    ),
    Plate(
        "gates",
        "Where the gates went",
        gates_figure,
        gates_data,
        "A gate at its dotted line was not moved by the repair: its learning rate was too small, or the swap does not "
        "need it. All heads at 0 or at 1: one branch was given up, and the table of branches says whether it matters.",
        planned=True,
        planned_data=True,
    ),
)


DIAGNOSE_PLATES = (
    Plate(
        "diagnosis",
        "Which correction returns the damage",
        diagnosis_figure,
        diagnosis_data,
        "Top: the three causes and the rest add up to 100. Below, one thing corrected at a time, from simple to rich: "
        "at 100 the damage is gone, at 0 that was not the matter. A richer correction often includes the simpler ones "
        "above it, so the first long bar is the one to read. Hollow bars took values from the teacher: they name a "
        "cause, and no repair has them.",
        planned=True,
        planned_data=True,
    ),
)


_OWN = {
    "diagnose": DIAGNOSE_PLATES,
    "scan": SCAN_PLATES,
    "plan": PLAN_PLATES,
    "repair": REPAIR_PLATES,
}


def kind(run: Run) -> str:
    """What made the run: trace, probe, diagnose, scan, plan or repair."""
    return str(run.manifest.get("kind", "trace"))


def plates(run: Run) -> tuple[Plate, ...]:
    """The figures of a run: of a scan the atlas; of a trace its own, and those of the probes that were asked."""
    if kind(run) in _OWN:
        return _OWN[kind(run)]
    asked = tuple(p for p in PROBE_PLATES if p.name in probes_of(run.table))
    return asked if kind(run) == "probe" else (*PLATES, *asked)
