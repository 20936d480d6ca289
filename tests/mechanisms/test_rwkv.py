"""RWKV-7 time mixing: the chunks against the definition, and the state however a text is fed."""

from __future__ import annotations

import math

import pytest
import torch
from reference_rwkv import LENGTHS, close, time_mixing
from tiny_models import FAMILIES, in_chunks, part, positions, swap, tiny, tokens
from transformers import DynamicCache

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.parts.delta_rule import CHUNK
from mismatch.mechanisms.rwkv import FASTEST, RWKV, OutputPower, RWKVConfig, rank, token_before
from mismatch.models.layout import Layout
from mismatch.models.private import same_memory

UNGATED = tuple(family for family in FAMILIES if family != "qwen3_5")
D_MODEL, H, KV, D = 24, 4, 2, 8  # of the tiny llama


def module(init="inherit", layer=1, dtype=torch.float32, stir=True) -> RWKV:
    """One time mixing outside any model, moved off its initial values (many are 0)."""
    model = tiny("llama").to(dtype)
    context = Context(
        layer=layer,
        slot="attn",
        n_layers=3,
        d_model=D_MODEL,
        model_config=model.config,
    )
    context.calibration = power_of(stream(2, 9))
    built = RWKV(Layout.of(model).blocks[layer].self_attn, RWKVConfig(init), context).eval()
    if stir:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for weight in built.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(0.2 * noise.to(weight))
    return built


def power_of(outputs, keep=None) -> OutputPower:
    """What calibration measures when the attention puts out these."""
    power = OutputPower()
    keep = torch.ones(outputs.shape[:2], dtype=torch.bool) if keep is None else keep
    power.update(outputs, outputs, keep)
    return power


def stream(batch, length, seed=0):
    return torch.randn(batch, length, D_MODEL, generator=torch.Generator().manual_seed(seed))


def definition(mixer: RWKV) -> dict[str, torch.Tensor]:
    """The weights by the reference's names, float64, heads repeated over their group."""
    weights = {name: weight.double() for name, weight in mixer.named_parameters()}
    bare = {name: weight for name, weight in weights.items() if "_proj" not in name}
    for new, old in (("r", "q"), ("k", "k"), ("v", "v")):
        for kind, end in (("W", "weight"), ("b", "bias")):
            value = weights.get(f"{old}_proj.{end}")
            if value is None:
                value = weights["w0"].new_zeros(H * D)
            groups = H * D // len(value)
            value = value.unflatten(0, (-1, D)).repeat_interleave(groups, 0).flatten(0, 1)
            bare[f"{kind}_{new}"] = value
    bias = weights.get("o_proj.bias", weights["w0"].new_zeros(D_MODEL))
    return bare | {"W_o": weights["o_proj.weight"], "b_o": bias}


def by_definition(mixer: RWKV, x):
    rows = [time_mixing(row, definition(mixer), H) for row in x.double()]
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


# the layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["inherit", "fresh"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_layer_is_its_definition(length, init):
    mixer, x, cache = module(init), stream(2, length), DynamicCache()
    got = mixer(hidden_states=x, past_key_values=cache)[0]
    wanted, state = by_definition(mixer, x)
    close(got, wanted, 1e-5)
    close(cache.layers[1].rows["state"], state.transpose(-1, -2), 1e-5)
    assert torch.equal(cache.layers[1].rows["last"], x[:, -1])


@pytest.mark.parametrize("init", ["inherit", "fresh"])
def test_its_gradients_are_those_of_the_definition(init):
    mixer, length = module(init), 2 * CHUNK + 5
    weigh = stream(2, length, seed=9)

    def gradients(forward):
        x = stream(2, length).requires_grad_(True)
        loss = (forward(x) * weigh).sum()
        names, weights = zip(*mixer.named_parameters(), strict=True)
        found = torch.autograd.grad(loss, [x, *weights])
        return dict(zip(("x", *names), found, strict=True))

    got = gradients(lambda x: mixer(hidden_states=x)[0])
    wanted = gradients(lambda x: by_definition(mixer, x)[0])
    for name, value in wanted.items():
        assert value.abs().max() > 0, name
        close(got[name], value, 2e-4)


@pytest.mark.parametrize("family", UNGATED)
def test_each_projection_reads_its_own_shifted_input(family):
    """Where the projection is fused, too."""
    mixer = part(swap(tiny(family), "layer1:rwkv"))
    inputs = tuple(stream(2, 5, seed) for seed in range(3))
    got = mixer.qkv(inputs)
    for i, x in enumerate(inputs):
        torch.testing.assert_close(got[i], mixer.qkv(x)[i])


def test_no_decay_is_faster_than_the_chunk_can_carry():
    """G and 1 / G of one chunk stay far inside float32."""
    assert math.exp(FASTEST * CHUNK) < 1e9
    mixer, x = module(), 100 * stream(1, 3 * CHUNK)
    with torch.no_grad():
        mixer.w0.fill_(1e4)
    x.requires_grad_(True)
    y = mixer(hidden_states=x)[0]
    y.sum().backward()
    close(y, by_definition(mixer, x)[0], 1e-4)
    assert x.grad.isfinite().all()


# token shift and padding -------------------------------------------------------------------------


def test_the_token_before_skips_pads_and_crosses_calls():
    x = torch.arange(1.0, 7).view(1, 6, 1)
    before, last = token_before(x, None, None)
    assert before.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert last.tolist() == [[6]]
    keep = torch.tensor([[False, True, False, True, True, False]])
    before, last = token_before(x, torch.tensor([[9.0]]), keep)
    assert before.flatten()[keep[0]].tolist() == [9, 2, 4]
    assert last.tolist() == [[5]]
    _, last = token_before(x, torch.tensor([[9.0]]), torch.zeros(1, 6, dtype=torch.bool))
    assert last.tolist() == [[9]]


@pytest.mark.parametrize("size", [40, 1, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_enter_neither_the_shift_nor_the_state(side, size):
    student = stirred(swap(tiny("llama"), "layer1:rwkv"))
    length, pads = 40, (0, 3, 13)
    real, mask = tokens(3, length), torch.zeros(3, length, dtype=torch.long)
    batch = torch.zeros_like(real)
    for row, pad in enumerate(pads):
        place = slice(pad, None) if side == "left" else slice(0, length - pad)
        batch[row, place] = real[row, : length - pad]
        mask[row, place] = 1
    padded = in_chunks(student, batch, size, mask)
    cache = DynamicCache(config=student.config)
    student(batch, attention_mask=mask, position_ids=positions(mask), past_key_values=cache)
    for row, pad in enumerate(pads):
        alone = DynamicCache(config=student.config)
        wanted = student(real[row : row + 1, : length - pad], past_key_values=alone).logits[0]
        torch.testing.assert_close(padded[row][mask[row] == 1], wanted, atol=1e-4, rtol=0)
        for name in ("state", "last"):
            a, b = cache.layers[1].rows[name][row], alone.layers[1].rows[name][0]
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
        assert int(cache.layers[1].seen[row]) == length - pad


def stirred(student):
    """Shift, bonus and gates switched on: they are off at first."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in student.model.modules():
            if isinstance(module, RWKV):
                for name, weight in module.named_parameters(recurse=False):
                    noise = torch.rand(weight.shape, generator=generator)
                    weight.add_(0.4 * noise if name == "mu" else 0.2 * (noise - 0.5))
    return student.model


# state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["layer0", "layer2", "all"])
def test_in_pieces_and_generated_it_is_the_whole(where):
    model = stirred(swap(tiny("llama"), f"{where}:rwkv"))
    ids = tokens(2, 75)
    whole = model(ids).logits
    for size in (1, CHUNK - 1, CHUNK + 3):
        torch.testing.assert_close(in_chunks(model, ids, size), whole, atol=1e-4, rtol=0)
    out = model.generate(
        ids[:, :40], max_new_tokens=20, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    full = model(out.sequences).logits[:, 39:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), full, atol=1e-3, rtol=0)


def test_the_state_does_not_grow_and_keeps_no_view():
    sizes = []
    for length in (3, 90):
        cache = DynamicCache()
        module()(hidden_states=stream(2, length), past_key_values=cache)
        rows = cache.layers[1].rows
        sizes.append({name: tuple(x.shape) for name, x in rows.items()})
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in rows.values())
    assert sizes[0] == sizes[1] == {"state": (2, H, D, D), "last": (2, D_MODEL)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_state_is_at_least_float32(dtype):
    cache, mixer = DynamicCache(), module(dtype=dtype)
    out = mixer(hidden_states=stream(1, 40).to(dtype), past_key_values=cache)[0]
    rows = cache.layers[1].rows
    assert rows["state"].dtype == torch.promote_types(dtype, torch.float32)
    assert rows["last"].dtype == out.dtype == dtype


def test_autocast_leaves_the_state_alone():
    cache = DynamicCache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module()(hidden_states=stream(1, 40), past_key_values=cache)
    assert cache.layers[1].rows["state"].dtype == torch.float32


# where it starts ---------------------------------------------------------------------------------


def test_inherit_starts_without_shift_and_bonus_and_with_an_open_gate():
    mixer = module(stir=False)
    assert torch.equal(mixer.mu, torch.zeros(6, D_MODEL))
    assert torch.equal(mixer.r_k, torch.zeros(H, D))
    gate = torch.sigmoid(stream(2, 5) @ mixer.g1) @ mixer.g2
    torch.testing.assert_close(gate, torch.ones_like(gate))


def test_over_an_attention_that_gates_its_output_it_inherits_nothing():
    with pytest.raises(SurgeryError, match=r"layer1\.attn: this attention gates its output") as got:
        swap(tiny("qwen3_5"), "layer1:rwkv")
    assert got.value.hint == "rwkv(init=fresh)"


@pytest.mark.parametrize("family", UNGATED)
def test_inherit_starts_as_loud_as_the_attention_it_replaces(family):
    """White heads (unit variance, times the scale) through W_o have its mean squared length."""
    model, text = tiny(family), tokens(2, 24, seed=99)  # what `swap` calibrates on
    mixer = part(swap(model, "layer0:rwkv"), layer=0)
    out = output_of(swap(model, "layer0:identity"), text)[:, 1:].double()  # bulk: not position 0
    output = getattr(mixer, mixer._output)
    if output.bias is not None:
        out = out - output.bias
    white = mixer.ln_x.double().square().mean() * output.weight.double().square().sum()
    torch.testing.assert_close(white, out.square().sum(-1).mean(), rtol=1e-4, atol=0)
    assert len(mixer.ln_x.unique()) == 1


def output_of(student, ids):
    seen = []
    hook = part(student, 0).register_forward_hook(lambda m, a, out: seen.append(out[0]))
    student.model(ids)
    hook.remove()
    return seen[0]


def test_power_is_the_mean_squared_length_around_the_bias():
    x, keep = stream(4, 10), torch.rand(4, 10, generator=torch.Generator().manual_seed(0)) > 0.3
    bias = stream(1, 1)[0, 0]
    wanted = (x[keep] - bias).double().square().sum(-1).mean().item()
    whole, parts = power_of(x, keep), OutputPower()
    for rows in ([0], [1, 2, 3]):
        parts.update(x[rows], x[rows], keep[rows])
    for power in (whole, parts):
        assert power.around(bias) == pytest.approx(wanted)
        assert power.around(None) == pytest.approx(x[keep].double().square().sum(-1).mean().item())


def test_inherit_without_calibration_is_refused():
    model = tiny("llama")
    context = Context(1, "attn", 3, D_MODEL, model.config)
    attention = Layout.of(model).blocks[1].self_attn
    with pytest.raises(SurgeryError, match=r"`rwkv` at layer1\.attn is built from a calibration"):
        RWKV(attention, RWKVConfig(), context)
    context.calibration = OutputPower()
    with pytest.raises(SurgeryError, match="no usable token"):
        RWKV(attention, RWKVConfig(), context)
    RWKV(attention, RWKVConfig("fresh"), context)


def test_fresh_starts_where_the_authors_start():
    """Channel by channel, as their training code counts them; layer 1 of 3."""
    mixer, layer, n_layers, channels = module("fresh", stir=False), 1, 3, H * D
    for n in range(channels):
        zigzag = (n % D - (D - 1) / 2) / ((D - 1) / 2)
        zigzag *= abs(zigzag)
        along = n / (channels - 1)
        speed = -6 + 6 * along ** (1 + (layer / (n_layers - 1)) ** 0.3)
        assert mixer.w0[n].item() == pytest.approx(speed + 0.5 + 2.5 * zigzag, abs=1e-5)
        rate = -0.19 + 0.3 * zigzag + 0.4 * (along - 0.5)
        assert mixer.a0[n].item() == pytest.approx(rate, abs=1e-6)
        assert mixer.k_k.flatten()[n].item() == pytest.approx(0.71 - 0.1 * (along - 0.5), abs=1e-6)
    for mu, power in zip(mixer.mu, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
        for i in range(D_MODEL):
            wanted = 1 - (i / D_MODEL) ** (power * (1 - layer / n_layers))
            assert mu[i].item() == pytest.approx(wanted, abs=1e-6)
    for name, value in (("k_a", 1.02), ("r_k", -0.04), ("ln_x", (2 / 3) ** 0.7), ("ln_x_bias", 0)):
        assert torch.allclose(getattr(mixer, name), torch.tensor(float(value)))
    for name in ("w1", "a1", "g1", "o_proj.weight"):
        assert not mixer.get_parameter(name).any()
    for name in ("w2", "a2", "g2"):
        rows = mixer.get_parameter(name)
        torch.testing.assert_close(rows @ rows.T, 0.01 * torch.eye(len(rows)), atol=1e-6, rtol=0)
    for name, scale in (("q_proj", 1.0), ("k_proj", 0.1), ("v_proj", 1.0)):
        weight = mixer.get_parameter(f"{name}.weight")  # more rows than columns
        square = scale**2 * channels / D_MODEL * torch.eye(D_MODEL)
        torch.testing.assert_close(weight.T @ weight, square, atol=1e-5, rtol=0)


def test_inherited_tensors_are_the_originals():
    model = tiny("llama")
    student = swap(model, "layer1:rwkv")
    mixer, original = part(student), model.model.layers[1].self_attn
    for name, weight in original.named_parameters():
        assert same_memory(mixer.get_parameter(name), weight)
    clause = student.plan.clauses[0]
    assert clause.dropped == {}
    assert set(clause.inherited) == {name for name, _ in original.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_keeps_nothing_and_adds_nothing_before_it_is_trained(family):
    model, ids = tiny(family), tokens(2, 21)
    student = swap(model, "layer1:rwkv(init=fresh)")
    assert student.plan.clauses[0].inherited == {}
    torch.testing.assert_close(
        student.model(ids).logits, swap(model, "layer1:zero").model(ids).logits
    )
    with torch.no_grad():
        part(student).o_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    whole = student.model(ids).logits
    torch.testing.assert_close(in_chunks(student.model, ids, 4), whole, atol=1e-4, rtol=0)


def test_draws_depend_on_seed_and_place_only():
    def drawn(text, layer=1, seed=0):
        return part(swap(tiny("llama"), text, seed), layer).w2

    torch.manual_seed(3)
    first, after = drawn("layer1:rwkv"), torch.rand(1)
    torch.manual_seed(3)
    _ = tiny("llama")
    assert torch.equal(torch.rand(1), after)  # building draws nothing from the global generator
    assert torch.equal(drawn("layers[1,2]:rwkv"), first)
    assert not torch.equal(drawn("layers[1,2]:rwkv", layer=2), first)
    assert not torch.equal(drawn("layer1:rwkv", seed=1), first)


def test_ranks_on_a_real_width():
    assert (rank(2.5, 576), rank(5, 576)) == (64, 128)
    assert (rank(2.5, 24), rank(5, 24)) == (32, 32)


def test_a_window_that_is_lost_is_said():
    notes = swap(tiny("mistral_window"), "layer1:rwkv").plan.clauses[0].notes
    assert notes == (
        "the module's own window of 7 tokens is gone: the state reaches back to the first token",
    )
    assert swap(tiny("llama"), "layer1:rwkv").plan.clauses[0].notes == ()


# loud refusals -----------------------------------------------------------------------------------


def test_a_padding_mask_of_another_batch_is_refused():
    mixer = module()
    mask = torch.tensor([[0, 1, 1]] * 3)
    with pytest.raises(SurgeryError, match=r"padding mask \(3, 3\) for an input \(2, 3\)"):
        mixer(hidden_states=stream(2, 3), attention_mask=mask)


def test_there_is_no_rotation_to_take_away():
    with pytest.raises(SurgeryError, match="RWKV has no rotary embedding to remove"):
        swap(tiny("llama"), "layer1:rwkv; layer1:nope")
