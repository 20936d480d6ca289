"""A model without its weights, on the meta device: for plans, shapes and refusals before anything is loaded."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from mismatch.errors import ModelError
from mismatch.models import offloaded
from mismatch.models.layout import Layout
from mismatch.models.quantised import quantised

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM


def skeleton(config: transformers.PretrainedConfig) -> CausalLM:
    """The model of a config without its weights, on the meta device: for plans and shapes.

    Raises:
        ModelError: no model can have such a config.
    """
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:  # whatever a family's constructors make of wrong numbers and words
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ModelError(
            f"config.json describes no model that can be built: {type(error).__name__}: {reason:.300}",
            hint="is it as save_pretrained wrote it?",
        ) from error


def skeleton_of(layout: Layout) -> Layout:
    """The same modules over tensors without values, on the meta device."""
    meta: dict[int, Any] = {
        id(t): torch.empty_like(t, device="meta", requires_grad=False)
        for t in chain(layout.model.parameters(), layout.model.buffers())
    }
    for parameter in layout.model.parameters():
        meta[id(parameter)] = nn.Parameter(meta[id(parameter)], requires_grad=False)
    for _, layer in quantised(
        layout.model
    ):  # as those of a config: of its shape, whatever it is packed in
        bias, dtype = layer.bias is not None, layout.model.dtype
        meta[id(layer)] = nn.Linear(layer.in_features, layer.out_features, bias, "meta", dtype)
    meta |= {id(one): one for one in offloaded.maps(layout.model)}
    bare = copy.deepcopy(layout.model, meta)
    offloaded.forget(bare)
    return replace(layout, model=bare)
