"""Weights that accelerate keeps in host memory or on disk and brings to a device for each forward of their module.

The module holds meta tensors meanwhile, and a hook that knows where the values are. Forward passes need nothing more.
Who reads the weights themselves (a mechanism that is built from the module that it replaces) asks for them here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Tree = TypeVar("Tree", bound=nn.Module)


def offloaded(tree: nn.Module) -> list[str]:
    """Names of the parameters whose values are elsewhere."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in tree.named_modules()
        if _hook(module) is not None
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]


def fetch(tree: Tree) -> Tree:
    """Bring all weights of a tree to the devices on which it runs, to stay there: the same tree."""
    for module in tree.modules():
        hook = _hook(module)
        if hook is None:
            continue
        values = {
            # A copy: from disk it is a view of the whole mapped file.
            name: hook.weights_map[name].to(hook.execution_device, copy=True)
            for name, tensor in module.named_parameters(recurse=False)
            if tensor.is_meta
        }
        _take_off(module, hook)
        for name, value in values.items():
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    return tree


def forget(tree: nn.Module) -> None:
    """Take the hooks of a tree off: its tensors without values stay so."""
    for module in tree.modules():
        if (hook := _hook(module)) is not None:
            _take_off(module, hook)


def value_of(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module with its values, on the device on which it runs."""
    own: Tensor = module.get_parameter(name)
    hook = _hook(module)
    return (
        own if hook is None or not own.is_meta else hook.weights_map[name].to(hook.execution_device)
    )


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module with a weight runs."""
    hook = _hook(module)
    return (
        module.get_parameter("weight").device
        if hook is None
        else torch.device(hook.execution_device)
    )


def maps(tree: nn.Module) -> Iterator[Any]:
    """Where the hooks of a tree find values: a copy of the tree looks there too, and has none of its own."""
    for module in tree.modules():
        if (hook := _hook(module)) is not None:
            yield getattr(hook.weights_map, "dataset", hook.weights_map)
            if hook.tied_params_map is not None:
                yield hook.tied_params_map


def _hook(module: nn.Module) -> Any:
    """The `AlignDevicesHook` that brings the weights of a module; None: they are there."""
    own = getattr(module, "_hf_hook", None)
    every = getattr(own, "hooks", (own,))  # several hooks in a row are one
    return next((hook for hook in every if getattr(hook, "offload", False)), None)


def _take_off(module: nn.Module, hook: Any) -> None:
    from accelerate.hooks import remove_hook_from_module  # takes long to import

    hook.offload = False  # it would bring back what it took
    remove_hook_from_module(module)
