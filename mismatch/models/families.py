"""The architectures, as data: where the modules of a block are, per family.

A `Family` names paths (blocks, attention, MLP, norms, what is added to the stream); `mismatch.models.layout` binds it
to a loaded model. Nothing is guessed: an unknown `model_type` is an error that names what was looked for. A model that
shares keys and values between layers beside its stream (some gemma4) cannot be run block by block and is refused.

Words: `attn_out` and `mlp_out` are what is ADDED to the stream, so in a family that normalises the output of its
attention (gemma, olmo) they are the outputs of that norm, not of the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mismatch.errors import LayoutError

LLAMA_PROJECTIONS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


# By name, so that a family can be pickled.
def _lacks_nothing(_config: Any, _kind: str) -> Mapping[str, str]:
    return {}


def _able(_config: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """One architecture. Paths are relative to the decoder (`blocks`, `final_norm`) or to a block (`slots`)."""

    name: str
    model_types: tuple[str, ...]
    slots: Mapping[str, str]
    attn_out: str
    """Module of a block whose output is added to the stream after attention."""
    mlp_out: str
    resid_mid: str
    """Module of a block whose input is the stream between attention and MLP."""
    blocks: str = "layers"
    embed: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"
    parallel: str | None = None
    """Config attribute that, when true, means attention and MLP read the same stream: then there is no resid_mid."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Slots that the family does not have, with the reason."""
    elsewhere: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By the config's `layer_types`: paths that differ in layers of that type."""
    lacks_in: Callable[[Any, str], Mapping[str, str]] = _lacks_nothing
    """By config and one of its `layer_types`: slots that layers of that type do not have, with the reason."""
    also_adds: str | None = None
    """Module of a block, where this model has it, whose output is added to the stream behind the MLP; it is no site."""
    scale: str | None = None
    """Buffer of a block that the stream leaving it is multiplied by, behind every sum."""
    unable: Callable[[Any], str | None] = _able
    """Why a model of this config cannot be run block by block; None: it can."""

    def slot_names(self) -> tuple[str, ...]:
        """Every slot of a block, `block` and `rope` included, in computation order where there is one."""
        rope = () if "rope" in self.lacks else ("rope",)
        return (*self.slots, *rope, "block", "final_norm")


def _llama_like(name: str, *model_types: str, **changes: Any) -> Family:
    facts: dict[str, Any] = {
        "slots": {
            "norm1": "input_layernorm",
            "attn": "self_attn",
            "norm2": "post_attention_layernorm",
            "mlp": "mlp",
            **LLAMA_PROJECTIONS,
        },
        "attn_out": "self_attn",
        "resid_mid": "post_attention_layernorm",
        "mlp_out": "mlp",
    }
    return Family(name, model_types, **(facts | changes))


def _olmo_like(name: str) -> Family:
    return _llama_like(
        name,
        name,
        slots={
            "attn": "self_attn",
            "norm1": "post_attention_layernorm",
            "mlp": "mlp",
            "norm2": "post_feedforward_layernorm",
            **LLAMA_PROJECTIONS,
        },
        attn_out="post_attention_layernorm",
        resid_mid="mlp",
        mlp_out="post_feedforward_layernorm",
    )


_GEMMA_SLOTS = {
    "norm1": "input_layernorm",
    "attn": "self_attn",
    "norm1_post": "post_attention_layernorm",
    "norm2": "pre_feedforward_layernorm",
    "mlp": "mlp",
    "norm2_post": "post_feedforward_layernorm",
    **LLAMA_PROJECTIONS,
}


def _qwen3_5_lacks(_config: Any, kind: str) -> Mapping[str, str]:
    if kind != "linear_attention":
        return {}
    reason = (
        "the attention of this layer is linear: a state, and no queries and keys with positions"
    )
    return dict.fromkeys(("rope", "q_proj", "k_proj", "v_proj", "o_proj"), reason)


def _gemma4_lacks(config: Any, kind: str) -> Mapping[str, str]:
    if kind == "full_attention" and config.attention_k_eq_v:
        return {"v_proj": "its keys are its values, too"}
    return {}


def _gemma4_unable(config: Any) -> str | None:
    if config.num_kv_shared_layers:
        return (
            f"its last {config.num_kv_shared_layers} layers read keys and values of earlier ones beside the stream, so "
            "no block can be run from the stream that enters it"
        )
    if config.enable_moe_block:
        return "its experts read the stream past the MLP's norm, so no slot holds the MLP"
    return None


FAMILIES: tuple[Family, ...] = (
    _llama_like("llama", "llama"),
    _llama_like("mistral", "mistral"),
    _llama_like("qwen2", "qwen2"),
    _llama_like("qwen3", "qwen3"),
    _llama_like("smollm3", "smollm3"),
    _llama_like(
        "qwen3_5",
        "qwen3_5_text",
        elsewhere={"linear_attention": {"self_attn": "linear_attn"}},
        lacks_in=_qwen3_5_lacks,
    ),
    _llama_like(
        "phi3",
        "phi3",
        slots={
            "norm1": "input_layernorm",
            "attn": "self_attn",
            "norm2": "post_attention_layernorm",
            "mlp": "mlp",
            "o_proj": "self_attn.o_proj",
            "down_proj": "mlp.down_proj",
        },
        lacks={
            "q_proj": "query, key and value are one fused projection",
            "k_proj": "query, key and value are one fused projection",
            "v_proj": "query, key and value are one fused projection",
            "gate_proj": "gate and up are one fused projection",
            "up_proj": "gate and up are one fused projection",
        },
    ),
    _llama_like(
        "gemma2",
        "gemma2",
        slots=_GEMMA_SLOTS,
        attn_out="post_attention_layernorm",
        resid_mid="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
    ),
    _llama_like(
        "gemma3",
        "gemma3_text",
        slots=_GEMMA_SLOTS,
        attn_out="post_attention_layernorm",
        resid_mid="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
    ),
    _llama_like(
        "gemma4",
        "gemma4_text",
        slots=_GEMMA_SLOTS,
        attn_out="post_attention_layernorm",
        resid_mid="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
        also_adds="post_per_layer_input_norm",
        scale="layer_scalar",
        lacks_in=_gemma4_lacks,
        unable=_gemma4_unable,
    ),
    _olmo_like("olmo2"),
    _olmo_like("olmo3"),
    _llama_like(
        "qwen3_moe",
        "qwen3_moe",
        slots={
            "norm1": "input_layernorm",
            "attn": "self_attn",
            "norm2": "post_attention_layernorm",
            "mlp": "mlp",
            **{name: path for name, path in LLAMA_PROJECTIONS.items() if "attn" in path},
        },
        lacks={
            "gate_proj": "the MLP is a mixture of experts",
            "up_proj": "the MLP is a mixture of experts",
            "down_proj": "the MLP is a mixture of experts",
        },
    ),
    Family(
        "gpt2",
        ("gpt2",),
        slots={
            "norm1": "ln_1",
            "attn": "attn",
            "norm2": "ln_2",
            "mlp": "mlp",
            "o_proj": "attn.c_proj",
        },
        attn_out="attn",
        resid_mid="ln_2",
        mlp_out="mlp",
        blocks="h",
        embed="wte",
        final_norm="ln_f",
        lacks={
            "rope": "learned positions",
            "q_proj": "query, key and value are one fused projection",
            "k_proj": "query, key and value are one fused projection",
            "v_proj": "query, key and value are one fused projection",
        },
    ),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        slots={
            "norm1": "input_layernorm",
            "attn": "attention",
            "norm2": "post_attention_layernorm",
            "mlp": "mlp",
            "o_proj": "attention.dense",
        },
        attn_out="attention",
        resid_mid="post_attention_layernorm",
        mlp_out="mlp",
        embed="embed_in",
        final_norm="final_layer_norm",
        parallel="use_parallel_residual",
        lacks={
            "q_proj": "query, key and value are one fused projection",
            "k_proj": "query, key and value are one fused projection",
            "v_proj": "query, key and value are one fused projection",
        },
    ),
)


def family_of(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        LayoutError: the `model_type` is in no family, or a model of this config cannot be run block by block.
    """
    kind = getattr(config, "model_type", None)
    for family in FAMILIES:
        if kind in family.model_types:
            if reason := family.unable(config):
                raise LayoutError(
                    f"this model of family `{family.name}` cannot be traced: {reason}"
                )
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise LayoutError(
        f"model family `{kind}` is not known: no layout names its blocks, attention, MLP and norms",
        hint=f"known families: {known}. A new one is one entry in `mismatch/models/families.py`",
    )


def is_parallel(family: Family, config: Any) -> bool:
    """Whether attention and MLP read the same stream (GPT-NeoX), so that `resid_mid` does not exist."""
    return family.parallel is not None and bool(getattr(config, family.parallel, False))
