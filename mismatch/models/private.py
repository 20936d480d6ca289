"""A second tree of modules whose tensors have the values of the first one's, and are its own.

Teacher and student would cost two models if each had its weights, and would move together if they held the same ones.
So the copy is on write: both read the same memory until either writes, whoever writes (an optimizer, `.data`,
`load_state_dict`, a merge, a fused kernel). Then that tensor alone is copied, and only its writer sees what it wrote.
`Tensor.to`, new modules and a changed config touch one tree alone: modules, parameters and config are its own objects.

| tensor | its copy |
|---|---|
| parameter or buffer in memory that torch allocated | on write (`torch._lazy_clone`) |
| over a mapped file, as transformers loads weights | both move to memory that torch allocated; then on write |
| in memory that processes share; a subclass (quantised weights); sparse | at once: its memory twice |
| without values (meta) | another one without values; of offloaded weights both read the same ones |

What asks for a writable pointer although it only reads (`data_ptr()`: numpy, pickle, safetensors, bitsandbytes,
compiled code) makes the copy then: more memory, the same values. Tensors that share memory inside the first tree (tied
weights, views) share it inside the copy. A raw pointer that was taken before (a numpy view of a weight) writes past
all this.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, UntypedStorage, nn
from transformers import PretrainedConfig

from mismatch.models import offloaded, quantised

Tree = TypeVar("Tree", bound=nn.Module)


class _Storages(NamedTuple):
    """Where the tensors of one storage lie from now on."""

    moved: UntypedStorage | None
    """Those of the first tree; None: they stay."""
    own: UntypedStorage
    """Those of the copy."""


def private_copy(tree: Tree, keep: Iterable[Any] = ()) -> Tree:
    """A copy of a tree of modules; whatever is written to either leaves the other as it is.

    Args:
        tree: a model, or a part of one. Values, dtypes and requires_grad are kept; gradients are left behind.
        keep: objects that the copy goes on sharing, such as the config of the model around a part.
    """
    memo: dict[int, Any] = {id(one): one for one in (*keep, *offloaded.maps(tree))}
    storages: dict[int, _Storages] = {}
    quantised.settle(tree)
    for tensor in chain(tree.parameters(), tree.buffers(), quantised.carried(tree)):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
            memo[id(tensor)] = _copied(tensor, storages)
    fresh = copy.deepcopy(tree, memo)
    quantised.settle(fresh)
    return fresh


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors read the same memory in the same way: neither was written to since one was copied from the
    other."""
    return (
        a.device == b.device != torch.device("meta")
        and _place(a) == _place(b)
        and torch._C._data_address(a) == torch._C._data_address(b)  # type: ignore[attr-defined]
    )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where in its storage a tensor lies, and what it is read as."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def for_reading(tensor: Tensor) -> Tensor:
    """The same values for code that asks for writable memory though it only reads: what that copies dies with them."""
    return torch._lazy_clone(tensor) if torch._C._is_cow_tensor(tensor) else tensor  # type: ignore[attr-defined]


def configs_of(tree: nn.Module) -> list[PretrainedConfig]:
    """The model configs in a tree: transformers reads the kind of attention off them at every call."""
    values = chain.from_iterable(vars(module).values() for module in tree.modules())
    return [value for value in values if isinstance(value, PretrainedConfig)]


def _copied(tensor: Tensor, storages: dict[int, _Storages]) -> Tensor:
    """The copy of one tensor, with the attributes that others set on it.

    Args:
        tensor: of the first tree.
        storages: what was copied so far, by the storage it was copied from.
    """
    before = tensor.untyped_storage()
    if before._cdata not in storages:
        storages[before._cdata] = _shared_until_written(tensor)
    moved, own = storages[before._cdata]
    if moved is not None:
        tensor.data = _over(moved, tensor)
    new = _over(own, tensor)
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, tensor.requires_grad)
    new.__dict__.update(tensor.__dict__)
    return new


def _shared_until_written(tensor: Tensor) -> _Storages:
    storage = tensor.untyped_storage()
    try:
        return _Storages(None, torch._lazy_clone(tensor.detach()).untyped_storage())
    except RuntimeError:  # memory that torch did not allocate
        if tensor.is_shared() or tensor.device.type != "cpu":
            return _Storages(None, storage.clone())
    moved = storage.clone()
    return _Storages(moved, torch._lazy_clone(_over(moved, tensor)).untyped_storage())


def _over(storage: UntypedStorage, like: Tensor) -> Tensor:
    """A tensor over a storage, shaped as another one is over its own."""
    empty = torch.empty(0, dtype=like.dtype, device=like.device)
    return empty.set_(storage, like.storage_offset(), like.shape, like.stride())
