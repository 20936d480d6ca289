"""Where the modules of a model are, per family, as data.

A `Family` names the paths of one architecture (blocks, attention, MLP, norms, what is added to the stream); a `Layout`
binds it to a loaded model. Nothing is guessed: an unknown `model_type` is an error that names what was looked for, and
`mismatch.forward.verify` proves the binding on the loaded model by a forward pass.

Words: `attn_out` and `mlp_out` are what is ADDED to the stream, so in a family that normalises the output of its
attention (gemma, olmo) they are the outputs of that norm, not of the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mismatch.errors import LayoutError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    # transformers' own annotation of a model with a language-modelling head that can generate.
    from transformers.models.auto.modeling_auto import _BaseModelWithGenerate as CausalLM

HEADS = "heads"
"""In place of a slot: what the heads of an attention give, which is what enters its output projection."""

LLAMA_PROJECTIONS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


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

FAMILIES: tuple[Family, ...] = (
    _llama_like("llama", "llama"),
    _llama_like("mistral", "mistral"),
    _llama_like("qwen2", "qwen2"),
    _llama_like("qwen3", "qwen3"),
    _llama_like("smollm3", "smollm3"),
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


UNABLE = {
    "qwen3_5_text": "some of its layers hold a linear attention in place of `self_attn`, the others gate their output",
    "gemma4_text": "its blocks multiply the stream and add an input of their own to it",
}
"""Model types that a `Family` cannot name yet: why not."""


def family_of(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        LayoutError: the `model_type` is in no family.
    """
    kind = getattr(config, "model_type", None)
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise LayoutError(
        f"model family `{kind}` is not known: "
        + UNABLE.get(str(kind), "no layout names its blocks, attention, MLP and norms"),
        hint=f"known families: {known}. A new one is one entry in `mismatch/models/layout.py`",
    )


def is_parallel(family: Family, config: Any) -> bool:
    """Whether attention and MLP read the same stream (GPT-NeoX), so that `resid_mid` does not exist."""
    return family.parallel is not None and bool(getattr(config, family.parallel, False))


@dataclass(frozen=True)
class Layout:
    """A family bound to one model. `Layout.of(model)` builds it."""

    model: CausalLM
    family: Family
    whole_blocks: frozenset[int] = frozenset()
    """Blocks that were replaced as a whole: what is inside them is not what is added to the stream."""

    @classmethod
    def of(cls, model: CausalLM) -> Layout:
        """Bind the family of `model.config` to `model` and check that every path is there.

        Raises:
            LayoutError: unknown family, or a path that this model lacks; names both.
        """
        layout = cls(model, family_of(model.config))
        missing = [
            f"block.{path}"
            for path in dict.fromkeys(layout.family.slots.values())
            if not _has(layout.blocks[0], path)
        ]
        if missing:
            raise LayoutError(
                f"a model of family `{layout.family.name}` should have {', '.join(missing)}; this "
                f"{type(model).__name__} has not",
                hint="was it changed before? `mismatch` needs the untouched model",
            )
        return layout

    @property
    def config(self) -> Any:
        """transformers' config of the model; its attributes differ by family."""
        return self.model.config

    @property
    def decoder(self) -> nn.Module:
        """The model without its head: ids in, final-norm states out."""
        return self.model.base_model

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's blocks, in order: one a layer."""
        return self._of_decoder(self.family.blocks)

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        return self._of_decoder(self.family.final_norm)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return self.config.hidden_size

    @property
    def n_heads(self) -> int:
        """Query heads of an attention."""
        return self.config.num_attention_heads

    @property
    def n_kv_heads(self) -> int:
        """Kv heads of an attention; a family without groups has as many as query heads."""
        return getattr(self.config, "num_key_value_heads", None) or self.n_heads

    @property
    def heads_width(self) -> int:
        """Width of what enters the output projection of an attention: all query heads, flat."""
        own = getattr(self.config, "head_dim", None) or self.d_model // self.n_heads
        return self.n_heads * own

    @property
    def vocab(self) -> int:
        """Rows of the head: the vocabulary, padding rows included."""
        return getattr(self.output, "out_features", None) or self.output.weight.shape[0]

    @property
    def embedding_device(self) -> torch.device:
        """The device that token ids must be on; under accelerate blocks may be on others."""
        return self._of_decoder(self.family.embed).weight.device

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a block read the same stream."""
        return is_parallel(self.family, self.config)

    def head(self, final: Tensor) -> Tensor:
        """Final-norm states to logits, as the model itself does it, on any number of tokens.

        Args:
            final: `... d_model`.

        Returns:
            `... vocab`, in the dtype of the model.
        """
        logits = self.output(final)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else (logits / cap).tanh() * cap

    def slot_path(self, layer: int | None, slot: str) -> str:
        """Dotted path, from the model, of the module in a slot. Of `rope` it is the attention, where positions enter.

        Raises:
            LayoutError: the family has no such slot.
        """
        decoder = self.model.base_model_prefix
        if slot == "final_norm":
            return f"{decoder}.{self.family.final_norm}"
        block = f"{decoder}.{self.family.blocks}.{layer}"
        if slot == "block":
            return block
        inner = self.family.slots.get("attn" if slot == "rope" else slot)
        if inner is None or slot in self.family.lacks:
            reason = self.family.lacks.get(slot)
            raise LayoutError(
                f"{self.family.name} has no slot `{slot}`" + (f" ({reason})" if reason else ""),
                hint=f"slots of {self.family.name}: {', '.join(self.family.slot_names())}",
            )
        return f"{block}.{inner}"

    @property
    def output(self) -> Any:
        """The last matrix: final states to logits, which `head` may cap."""
        return self.model.get_submodule(self.family.head)

    def _of_decoder(self, path: str) -> Any:
        if not _has(self.decoder, path):
            raise LayoutError(
                f"a model of family `{self.family.name}` should have `{path}` in its decoder; "
                f"{type(self.decoder).__name__} has: "
                + ", ".join(name for name, _ in self.decoder.named_children())
            )
        return self.decoder.get_submodule(path)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
