"""What every mechanism of the table owes to the model it stands in, at any layer of any family."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
from tiny_models import DENSE, FAMILIES, N_LAYERS, in_chunks, part, positions, swap, tiny, tokens

from mismatch.mechanisms import MECHANISMS
from mismatch.mechanisms.base import scored_in
from mismatch.models.private import same_memory
from mismatch.registry import mechanisms

CALLS = {
    "adapterplus": "adapterplus(reduction=6)",
    "dyt": "dyt",
    "gated_attention": "gated_attention",
    "gated_deltanet": "gated_deltanet",
    "gqa": "gqa(groups=1)",
    "houlsby": "houlsby(reduction=6)",
    "identity": "identity",
    "infini": "infini(segment=8, update=delta, overlap=1, normalizer=shared, feature_map=hedgehog)",
    "kda": "kda",
    "kv_slots": "kv_slots(segment=4, slots=3)",
    "linear_attention": "linear_attention(feature_map=codebook, codes=6, window=5, sinks=2, decay=learned)",
    "linear": "linear",
    "lora": "lora(r=4, dora=true)",
    "low_rank_mlp": "low_rank_mlp(rank=7)",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "mean": "mean",
    "mla": "mla(rank=9, rope_dim=4)",
    "moba": "moba(block=3, top=2)",
    "nope": "nope",
    "partial_rope": "partial_rope(fraction=0.5)",
    "parallel": "parallel(infini(segment=8, sinks=2), alpha=0.5)",
    "parallel_adapter": "parallel_adapter(learned_scale=true)",
    "qlora": "qlora(r=4)",
    "quantized": "quantized(format=int8)",
    "random": "random",
    "rwkv": "rwkv",
    "ring": "ring(block=8)",
    "rope": "rope(type=llama3, factor=8, original=16, theta=500)",
    "short_conv": "short_conv",
    "skip": "skip",
    "sliding_window": "sliding_window(window=5)",
    "topk": "topk(k=4)",
    "yarn": "yarn(factor=4)",
    "zero": "zero",
}
# In some heads of a layer: one of each way to be built. Two heads of one kv group, and one of the other.
IN_HEADS = {
    "infini in heads": "infini(segment=8, sinks=2, update=delta, feature_map=learned)",
    "kv_slots in heads": "kv_slots(segment=4, slots=[0, 3])",
    "linear in heads": "linear",
    "hedgehog in heads": "linear_attention(window=5, sinks=2, decay=learned)",
    "mamba2 in heads": "mamba2",
    "nope in heads": "nope",
    "sliding_window in heads": "sliding_window(window=5, sinks=2)",
}
# The setting at which the student is the teacher, of each mechanism that has one.
LIMITS = {
    "adapterplus": "adapterplus",
    "gated_attention": "gated_attention(gate=headwise)",
    "gqa": "gqa(groups=2)",
    "houlsby": "houlsby",
    "identity": "identity",
    "infini": "infini(segment=21, first_segment=local)",
    "kv_slots": "kv_slots(segment=11, slots=3)",
    "linear_attention": "linear_attention(window=21)",
    "lora": "lora",
    "low_rank_mlp": "low_rank_mlp(rank=24)",
    "mla": "mla(rank=99, rope_dim=98)",
    "moba": "moba(block=7)",
    "parallel": "parallel(random, alpha=0)",
    "parallel_adapter": "parallel_adapter",
    "partial_rope": "partial_rope(fraction=1)",
    "ring": "ring(block=8)",
    "rope": "rope(type=linear, factor=1)",
    "sliding_window": "sliding_window(window=21)",
    "topk": "topk(k=21)",
    "yarn": "yarn(factor=1)",
}
LENGTH = 21
SOME = ("llama", "gemma3", "gpt2", "gpt_neox")  # where the families differ most
BEGINS_AS_TEACHER = (
    "identity", "adapterplus", "gated_attention", "houlsby", "lora", "parallel_adapter",
)  # fmt: skip
ROTARY = ("nope", "partial_rope", "rope", "yarn")  # not for gpt2, nor for layers without rotary
# What folds maps of heads into the projections, and the families without norms between the two.
BARE = ("gqa", "mla")
NO_NORMS = (
    "llama",
    "mistral",
    "mistral_window",
    "qwen2",
    "gemma2",
    "phi3",
    "smollm3",
    "gpt2",
    "gpt_neox",
)
# Layers of the tiny models that have a window of their own.
WINDOWED = {
    "mistral_window": (0, 1, 2), "qwen2": (1, 2), "gemma2": (0, 2), "gemma3": (0, 2), "olmo3": (0, 2), "gemma4": (1,),
    "phi3": (0, 1, 2),
}  # fmt: skip
# What a family's attention can break.
ATTENTION = (
    "gated_deltanet", "infini", "kv_slots", "linear_attention", "mamba2", "mla", "nope", "parallel", "rwkv",
    "sliding_window",
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher():
    """`teacher(family)`: one model per family for the whole file; nothing here changes it."""
    return functools.cache(tiny)


@pytest.fixture(autouse=True)
def extras(request):
    """What an optional package is needed for is skipped where it is missing."""
    case = getattr(request.node, "callspec", None)
    if case is not None and case.params.get("name") in ("qlora", "quantized"):
        pytest.importorskip("bitsandbytes")


def text(name: str, layer: int) -> str:
    if name in IN_HEADS:
        return f"layer{layer}.heads[0,1,3]:{IN_HEADS[name]}"
    return f"layer{layer}:{CALLS[name]}"


def slot(name: str) -> str:
    return "attn" if name in IN_HEADS else mechanisms().card(name).facts["slots"][0]


def fits(family: str, name: str, layer: int = 1) -> bool:
    if name == "low_rank_mlp":
        return family in DENSE
    if name == "moba" and layer in WINDOWED.get(family, ()):
        return False
    if name in BARE:
        return family in NO_NORMS
    if name in IN_HEADS and family != "llama":
        return (family, name) == ("gpt2", "infini in heads")
    if name == "rwkv" and family == "qwen3_5":
        return False  # refused: see test_rwkv.py
    if name.removesuffix(" in heads") not in ROTARY:
        return True
    return family != "gpt2" and not (family == "smollm3" and layer == 1)


def some():
    return [
        pytest.param(family, name, id=f"{family}-{name}")
        for family in SOME
        for name in (*CALLS, *IN_HEADS)
        if fits(family, name)
    ]


def cases(families=SOME):
    """Every mechanism on the families given, those of the attention on all."""
    return [
        pytest.param(family, name, id=f"{family}-{name}")
        for family in FAMILIES
        for name in (*CALLS, *IN_HEADS)
        if (family in families or name in ATTENTION) and fits(family, name)
    ]


def at_layers(params, layers):
    """The cases at each layer; of the families that differ little, layer 0 is enough."""
    return [
        pytest.param(*param.values, layer, id=f"{param.id}-{layer}")
        for param in params
        for layer in layers
        if fits(*param.values, layer) and (layer == 0 or param.values[0] in SOME)
    ]


def test_every_mechanism_of_the_table_is_tested():
    assert CALLS.keys() == MECHANISMS.keys()


@pytest.mark.parametrize("name", MECHANISMS)
def test_card(name):
    card = mechanisms().card(name)
    assert card.summary.startswith(f"{name}: ")
    assert {"slots", "identity", "state", "source"} <= card.facts.keys()
    assert all(arg.doc for arg in card.args)
    for word in ("Inherited", "New", "dropped"):
        assert word.lower() in card.text.lower()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family, name", cases())
def test_same_shape_dtype_and_finite(family, name, dtype):
    model = tiny(family).to(dtype)
    ids = tokens(2, LENGTH)
    student = swap(model, text(name, 1))
    got = student.model(ids).logits
    assert got.shape == model(ids).logits.shape
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert all(p.dtype == dtype for p in student.model.parameters())


@pytest.mark.parametrize("family, name", cases())
def test_causal(teacher, family, name):
    model = swap(teacher(family), text(name, 1)).model
    ids = tokens(2, LENGTH)
    other = ids.clone()
    other[:, 13:] = tokens(2, LENGTH, seed=5)[:, 13:]
    a, b = model(ids).logits, model(other).logits
    # An expert multiplies the tokens that came to it, later ones too: rounding depends on how many.
    apart = 0.0 if family in DENSE else 1e-5
    torch.testing.assert_close(a[:, :13], b[:, :13], atol=apart, rtol=0)
    assert (a[:, 13:] - b[:, 13:]).abs().max() > 1e-2


@pytest.mark.parametrize("family, name", some())
def test_gradients_are_finite_and_reach_every_new_tensor(family, name):
    model = tiny(family).requires_grad_(True)
    student = swap(model, text(name, 1))
    fresh = student.plan.clauses[0].new_parameters
    new = {n: p for n, p in part(student, slot=slot(name)).named_parameters() if n in fresh}
    reached = set()
    # Twice: what starts behind a zero (the down-projection of an adapter) moves from the second step on.
    for _ in range(2):
        student.model.zero_grad()
        student.model(tokens(2, LENGTH)).logits.pow(2).mean().backward()
        for _, net in scored_in(part(student, slot=slot(name))):  # learned from targets of its own
            (net(torch.ones(24)) - 1).square().mean().backward()
        grads = [p.grad for p in student.model.parameters() if p.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)
        moving = {n for n, p in new.items() if p.grad is not None and p.grad.abs().sum() > 0}
        with torch.no_grad():
            for name_ in moving:
                new[name_].sub_(0.1 * new[name_].grad / new[name_].grad.norm())
        reached |= moving
    assert reached == new.keys()


@pytest.mark.parametrize("name", CALLS)
def test_built_twice_from_one_seed_it_is_the_same(name):
    model = tiny("llama")
    a, b = (swap(model, text(name, 1), seed=7).model.state_dict() for _ in range(2))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family, name", cases())
def test_a_padded_row_is_the_row_alone(teacher, family, name, side):
    model = swap(teacher(family), text(name, 1)).model
    ids, pads = tokens(3, LENGTH), (0, 4, 9)
    mask = torch.ones_like(ids)
    batch = ids.clone()
    for row, pad in enumerate(pads):
        real = slice(pad, None) if side == "left" else slice(None, LENGTH - pad)
        mask[row] = 0
        mask[row, real] = 1
        batch[row, mask[row] == 0] = 0
        batch[row, real] = ids[row, : LENGTH - pad]
    padded = model(batch, attention_mask=mask, position_ids=positions(mask)).logits
    for row, pad in enumerate(pads):
        alone = model(ids[row : row + 1, : LENGTH - pad]).logits[0]
        torch.testing.assert_close(padded[row][mask[row] == 1], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family, name", some())
def test_a_row_of_a_batch_is_the_row_alone(teacher, family, name):
    model = swap(teacher(family), text(name, 1)).model
    ids = tokens(3, LENGTH)
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(model(ids).logits, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family, name, layer", at_layers(cases(), range(N_LAYERS)))
def test_fed_in_chunks_or_token_by_token_it_is_the_whole(teacher, family, name, layer):
    model = swap(teacher(family), text(name, layer)).model
    ids = tokens(2, LENGTH)
    whole = model(ids).logits
    for size in (1, 6):
        torch.testing.assert_close(in_chunks(model, ids, size), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family, name, layer", at_layers(some(), range(N_LAYERS)))
def test_generate_with_beams_and_left_padding_equals_generate_without_cache(
    teacher, family, name, layer
):
    model = swap(teacher(family), text(name, layer)).model
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    ids[0, :3] = mask[0, :3] = 0
    settings = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **settings)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.scores, plain.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family, name, layer", at_layers(some(), (0,)))
def test_no_memory_between_calls_and_none_in_the_state_dict(teacher, family, name, layer):
    model = swap(teacher(family), text(name, layer)).model
    ids, names = tokens(2, LENGTH), list(model.state_dict())
    first = model(ids).logits
    in_chunks(model, ids, 5)
    assert torch.equal(model(ids).logits, first)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("family, name", cases())
def test_the_teacher_stays_itself_and_undo_brings_it_back(teacher, family, name):
    model = teacher(family)
    ids = tokens(2, LENGTH)
    before = model(ids).logits
    student = swap(model, text(name, 1))
    if name != "ring":  # the same up to rounding, whatever the rounding
        assert torch.equal(student.model(ids).logits, before) == (name in BEGINS_AS_TEACHER)
    assert torch.equal(model(ids).logits, before)
    student.undo()
    assert torch.equal(student.model(ids).logits, before)


@pytest.mark.parametrize("family, name", some())
def test_builds_without_weights(family, name):
    with torch.device("meta"):
        model = tiny(family)
    model = swap(model, text(name, 1)).model
    assert all(t.device.type == "meta" for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", CALLS)
def test_what_it_makes_lies_on_the_device_of_its_input(name, monkeypatch):
    """On the meta device, the only second one that every machine has: a tensor made elsewhere does not mix with it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown on meta
    with torch.device("meta"):
        model = tiny("llama")
    student = swap(model, text(name, 1)).model
    assert student(tokens(2, LENGTH).to("meta")).logits.device.type == "meta"


@pytest.mark.parametrize("family, name", some())
def test_the_plan_tells_inherited_new_and_dropped_apart(teacher, family, name):
    student = swap(teacher(family), text(name, 1))
    clause = student.plan.clauses[0]
    old = dict(teacher(family).get_submodule(clause.path).named_parameters())
    now = dict(student.model.get_submodule(clause.path).named_parameters())
    kept = {key for key, p in old.items() if any(same_memory(p, own) for own in now.values())}
    assert clause.inherited.keys() == kept
    assert clause.dropped == {key: p.numel() for key, p in old.items() if key not in kept}
    born = {
        key: own.numel()
        for key, own in now.items()
        if not any(same_memory(p, own) for p in old.values())
    }
    assert clause.new_parameters == born
    # What was not replaced exists once.
    rest = dict(student.model.named_parameters())
    for key, p in teacher(family).named_parameters():
        assert key.startswith(clause.path) or same_memory(p, rest[key])


@pytest.mark.parametrize("family, name", some())
def test_weights_survive_a_save_and_a_load(family, name):
    ids = tokens(2, LENGTH)
    student = swap(tiny(family), text(name, 1)).model
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.01)
    again = swap(tiny(family, seed=3), text(name, 1), seed=3).model
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(ids).logits, student(ids).logits)


BIT_LIMITS = (
    "layer1:identity",
    "layer1.block:identity",
    "norms:identity",
    "layer1:sliding_window(window=21)",
    "layer1:parallel(infini(segment=8))",
    "layer1.mlp:parallel(random)",
    "layer1:lora",
    "layer1.mlp:lora(dora=true, rslora=true, init=gaussian)",
    "layer1.attn:houlsby; layer1.mlp:houlsby",
    "all:parallel_adapter",
    "layer1:adapterplus; layer1.attn:adapterplus",
)


@pytest.mark.parametrize(
    "family, limit",
    # Experts have no linear layer for lora; that is refused, and tested in test_lora.
    [(f, limit) for f in FAMILIES for limit in BIT_LIMITS if f in DENSE or "mlp:lora" not in limit],
)
def test_at_its_identity_limit_the_student_is_the_teacher_to_the_bit(teacher, family, limit):
    model = teacher(family)
    ids = tokens(2, LENGTH)
    assert torch.equal(swap(model, limit).model(ids).logits, model(ids).logits)


def test_every_mechanism_has_an_identity_limit_or_says_why_not():
    none = {
        name
        for name in MECHANISMS
        if mechanisms().card(name).facts["identity"].startswith("none: ")
    }
    assert MECHANISMS.keys() - none == LIMITS.keys()


@pytest.mark.parametrize(
    "family, name",
    # These two have more kv heads: see test_gqa.py.
    [
        (f, n)
        for f in FAMILIES
        for n in LIMITS
        if fits(f, n) and not (n == "gqa" and f[:3] == "gpt")
    ],
)
def test_at_its_identity_limit_the_student_is_the_teacher(teacher, family, name):
    """Up to rounding, by one setting of each mechanism that has one."""
    model = teacher(family)
    ids = tokens(2, LENGTH)
    student = swap(model, f"layer1:{LIMITS[name]}").model
    torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
