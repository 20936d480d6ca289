"""Settings of `mismatch repair`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mismatch.config import BUILDS_ON, DANGEROUS, MODEL, OUTPUT, ScoredConfig, SwapConfig
from mismatch.errors import ConfigError
from mismatch.registry import did_you_mean, mechanisms, probes

STAGES = ("scores", "slots", "inherit", "closed-form", "local", "block", "window", "end-to-end")
"""The repair ladder, from cheap to costly."""
SWAPPED = "swap"
"""Stands for the student as it was swapped, before the first stage."""
INITIAL_VALUES = ("keys", "values", "half-life", "write", "gate")
"""What the stage `inherit` sets, in its order."""
PUBLISHED = ("mean-half-life", "value-scale")
"""Forms of other authors, to compare with."""

USUAL_RETRIEVAL = 0.25
"""Share of the training tokens in which something must be retrieved, at most, when nobody says."""


@dataclass(frozen=True, kw_only=True)
class RepairConfig(ScoredConfig, SwapConfig):
    """Settings of `mismatch repair`."""

    groups = {
        "model": MODEL,
        "swap": ("swap", "student", "controls", "trained_controls"),
        "ladder": (
            *(
                "stages",
                "initial_values",
                "state_bytes",
                "max_minutes",
                "epochs",
                "lr",
                "gate_lr",
                "window_blocks",
            ),
            *("lora_blocks", "lora_rank", "order", "min_gain"),
        ),
        "text": (
            *(
                "data",
                "text_field",
                "answers_only",
                "tokens",
                "train_data",
                "train_tokens",
                "self_generated",
                "retrieval_text",
                "val_tokens",
            ),
            *("calibration_tokens", "seq_len", "batch_size", "seed"),
            *BUILDS_ON,
        ),
        "before and after": ("probes", "trace_tokens"),
        "activations": ("activations_dir", "activations_gb", "activations_dtype"),
        "output": OUTPUT,
        "dangerous": DANGEROUS,
    }

    controls: tuple[str, ...] = ("zero", "linear")
    """Controls that are measured beside the repair: zero deletes the module, linear is its best linear map; none for
    no control."""
    trained_controls: tuple[str, ...] = ()
    """Controls that are trained for the same steps as the swap: identity (does training alone move the model?), zero
    (what is recovered without the mechanism?). Each takes as long as the repair; none for no such control."""
    stages: tuple[str, ...] = (
        "scores",
        "slots",
        "inherit",
        "closed-form",
        "local",
        "block",
        "window",
        "end-to-end",
    )
    """Stages of the repair ladder to run, in its order."""
    initial_values: tuple[str, ...] = ("keys", "values", "half-life", "write", "gate")
    """What the stage `inherit` sets in recurrent mixers, from the attention that they replace: keys without their mean,
    values that pass the convolution undistorted, a state that halves over the median distance of attention, how much is
    written, a gate as loud as the attention. Published forms to compare with: mean-half-life, value-scale."""
    tokens: Annotated[int, ">= 1"] = 8192
    """Evaluation tokens."""
    train_data: str = "sotu"
    """Training text, of another source than the evaluation text. Mechanisms that need calibration use it too."""
    train_tokens: Annotated[int, ">= 1"] = 131072
    """Training tokens."""
    self_generated: Annotated[float, ">= 0"] = 0.5
    """Share of the training tokens that is sampled from the teacher, which knows more kinds of text than one source
    has; the rest is training text. Sampling, and the teacher's run over all of it, may take 0.45 of --max-minutes. 0 =
    training text alone."""
    retrieval_text: Annotated[float, ">= 0"] | None = None
    """Share of the training tokens in which something must be retrieved: needles, copies and lists made of training
    text. By default half of what --self-generated leaves, at most 0.25, where the tokenizer and --seq-len allow it;
    0 = none."""
    val_tokens: Annotated[int, ">= 1"] = 2048
    """Validation tokens, of other documents of the evaluation source: they select checkpoints and end a stage early."""
    trace_tokens: Annotated[int, ">= 0"] = 2048
    """Evaluation tokens behind the heatmaps before and after the repair; 0 = no heatmaps."""
    probes: tuple[str, ...] | None = None
    """Probes of teacher, swap and repaired model. By default passkey, needles, kv_lookup, induction and generation
    where the model can answer them; none = no probe."""
    batch_size: Annotated[int, ">= 1"] = 1
    """Windows per training step. Small steps learn more from the same tokens; a GPU wants more windows at once."""
    epochs: Annotated[int, ">= 1"] = 10
    """Passes over the training text per stage; no progress on validation text ends a stage earlier. Where time allows a
    part of --train-tokens only, as many steps over that part."""
    state_bytes: Annotated[int, ">= 1"] | None = None
    """Bytes of state that a text may take in all swapped modules together: shared out as slots among their kv heads, by
    what each loses without them. none = slots as the swap says."""
    max_minutes: Annotated[float, "> 0"] | None = 10.0
    """Wall-clock minutes that sampling and training may take: self-generated text, the teacher's activations, all
    stages together; a stage plans its steps for its share. Not counted: loading, evaluation after each stage, controls,
    branches, probes, the heatmaps. none = by tokens alone."""
    lr: Annotated[float, "> 0"] = 2e-3
    """Peak learning rate of weights."""
    gate_lr: Annotated[float, "> 0"] = 3e-2
    """Peak learning rate of gates and decays, which have far to go."""
    window_blocks: Annotated[int, ">= 1"] = 3
    """Blocks behind the last swapped one whose stream the stage `window` matches."""
    lora_blocks: Annotated[int, ">= 0"] = 3
    """Blocks behind the last swapped one that train too, by LoRA, in the stages window and end-to-end; 0 = none."""
    lora_rank: Annotated[int, ">= 1"] = 16
    """Rank of that LoRA."""
    order: Literal["sequential", "joint"] = "sequential"
    """Several swapped modules: each on the stream of the student as repaired so far, or all on the teacher's."""
    min_gain: Annotated[float, ">= 0"] = 0.005
    """A stage that closes less than this share of the gap, after another that did too, ends the ladder."""
    activations_gb: Annotated[float, ">= 0"] = 4.0
    """Disk for the teacher's activations; what does not fit is computed anew each time."""
    activations_dir: str | None = None
    """Folder for these activations, kept for other repairs on the same text; by default they go with the run."""
    activations_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the stored activations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._known(self.probes or (), probes())
        self._known(self.trained_controls, mechanisms())
        for index, name in enumerate(self.stages):
            if name not in STAGES:
                raise ConfigError(f"unknown stage `{name}`", hint=did_you_mean(name, STAGES))
            if name in self.stages[:index]:
                raise ConfigError(f"the stage `{name}` is named twice")
        for name in self.initial_values:
            if name not in (known := (*INITIAL_VALUES, *PUBLISHED)):
                raise ConfigError(
                    f"--initial-values: unknown part `{name}`", hint=did_you_mean(name, known)
                )
        if {"half-life", "mean-half-life"} <= {*self.initial_values}:
            raise ConfigError(
                "--initial-values has half-life and mean-half-life, and a state has one",
                hint="leave one of them out",
            )
        if self.self_generated >= 1:
            raise ConfigError(
                f"--self-generated must be less than 1, got {self.self_generated:g}",
                hint="it is a share: 0.5 is half of the tokens; some text must be left",
            )
        if self.self_generated + (self.retrieval_text or 0.0) >= 1:
            raise ConfigError(
                f"--self-generated {self.self_generated:g} and --retrieval-text {self.retrieval_text:g} leave no "
                "training text",
                hint="together they must be less than 1: both are shares of the training tokens",
            )
        if self.state_bytes is not None and "slots" not in self.stages:
            raise ConfigError(
                "--state-bytes is shared out in the stage `slots`, which --stages leaves out",
                hint="add it: --stages scores,slots",
            )
        if not self.stages:
            raise ConfigError("`stages` is empty", hint=f"name some of {', '.join(STAGES)}")
        if list(self.stages) != [name for name in STAGES if name in self.stages]:
            raise ConfigError(
                f"the stages are out of order: {', '.join(self.stages)}",
                hint=f"the ladder is {', '.join(STAGES)}",
            )

    @property
    def to_generate(self) -> int:
        """Training tokens that are sampled from the teacher: whole windows."""
        return int(self.train_tokens * self.self_generated) // self.seq_len * self.seq_len

    @property
    def retrieval_share(self) -> float:
        """Share of the training tokens that is retrieval-shaped, where it can be made."""
        if self.retrieval_text is not None:
            return self.retrieval_text
        return min(USUAL_RETRIEVAL, (1 - self.self_generated) / 2)

    @property
    def to_make(self) -> int:
        """Training tokens that are retrieval-shaped: whole windows."""
        return int(self.train_tokens * self.retrieval_share) // self.seq_len * self.seq_len

    @property
    def behind(self) -> bool:
        """Whether blocks behind the swap train too."""
        return self.lora_blocks > 0 and bool({"window", "end-to-end"} & {*self.stages})

    @property
    def around(self) -> bool:
        """Whether the rest of a swapped block trains too."""
        return bool({"block", "window", "end-to-end"} & {*self.stages})
