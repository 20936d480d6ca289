"""rope: the rotary embedding of a layer built anew: another base, or another scaling of it.

With f_i = theta^(-2i/D), one for each pair of dims, and L the length the model was trained for,

    angle(p, i) = p f'_i           cos, sin = a cos(angle), a sin(angle)

    default       f' = f                                          RoFormer, arXiv 2104.09864
    linear        f' = f / factor                                 arXiv 2306.15595, eq. 4
    dynamic       f of a base that grows with the text, once it   arXiv 2309.00071, 3.1 and 3.3
                  is longer than L                                (NTK-aware, dynamic)
    yarn          f where a pair turns > 32 times in L, f /       arXiv 2309.00071, 3.2 and 3.4
                  factor where < 1 time, a ramp between;
                  a = 0.1 ln(factor) + 1
    longrope      f / short_i up to L, f / long_i beyond;         arXiv 2402.13753
                  a = sqrt(1 + ln(factor) / ln(L))
    llama3        f where a pair turns > 4 times in L, f /        Llama 3.1, by transformers
                  factor where < 1 time, smooth between
    proportional  f / factor for the fastest `fraction` of the    p-RoPE, arXiv 2410.06205
                  pairs, 0 for the others

The numbers are transformers' own (`ROPE_INIT_FUNCTIONS`). LongRoPE finds its factors by search: a
model that was trained with them keeps its lists; any other gets short_i = 1 and long_i = factor.

A scaling that the model has already is REPLACED, not multiplied: the new rule starts from the
model's theta (of this layer's type, in gemma3), rotated fraction (phi3, gpt_neox) and trained
length, and the plan names the scaling that went. So factor=1 is the teacher only where the model's
rotary embedding has none. `partial_rope` and `nope` keep it.

Limits. Up to L `dynamic` is the default, and longrope its short list. A text that grows past L
changes the angles of all its tokens, the earlier ones too: there neither is causal, nor equal to
keys that were cached before (transformers has the same limit), and the longest row of a batch
decides for all. Inherited: everything. New: nothing. Dropped: the model's own angles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.rotary import COUNTED, NewRotary, Rule


@dataclass(frozen=True)
class RopeConfig:
    type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"] = (
        "default"
    )
    """How the frequencies are scaled."""
    factor: Annotated[float, ">= 1"] = 1.0
    """By how much the context is stretched."""
    theta: Annotated[float, "> 0"] | None = None
    """Base of the frequencies; none = the model's own."""
    original: Annotated[int, ">= 1"] | None = None
    """Trained length that dynamic, yarn, longrope and llama3 count from; none = the model's own."""
    fraction: Annotated[float, "0..1"] = 1.0
    """Share of the frequencies that rotates, for type=proportional."""


class Rope(NewRotary):
    """Passes the cos and sin of another rule to the wrapped attention."""

    Config = RopeConfig
    slots = ("rope",)
    heads = True
    identity = "factor = 1 (and fraction = 1) at the model's own theta, if it has no scaling"
    state = "the host's KV cache, keys rotated by the new angles"
    source = "transformers; arXiv 2306.15595, 2309.00071, 2402.13753, 2410.06205"
    stacks = True

    def __init__(self, original: nn.Module, config: RopeConfig, context: Context) -> None:
        """Raises:
        SurgeryError: this attention has no rotary embedding; an argument that the type does not
            use.
        """
        super().__init__(original, config, context)
        self._refuse_unused()
        rule = Rule.over(
            context.model_config,
            context.layer,
            config.type,
            config.factor,
            config.theta,
            config.original,
            config.fraction,
        )
        self.follow(rule, original)

    def _refuse_unused(self) -> None:
        kind = self.settings.type
        unused = {
            "factor": self.settings.factor != 1 and kind == "default",
            "original": self.settings.original is not None and kind not in COUNTED,
            "fraction": self.settings.fraction != 1 and kind != "proportional",
        }
        for name in (name for name, is_unused in unused.items() if is_unused):
            users = {"factor": "any other type", "original": ", ".join(COUNTED)}
            raise SurgeryError(
                f"{self.context.where}: rope of type `{kind}` does not use `{name}`",
                hint=f"`{name}` belongs to {users.get(name, 'proportional')}",
            )
