"""The mixers of transformers in the place of attention: each against its definition and against the
library's own class; what they inherit and draw; devices; refusals."""

from __future__ import annotations

import copy
import types

import pytest
import reference_mixers as reference
import torch
from lone_mixers import CALLS, DIM, HEADS, KV, gen, lone, name_of, rows_after, run, stream
from reference_mixers import convolved
from tiny_models import part, swap, tiny, tokens
from torch import nn
from transformers import DynamicCache
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from mismatch.errors import SurgeryError
from mismatch.mechanisms.parts.mixers import by_device, on_any_device


def by_hand(mixer, call, x):
    """Output and last state by the definition; what goes where is written out here once more."""
    own = {name: p for name, p in mixer.mixer.named_parameters()}

    def heads_of(projection, repeat):
        y = x @ projection.weight.T + projection.bias
        y = y.unflatten(-1, (-1, DIM))
        order = [h // (HEADS // KV) if repeat else h for h in range(HEADS)]
        return y[:, :, order]

    name, inherits = name_of(call), mixer.inherits
    if inherits:
        q = heads_of(mixer.q_proj, False)
        k, v = heads_of(mixer.k_proj, True), heads_of(mixer.v_proj, True)
    if name == "mamba2":
        sizes = {"heads": HEADS, "head_dim": DIM, "groups": HEADS, "state": DIM}
        if inherits:
            z, dt = x @ mixer.gate.weight.T, x @ mixer.step.weight.T
            columns = torch.cat([z, v.flatten(2), k.flatten(2), q.flatten(2), dt], dim=-1)
        else:
            sizes = {"heads": 3, "head_dim": 16, "groups": 1, "state": 5}
            columns = x @ own["in_proj.weight"].T
        sizes["norm"] = mixer.settings.norm
        heads, state = reference.mamba2(columns, own, **sizes)
    elif name == "gated_deltanet":
        if inherits:
            z = (x @ mixer.gate.weight.T).unflatten(-1, (HEADS, DIM))
            qkvz = torch.stack([q, k, v, z], dim=-2).flatten(2)
            ba = x @ mixer.write.weight.T
        else:
            qkvz, ba = x @ own["in_proj_qkvz.weight"].T, x @ own["in_proj_ba.weight"].T
        columns = torch.cat([qkvz, ba], dim=-1)
        heads, state = reference.gated_deltanet(columns, own, heads=HEADS, head_dim=DIM)
    elif name == "kda":
        if inherits:
            b, f, z = (x @ m.weight.T for m in (mixer.write, mixer.decay, mixer.gate))
        else:
            q, k, v = (
                (x @ own[f"{one}_proj.weight"].T).unflatten(-1, (HEADS, DIM)) for one in "qkv"
            )
            of = ("b_proj", "forget_gate.f_a_proj", "g_a_proj")
            b, f, z = (x @ own[f"{one}.weight"].T for one in of)
        heads, state = reference.kda(q, k, v, b, f, z, own, heads=HEADS, head_dim=DIM)
    elif name == "mamba":
        heads, state = reference.mamba(x @ own["in_proj.weight"].T, own, state=mixer.settings.state)
    else:
        heads, state = reference.short_conv(x @ own["in_proj.weight"].T, own)
    if inherits:
        return heads @ mixer.o_proj.weight.T + mixer.o_proj.bias, state
    return heads @ own["o_proj.weight" if name == "kda" else "out_proj.weight"].T, state


# the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 70])
@pytest.mark.parametrize("call", CALLS)
def test_output_and_state_are_those_of_the_definition(call, length):
    """70 tokens: more than one chunk of the fast paths."""
    mixer, x = lone(call), stream(2, length)
    with torch.no_grad():
        wanted, state = by_hand(copy.deepcopy(mixer).double(), call, x.double())
        got, rows = rows_after(mixer, x)
    torch.testing.assert_close(got, wanted.float(), atol=2e-5, rtol=1e-4)
    if state is not None:
        assert rows["recurrent"].dtype == torch.float32
        torch.testing.assert_close(rows["recurrent"], state.float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_those_of_the_definition(call):
    mixer, length = lone(call).requires_grad_(True), 70
    weight = stream(2, length, seed=5)
    exact = copy.deepcopy(mixer).double()
    names = [n for n, _ in mixer.named_parameters()]
    results = []
    for module, forward in ((mixer, run), (exact, lambda m, x: by_hand(m, call, x)[0])):
        x = stream(2, length).to(next(module.parameters()).dtype).requires_grad_(True)
        loss = (forward(module, x) * weight).sum()
        results.append(torch.autograd.grad(loss, [x, *(p for _, p in module.named_parameters())]))
    for name, got, wanted in zip(["x", *names], *results, strict=True):
        scale = wanted.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            got, wanted.float(), atol=3e-5 * scale, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("call", [call for call in CALLS if "norm=before" not in call])
def test_it_is_the_librarys_mixer_run_alone(call):
    """The same weights in transformers' own class, whole and without a cache."""
    mixer, x = lone(call, attention_bias=False), stream(2, 70)
    theirs = theirs_alone(mixer, call)
    with torch.no_grad():
        wanted = theirs(x)
    torch.testing.assert_close(run(mixer, x), wanted, atol=1e-5, rtol=1e-4)


def theirs_alone(mixer, call):
    cls = {
        "mamba2": Mamba2Mixer,
        "gated_deltanet": Qwen3NextGatedDeltaNet,
        "kda": KimiLinearDeltaAttention,
        "mamba": MambaMixer,
        "short_conv": Lfm2ShortConv,
    }[name_of(call)]
    theirs = cls.__new__(cls)
    nn.Module.__init__(theirs)
    theirs.__dict__.update({k: v for k, v in vars(mixer.mixer).items() if not k.startswith("_")})
    for name, module in mixer.mixer.named_children():
        setattr(theirs, name, copy.deepcopy(module))
    for name, parameter in mixer.mixer.named_parameters(recurse=False):
        setattr(theirs, name, nn.Parameter(parameter.detach().clone()))
    if mixer.inherits:
        repeat = [h // (HEADS // KV) for h in range(HEADS)]

        def rows(projection, order=range(HEADS)):
            return projection.weight.detach().unflatten(0, (-1, DIM))[list(order)].flatten(0, 1)

        q, gate = rows(mixer.q_proj), mixer.gate.weight
        k, v = rows(mixer.k_proj, repeat), rows(mixer.v_proj, repeat)
        if name_of(call) == "kda":
            theirs.q_proj, theirs.k_proj, theirs.v_proj = map(linear, (q, k, v))
            theirs.b_proj, theirs.g_a_proj = linear(mixer.write.weight), linear(gate)
            theirs.forget_gate.f_a_proj = linear(mixer.decay.weight)
            theirs.o_proj = linear(mixer.o_proj.weight)
            return theirs.eval()
        if name_of(call) == "mamba2":
            theirs.in_proj = linear(torch.cat([gate, v, k, q, mixer.step.weight]))
        else:
            heads = [w.unflatten(0, (HEADS, DIM)) for w in (q, k, v, gate)]
            theirs.in_proj_qkvz = linear(torch.cat(heads, dim=1).flatten(0, 1))
            theirs.in_proj_ba = linear(mixer.write.weight)
        theirs.out_proj = linear(mixer.o_proj.weight)
    return theirs.eval()


def linear(weight):
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.detach().clone())
    return made


def test_the_reference_convolution_is_torchs():
    conv = nn.Conv1d(6, 6, 3, groups=6, padding=2)
    x = torch.randn(2, 9, 6, generator=gen(0))
    wanted = conv(x.transpose(1, 2))[..., :9].transpose(1, 2)
    torch.testing.assert_close(convolved(x, conv.weight, conv.bias), wanted)


@pytest.mark.parametrize("call", ["mamba2", "gated_deltanet", "kda"])
def test_an_inherited_convolution_starts_as_this_token_alone(call):
    mixer = part(swap(tiny("llama"), f"layer1:{call}")).mixer
    x = torch.randn(2, mixer.conv1d.in_channels, 9, generator=gen(0))
    assert torch.equal(mixer.conv1d(x)[..., :9], x)


def test_an_inherited_mamba2_starts_quietly():
    """Its norm gives every head length one; what the output projection was trained on is shorter."""
    model = tiny("llama")
    for call, gain in (("mamba2", 0.1), ("mamba2(init=fresh)", 1.0)):
        weight = part(swap(model, f"layer1:{call}")).mixer.norm.weight
        assert torch.equal(weight, torch.full_like(weight, gain))


# weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, kept",
    [
        ("mamba2", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gated_deltanet", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("kda", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("kda(init=fresh)", set()),
        ("mamba2(init=fresh)", set()),
        ("gated_deltanet(init=fresh)", set()),
        ("mamba", set()),
        ("short_conv", set()),
    ],
)
def test_what_is_inherited_is_the_teachers_own(call, kept):
    model = tiny("llama")
    student = swap(model, f"layer1:{call}")
    clause = student.plan.clauses[0]
    assert {name.split(".")[0] for name in clause.inherited} == kept
    assert clause.inherited.keys() | clause.dropped.keys() == {
        name for name, _ in model.model.layers[1].self_attn.named_parameters()
    }
    for name in clause.inherited:
        theirs = model.model.layers[1].self_attn.get_parameter(name)
        assert torch.equal(part(student).get_parameter(name), theirs)


@pytest.mark.parametrize("call", CALLS)
def test_draws_depend_on_seed_and_place_and_leave_the_generator_alone(call):
    model = tiny("llama")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    student = swap(model, f"layer1:{call}; layer2:{call}", seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    here = dict(part(student, 1).named_parameters())
    there = dict(part(student, 2).named_parameters())
    other = dict(part(swap(model, f"layer1:{call}", seed=8), 1).named_parameters())
    drawn = [n for n in student.plan.clauses[0].new_parameters if "proj" in n or "gate" in n]
    assert drawn
    assert not any(torch.equal(here[n], there[n]) or torch.equal(here[n], other[n]) for n in drawn)


@pytest.mark.parametrize("call", CALLS)
def test_built_without_weights_it_takes_them_all_from_a_state_dict(call):
    real = lone(call)
    with torch.device("meta"):
        model = tiny("llama")
    empty = part(swap(model, f"layer1:{call}"))
    assert all(t.device.type == "meta" for t in [*empty.parameters(), *empty.buffers()])
    empty.load_state_dict(real.state_dict(), assign=True)
    x = stream(2, 9)
    assert torch.equal(run(empty.eval(), x), run(real, x))


def test_deltanet_remembers_for_more_than_a_token_at_the_start():
    """As flash-linear-attention draws it; transformers' own dt_bias of 1 forgets at once."""
    model = tiny("llama", hidden_size=128, num_attention_heads=64, num_key_value_heads=64)
    mixer = part(swap(model, "layer1:gated_deltanet")).mixer
    with torch.no_grad():
        keep = (-mixer.A_log.exp() * nn.functional.softplus(mixer.dt_bias)).exp()
        library = (-mixer.A_log.exp() * nn.functional.softplus(torch.ones(64))).exp()
    step = nn.functional.softplus(mixer.dt_bias)
    assert step.min() >= 0.001 * 0.99
    assert step.max() <= 0.1 * 1.01
    assert keep.median() > 0.7
    assert library.median() < 0.01


def test_kda_draws_what_the_library_leaves_to_its_models():
    """Outside of one, A and dt_bias would be what the memory held."""
    forget = part(swap(tiny("llama"), "layer1:kda")).mixer.forget_gate
    assert forget.A_log.exp().min() >= 1 and forget.A_log.exp().max() <= 16
    step = nn.functional.softplus(forget.dt_bias)
    assert step.min() >= 0.001 * 0.99 and step.max() <= 0.1 * 1.01


# devices -------------------------------------------------------------------------------------


def broken(*_args, **_kwargs):
    raise RuntimeError("0 active drivers ([])")


def test_kernels_that_need_a_gpu_are_not_called_on_a_cpu(monkeypatch):
    """As it is with flash-linear-attention installed: transformers' own class fails, ours does not."""
    module = __import__(Qwen3NextGatedDeltaNet.__module__, fromlist=["x"])
    names = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    names += ("causal_conv1d_fn", "causal_conv1d_update")
    for name in names:
        kernel = types.FunctionType(broken.__code__, globals(), name)
        kernel.__wrapped__ = getattr(module, name).__wrapped__
        monkeypatch.setattr(module, name, kernel)
    mixer, x = lone("gated_deltanet(init=fresh)"), stream(2, 5)
    with pytest.raises(RuntimeError, match="0 active drivers"):
        theirs_alone(mixer, "gated_deltanet")(x)
    wanted = run(mixer, x)
    mixer.mixer.__class__ = on_any_device(
        Qwen3NextGatedDeltaNet, __name__
    )  # made with the kernels in place
    cache = DynamicCache()
    pieces = [run(mixer, piece, cache) for piece in x.split([3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(run(mixer, x), wanted)


def test_elsewhere_the_kernel_is_called():
    call = by_device(lambda x: "kernel", lambda x: "torch")
    assert call(torch.zeros(1)) == "torch"
    assert call(torch.zeros(1, device="meta")) == "kernel"


def test_every_kernel_of_a_mixer_is_found():
    """A name that transformers changes would bring its kernel back onto the CPU without a word."""
    for cls, names in {
        Mamba2Mixer: {"mamba2_chunk_scan", "mamba2_selective_state_update", "causal_conv1d_fn"},
        MambaMixer: {"mamba_selective_scan", "mamba_selective_state_update", "causal_conv1d_fn"},
        Qwen3NextGatedDeltaNet: {
            "torch_chunk_gated_delta_rule",
            "torch_recurrent_gated_delta_rule",
            "causal_conv1d_update",
        },
        KimiLinearDeltaAttention: {
            "chunk_kimi_delta_attention",
            "recurrent_kimi_delta_attention",
            "causal_conv1d_update",
        },
        Lfm2ShortConv: {"causal_conv1d_fn", "causal_conv1d_update"},
    }.items():
        own = on_any_device(cls, __name__).forward.__globals__
        assert all(own[name].__module__ == by_device.__module__ for name in names)


# refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        ("mamba2(state=16)", r"4 heads, state 8\); got state=16"),
        ("mamba2(heads=2, expand=1)", "got expand=1, heads=2"),
        (
            "mamba2(init=fresh, heads=7)",
            r"expand \* d_model = 2 \* 24 = 48, does not divide into 7",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_weights_are_loaded(call, message):
    with torch.device("meta"):
        model = tiny("llama")
    with pytest.raises(SurgeryError, match=message):
        swap(model, f"layer1:{call}")


def test_a_padding_mask_of_another_batch_is_refused():
    with pytest.raises(SurgeryError, match=r"padding mask \(3, 3\) for an input \(2, 3\)"):
        run(lone("mamba2"), stream(2, 3), mask=torch.tensor([[0, 1, 1]] * 3))


@pytest.mark.parametrize(
    "text", ["layer1:gated_attention", "layer1.heads[0,1]:infini(segment=4)", "layer1:mamba2"]
)
def test_peft_finds_the_output_projection_once(text):
    """Also where an attention inside goes without its own."""
    peft = pytest.importorskip("peft")
    model = swap(tiny("llama"), text).model
    wanted = model(tokens(2, 9)).logits
    targets = ["o_proj", "in_proj", "out_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    torch.testing.assert_close(adapted(tokens(2, 9)).logits, wanted, atol=1e-5, rtol=0)
    layer = adapted.get_submodule("base_model.model.model.layers.1.self_attn")
    assert [n for n, _ in layer.named_modules() if n.endswith("lora_A")] == ["o_proj.lora_A"]


@pytest.mark.parametrize(
    "text", ["layer1:parallel(infini(segment=4), alpha=0.5)", "layer1.heads[0,1]:infini(segment=4)"]
)
def test_an_adapter_on_a_weight_of_two_paths_is_warned_of(text, recwarn):
    """Merged, it would change both; the output projection of some heads is one for all."""
    peft = pytest.importorskip("peft")
    for target, warned in (("q_proj", True), ("down_proj", False), ("o_proj", "parallel" in text)):
        model = swap(tiny("llama"), text).model
        recwarn.clear()
        model(tokens(2, 9))
        assert not len(recwarn)
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target]))(tokens(2, 9))
        said = [str(w.message) for w in recwarn if "peft adapter sits on" in str(w.message)]
        assert bool(said) is warned, target
        assert not said or f"layer 1: a peft adapter sits on `{target}`" in said[0]


@pytest.mark.parametrize("name", ["gated_deltanet", "kda"])
def test_peft_finds_the_projections_with_weights_alone(name):
    """The library's mixer has projections of the same names; what stands in their place is no module."""
    peft = pytest.importorskip("peft")
    model = swap(tiny("llama"), f"layer1:{name}").model
    wanted = model(tokens(2, 9)).logits
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    torch.testing.assert_close(adapted(tokens(2, 9)).logits, wanted, atol=1e-5, rtol=0)
    layer = adapted.get_submodule("base_model.model.model.layers.1.self_attn")
    found = {n for n, _ in layer.named_modules() if n.endswith("lora_A")}
    assert found == {f"{one}.lora_A" for one in targets[:4]}
