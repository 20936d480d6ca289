"""What a scan will do, worked out before any weight is loaded: cells, tasks, text, and how long it will take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mismatch import spec
from mismatch.forward.head import chunk_of
from mismatch.models.layout import Layout
from mismatch.stages.estimate import BYTES, EFFICIENCY, PROCESS, Estimate, resident, speed
from mismatch.stages.opening import Opened
from mismatch.stages.scan.cells import Cell, Column, cells, columns, refused
from mismatch.stages.scan.config import TASKS, ScanConfig
from mismatch.stages.scan.sweep import HELD
from mismatch.stages.scan.tasks import Task, tasks
from mismatch.stages.swapped import calibration_tokens
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class Prepared:
    """Everything about a scan but the model.

    Attributes:
        columns: mechanisms and controls.
        cells: those that can be built, layer by layer.
        refused: those that cannot, with the reason.
        tasks: what is asked.
        left_out: tasks that this model cannot be asked, with the reason.
        calibration: windows of text for mechanisms that set themselves from it; None: none of them does.
        cut: windows of the evaluation text; None when it is not asked for.
        estimate: of time and memory.
        n_layers: of the model.
    """

    columns: tuple[Column, ...]
    cells: tuple[Cell, ...]
    refused: dict[Cell, str]
    tasks: tuple[Task, ...]
    left_out: dict[str, str]
    calibration: Windows | None
    cut: Windows | None
    estimate: Estimate
    n_layers: int

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are gone through."""
        cells = (*self.cells, *self.refused)
        return tuple(sorted({cell.layer for cell in cells if cell.layer is not None}))

    @property
    def controls(self) -> dict[str, tuple[str, ...]]:
        """By column, the controls it is compared with."""
        return {column.name: column.controls for column in self.columns}

    def notes(self) -> list[str]:
        """What is not measured, and why."""
        found = [f"{task} is left out: {reason}" for task, reason in self.left_out.items()]
        reasons: dict[tuple[str, str], list[int | None]] = {}
        for cell, reason in self.refused.items():
            plain = reason.replace(f"layer{cell.layer}.", "").replace(f"layer {cell.layer} ", "")
            reasons.setdefault((cell.name, plain), []).append(cell.layer)
        for (name, reason), layers in reasons.items():
            where = ", ".join(map(str, dict.fromkeys(layers)))  # of a layer all heads alike
            found.append(f"{name} is not applicable in layers {where}: {reason}")
        return found

    def text(self, config: ScanConfig) -> str:
        """For a person, before it starts."""
        asked = [f"{t.name} ({len(t.ids)} x {t.ids.shape[1]} tokens)" for t in self.tasks]
        names = [c.name + (" (control)" if c.control else "") for c in self.columns]
        count = len({cell.head for cell in self.cells})
        heads = "" if config.by == "layer" else f" x {count} {config.by.replace('-', ' ')}s"
        lines = [
            f"model   {config.model} ({config.dtype})",
            f"scan    {len(self.layers)} layers{heads} x {len(names)}: {', '.join(names)}",
            f"tasks   {', '.join(asked)}",
            *self.estimate.lines(),
            *(f"warning: {note}" for note in self.notes()),
        ]
        return "\n".join(lines)


def prepare(opened: Opened[ScanConfig], beside: Iterable[str] = ()) -> Prepared:
    """Work out a scan.

    Args:
        opened: its command.
        beside: further mechanisms that will set themselves from its calibration text: the controls of a plan.

    Raises:
        MismatchError: whatever the scan would refuse of mechanisms, layers, tasks and text.
    """
    config, skeleton = opened.config, opened.skeleton
    layers = spec.layers(config.among, skeleton.n_layers)
    made = columns(config.templates, config.controls)
    every = cells(made, layers, skeleton, config.by)
    not_here = refused(every, skeleton)
    able = tuple(cell for cell in every if cell not in not_here)
    calls = [placement.call for cell in able for placement in cell.placements]
    wanted = calibration_tokens(calls, beside, d_model=skeleton.d_model)
    calibration, cut = _text(opened, wanted)
    asked, left_out = tasks(config, config.tasks, cut, opened.tokenizer, opened.model_config)
    return Prepared(
        made, able, not_here, asked, left_out, calibration, cut,
        estimate(config, skeleton, able, asked), skeleton.n_layers,
    )  # fmt: skip


def _text(opened: Opened[ScanConfig], wanted: int) -> tuple[Windows | None, Windows | None]:
    """Windows of calibration and evaluation text, each where it is wanted."""
    config, calibration, cut = opened.config, None, None
    if "text" in (config.tasks or TASKS):
        calibration, held_out = opened.apart(calibrates=wanted > 0)
        cut = opened.cut("evaluation", held_out, config.tokens)
    return opened.calibration(wanted, calibration), cut


def estimate(
    config: ScanConfig, skeleton: Layout, cells: Sequence[Cell], tasks: Sequence[Task]
) -> Estimate:
    """Time and memory of a scan: the teacher once, a suffix a cell, the head where predictions are scored."""
    n, d, vocab = skeleton.n_layers, skeleton.d_model, skeleton.vocab
    inside = sum(p.numel() for p in skeleton.blocks.parameters())
    weights = resident(skeleton, config)
    blocks = n + sum(n - cell.first for cell in cells)
    flops = 0.0
    for task in tasks:
        # Scores and their use, causal: half of 4 T d a token and layer.
        block = 2 * inside / n + 2 * task.ids.shape[1] * d
        flops += task.ids.size * blocks * block
        flops += int(task.asked.sum()) * (len(cells) + 1) * 2 * vocab * d
    tokens = config.batch_size * config.seq_len
    streams = len({cell.first for cell in cells}) * tokens * d * BYTES[config.dtype]
    held = min(HELD, len(cells) * tokens * d * BYTES[config.dtype])
    peak = PROCESS + weights + streams + held + 5 * chunk_of(skeleton) * vocab * 4
    return Estimate(weights, peak, flops * 1.15, flops * 1.15 / (speed() * EFFICIENCY))
