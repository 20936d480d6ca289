"""How keys and values are held in a state, and what is read of them: as they are made, rounded, or packed in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from mismatch.mechanisms.parts import mxint8


class Held:
    """Keys and values of one mechanism in its state.

    Args:
        name: float16, bfloat16 or mxint8; None: as the module makes them.
        width: numbers of a key.
    """

    def __init__(self, name: str | None, width: int) -> None:
        self.name, self.width = name, width

    def dtype(self, made: torch.dtype) -> torch.dtype:
        """In which they are read, of a module that makes them in this one."""
        if self.name == "mxint8":
            return torch.promote_types(made, torch.float32)
        if self.name is None:
            return made
        found: torch.dtype = getattr(torch, self.name)
        return found

    def bytes_of(self, made: torch.dtype) -> int:
        """Bytes of one key or value."""
        if self.name == "mxint8":
            return mxint8.bytes_of(self.width)
        return self.width * self.dtype(made).itemsize

    def rounded(self, x: Tensor) -> Tensor:
        """`... D` as it will be read."""
        return mxint8.rounded(x) if self.name == "mxint8" else x.to(self.dtype(x.dtype))

    def packed(self, x: Tensor) -> Tensor:
        """`... D`, rounded before, as it is held."""
        return mxint8.packed(x) if self.name == "mxint8" else x

    def unpacked(self, x: Tensor, made: torch.dtype) -> Tensor:
        """The way back, of a module that makes them in this dtype."""
        return mxint8.unpacked(x, self.width, self.dtype(made)) if self.name == "mxint8" else x
