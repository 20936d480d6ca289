"""Cos and sin by another rule than the model's own, from transformers' own rope functions.

    angle(p, i) = p f_i            cos, sin = a cos(angle), a sin(angle)

f_i are the frequencies of a rule and a is its attention factor; both come from transformers'
`ROPE_INIT_FUNCTIONS`, which takes a config. It gets a stand-in whose head has the rotated dims of
the host's (all of them, or the first ones in phi3 and gpt_neox), so that no peculiarity of the
host's own config (parameters per layer type, a fraction, a scaling of its own) is read twice or
falls back to a default. The host's rotary class would keep its frequencies in buffers: a model cast
to bfloat16 rounds them, a model built without weights leaves them empty, and under `dynamic` they
remember the longest text so far. Here they are computed from the numbers and kept as a plain
cache.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Wrapper, innermost

# A bfloat16 cos^2 + sin^2 is off by less than this; YaRN's factor is 1.1 and more.
ROUNDING = 0.02

COUNTED = ("dynamic", "yarn", "longrope", "llama3")
"""Rules that depend on the length the model was trained for."""

# Llama 3.1's own (its config.json): below one turn in the trained length a frequency is divided,
# above four turns it is kept.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def need_rotary(original: nn.Module, context: Context, purpose: str) -> None:
    """Refuse an attention whose queries and keys are not rotated.

    Args:
        purpose: what the rotation is needed for, as a verb for the error.

    Raises:
        SurgeryError: it has no rotary embedding.
    """
    attention = innermost(original)
    takes = "position_embeddings" in inspect.signature(attention.forward).parameters
    # An attention rebuilt from its modules takes any keyword, and has `rotates` itself.
    rotates = getattr(attention, "rotates", takes)
    if not rotates or not getattr(attention, "use_rope", True):
        raise SurgeryError(
            f"{context.where}: {type(attention).__name__} has no rotary embedding to {purpose}",
            hint="positions must enter by rotation of queries and keys in this layer",
        )


def attention_factor(cos: Tensor, sin: Tensor) -> Tensor:
    """The length of (cos, sin), `1 1 1`: 1, or what YaRN and longrope put on them; no position."""
    factor = torch.hypot(cos[:1, :1, :1].float(), sin[:1, :1, :1].float())
    return torch.where((factor - 1).abs() < ROUNDING, 1.0, factor).to(cos.dtype)


def own_parameters(config: Any, layer: int | None) -> dict[str, Any]:
    """The model's own rope parameters at this layer; a model may have one set per layer type.

    Raises:
        SurgeryError: there are none, or no base among them (10000 must never be a guess).
    """
    given = getattr(config, "rope_parameters", None) or {}
    kinds = getattr(config, "layer_types", None)
    if kinds and isinstance(given.get(kinds[layer]), dict):
        given = given[kinds[layer]]
    if given.get("rope_theta") is None:
        raise SurgeryError(
            f"layer {layer}: the config of this {config.model_type} model names no `rope_theta`: "
            f"{given}",
            hint="write `rope_parameters` with `rope_theta` into its config.json",
        )
    return given


def own_frequencies(config: Any, layer: int | None, width: int) -> Tensor:
    """f of the model's own rotary embedding at this layer, `width / 2` in float32 on the CPU, as up to
    the trained length.

    Args:
        width: rotated dims of a head.
    """
    own = own_parameters(config, layer)
    kind = own.get("rope_type", "default")
    # The default rotary embedding has no function of its own: it is linear with factor 1.
    kind, stretch = ("linear", {"factor": 1.0}) if kind == "default" else (kind, {})
    head = LlamaConfig(
        hidden_size=width,
        num_attention_heads=1,
        head_dim=width,
        max_position_embeddings=config.max_position_embeddings,
    )
    trained = getattr(config, "original_max_position_embeddings", None)
    if trained is not None:
        head.original_max_position_embeddings = trained
    # `width` is what cos and sin have: no part of it is to be left out again, but where the rule itself
    # lets a part of them stand still.
    fraction = own.get("partial_rotary_factor", 1.0) if kind == "proportional" else 1.0
    head.rope_parameters = {
        **own,
        "rope_type": kind,
        **stretch,
        "partial_rotary_factor": fraction,
    }
    return ROPE_INIT_FUNCTIONS[kind](head, torch.device("cpu"), seq_len=None)[0]


class FixedTurn:
    """Cos and sin of one distance by the model's own frequencies, whatever the position.

    Args:
        context: of the layer.
        distance: in tokens.

    Raises:
        SurgeryError: the model names no frequencies.
    """

    def __init__(self, context: Context, distance: int) -> None:
        self.context, self.distance = context, distance
        own_parameters(context.model_config, context.layer)
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    def __call__(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, `1 1 width` each, in the width, dtype and device of the host's cos `batch pos
        width`. A factor that the model puts on its own (YaRN) is no rotation and is left out."""
        key = (like.device, like.dtype, like.shape[-1])
        if key not in self._known:
            config, layer = self.context.model_config, self.context.layer
            half = self.distance * own_frequencies(config, layer, like.shape[-1])
            angle = torch.cat([half, half])[None, None]
            self._known[key] = (angle.cos().to(like), angle.sin().to(like))
        return self._known[key]


@dataclass(frozen=True)
class Rule:
    """How frequencies are made. `original` is the trained length; `own` are the lists of a model
    that was trained with longrope."""

    type: str
    factor: float
    theta: float
    original: int
    fraction: float = 1.0
    own: tuple[tuple[str, list[float]], ...] = ()

    @classmethod
    def over(
        cls,
        config: Any,
        layer: int | None,
        type: str,
        factor: float,
        theta: float | None = None,
        original: int | None = None,
        fraction: float = 1.0,
    ) -> Rule:
        """The rule at one layer of a model; what is None is the model's own."""
        own = own_parameters(config, layer)
        trained = (
            original
            or own.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            or config.max_position_embeddings
        )
        lists = tuple((k, own[k]) for k in ("short_factor", "long_factor") if k in own)
        base = own["rope_theta"] if theta is None else theta
        return cls(type, factor, float(base), trained, fraction, lists)

    def frequencies(self, width: int, length: int | None, device: Any) -> tuple[Tensor, float]:
        """f `width / 2` in float32, and the attention factor.

        Args:
            width: rotated dims of a head.
            length: of the text (dynamic, longrope); None = up to the trained length.
            device: for the result; the numbers are made on the CPU, as the host's own are.
        """
        # The default rotary embedding has no function of its own: it is linear with factor 1.
        kind, stretch = (self.type, self.factor) if self.type != "default" else ("linear", 1.0)
        head = LlamaConfig(
            hidden_size=width,
            num_attention_heads=1,
            head_dim=width,
            max_position_embeddings=self.original,
        )
        head.rope_parameters = {
            "rope_type": kind,
            "rope_theta": self.theta,
            "factor": stretch,
            "partial_rotary_factor": self.fraction,
            "original_max_position_embeddings": self.original,
            **LLAMA3,
            "short_factor": [1.0] * (width // 2),
            "long_factor": [self.factor] * (width // 2),
            **dict(self.own),
        }
        found, factor = ROPE_INIT_FUNCTIONS[kind](head, torch.device("cpu"), seq_len=length)
        return found.to(device), float(factor)


class NewRotary(Wrapper):
    """Passes the cos and sin of a rule to the wrapped attention. Subclasses call `follow`."""

    rule: Rule

    def follow(self, rule: Rule, original: nn.Module) -> None:
        """Take a rule.

        Raises:
            SurgeryError: this attention has no rotary embedding.
        """
        need_rotary(original, self.context, "change")
        self.rule = rule
        self._known: dict[Any, tuple[Tensor, float]] = {}

    def notes(self) -> tuple[str, ...]:
        rule, own = self.rule, own_parameters(self.context.model_config, self.context.layer)
        note = f"rotary: {rule.type}, factor {rule.factor:g}, theta {rule.theta:g}"
        if rule.type in COUNTED:
            note += f", trained length {rule.original}"
        kind = own.get("rope_type", "default")
        if kind == "default":
            return (note,)
        factor = f" (factor {own['factor']:g})" if own.get("factor") else ""
        return (note, f"replaces the model's own rotary scaling: {kind}{factor}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        positions = kwargs.get("position_ids")
        if positions is None:
            raise SurgeryError(
                f"{self.context.where}: the attention was called without `position_ids`, so new "
                "rotary angles cannot be computed",
                hint="call it as its block does, with position_ids",
            )
        old, _ = kwargs["position_embeddings"]
        new = self._rotation(positions, old)
        return self.original(*args, **{**kwargs, "position_embeddings": new})

    def _rotation(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `batch pos width` for `positions` `batch pos`, in the width and dtype of the
        host's cos."""
        frequencies, factor = self._frequencies(positions, like.shape[-1], like.device)
        angle = positions[..., None].float() * frequencies
        angle = torch.cat([angle, angle], dim=-1)
        return (factor * angle.cos()).to(like.dtype), (factor * angle.sin()).to(like.dtype)

    def _frequencies(self, positions: Tensor, width: int, device: Any) -> tuple[Tensor, float]:
        length = None
        if self.rule.type in ("dynamic", "longrope"):
            longest = int(positions.max()) + 1
            length = longest if longest > self.rule.original else None
        if length is not None and self.rule.type == "dynamic":
            return self.rule.frequencies(width, length, device)  # another for every length
        key = (device, width, length is None)
        if key not in self._known:
            self._known[key] = self.rule.frequencies(width, length, device)
        return self._known[key]
