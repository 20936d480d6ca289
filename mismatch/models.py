"""Models by name: a folder, a fetched demo model, an installed package or a hub id.

`resolve` says where a name leads, `read_config` reads only the config, `load` loads model and
tokenizer. All that can be refused is refused before weights are read (`mismatch.weights`), and
after the load three silent failures are looked for: weights that were left at random, a RoPE base
that was lost between transformers 4 and 5, token ids that the embedding does not have.

This is the only file that calls `from_pretrained`.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mismatch import fetch, weights
from mismatch.errors import ModelError

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class Source:
    """Where a model name leads. `folder` is None for a hub id, whose files are not here yet."""

    name: str
    folder: Path | None
    note: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """What goes into a manifest. `sha256` covers the config and every byte of the weights."""

    name: str
    path: str
    sha256: str
    parameters: int
    dtype: str
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Loaded(NamedTuple):
    model: nn.Module
    tokenizer: Any
    info: ModelInfo


def resolve(name_or_path: str | Path) -> Source:
    """Where a name leads: explicit path, cache, installed package, hub id, in this order.

    An installed package is converted into the cache on the way. Nothing is downloaded.

    Raises:
        ModelError: no such folder, a text's name, a fetchable model that was not fetched.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(name, path.resolve())
    if path.is_file():
        raise ModelError(f"{name} is a file", hint="give the folder that it lies in")
    if package := fetch.SOURCES.get(name):
        return _fetched(package)
    looks_like_path = isinstance(name_or_path, Path) or name.startswith((".", "/", "~"))
    if looks_like_path or not _HUB_ID.fullmatch(name):
        raise ModelError(f"no model folder {name}", hint=_near(name) or _known())
    if near := _near(name):
        raise ModelError(f"no model is called {name!r}", hint=near)
    return Source(name, None, "from the Hugging Face hub")


def _fetched(package: fetch.Package) -> Source:
    if package.kind != "model":
        raise ModelError(f"{package.name} is a text, not a model", hint=_known())
    if folder := fetch.find(package.name):
        return Source(package.name, folder, f"{package.what} ({package.licence})")
    raise ModelError(
        f"the model {package.name} is not here yet: neither in {fetch.cache_dir()} nor installed",
        hint=f"mismatch fetch {package.name}   ({package.megabytes:g} MB)",
    )


def _near(name: str) -> str | None:
    models = [p.name for p in fetch.SOURCES.values() if p.kind == "model"]
    near = difflib.get_close_matches(name.lower(), models, n=1)
    return f"did you mean `{near[0]}`?" if near else None


def _known() -> str:
    models = [p.name for p in fetch.SOURCES.values() if p.kind == "model"]
    return f"a folder, a hub id such as `owner/name`, or one to fetch: {', '.join(models)}"


def read_config(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[transformers.PretrainedConfig, Source]:
    """The config alone, for `mismatch check`: no weights are read, none need be there.

    Raises:
        ModelError: as `resolve`; no or broken config.json; code of the folder's own.
    """
    source = resolve(name_or_path)
    folder = source.folder or _hub_folder(source.name, revision, _HUB_FILES)
    config = _config(folder, trust_remote_code)
    return config, Source(source.name, folder, source.note)


def load(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Loaded:
    """Model (in eval mode, without gradients) and tokenizer.

    Args:
        name_or_path: see `resolve`.
        dtype: "auto" is what the model was saved in; else a key of `DTYPES` or a torch dtype.
        device: where to put it; None is CUDA when there is one, else the CPU.
        device_map: accelerate's placement ("auto" spreads a model over all GPUs and the CPU);
            not together with `device`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: read pickle weights when there are no others (transformers reads them with
            torch's weights_only unpickler).

    Raises:
        ModelError: before weights are read, for all that `mismatch.weights` refuses; after, for
            weights or a RoPE base that did not arrive.
    """
    torch_dtype = _dtype(dtype)
    place = _place(device, device_map)
    source = resolve(name_or_path)
    folder = source.folder or _hub_model(source.name, revision, trust_remote_code, allow_pickle)
    config = _config(folder, trust_remote_code)
    files = weights.check_weights(folder, allow_pickle)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    model = _model(folder, config, torch_dtype, place, trust_remote_code, bool(files))
    _check_rope(model, folder)
    _check_vocabulary(model, tokenizer, folder)
    info = ModelInfo(
        name=source.name,
        path=str(folder),
        sha256=weights.fingerprint(folder, files),
        parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        note=source.note,
    )
    return Loaded(model, tokenizer, info)


def describe(model: nn.Module, name: str = "a loaded model") -> ModelInfo:
    """The info of a model that the caller loaded: the fingerprint is over the tensors themselves.

    It names the weights as they are in memory, so it differs from that of the folder they came
    from (which also covers the dtype they were saved in).
    """
    whole = hashlib.sha256(repr(sorted(model.config.to_dict().items(), key=str)).encode())
    for key, tensor in sorted(model.named_parameters(), key=lambda item: item[0]):
        plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        whole.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(plain.numpy().data)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return ModelInfo(name, "", whole.hexdigest(), parameters, dtype)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder. Raises ModelError when there is none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{folder} has no tokenizer that can be loaded: {_first_line(error)}",
            hint="tokenizer.json and tokenizer_config.json belong beside the weights",
        ) from error


def _config(folder: Path, trust_remote_code: bool) -> transformers.PretrainedConfig:
    raw = weights.read_config_file(folder)
    known = raw["model_type"] in CONFIG_MAPPING
    if not trust_remote_code:
        weights.refuse_remote_code(raw, folder, known)
    if not known and "auto_map" not in raw:
        raise ModelError(
            f"{folder}: model_type {raw['model_type']!r} is unknown to transformers "
            f"{transformers.__version__}",
            hint="a newer transformers may know it",
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # validators of many families raise many types
        raise ModelError(
            f"{folder / weights.CONFIG} is not a valid config: {_first_line(error)}"
        ) from error


def _model(
    folder: Path,
    config: transformers.PretrainedConfig,
    dtype: torch.dtype | str,
    place: dict[str, Any],
    trust_remote_code: bool,
    safetensors: bool,
) -> nn.Module:
    try:
        with _no_progress_bar():
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map=place.get("device_map"),
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=safetensors,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{folder} does not fit: {_first_line(error)}",
            hint="--device-map auto, or --dtype bfloat16",
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(
            f"{folder} could not be loaded as a causal language model: {_first_line(error)}"
        ) from error
    if absent := sorted(report["missing_keys"]):
        raise ModelError(
            f"{folder}: {len(absent)} tensors of {type(model).__name__} are not in its weights and "
            f"would be random, first {absent[0]}",
            hint="are the weights those of this config?",
        )
    if "device" in place:
        model = model.to(place["device"])
    return model.eval().requires_grad_(False)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading shows a bar of transformers' own; stderr is the caller's."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _check_rope(model: nn.Module, folder: Path) -> None:
    """The RoPE base of config.json must have arrived.

    transformers 4 wrote `rope_theta`, 5 writes `rope_parameters`; read by the other, it can fall
    back to 10000 without a word.
    """
    wanted = set(_thetas(weights.read_config_file(folder)))
    got = set(_thetas(model.config.to_dict()))
    if wanted and not wanted <= got:
        raise ModelError(
            f"{folder}: config.json has rope_theta {sorted(wanted)}, the loaded model has "
            f"{sorted(got)}: it was lost between versions of transformers",
            hint="write rope_parameters into config.json as transformers "
            f"{transformers.__version__} does",
        )


def _thetas(config: dict[str, Any]) -> Iterator[float]:
    for key, value in config.items():
        if key in ("rope_theta", "rope_local_base_freq") and value is not None:
            yield float(value)
        elif isinstance(value, dict) and (key.startswith("rope") or "_attention" in key):
            yield from _thetas(value)


def _check_vocabulary(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    rows, ids = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if ids > rows:
        raise ModelError(
            f"{folder}: the tokenizer has {ids:,} tokens, the embedding {rows:,} rows",
            hint="is this the tokenizer of this model?",
        )


def _dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _place(device: Any, device_map: Any) -> dict[str, Any]:
    if device_map is not None:
        if device is not None:
            raise ModelError("device and device_map exclude one another", hint="give one of them")
        return {"device_map": device_map}
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {chosen!s} cannot be used: {_first_line(error)}") from error
    return {"device": torch.device(chosen)}


def _hub_model(
    name: str, revision: str | None, trust_remote_code: bool, allow_pickle: bool
) -> Path:
    """Small files first, so that what must be refused is refused before gigabytes come."""
    folder = _hub_folder(name, revision, _HUB_FILES)
    _config(folder, trust_remote_code)
    patterns = ["*.safetensors", *_HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    folder = _hub_folder(name, revision, patterns)
    if allow_pickle and not any(folder.glob("*.safetensors")):
        folder = _hub_folder(name, revision, [*patterns, "*.bin"])
    return folder


def _hub_folder(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises types of three libraries
        raise ModelError(
            f"no model {name!r}: no such folder, nothing to fetch by this name, and the Hugging "
            f"Face hub did not give it ({_first_line(error)})",
            hint=_known(),
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
