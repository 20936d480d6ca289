"""What can be known about a model folder before its weights are loaded. No torch.

Refuses, with the reason: no config, broken config, no weights, pickle weights, a truncated or
missing shard, code that would have to be run. `fingerprint` names the weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict

from safetensors import SafetensorError, safe_open

from mismatch.errors import ModelError
from mismatch.reading import json_of, shown, typed

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BITSANDBYTES = "bitsandbytes"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""dtypes of safetensors, as torch calls them."""


class Config(TypedDict, total=False):
    """config.json, as far as it is read here; transformers checks the rest."""

    model_type: Required[str]
    auto_map: dict[str, Any]


class Index(TypedDict):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]


class Stored(NamedTuple):
    """A tensor in a file: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: list[int]


def read_config_file(folder: Path) -> dict[str, Any]:
    """config.json as a dict. Raises ModelError when it is missing, broken or of something else."""
    path = folder / CONFIG
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise ModelError(
            f"{folder} has no {CONFIG}, so it is not a transformers model folder; it holds: "
            f"{', '.join(found) or 'nothing'}",
            hint=_hint_for(folder),
        )
    config = json_of(path, ModelError)
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(
            f"{path} names no model_type", hint="is this the config of a transformers model?"
        )
    typed(Config, config, lambda reason: ModelError(f"{path}: {reason}"))
    return config


LARGEST = {
    "num_hidden_layers": 1024,
    "hidden_size": 2**20,
    "vocab_size": 2**24,
    "num_attention_heads": 2**14,
}
"""Sizes that every family has under these names (transformers maps the others), and the largest that is believed."""


def check_sizes(config: Any, folder: Path) -> None:
    """A model of a million layers is built for hours before anything is wrong.

    Raises:
        ModelError: a size is not a number, or out of range.
    """
    inner = config.get_text_config()
    context = {"max_position_embeddings": 2**40}
    for name, largest in {**LARGEST, **context}.items():
        value = getattr(inner, name, None)
        if value is None and (name in context or not hasattr(inner, name)):
            continue
        if type(value) is not int or not 1 <= value <= largest:
            raise ModelError(
                f"{folder / CONFIG}: `{name}` must be int in 1..{largest}, got {shown(value)}"
            )


def thetas(config: dict[str, Any]) -> Iterator[float]:
    """The RoPE bases that a config names, wherever they stand in it."""
    for key, value in config.items():
        if key in ("rope_theta", "rope_local_base_freq") and isinstance(value, (int, float)):
            yield float(value)
        elif isinstance(value, dict) and (key.startswith("rope") or "_attention" in key):
            yield from thetas(value)


def _hint_for(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "this is a peft adapter: merge it into its base model (merge_and_unload) first"
    if (folder / "checkpoint" / CONFIG).is_file():
        return f"this is the run of a repair: give the model in it, {folder / 'checkpoint'}"
    if any(folder.glob("*.gguf")):
        return "GGUF is not read: convert it to safetensors (from_pretrained(..., gguf_file=...))"
    return "give the folder that save_pretrained wrote"


def refuse_remote_code(config: dict[str, Any], folder: Path, known: bool) -> None:
    """Raise ModelError when the model needs Python code from its own folder.

    `known`: transformers itself has this model_type; then its class is used and no code is run.
    """
    if "auto_map" in config and not known:
        code = sorted({str(v) for v in config["auto_map"].values()})
        raise ModelError(
            f"{folder}: model_type {config['model_type']!r} is not one of transformers' own; the "
            f"folder would have to run its own code ({', '.join(code)}), which is off",
            hint="read that code first, then --trust-remote-code "
            "(in Python: trust_remote_code=True)",
        )


def refuse_quantised(config: Mapping[str, Any], where: Path | str) -> None:
    """Raise ModelError for weights that are quantised and not by bitsandbytes, or when that is missing.

    `config` of a model in memory is that of `config.to_dict()`.
    """
    found = config.get("quantization_config")
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if method != BITSANDBYTES:
        raise ModelError(
            f"{where}: its weights are quantised by {method or 'a method that is not named'}; read are those of "
            f"{BITSANDBYTES} (4 and 8 bits), and weights that are not quantised",
            hint="give the model that was quantised, or one whose weights were turned back into numbers",
        )
    if importlib.util.find_spec(BITSANDBYTES) is None:
        raise ModelError(
            f"{where}: its weights are quantised by {BITSANDBYTES}, which is not installed here",
            hint="pip install 'llm-mismatch[qlora]'",
        )


def check_weights(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The weight files of a folder, each whole.

    Returns:
        safetensors files in name order; empty when only pickle weights are there and allowed.

    Raises:
        ModelError: no weights, pickle only, shard missing, file truncated, index incomplete.
    """
    if (folder / INDEX).is_file():
        return _check_shards(folder)
    if (folder / SINGLE).is_file():
        check_safetensors(folder / SINGLE)
        return [folder / SINGLE]
    pickles = [name for name in PICKLES if (folder / name).is_file()]
    if not pickles:
        raise ModelError(
            f"{folder} has a config but no weights: neither {SINGLE} nor {INDEX}",
            hint="was the download cut off, or are they Git LFS files that were not pulled?",
        )
    if not allow_pickle:
        raise ModelError(
            f"{folder} holds its weights only as pickle ({pickles[0]}), which is refused: a pickle "
            "can run code when it is read",
            hint="convert it to safetensors, or, when you trust where it comes from, "
            "--allow-pickle (in Python: allow_pickle=True)",
        )
    return []


def saved_dtypes(folder: Path) -> set[str]:
    """What the weights of a folder are saved in, as torch calls it; empty where they are pickled."""
    found = set()
    for file in check_weights(folder, allow_pickle=True):
        with safe_open(file, framework="numpy") as opened:
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return {FLOATS.get(name, name.lower()) for name in found}


def _check_shards(folder: Path) -> list[Path]:
    path = folder / INDEX
    index: Index = typed(
        Index,
        json_of(path, ModelError),
        lambda reason: ModelError(f"{path} is not a safetensors index: {reason}"),
    )
    weight_map = index["weight_map"]
    shards = sorted(set(weight_map.values()))
    if outside := [
        name
        for name in shards
        if not 0 < len(name.encode(errors="replace")) < 256
        or Path(name).name != name
        or "\0" in name
    ]:
        raise ModelError(
            f"{path} is not a safetensors index: {outside[0]!r:.100} is not the name of a file beside it"
        )
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(shards)} shards of its index are missing: "
            f"{', '.join(missing[:4])}",
            hint="was the download cut off?",
        )
    for shard in shards:
        held = set(check_safetensors(folder / shard))
        wanted = {name for name, where in weight_map.items() if where == shard}
        if absent := sorted(wanted - held):
            raise ModelError(
                f"{folder / shard} lacks {len(absent)} tensors that {INDEX} lists for it, "
                f"first {absent[0]}"
            )
    return [folder / shard for shard in shards]


def check_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, its header and its length checked.

    The format: 8 bytes little-endian header length, JSON header, then the tensors' bytes up to the
    largest `data_offsets` (safetensors README, "Format"). Its own reader checks types, shapes and offsets.

    Raises:
        ModelError: a Git LFS pointer, truncated, or broken.
    """
    if not path.is_file():
        raise ModelError(f"{path} is not an ordinary file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"version "):
        raise ModelError(
            f"{path} is a Git LFS pointer, not the weights", hint="git lfs pull in that folder"
        )
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ModelError(
            f"{path} is truncated or not safetensors: {size:,} bytes, and its header alone "
            f"should take {length:,}",
            hint="get the file again",
        )
    try:
        with safe_open(path, framework="numpy") as found:
            names = found.keys()
            slices = {name: found.get_slice(name) for name in names}
            return {name: Stored(one.get_dtype(), one.get_shape()) for name, one in slices.items()}
    except SafetensorError as error:
        needed = _end(path, length)
        if needed is not None and needed != size:
            what = "truncated" if size < needed else "too long"
            raise ModelError(
                f"{path} is {what}: {size:,} bytes, its header requires {needed:,}",
                hint="get the file again",
            ) from error
        raise ModelError(
            f"{path} is not safetensors: {error}", hint="get the file again"
        ) from error


def _end(path: Path, length: int) -> int | None:
    """How many bytes the header of a broken file asks for; None when it does not say."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(8 + length)[8:])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        return 8 + length + int(max(ends, default=0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None


def fingerprint(folder: Path, files: list[Path]) -> str:
    """sha256 over config.json and every byte of every weight file.

    Sampling would be faster and would miss a changed weight; reading all of it costs about a
    second per gigabyte, several files at a time, and leaves the file in the page cache for the
    load that follows.
    """
    paths = [folder / CONFIG, *(files or [p for n in PICKLES if (p := folder / n).is_file()])]
    with ThreadPoolExecutor() as pool:  # hashlib releases the lock
        digests = list(pool.map(_file_digest, paths))
    whole = hashlib.sha256()
    for path, digest in zip(paths, digests, strict=True):
        whole.update(f"{digest}  {path.name}\n".encode())
    return whole.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
