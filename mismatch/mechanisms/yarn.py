"""yarn: `rope(type=yarn)` by its short name: slow rotary frequencies divided, fast ones kept.

    f'_i = (1 - g_i) f_i / factor + g_i f_i       f_i = theta^(-2i/D)
    g_i  = 1 for pairs that turn more than 32 times in the trained length, 0 below one turn,
           a linear ramp in i between
    cos, sin  *=  0.1 ln(factor) + 1              in both q and k: logits grow by its square

Source: arXiv 2309.00071 (YaRN), sections 3.2 and 3.4, in transformers' implementation (the ramp's
ends are rounded to whole pairs). A scaling of the model's own is replaced and the plan notes it, as
in `rope`. Inherited: everything. New: nothing. Dropped: the model's own angles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import nn

from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.rotary import NewRotary, Rule


@dataclass(frozen=True)
class YarnConfig:
    factor: Annotated[float, ">= 1"]
    """By how much the context is stretched."""
    original: Annotated[int, ">= 1"] | None = None
    """Trained length that turns are counted in; none = the model's own."""


class Yarn(NewRotary):
    """Passes YaRN's cos and sin to the wrapped attention."""

    Config = YarnConfig
    slots = ("rope",)
    heads = True
    identity = "factor = 1, if the model's rotary embedding has no scaling"
    state = "the host's KV cache, keys rotated by the new angles"
    source = "arXiv 2309.00071, sections 3.2 and 3.4"
    stacks = True

    def __init__(self, original: nn.Module, config: YarnConfig, context: Context) -> None:
        """Raises:
        SurgeryError: this attention has no rotary embedding.
        """
        super().__init__(original, config, context)
        rule = Rule.over(
            context.model_config,
            context.layer,
            "yarn",
            config.factor,
            original=config.original,
        )
        self.follow(rule, original)
