"""Models by name: a folder, a fetched demo model, an installed package or a hub id.

`mismatch.models.resolve` finds the folder of a name, `read_config` reads only the config, `load` loads model and
tokenizer. All that can be refused is refused before weights are read (`mismatch.models.folder`). After the load, three
silent failures are checked for: weights that were left at random, a RoPE base that was lost between transformers 4 and
5, token ids that the embedding does not have.

This is the only file that calls `from_pretrained`. `mismatch.surgery.loading` uses it to load a checkpoint of a swapped
model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mismatch.errors import ModelError
from mismatch.models import swap_record as record
from mismatch.models.folder import (
    CONFIG,
    check_sizes,
    check_weights,
    fingerprint,
    read_config_file,
    refuse_quantised,
    refuse_remote_code,
    thetas,
)
from mismatch.models.private import for_reading
from mismatch.models.quantised import bits, numbers, quantised, settle, values
from mismatch.models.resolve import Located, from_hub, locate
from mismatch.models.target import as_target
from mismatch.models.tokenizer import check_vocabulary
from mismatch.runs.batch_size import is_memory

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM

DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


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
        """For the manifest."""
        return asdict(self)


class Loaded(NamedTuple):
    """A model with its tokenizer, and what a manifest records of it."""

    model: CausalLM
    tokenizer: Any
    info: ModelInfo


def read_config(
    name_or_path: str | Path | Located,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[transformers.PretrainedConfig, Located]:
    """The config alone, for `mismatch check`: no weights are read, none need be there.

    Of a checkpoint of a swapped model it is that of the plain model.

    Raises:
        ModelError: as `resolve`; no or broken config.json; code of the folder's own.
    """
    source = locate(name_or_path, revision, code=trust_remote_code)
    return _config(source.folder, trust_remote_code), source


def load(
    name_or_path: str | Path | Located,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    tokenizer: Any = None,
) -> Loaded:
    """Model (in eval mode, without gradients) and tokenizer.

    Args:
        name_or_path: see `resolve`.
        dtype: "auto" is what the model was saved in; else a key of `DTYPES` or a torch dtype.
        device: where to put it; None is CUDA when there is one, else the CPU.
        device_map: accelerate's device map, see `mismatch.models.target`; not together with `device`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: read pickle weights when there are no others (transformers reads them with
            torch's weights_only unpickler).
        tokenizer: of the same model, where it was loaded already.

    Raises:
        ModelError: before weights are read, for all that `mismatch.models.folder` refuses; after, for
            weights or a RoPE base that did not arrive.
    """
    torch_dtype = as_dtype(dtype)
    target = as_target(device, device_map)
    source = locate(name_or_path, revision, code=trust_remote_code)
    folder = source.folder
    if record.read(folder) is not None:
        raise ModelError(
            f"{folder} is a checkpoint of a swapped model, not a plain one",
            hint="mismatch.load reads both",
        )
    config = _config(folder, trust_remote_code)
    if source.hub:
        folder = from_hub(
            source.name, source.revision, weights=True, code=trust_remote_code, pickle=allow_pickle
        )
    files = check_weights(folder, allow_pickle)
    tokenizer = tokenizer or load_tokenizer(folder, trust_remote_code)
    model = _model(folder, config, torch_dtype, target, trust_remote_code, bool(files))
    return Loaded(model, tokenizer, check_loaded(model, tokenizer, folder, files, source))


def check_loaded(
    model: CausalLM, tokenizer: Any, folder: Path, files: list[Path], source: Located
) -> ModelInfo:
    """Check for what a load can lose silently; return the info of the model.

    Raises:
        ModelError: a RoPE base that did not arrive, token ids that the embedding does not have.
    """
    _check_rope(model, folder)
    check_vocabulary(model, tokenizer, str(folder))
    return ModelInfo(
        name=source.name,
        path=str(folder),
        sha256=fingerprint(folder, files),
        parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        note=source.note,
    )


def describe(model: CausalLM, name: str = "a loaded model") -> ModelInfo:
    """The info of a model that the caller loaded: the fingerprint is over the tensors themselves.

    It names the weights as they are in memory, so it differs from that of the folder they came
    from (which also covers the dtype they were saved in).
    """
    whole = hashlib.sha256(repr(sorted(model.config.to_dict().items(), key=str)).encode())
    for key, tensor in sorted(model.named_parameters(), key=lambda item: item[0]):
        if bits(tensor):  # codes alone name no weight: their scales lie beside them
            continue
        plain = for_reading(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8)
        whole.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(plain.numpy().data)
    for path, layer in quantised(model):
        whole.update(f"{path} {bits(layer.weight)}".encode())
        whole.update(numbers(layer).cpu().numpy().data)
    if (swapped := getattr(model, "swap_record", None)) is not None:
        # `zero` has exactly the tensors of the model that it was put into.
        whole.update(repr(swapped).encode())
    parameters = sum(values(p) for p in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    return ModelInfo(name, "", whole.hexdigest(), parameters, dtype)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder. Raises ModelError when there is none."""
    # transformers picks the class by the family, which the config.json of a checkpoint does not name.
    swapped = record.read(folder) is not None
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            folder,
            config=_config(folder, trust_remote_code) if swapped else None,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
        found("a word")  # settings of wrong types are noticed here first
        return found
    except BaseException as error:  # its files are read by Rust, whose panics are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ModelError(
            f"{folder} has no tokenizer that can be loaded: {_first_line(error)}",
            hint="tokenizer.json and tokenizer_config.json belong beside the weights",
        ) from error


def _config(folder: Path, trust_remote_code: bool) -> transformers.PretrainedConfig:
    raw = read_config_file(folder)
    if (found := record.of_config(raw, folder)) is not None:
        return plain_config(raw, found, folder)
    known = raw["model_type"] in CONFIG_MAPPING
    refuse_quantised(raw, folder)
    if not trust_remote_code:
        refuse_remote_code(raw, folder, known)
    if not known and "auto_map" not in raw:
        raise ModelError(
            f"{folder}: model_type {raw['model_type']!r} is unknown to transformers "
            f"{transformers.__version__}",
            hint="a newer transformers may know it",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # validators of many families raise many types
        raise ModelError(
            f"{folder / CONFIG} is not a valid config: {_first_line(error)}"
        ) from error
    check_sizes(config, folder)
    return config


def plain_config(
    raw: dict[str, Any], found: record.Record, folder: Path | str, **options: Any
) -> transformers.PretrainedConfig:
    """The config of the model that a checkpoint was made from; `options` as of `from_dict`.

    Raises:
        ModelError: transformers does not know its family, or does not take its config.
    """
    if found.model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{folder}: model_type {found.model_type!r} is unknown to transformers "
            f"{transformers.__version__}",
            hint="a newer transformers may know it",
        )
    refuse_quantised(raw, folder)
    try:
        config = CONFIG_MAPPING[found.model_type].from_dict(record.plain(raw, found), **options)
    except Exception as error:  # validators of many families raise many types
        raise ModelError(
            f"{Path(folder, CONFIG)} is not a valid config: {_first_line(error)}"
        ) from error
    check_sizes(config[0] if isinstance(config, tuple) else config, Path(folder))
    return config


def _model(
    folder: Path,
    config: transformers.PretrainedConfig,
    dtype: torch.dtype | str,
    target: dict[str, Any],
    trust_remote_code: bool,
    safetensors: bool,
) -> CausalLM:
    model, report = pretrained(
        folder,
        config,
        target,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=safetensors,
    )
    if absent := sorted(report["missing_keys"]):
        raise ModelError(
            f"{folder}: {len(absent)} tensors of {type(model).__name__} are not in its weights and "
            f"would be random, first {absent[0]}",
            hint="are the weights those of this config?",
        )
    return model.eval().requires_grad_(False)


def pretrained(
    folder: Path,
    config: transformers.PretrainedConfig,
    target: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[CausalLM, dict[str, Any]]:
    """transformers' own `from_pretrained` on a local folder; `target` from `as_target` says where it goes.

    Returns:
        the model, and transformers' report of missing, unexpected and mismatched tensors.

    Raises:
        ModelError: it does not fit into memory, or cannot be loaded.
    """
    options |= {"local_files_only": True, "output_loading_info": True}
    target = target or {}
    if getattr(config, "quantization_config", None) and "device" in target:
        target = {"device_map": {"": target["device"]}}  # a quantised model cannot be moved
    if "device_map" in target:
        options["device_map"] = target["device_map"]
    try:
        with _no_progress_bar():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, config=config, **options
            )
        model, report = loaded
        if "device" in target:
            model.to(target["device"])
        settle(model)
        return model, report
    except Exception as error:  # a config or weights that a family's constructors do not take
        if is_memory(error):
            raise ModelError(
                f"{folder} does not fit: {_first_line(error)}",
                hint="--device-map auto, or --dtype bfloat16",
            ) from error
        raise ModelError(
            f"{folder} could not be loaded as a causal language model: {_first_line(error)}"
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide the progress bar that transformers shows on stderr while it loads."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _check_rope(model: CausalLM, folder: Path) -> None:
    """The RoPE base of config.json must have arrived.

    transformers 4 wrote `rope_theta`, 5 writes `rope_parameters`; read by the other, it can fall
    back to 10000 silently.
    """
    wanted = set(thetas(read_config_file(folder)))
    got = set(thetas(model.config.to_dict()))
    if wanted and not wanted <= got:
        raise ModelError(
            f"{folder}: config.json has rope_theta {sorted(wanted)}, the loaded model has "
            f"{sorted(got)}: it was lost between versions of transformers",
            hint="write rope_parameters into config.json as transformers "
            f"{transformers.__version__} does",
        )


def as_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """The dtype of a name of `DTYPES`; "auto" stays.

    Raises:
        ModelError: unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
