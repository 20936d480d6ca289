"""The best linear map: against numpy's least squares, in every slot, and as a control."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, in_chunks, part, swap, tiny, tokens

from mismatch import spec
from mismatch.errors import SurgeryError
from mismatch.forward.sites import massive
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.linear import Linear, LinearConfig, Moments
from mismatch.models.layout import Layout
from mismatch.stages.swapped import calibration_tokens
from mismatch.surgery.controls import control_specs

TEXT = tokens(2, 24, seed=99)  # what `swap` calibrates on


def lstsq(x, y, ridge):
    """Ridge regression with a bias as one least-squares problem: centred data, and one row more per
    input for its penalty."""
    x, y = x.double().numpy(), y.double().numpy()
    mean_x, mean_y = x.mean(0), y.mean(0)
    a, b = x - mean_x, y - mean_y
    penalty = np.diag(np.sqrt(ridge * (a**2).sum(0)))
    rows = np.concatenate([a, penalty])
    solved, *_ = np.linalg.lstsq(rows, np.concatenate([b, np.zeros((len(penalty), b.shape[1]))]))
    explained = 1 - ((a @ solved - b) ** 2).sum() / (b**2).sum()
    return solved.T, mean_y - solved.T @ mean_x, explained


def sample(n=200, d_in=7, d_out=5):
    torch.manual_seed(0)
    x = torch.randn(n, d_in) * torch.logspace(-2, 3, d_in) + torch.randn(d_in)
    return x, torch.tanh(x @ torch.randn(d_in, d_out)) + 3


def fitted(x, y, ridge, **options):
    moments = Moments()
    moments.update(x[None], y[None], torch.ones(1, len(x), dtype=bool))
    return parts_of(moments.fit(ridge, **options))


def parts_of(fit):
    return fit.weight, fit.bias, fit.explained


@pytest.mark.parametrize("ridge", [1e-8, 0.1, 1.0, 30.0])
def test_it_is_least_squares_with_the_ridge_as_a_share_of_each_inputs_variance(ridge):
    x, y = sample()
    weight, bias, explained = fitted(x, y, ridge)
    wanted, offset, share = lstsq(x, y, ridge)
    np.testing.assert_allclose(weight, wanted, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bias, offset, rtol=1e-6, atol=1e-9)
    assert explained == pytest.approx(share, rel=1e-6)


def test_an_update_is_fitted_without_seeing_it():
    x, _ = sample(d_in=5)
    y = x + torch.tanh(x)
    weight, bias, explained = fitted(x, y, 0.1, update=True)
    wanted, offset, share = lstsq(x, y.double() - x.double(), 0.1)
    np.testing.assert_allclose(weight, wanted, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bias, offset, rtol=1e-6, atol=1e-9)
    assert explained == pytest.approx(share, rel=1e-6)


def test_a_linear_part_is_found_exactly():
    x, _ = sample()
    true = torch.randn(5, 7)
    weight, bias, explained = fitted(x.double(), (x @ true.T + 2).double(), 1e-12)
    torch.testing.assert_close(weight, true.double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(bias, torch.full((5,), 2.0).double(), atol=1e-3, rtol=0)
    assert explained == pytest.approx(1)


def test_a_channel_that_never_moves_does_no_harm():
    x, y = sample()
    x[:, 2] = 1e3 / 3
    weight = fitted(x, y, 0.1)[0]
    assert weight.isfinite().all()
    rest = [0, 1, 3, 4, 5, 6]
    wanted, _, _ = lstsq(x[:, rest], y, 0.1)
    np.testing.assert_allclose(weight[:, rest], wanted, rtol=1e-5, atol=1e-8)
    assert weight[:, 2].abs().max() < 1e-6


def test_batches_add_up_and_masked_tokens_are_not_seen():
    x, y = (v.unflatten(0, (10, 20)) for v in sample())
    keep = torch.rand(10, 20) > 0.3
    whole, parts = Moments(), Moments()
    whole.update(x, y, keep)
    for rows in ([0, 1, 2], [3], [4, 5, 6, 7, 8, 9]):
        parts.update(x[rows], torch.where(keep[rows][..., None], y[rows], torch.nan), keep[rows])
    for a, b in zip(parts_of(whole.fit(0.1)), parts_of(parts.fit(0.1)), strict=True):
        assert b == pytest.approx(a, rel=1e-8)
    wanted, _, _ = lstsq(x[keep], y[keep], 0.1)
    np.testing.assert_allclose(whole.fit(0.1).weight, wanted, rtol=1e-6, atol=1e-9)
    assert whole.fit(0.1).tokens == keep.sum()


def test_the_ridge_is_the_one_that_does_best_on_windows_that_were_not_fitted():
    """Few tokens and much noise want a large ridge, many tokens a small one."""
    torch.manual_seed(0)
    true, chosen = torch.randn(5, 7), []
    for windows in (8, 800):
        x = torch.randn(windows, 6, 7)
        y = x @ true.T + 6 * torch.randn(windows, 6, 5)
        moments, held = Moments(), torch.arange(windows) % 4 == 3
        moments.update(x, y, torch.ones(windows, 6, dtype=bool))
        fit = moments.fit()
        shares = {}
        for ridge in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
            weight, bias, _ = lstsq(x[~held].flatten(0, 1), y[~held].flatten(0, 1), ridge)
            left = y[held].flatten(0, 1).double().numpy()
            off = left - x[held].flatten(0, 1).double().numpy() @ weight.T - bias
            shares[ridge] = 1 - (off**2).sum() / ((left - left.mean(0)) ** 2).sum()
        assert fit.ridge == max(shares, key=shares.get)
        assert fit.held_out == pytest.approx(shares[fit.ridge], rel=1e-6)
        chosen.append(fit.ridge)
        whole, *_ = lstsq(x.flatten(0, 1), y.flatten(0, 1), fit.ridge)
        np.testing.assert_allclose(fit.weight, whole, rtol=1e-5, atol=1e-8)
    assert chosen[0] > chosen[1]


def test_it_asks_for_as_much_text_as_its_size_needs():
    calls = [spec.Call("mean"), spec.Call("zero")]
    assert calibration_tokens([spec.Call("zero")], d_model=576) == 0
    assert calibration_tokens(calls, d_model=576) == 2048
    assert calibration_tokens(calls, ["linear"], d_model=576) == 32 * 576
    assert calibration_tokens(calls, ["linear"], d_model=24) == 2048


@pytest.mark.parametrize("slot", ["attn", "mlp", "block", "norm2", "final_norm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_its_slot_it_is_what_numpy_fits_to_the_bulk_tokens_of_the_part(family, slot):
    model = tiny(family)
    layout, seen = Layout.of(model), {}
    layer = None if slot == "final_norm" else 1
    place = model.get_submodule(layout.slot_path(layer, slot))

    def note(_module, args, kwargs, out):
        seen["x"] = args[0] if args else kwargs["hidden_states"]
        seen["y"] = out[0] if isinstance(out, tuple) else out

    def entering(_module, args, kwargs):
        seen["stream"] = args[0] if args else kwargs["hidden_states"]

    handles = [
        place.register_forward_hook(note, with_kwargs=True),
        layout.blocks[-1 if layer is None else 1].register_forward_pre_hook(
            entering, with_kwargs=True
        ),
    ]
    with torch.no_grad():
        model(TEXT)
    for handle in handles:
        handle.remove()
    keep = ~massive(seen["stream"], torch.ones(TEXT.shape, dtype=torch.bool))
    keep[:, 0] = False
    x, y = seen["x"][keep], seen["y"][keep]
    weight, bias, _ = lstsq(x, y - x if slot == "block" else y, 0.3)
    text = "final_norm:linear(ridge=0.3)" if layer is None else f"layer1.{slot}:linear(ridge=0.3)"
    student = swap(model, text)
    mine = part(student, layer, slot)
    np.testing.assert_allclose(mine.weight.detach(), weight, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(mine.bias.detach(), bias, rtol=1e-3, atol=1e-3)
    h = torch.randn(2, 3, 24)
    wanted = h.double() @ torch.from_numpy(weight).T + torch.from_numpy(bias)
    wanted = wanted + h if slot == "block" else wanted
    out = mine(hidden_states=h) if slot == "attn" else mine(h)
    if slot == "attn":
        assert out[1] is None
        out = out[0]
    torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-2)
    assert student.plan.clauses[0].inherited == {}


@pytest.mark.parametrize("slot", ["attn", "block"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_positions_are_right_with_every_layer_replaced(family, slot):
    model, ids = tiny(family), tokens(2, 20)
    student = swap(model, f"all.{slot}:linear").model
    torch.testing.assert_close(in_chunks(student, ids, 6), student(ids).logits, atol=1e-4, rtol=0)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (
        student.generate(ids, attention_mask=mask, use_cache=use, **settings)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_the_plan_says_how_much_it_explains():
    model = tiny("llama")
    (note,) = swap(model, "layer1.mlp:linear").plan.clauses[0].notes
    assert note.startswith("explains ")
    assert note.endswith(
        "% of the variance of the output on the 46 calibration tokens it was fitted to (ridge 1)"
    )
    (note,) = swap(model, "layer1.block:linear").plan.clauses[0].notes
    assert "variance of the update" in note


def test_without_calibration_it_is_refused():
    attn = Layout.of(tiny("llama")).blocks[1].self_attn
    context = Context(1, "attn", 3, 24, None)
    with pytest.raises(SurgeryError, match=r"`linear` at layer1\.attn is built from a calibration"):
        Linear(attn, LinearConfig(), context)
    context.calibration = Moments()
    with pytest.raises(SurgeryError, match="no usable token"):
        Linear(attn, LinearConfig(), context)


@pytest.mark.parametrize(
    ("swapped", "control"),
    [
        ("layer1:nope", "layer1.rope:linear"),
        ("layers0-1.mlp:random", "layers[0,1].mlp:linear"),
        ("layer1:skip", "layer1.block:linear"),
        ("final_norm:dyt(alpha=1)", "final_norm:linear"),
    ],
)
def test_as_a_control_it_stands_in_the_slots_of_the_swap(swapped, control):
    model = tiny("llama")
    (found,) = control_specs(["linear"], swap(model, swapped).plan).values()
    assert spec.format(found) == control
    student = swap(model, control)
    ids = tokens(2, 12)
    torch.testing.assert_close(
        in_chunks(student.model, ids, 5), student.model(ids).logits, atol=1e-4, rtol=0
    )
