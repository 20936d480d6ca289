"""Write a swapped model as an ordinary Hugging Face folder.

    config.json            the plain model's config, and the record of the swap (`mismatch.models.swap_record`)
    model.safetensors      every tensor once (several files and an index when they are large)
    modeling_mismatch.py   lets transformers load it: a few lines that import mismatch
    generation_config.json, tokenizer files
    mismatch.json          facts about these weights, when there are any

A swapped model is an ordinary transformers model whose class got one more base, `Swapped`, and with it a
`save_pretrained` that writes the swap too: transformers' own would write a folder that loads as the plain model. So
`Trainer` and pipelines write complete checkpoints, into a folder that may exist, as they always do; `save` makes a new
folder, whole or not at all.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from mismatch import spec
from mismatch.errors import OutputError, SurgeryError, UsageError
from mismatch.models import swap_record as record
from mismatch.models.folder import CONFIG, INDEX, SINGLE
from mismatch.models.made import reduced
from mismatch.models.private import for_reading
from mismatch.models.swap_record import Record, Swap
from mismatch.runs.environment import private
from mismatch.runs.files import (
    guarded,
    json_text,
    whole_folder,
    write_atomic,
    write_atomic_by_name,
)

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM

    _Model = CausalLM
else:  # `Swapped` is a second base beside the model's own class
    _Model = object

SHARD = "50GB"
"""Largest weight file, as in transformers 5."""

CODE = '''"""Lets transformers load this model: `mismatch` replaced modules of it, and their code is in that package."""

try:
    from mismatch.checkpoint import MismatchConfig, MismatchForCausalLM
except ImportError as error:
    raise ImportError(
        "modules of this model were replaced by `mismatch` {version}, which is not installed here: "
        "`pip install llm-mismatch` (the package called mismatch on PyPI is another one)"
    ) from error

__all__ = ["MismatchConfig", "MismatchForCausalLM"]
'''


class Swapped(_Model):
    """The second base of a swapped model's class. `swap_record` holds the swaps."""

    swap_record: Record

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return reduced(self, _swapped, plain_class(self))

    def save_pretrained(  # type: ignore[override]  # transformers' later options by keyword only
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = SHARD,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As that of transformers: an existing folder is written into. `push_to_hub()` is a method of its own.

        Raises:
            UsageError: `push_to_hub`, `variant` or `distributed_checkpoint`.
            SurgeryError: a module keeps something in its state that is not a tensor.
            RunError: it cannot be written.
        """
        for name, given in (
            ("push_to_hub", push_to_hub),
            ("variant", variant),
            ("distributed_checkpoint", kwargs.get("distributed_checkpoint")),
        ):
            if given:
                raise UsageError(
                    f"save_pretrained of a swapped model does not support `{name}`",
                    hint="save it, then call model.push_to_hub(...)"
                    if name == "push_to_hub"
                    else None,
                )
        if is_main_process:
            _check(self, state_dict)
            folder = Path(save_directory)
            with guarded("make the folder", folder):
                folder.mkdir(parents=True, exist_ok=True)
            _write(self, folder, state_dict, max_shard_size)


def mark(model: CausalLM, swap: Swap, base: record.Base | None = None) -> None:
    """Record a swap on the model: its class becomes one whose `save_pretrained` writes the swap too.

    Args:
        model: after the swap.
        swap: what was done.
        base: the plain model, when this is the first swap.
    """
    if isinstance(model, Swapped):
        model.swap_record = model.swap_record.then(swap)
        return
    own: Any = type(model)
    model.__class__ = _swapped(own)
    assert isinstance(model, Swapped)
    model.swap_record = Record(base=base).then(swap)


def unmark(model: Swapped) -> None:
    """Forget the swaps: the class is the plain model's again."""
    del model.swap_record
    model.__class__ = plain_class(model)


def plain_class(model: Swapped) -> Any:
    """The class of the plain model; while FSDP2 shards a model, its class is one above both."""
    order = type(model).__mro__
    return order[order.index(Swapped) + 1]


@functools.cache
def _swapped(cls: type[CausalLM]) -> type[Swapped]:
    # transformers decides by the name and the module of a class (loss, pipelines, kernels): they stay.
    names = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (Swapped, cls), names)


def save(
    model: CausalLM,
    path: str | Path,
    *,
    tokenizer: Any = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint into a new folder, whole or not at all.

    Args:
        model: a swapped model.
        path: the folder to make.
        tokenizer: written beside it.
        extra: for mismatch.json.
        overwrite: replace a checkpoint in the folder once the new one is complete; nothing else is ever replaced.
            Between the two is an instant without either.

    Raises:
        SurgeryError: nothing is swapped in this model, or a module keeps something that is not a tensor.
        OutputError: the folder exists and is not empty, or holds something other than a checkpoint.
        RunError: it cannot be written.
    """
    path = Path(path).expanduser()
    if not isinstance(model, Swapped):
        raise SurgeryError(
            f"nothing is swapped in this {type(model).__name__}, so there is no checkpoint to write",
            hint="save_pretrained saves a plain model",
        )
    _check(model, None)
    check_free(path, overwrite)
    with whole_folder(path) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if extra:
            (folder / record.EXTRA).write_text(private(json_text(dict(extra))), encoding="utf-8")
        _write(model, folder, None, SHARD)
    return path


def _check(model: Swapped, state_dict: Mapping[str, Tensor] | None) -> None:
    # Loading makes swaps, which mark their models: these files need one another.
    from mismatch.surgery.loadable import check_loadable

    own = model.state_dict(keep_vars=True)
    shared = shared_names(own)
    given = own if state_dict is None else state_dict
    if absent := sorted(own.keys() - given.keys() - shared.keys()):
        raise UsageError(
            f"`state_dict` lacks {len(absent)} tensors of this model, first {absent[0]}",
            hint="leave it out to save all of them",
        )
    check_loadable(model, {name: own[name] for name in shared} | dict(given))


def check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, not a folder", hint="give another path")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"the folder {path} exists and is not empty",
            hint="give another path, or overwrite=True to replace the checkpoint in it",
        )
    if not (path / CONFIG).is_file() or record.read(path) is None:
        raise OutputError(
            f"{path} is not a checkpoint of mismatch and is not overwritten",
            hint="give another path",
        )


def _write(
    model: Swapped,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None,
    max_shard_size: int | str,
) -> None:
    """All but the tokenizer. config.json comes last: without it the folder is no model."""
    own = model.state_dict(keep_vars=True)
    shared = shared_names(own)
    given = own if state_dict is None else state_dict
    _write_weights(_tensors(given, shared), folder, max_shard_size)
    known = model.swap_record
    code = CODE.format(version=known.entry()["version"])
    write_atomic(folder / f"{record.CODE}.py", lambda file: file.write(code.encode()))
    if model.can_generate():
        # Not its save_pretrained: that refuses settings which the model came with.
        model.generation_config.to_json_file(folder / "generation_config.json")
    entry = replace(
        known,
        swaps=tuple(replace(swap, text=_written_out(swap.text)) for swap in known.swaps),
        shared=shared,
        model_type=model.config.model_type,
    ).entry()
    config = json.loads(model.config.to_json_string(use_diff=True)) | {
        "model_type": record.MODEL_TYPE,
        "architectures": [plain_class(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "auto_map": record.AUTO_MAP,
        record.KEY: entry,
    }
    text = private(json.dumps(config, indent=2, sort_keys=True)) + "\n"
    write_atomic(folder / CONFIG, lambda file: file.write(text.encode()))


def _written_out(text: str) -> str:
    return spec.explicit(spec.parse(text))


def shared_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Second names of tensors, and the name under which each is written.

    Raises:
        SurgeryError: a module keeps something in its state that is not a tensor.
    """
    first: dict[int, str] = {}
    found = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise SurgeryError(
                f"`{name}` is not a tensor but {type(value).__name__}: safetensors cannot hold it",
                hint="keep what must survive a save in parameters or buffers",
            )
        if first.setdefault(id(value), name) != name:
            found[name] = first[id(value)]
    return found


def _tensors(state: Mapping[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    """What goes into the file: each tensor once, contiguous, in memory of its own.

    Raises:
        SurgeryError: a tensor that lies on no device.
    """
    found, storages = {}, set()
    for name, value in state.items():
        if name in shared:
            continue
        if value.device.type == "meta":
            raise SurgeryError(
                f"`{name}` lies on no device (it was offloaded, or never loaded), so it cannot be saved",
                hint="load the model without offloading",
            )
        storage = value.untyped_storage()._cdata
        tensor = value.detach().clone() if storage in storages else for_reading(value.detach())
        found[name] = tensor.contiguous()
        storages.add(storage)
    return found


def _write_weights(tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    split = split_torch_state_dict_into_shards(
        tensors,
        max_shard_size=max_shard_size,
        filename_pattern=SINGLE.replace(".safetensors", "{suffix}.safetensors"),
    )
    with guarded("write", folder):
        # From here on the folder is no model until the new config.json is there.
        for old in (
            folder / CONFIG,
            folder / INDEX,
            *folder.glob("model*.safetensors"),
        ):
            old.unlink(missing_ok=True)
        for name, keys in split.filename_to_tensors.items():
            part = {key: tensors[key] for key in keys}
            write_atomic_by_name(
                folder / name, functools.partial(save_file, part, metadata={"format": "pt"})
            )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_atomic(folder / INDEX, lambda file: file.write(text.encode()))
