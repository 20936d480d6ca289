"""Fill a rebuilt model with the tensors of its checkpoint: every tensor of the file goes to its name, once.

A missing tensor, one too many, or one of another shape is an error. One tensor under two names becomes one again. Two
tensors in the file become two, even where building the swap makes one (a tied head that was untied, the two paths of
`parallel` after they were trained separately).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mismatch.errors import ModelError
from mismatch.models.folder import check_safetensors
from mismatch.models.swap_record import Record
from mismatch.surgery.codes import put_codes

FORMATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""The names of weight dtypes in safetensors."""


def fill(
    model: nn.Module,
    found: Record,
    folder: Path,
    files: Sequence[Path],
    replaced: Sequence[str],
    *,
    exact: bool,
) -> None:
    """Put a checkpoint's tensors into the rebuilt model: those of replaced modules, and what differs from the file.

    Args:
        model: rebuilt; what was not replaced was read from the file already, in the dtype of the model.
        found: the checkpoint's record.
        folder, files: where the tensors are.
        replaced: paths of the replaced modules.
        exact: each tensor in the dtype of the file, whatever the others have.

    Raises:
        ModelError: names or shapes in the file are not those of the model; a replaced module lies on no device.
    """
    held = {name: (file, one) for file in files for name, one in check_safetensors(file).items()}
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}

        def read(name: str) -> Tensor:
            source = found.shared.get(name, name)
            return opened[held[source][0]].get_tensor(source)

        in_place = put_codes(model, [*held, *found.shared], read)
        state = model.state_dict(keep_vars=True)
        _compare(state, {name: one.shape for name, (_, one) in held.items()}, found, folder)
        inside = tuple(f"{path}." for path in replaced)
        there: dict[str, Tensor] = {}
        used: set[int] = set()
        sources: dict[int, set[str]] = {}
        for name, tensor in state.items():
            sources.setdefault(id(tensor), set()).add(found.shared.get(name, name))
        paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        for name, tensor in state.items():
            if name in in_place:
                continue
            source = found.shared.get(name, name)
            if source in there:  # a second name of a tensor that is there
                if there[source] is not tensor:
                    _put(model, name, there[source], paths)
                continue
            entry = held[source][1]
            other = exact and entry.dtype != FORMATS.get(tensor.dtype)
            # The rebuilt model shares what the saved one no longer did.
            split = len(sources[id(tensor)]) > 1
            if id(tensor) in used:
                tensor = _alike(tensor)
                _put(model, name, tensor, paths)
            if name.startswith(inside) or other or split:
                value = read(source)
                _refuse_offloaded(tensor, name, folder)
                dtype = value.dtype if exact else tensor.dtype
                # A copy: not a view of the file, and aligned as any other tensor (sums round by alignment).
                tensor.data = value.to(device=tensor.device, dtype=dtype, copy=True)
            used.add(id(tensor))
            there[source] = tensor


def _compare(
    state: Mapping[str, Tensor], shapes: Mapping[str, list[int]], found: Record, folder: Path
) -> None:
    wanted = {found.shared.get(name, name) for name in state}
    for what, names in (
        ("are not in its weights", wanted - shapes.keys()),
        (
            "belong to no module of it",
            (shapes.keys() - wanted) | (found.shared.keys() - state.keys()),
        ),
        (
            "have another shape than its modules",
            {n for n in wanted & shapes.keys() & state.keys() if shapes[n] != [*state[n].shape]},
        ),
    ):
        if names:
            raise ModelError(
                f"{folder}: {len(names)} tensors {what}, first {min(names)}",
                hint="the folder is not as student.save() wrote it, or another version of mismatch builds this swap "
                f"differently (it was written by {found.version})",
            )


def _put(model: nn.Module, name: str, tensor: Tensor, paths: Counter[int]) -> None:
    """Put another tensor under this name only. A module that is reached by several paths is copied on this one."""
    *owners, leaf = name.split(".")
    module: nn.Module = model
    for step in owners:
        child = module.get_submodule(step)
        if paths[id(child)] > 1:
            paths[id(child)] -= 1
            child = copy.copy(child)
            for kind in ("_parameters", "_buffers", "_modules"):
                setattr(child, kind, dict(getattr(child, kind)))
            module._modules[step] = child
        module = child
    kept: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    kept[leaf] = tensor


def _alike(tensor: Tensor) -> Tensor:
    fresh = tensor.detach().clone()
    return nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh


def _refuse_offloaded(tensor: Tensor, name: str, folder: Path) -> None:
    if tensor.device.type == "meta":
        raise ModelError(
            f"{folder}: {name} was trained in another dtype than the model's, or apart from one that it "
            "shared, and lies on no device (it was offloaded)",
            hint="give a device_map that keeps its layer on a device",
        )
