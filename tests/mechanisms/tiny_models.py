"""Random models of every supported family with what a mechanism must carry over switched on, and
surgery in one call.

Beyond the shared `tiny` fixture: windows shorter than the texts, softcaps, biases, partial rotary
embedding, layers without one, a scaling of their own. A piece that is lost shows.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from mismatch.forward.calibrate import calibrate
from mismatch.models.layout import Layout
from mismatch.models.quantised import settle, unpacked
from mismatch.spec import parse
from mismatch.surgery.operate import Student, calibrators, operate, placed

N_LAYERS = 3
VOCAB = 61

COMMON = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GEMMA = {"query_pre_attn_scalar": 5, "sliding_window": 9}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "mistral_window": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 20.0},
    "gemma3": {
        **GEMMA,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "olmo2": {},
    "olmo3": {
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "qwen3_5": {
        "layer_types": ["full_attention"] * N_LAYERS,  # linear ones are slow: see test_hybrid.py
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
    "gemma4": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 9,
        "global_head_dim": 12,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": VOCAB,
        "final_logit_softcapping": 20.0,
    },
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
}
MODEL_TYPE = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "qwen3_5": "qwen3_5_text",
    "mistral_window": "mistral",
}
FAMILIES = tuple(EXTRA)
DENSE = tuple(family for family in FAMILIES if "moe" not in family)
"""Families whose MLP is made of linear layers."""


def tiny(family: str, attn: str = "sdpa", seed: int = 0, **changes: Any) -> nn.Module:
    """A random model in eval mode, float32. Gemma2's softcap exists under eager attention only."""
    config = AutoConfig.for_model(
        MODEL_TYPE.get(family, family), **{**COMMON, **EXTRA[family], **changes}
    )
    torch.manual_seed(seed)
    attn = "eager" if family == "gemma2" else attn
    experts = {"experts_implementation": "eager"} if "moe" in family else {}  # float64 too
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, **experts).eval()
    with torch.no_grad():  # norms and biases are born as ones and zeros, and would hide a lost one
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
        for name, scale in model.named_buffers():
            if name.endswith("layer_scalar"):  # gemma4
                scale.add_(torch.randn_like(scale) * 0.2)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids without the pad id."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def swap(model: nn.Module, text: str, seed: int = 0) -> Student:
    """The student of a swap text, calibrated on random tokens."""
    layout = Layout.of(model)
    places = placed(parse(text), layout)
    wanted = {} if next(model.parameters()).device.type == "meta" else calibrators(places)
    if wanted:
        calibrate(layout, wanted, [tokens(2, 24, seed=99)])
    return operate(layout, places, spec=text, seed=seed, calibrations=wanted)


def part(student: Student, layer: int = 1, slot: str = "attn") -> nn.Module:
    """What now stands in a slot."""
    return student.model.get_submodule(student.layout.slot_path(layer, slot))


def in_chunks(
    model: nn.Module, ids: torch.Tensor, size: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of a text that is fed piece by piece through the cache."""
    cache, out = DynamicCache(config=model.config), []
    for start in range(0, ids.shape[1], size):
        end = min(start + size, ids.shape[1])
        more = {}
        if mask is not None:
            more = {"attention_mask": mask[:, :end], "position_ids": positions(mask)[:, start:end]}
        out.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **more).logits)
    return torch.cat(out, dim=1)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions as `generate` counts them: from the first real token."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def quantised(
    folder: Path, bits: int, family: str = "llama", dtype: Any = torch.float32
) -> nn.Module:
    """`tiny` with its matrices in 4 or 8 bits, as transformers loads it.

    Args:
        folder: to write the weights to.
        bits: 4 (NF4, double quantisation) or 8.
        family: see `tiny`.
        dtype: of everything else.
    """
    tiny(family).save_pretrained(folder)
    settings = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=dtype, device_map={"": "cpu"}
    )
    settle(model)
    return model.eval()


def in_numbers(model: nn.Module) -> nn.Module:
    """The same model with ordinary matrices, of the numbers that the quantised ones stand for."""
    return unpacked(copy.deepcopy(model), model.dtype)
