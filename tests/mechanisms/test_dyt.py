"""gamma tanh(alpha x) + beta, with the gain and bias of the norm, whatever its convention."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, part, swap, tiny, tokens

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.dyt import DyT, DyTConfig, InputScale, gain_offset
from mismatch.models.layout import Layout
from mismatch.models.private import same_memory


@pytest.mark.parametrize("slot", ["norm1", "norm2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_formula_with_the_norms_own_gain_and_bias(family, slot):
    """The gain is read off the norm's behaviour: what it makes of +-1 (rms 1), and of zeros."""
    model = tiny(family)
    student = swap(model, f"layer1.{slot}:dyt(alpha=0.3)")
    original = model.get_submodule(student.layout.slot_path(1, slot))
    unit = torch.tensor([1.0, -1.0]).repeat(12)  # rms 1, mean 0: LayerNorm and RMSNorm leave it
    beta = original(torch.zeros(24))
    gamma = (original(unit) - beta) / unit
    x = 3 * torch.randn(2, 5, 24)
    wanted = gamma * torch.tanh(0.3 * x) + beta
    torch.testing.assert_close(part(student, slot=slot)(x), wanted, atol=1e-4, rtol=1e-4)
    assert gamma.std() > 0.05, "the gain must not be constant for this to say anything"


@pytest.mark.parametrize("family, offset", [("llama", 0.0), ("gemma3", 1.0), ("gpt2", 0.0)])
def test_gemma_stores_the_gain_less_one(family, offset):
    assert gain_offset(Layout.of(tiny(family)).final_norm) == offset


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_inherited_tensors_are_the_norms_and_alpha_is_new(family):
    model = tiny(family)
    student = swap(model, "layer1.norm1:dyt(alpha=0.3)")
    original = model.get_submodule(student.layout.slot_path(1, "norm1"))
    mine = dict(part(student, slot="norm1").named_parameters())
    assert all(same_memory(mine[name], value) for name, value in original.named_parameters())
    assert student.plan.clauses[0].new_parameters == {"alpha": 1}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_without_inheritance_gain_is_one_and_bias_zero(family):
    student = swap(tiny(family), "layer1.norm1:dyt(alpha=0.3, inherit=false)")
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(part(student, slot="norm1")(x), torch.tanh(0.3 * x))
    assert sum(student.plan.clauses[0].inherited.values()) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_means_all_of_them(family):
    student = swap(tiny(family), "norms:dyt")
    blocks = {clause.slot for clause in student.plan.clauses}
    gemma = family.startswith("gemma")
    assert blocks == {"norm1", "norm2", "final_norm"} | (
        {"norm1_post", "norm2_post"} if gemma else set()
    )
    assert student.model(tokens(1, 9)).logits.isfinite().all()


def test_alpha_is_one_over_the_rms_of_the_norms_input_over_bulk_tokens():
    x, keep = torch.randn(6, 10, 4) * 7, torch.rand(6, 10) > 0.3
    x[~keep] = 1e4
    whole, parts = InputScale(), InputScale()
    whole.update(x, x, keep)
    for rows in ([0], [1, 2, 3], [4, 5]):
        parts.update(x[rows], x[rows], keep[rows])
    assert whole.alpha() == pytest.approx(1 / x[keep].pow(2).mean().sqrt().item(), rel=1e-6)
    assert parts.alpha() == pytest.approx(whole.alpha(), rel=1e-12)


def test_measured_alpha_reaches_the_module():
    model, text = tiny("llama"), tokens(2, 24, seed=99)
    student = swap(model, "layer1.norm2:dyt")
    seen = []
    norm = model.get_submodule(student.layout.slot_path(1, "norm2"))
    hook = norm.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(text)
    hook.remove()
    rms = seen[0][:, 1:].pow(2).mean().sqrt()  # `swap` calibrates on `text`; 0 is not bulk
    alpha = part(student, slot="norm2").alpha.detach()
    torch.testing.assert_close(alpha, 1 / rms, rtol=1e-5, atol=0)


def test_tokens_of_one_scale_below_saturation_come_out_as_from_the_norm():
    model = tiny("llama")
    norm = Layout.of(model).blocks[1].input_layernorm
    context = Context(1, "norm1", 3, 24, None)
    directions = torch.randn(2, 50, 24)
    x = 1e-3 * directions / directions.pow(2).mean(-1, keepdim=True).sqrt()
    # alpha = 1e-3 / rms: tanh is linear there, and DyT is the norm times 1e-3
    out = DyT(norm, DyTConfig(alpha=1.0), context)(x)
    norm.variance_epsilon = 0.0
    torch.testing.assert_close(out, 1e-3 * norm(x), rtol=1e-4, atol=1e-8)


def test_refusals():
    context = Context(1, "norm1", 3, 24, None)
    blocks = Layout.of(tiny("llama")).blocks
    with pytest.raises(SurgeryError, match="LlamaMLP is not a norm with a gain"):
        DyT(blocks[1].mlp, DyTConfig(alpha=1.0), context)
    with pytest.raises(SurgeryError, match=r"`dyt` at layer1\.norm1 is built from a calibration"):
        DyT(blocks[1].input_layernorm, DyTConfig(), context)
    with pytest.raises(SurgeryError, match="no usable token"):
        InputScale().alpha()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_refit_finds_planted_slope_gain_and_bias(family):
    student = swap(tiny(family), "layer1.norm1:dyt")
    dyt = part(student, slot="norm1")
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(2, 40, len(dyt.weight), generator=generator) * 3 for _ in range(4)]
    gain = torch.rand(len(dyt.weight), generator=generator) + 0.5
    bias = 0.0 if dyt.bias is None else torch.randn(len(dyt.weight), generator=generator)
    slope = dyt.alpha.detach() * 2.0 ** (3 / 4)  # on the grid
    dyt.weight = torch.nn.Parameter(torch.ones_like(dyt.weight))
    said = dyt.refit((one, gain * torch.tanh(slope * one) + bias) for one in x)
    assert said == ("slope and gain" if dyt.bias is None else "slope, gain and bias")
    torch.testing.assert_close(dyt.alpha.detach(), slope)
    torch.testing.assert_close(dyt.weight.detach() + dyt.offset, gain, rtol=1e-4, atol=1e-5)
    if dyt.bias is not None:
        torch.testing.assert_close(dyt.bias.detach(), bias, rtol=1e-4, atol=1e-5)
