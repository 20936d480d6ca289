"""A model without its weights, on the meta device: for plans, shapes and refusals before anything is loaded."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor, nn

from mismatch.models.layout import Layout

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM


def skeleton(config: transformers.PretrainedConfig) -> CausalLM:
    """The model of a config without its weights, on the meta device: for plans and shapes."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def skeleton_of(layout: Layout) -> Layout:
    """The same modules over tensors without values, on the meta device."""
    meta: dict[int, Tensor] = {
        id(t): torch.empty_like(t, device="meta", requires_grad=False)
        for t in chain(layout.model.parameters(), layout.model.buffers())
    }
    for parameter in layout.model.parameters():
        meta[id(parameter)] = nn.Parameter(meta[id(parameter)], requires_grad=False)
    return replace(layout, model=copy.deepcopy(layout.model, meta))
