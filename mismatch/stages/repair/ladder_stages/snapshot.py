"""Weights on their way to a file and back, and what tells two sets of them apart."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def fingerprint(weights: dict[str, Tensor]) -> str:
    """sha256 of tensors by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(name.encode() + bits(tensor).tobytes())
    return found.hexdigest()


def bits(tensor: Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bits as int16."""
    tensor = tensor.cpu().contiguous()
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def tensor(array: np.ndarray, like: Tensor) -> Tensor:
    """What `bits` gave, as a tensor like another."""
    tensor = torch.from_numpy(np.array(array))
    if like.dtype == torch.bfloat16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.reshape(like.shape).to(like.device)
