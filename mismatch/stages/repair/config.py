"""What `mismatch repair` is told. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mismatch.config import SwapConfig
from mismatch.errors import ConfigError
from mismatch.registry import did_you_mean, mechanisms, probes

RUNGS = ("closed-form", "local", "block", "window", "end-to-end")
"""The ladder, from cheap to dear. What the swap inherits is rung 0, and is always there."""


@dataclass(frozen=True, kw_only=True)
class RepairConfig(SwapConfig):
    """What `mismatch repair` is told."""

    controls: tuple[str, ...] = ("zero", "linear")
    """Controls that are judged beside the repair: nothing in the place, the best linear map; none for no control."""
    same_steps: tuple[str, ...] = ()
    """Controls that are trained for the same steps as the swap: identity (does training alone move the model?), zero
    (what is mended without the mechanism?). Each takes as long as the repair; none for no such control."""
    rungs: tuple[str, ...] = ("closed-form", "local", "block", "window", "end-to-end")
    """Rungs of the ladder to climb, in its order."""
    tokens: Annotated[int, ">= 1"] = 131072
    """Tokens to learn from."""
    written: Annotated[float, ">= 0"] = 0.5
    """Share of them that the original model writes itself, for it knows more kinds of text than one source has; the
    rest is calibration text. Writing may take two fifths of --max-minutes. 0 = calibration text alone."""
    judged: Annotated[int, ">= 1"] = 8192
    """Held-out tokens behind every number that is reported."""
    looked: Annotated[int, ">= 1"] = 2048
    """Other held-out tokens, which choose weights and end a rung."""
    traced: Annotated[int, ">= 0"] = 2048
    """Tokens, of those judged, behind the heatmaps before and after; 0 = no heatmaps."""
    probes: tuple[str, ...] | None = None
    """Probes put to teacher, swap and repaired model. By default passkey, induction and generation where the model can
    be asked; none = no probe."""
    seq_len: Annotated[int, ">= 2"] = 1024
    """Tokens per window. A window never mixes documents."""
    batch_size: Annotated[int, ">= 1"] = 1
    """Windows per step. Small steps learn more from the same tokens; a GPU wants more windows at once."""
    epochs: Annotated[int, ">= 1"] = 10
    """Times that a rung may go through the text; no progress on held-out windows ends it earlier."""
    max_minutes: Annotated[float, "> 0"] | None = 10.0
    """Wall-clock minutes for all rungs together, judging not counted; a rung plans its steps for its share. none = by
    tokens alone."""
    lr: Annotated[float, "> 0"] = 2e-3
    """Highest learning rate of weights."""
    gate_lr: Annotated[float, "> 0"] = 3e-2
    """Highest learning rate of gates and decays, which have far to go."""
    width: Annotated[int, ">= 1"] = 3
    """Blocks behind the last swapped one whose stream the rung `window` matches."""
    neighbours: Annotated[int, ">= 0"] = 3
    """Blocks behind the last swapped one that learn too, through LoRA, in the rungs window and end-to-end; 0 = none."""
    rank: Annotated[int, ">= 1"] = 16
    """Rank of that LoRA."""
    order: Literal["sequential", "joint"] = "sequential"
    """Several places: each on the stream of the student as mended so far, or all on the teacher's."""
    pays: Annotated[float, ">= 0"] = 0.005
    """A rung that closes less than this share of the gap, after another that did too, ends the climb."""
    store_gb: Annotated[float, ">= 0"] = 4.0
    """Disk for the teacher's activations; what does not fit is computed anew each time."""
    store: str | None = None
    """Folder for these activations, kept for other candidates on the same text; by default they go with the run."""
    store_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the stored activations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._known(self.probes or (), probes())
        self._known(self.same_steps, mechanisms())
        for index, name in enumerate(self.rungs):
            if name not in RUNGS:
                raise ConfigError(f"unknown rung `{name}`", hint=did_you_mean(name, RUNGS))
            if name in self.rungs[:index]:
                raise ConfigError(f"the rung `{name}` is named twice")
        if self.written >= 1:
            raise ConfigError(
                f"--written must be less than 1, got {self.written:g}",
                hint="it is a share: 0.5 is half of the tokens; some text must be left",
            )
        if not self.rungs:
            raise ConfigError("`rungs` is empty", hint=f"name some of {', '.join(RUNGS)}")
        if list(self.rungs) != [name for name in RUNGS if name in self.rungs]:
            raise ConfigError(
                f"the rungs are out of order: {', '.join(self.rungs)}",
                hint=f"the ladder is {', '.join(RUNGS)}",
            )

    @property
    def to_write(self) -> int:
        """Tokens that the original writes itself: whole windows."""
        return int(self.tokens * self.written) // self.seq_len * self.seq_len

    @property
    def behind(self) -> bool:
        """Whether blocks behind the swap learn too."""
        return self.neighbours > 0 and bool({"window", "end-to-end"} & {*self.rungs})

    @property
    def around(self) -> bool:
        """Whether the rest of a swapped block learns too."""
        return bool({"block", "window", "end-to-end"} & {*self.rungs})
