"""How pickle, and with it `torch.save`, finds a class that stands in no module: by what it was made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def reduced(instance: Any, make: Callable[[Any], type], of: Any) -> tuple[Any, ...]:
    """What `__reduce_ex__` returns for an instance of the class `make(of)`; both can be found by their names."""
    return empty, (make, of), instance.__getstate__()


def empty(make: Callable[[Any], type], of: Any) -> Any:
    """An instance of the class `make(of)`, before its state is set."""
    cls: Any = make(of)
    return cls.__new__(cls)
