"""A model while it is measured: one thread has it, dropout is off, and afterwards it is as the caller left it.

A measurement hangs hooks on modules and lets some be skipped; two at a time on one model would see each other's.
So a model has one lock, and a student has its teacher's: they share memory and what a forward tells their mechanisms.
Whoever calls the model by himself meanwhile, from another thread, is not held up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LOOKING = threading.Lock()


@contextmanager
def measured(*models: nn.Module) -> Iterator[None]:
    """Have models for oneself, in eval mode; the mode of every module is restored at the end.

    The torch modes of the caller (`no_grad`, `inference_mode`) do not reach inside: some stages train, and tensors made
    in inference mode could be used nowhere else.
    """
    with ExitStack() as stack:
        locks = {id(lock): lock for lock in map(lock_of, models)}
        for key in sorted(locks):  # in one order in all threads, so that no two wait for each other
            stack.enter_context(locks[key])
        stack.enter_context(torch.inference_mode(False))
        for model in models:
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
        for model in models:
            model.eval()
        yield


def lock_of(model: nn.Module) -> Any:
    """The lock of a model."""
    with _LOOKING:
        return _LOCKS.setdefault(model, threading.RLock())


def share_lock(model: nn.Module, other: nn.Module) -> None:
    """From now on a model has the lock of another one."""
    lock = lock_of(other)
    with _LOOKING:
        _LOCKS[model] = lock
