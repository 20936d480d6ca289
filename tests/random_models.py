"""One tiny random model per family.

3 layers, d_model 32, vocab 101, float32, eval mode; grouped-query attention wherever the family has it; every vector
parameter (norm weights, biases) is moved off its initial value, so that leaving one out shows.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 101
LAYERS = 3
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # the default .02 leaves random logits all alike
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_HEADS = {"head_dim": 8}
_OWN_HEADS = {"head_dim": 12}  # not d_model / heads: families that have it free
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_HEADS},
    "mistral": {**_OWN_HEADS, "sliding_window": 16},
    "qwen2": {},
    "qwen3": {**_OWN_HEADS},
    "gemma2": {
        **_OWN_HEADS, "query_pre_attn_scalar": 12, "sliding_window": 16, "layer_types": _MIXED
    },
    "gemma3_text": {
        **_OWN_HEADS, "query_pre_attn_scalar": 12, "sliding_window": 16, "layer_types": _MIXED
    },
    "olmo2": {},
    "olmo3": {"sliding_window": 16, "layer_types": _MIXED},
    "qwen3_moe": {
        **_OWN_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20
    },
    "qwen3_5_text": {
        **_OWN_HEADS, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "gemma4_text": {
        **_OWN_HEADS, "global_head_dim": 16, "sliding_window": 16, "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": VOCAB, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 1, 0]},  # 0: the layer has no RoPE
    "gpt2": {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 512,
        "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": {"num_key_value_heads": None, "rotary_pct": 0.5},
}  # fmt: skip


def build(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model of that family; `changes` go into its config."""
    given = FAMILIES[family]
    sizes = given if family == "gpt2" else _SIZES | given
    settings = {key: value for key, value in (sizes | changes).items() if value is not None}
    config = transformers.AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith(
                    "layer_scalar"
                ):  # gemma4: 1 in a fresh model, and not in a trained one
                    buffer.add_(0.2 * torch.randn_like(buffer))
    return model.eval().requires_grad_(False)
