"""Each matrix of the MLP at rank r: against numpy, at the identity limit, and what it costs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_models import DENSE, part, swap, tiny, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

from mismatch.mechanisms.parts.linears import linear_layers
from mismatch.models.private import same_memory

IDS = tokens(2, 12)


def truncated(weight, rank):
    u, s, vt = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s


@pytest.mark.parametrize("family", DENSE)
def test_it_is_the_model_with_truncated_matrices(family):
    model = tiny(family)
    student = swap(model, "layer1:low_rank_mlp(rank=5)")
    twin = copy.deepcopy(model)
    place = twin.get_submodule(student.layout.slot_path(1, "mlp"))
    for layer in linear_layers(place).values():
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(truncated(layer.weight, 5)[0]))
    ours, theirs = student.model(IDS).logits, twin(IDS).logits
    assert (theirs - model(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    clause = student.plan.clauses[0]
    matrices = {f"{path}.weight" for path in linear_layers(place)}
    assert clause.dropped.keys() == matrices
    assert all("bias" in name for name in clause.inherited)


@pytest.mark.parametrize("family", DENSE)
def test_at_full_rank_it_is_the_mlp(family):
    model = tiny(family)
    student = swap(model, "layer1:low_rank_mlp(rank=999)")
    place = model.get_submodule(student.layout.slot_path(1, "mlp"))
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(part(student, slot="mlp")(x), place(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_what_is_lost_is_the_singular_values_behind_the_rank(rank):
    model = tiny("llama")
    student = swap(model, f"layer1:low_rank_mlp(rank={rank})")
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = getattr(model.model.layers[1].mlp, name).weight
        factors = getattr(part(student, slot="mlp").original, name)
        assert factors.down.shape[0] == factors.up.shape[1] == rank
        _, s = truncated(weight, rank)
        lost = (weight - factors.up @ factors.down).norm().item()
        assert lost == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), rel=1e-4)
        # Both factors carry half of each singular value, so that a step moves both alike.
        torch.testing.assert_close(
            factors.down.norm(dim=1), factors.up.norm(dim=0), atol=1e-5, rtol=1e-4
        )


def test_the_plan_says_where_it_costs_more_than_it_saves():
    model = tiny("llama")  # 40 x 24: break-even at 15
    clause = swap(model, "layer1:low_rank_mlp(rank=15)").plan.clauses[0]
    assert clause.notes == ()
    clause = swap(model, "layer1:low_rank_mlp(rank=16)").plan.clauses[0]
    assert clause.notes == (
        "rank 16 takes more values than the whole matrix in `gate_proj` (40 x 24), "
        "`up_proj` (40 x 24), `down_proj` (24 x 40)",
    )
    assert clause.new_parameters["original.gate_proj.down"] == 16 * 24
    assert clause.new_parameters["original.gate_proj.up"] == 40 * 16


def test_the_teachers_matrices_stay_where_they_are():
    model = tiny("gpt2")
    mlp = model.transformer.h[1].mlp
    before = mlp.c_fc.weight.clone()
    student = swap(model, "layer1:low_rank_mlp(rank=2)")
    assert isinstance(mlp.c_fc, Conv1D)
    assert torch.equal(mlp.c_fc.weight, before)
    assert same_memory(part(student, slot="mlp").original.c_fc.bias, mlp.c_fc.bias)
    assert isinstance(student.model.transformer.h[0].mlp, type(mlp))
    assert not isinstance(part(student, slot="mlp").original.c_fc, (nn.Linear, Conv1D))
