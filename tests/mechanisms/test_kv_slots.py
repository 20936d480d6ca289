"""kv_slots against its definition, however a text is fed, and what its options mean."""

from __future__ import annotations

import functools

import pytest
import torch
from reference_kv_slots import far_target, reference
from tiny_models import in_chunks, part, positions, swap, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from mismatch.errors import SpecError, SurgeryError
from mismatch.mechanisms.base import Context
from mismatch.mechanisms.kv_slots import KVSlots, KVSlotsConfig
from mismatch.models.layout import Layout

N = 4
LENGTH = 31
VARIANTS = {
    "learned": {"slots": 5},
    "by head": {"slots": (0, 7), "sinks": 2},
    "no overlap": {"slots": 3, "overlap": 0},
    "two before": {"slots": 6, "overlap": 2, "sinks": 0},
    "sinks over a segment": {"slots": 2, "sinks": 6},
    "none": {"slots": 0, "slot_score": "first"},
    "one token a segment": {"segment": 1, "slots": 4},
    "value_norm": {"slots": 5, "slot_score": "value_norm"},
    "key_norm": {"slots": (5, 2), "slot_score": "key_norm"},
    "short_key": {"slots": (5, 2), "slot_score": "short_key"},
    "recent": {"slots": 5, "slot_score": "recent"},
    "first": {"slots": 5, "slot_score": "first"},
    "random": {"slots": 5, "slot_score": "random"},
    "rest": {"slots": (5, 0), "rest": "mean", "sinks": 2},
    "half": {"slots": (5, 2), "sinks": 2, "kv_dtype": "float16"},
    "eight bits": {"slots": (5, 2), "rest": "mean", "kv_dtype": "mxint8"},
    "rest alone": {"slots": 0, "slot_score": "first", "rest": "mean", "overlap": 0},
}


@functools.cache
def llama(family: str = "llama"):
    return tiny(family)


def module(family: str = "llama", dtype=torch.float64, layer: int = 1, **settings) -> KVSlots:
    """One kv_slots with a random net, outside any model: H=4, KV=2, D=8, d_model=24."""
    model = tiny(family).to(dtype)
    layout = Layout.of(model)
    context = Context(layer=layer, slot="attn", n_layers=3, d_model=24, model_config=model.config)
    original = model.get_submodule(layout.slot_path(layer, "attn"))
    built = KVSlots(original, KVSlotsConfig(**{"segment": N, **settings}), context).eval()
    built.rotary = model.base_model.rotary_emb
    spread(built)
    return built


def spread(mechanism) -> None:
    """Scores that differ, in place of the zeros at first."""
    net = mechanism.score_net()
    if net is not None:
        with torch.no_grad():
            draws = torch.randn(net.out.weight.shape, generator=torch.Generator().manual_seed(5))
            net.out.weight.copy_(10 * draws)


def embeddings(mechanism, x, offset=0):
    ids = torch.arange(offset, offset + x.shape[1])[None]
    return mechanism.rotary(x, ids)


def run(mechanism, x, offset=0, cache=None):
    return mechanism(
        hidden_states=x,
        position_embeddings=embeddings(mechanism, x, offset),
        past_key_values=cache,
        attention_mask=None,
    )[0]


def stream(batch=2, length=LENGTH, dtype=torch.float64, seed=0):
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(mechanism, x):
    return torch.stack([reference(mechanism, row, embeddings(mechanism, x)) for row in x])


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_it_is_the_definition(settings):
    mechanism, x = module(**settings), stream()
    torch.testing.assert_close(run(mechanism, x), by_definition(mechanism, x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "mistral_window"])
def test_it_is_the_definition_in_families_that_differ(family):
    """One kv head per query head; softcap and a window shorter than what is read whole."""
    mechanism, x = module(family, layer=0, slots=4, overlap=2), stream()
    torch.testing.assert_close(run(mechanism, x), by_definition(mechanism, x), atol=1e-10, rtol=0)


def test_gradients_are_those_of_the_definition():
    mechanism, x = module(slots=(3, 5), sinks=2), stream(batch=1, length=19)
    trained = [p for name, p in mechanism.named_parameters() if not name.startswith("choice")]
    grads = [
        torch.autograd.grad(path(mechanism, x).square().sum(), trained)
        for path in (run, by_definition)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("size", [1, 3, N, 2 * N + 1])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_fed_in_pieces_it_is_the_whole(settings, size):
    mechanism, x = module(**settings), stream()
    cache = DynamicCache()
    pieces = [run(mechanism, x[:, s : s + size], s, cache) for s in range(0, LENGTH, size)]
    torch.testing.assert_close(torch.cat(pieces, 1), run(mechanism, x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["none", "mxint8"])
def test_between_two_segments_only_the_open_one_is_written(kind):
    """What is held in 8 bits is packed once, not at every token."""
    student = swap(llama(), f"layer0:kv_slots(segment={N}, slots=3, kv_dtype={kind})")
    cache = DynamicCache(config=student.model.config)
    ids = tokens(1, 4 * N + 2)
    rows = []
    for start, stop in ((0, 4 * N + 1), (4 * N + 1, 4 * N + 2)):
        student.model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        rows.append(dict(cache.layers[0].rows))
    before, after = rows
    written = {name for name in after if after[name] is not before[name]}
    assert written & {
        f"{what}_{side}" for what in ("open", "earlier", "sink", "slot") for side in "kv"
    } == {"open_k", "open_v"}


# the choice --------------------------------------------------------------------------------------


def test_equal_tokens_keep_the_earlier_one_whatever_the_pieces():
    """Layer 0 sees embeddings alone, so equal tokens have equal scores, but for the last bits of a matrix product."""
    student = swap(llama(), f"layer0:kv_slots(segment={N}, slots=3)")
    spread(part(student, 0))
    ids = tokens(1, 6).repeat(1, 8)
    kept = {}
    for size in (48, 1, 5):
        cache = DynamicCache(config=student.model.config)
        for start in range(0, 48, size):
            student.model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        kept[size] = cache.layers[0].rows["slot_k"]
    torch.testing.assert_close(kept[1], kept[48], atol=1e-5, rtol=0)
    torch.testing.assert_close(kept[5], kept[48], atol=1e-5, rtol=0)


def test_untrained_scores_keep_the_first_tokens():
    x = stream()
    untrained = module(slots=5)
    with torch.no_grad():
        untrained.score_net().out.weight.zero_()
    torch.testing.assert_close(run(untrained, x), run(module(slots=5, slot_score="first"), x))
    fresh = part(swap(llama(), "layer1:kv_slots"))
    assert not fresh.score_net().out.weight.any()
    assert fresh.score_net().into.weight.std() > 0.05


def test_random_depends_on_head_layer_and_seed_and_not_on_the_chunks():
    """That it does not depend on the chunks is `test_fed_in_pieces_it_is_the_whole`."""
    scores = [
        part(swap(llama(), f"layer{at}:kv_slots(slot_score=random)", seed=seed), at)
        for at, seed in ((1, 0), (2, 0), (1, 1))
    ]
    first, layer, seed = (
        torch.stack([one.choice._by_number(torch.arange(4096), h) for h in (0, 1)]) / 2**24
        for one in scores
    )
    for other in (layer[0], seed[0], first[1]):
        assert abs(torch.corrcoef(torch.stack([first[0], other]))[0, 1]) < 0.05
    # Uniform: mean 1/2 and deviation 1/sqrt(12), within three standard errors of 4096 draws.
    assert abs(first[0].mean() - 0.5) < 3 * 12**-0.5 / 64
    assert abs(first[0].std() - 12**-0.5) < 0.02


def test_gradients_reach_everything_but_the_net():
    mechanism, x = module(dtype=torch.float32, slots=5), stream(dtype=torch.float32)
    x.requires_grad_()
    run(mechanism, x)[:, -1].sum().backward()
    assert x.grad[:, : LENGTH - 2 * N].abs().sum() > 0  # through what is kept
    assert all(p.grad is None for p in mechanism.choice.parameters())
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert getattr(mechanism, name).weight.grad.abs().sum() > 0


# state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [LENGTH, 1, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_counted_nor_kept_nor_read(side, size):
    """Rows at different places of their segments, one shorter than what is read whole."""
    student = swap(llama(), f"layer1:kv_slots(segment={N}, sinks=2, slots=[3, 6], rest=mean)")
    spread(part(student))
    pads = (0, 3, N, 26)
    real, mask = tokens(4, LENGTH), torch.zeros(4, LENGTH, dtype=torch.long)
    batch = torch.zeros_like(real)
    for row, pad in enumerate(pads):
        place = slice(pad, None) if side == "left" else slice(0, LENGTH - pad)
        batch[row, place] = real[row, : LENGTH - pad]
        mask[row, place] = 1
    padded = in_chunks(student.model, batch, size, mask)
    cache = DynamicCache(config=student.model.config)
    given = {"attention_mask": mask, "position_ids": positions(mask)}
    student.model(batch, past_key_values=cache, **given)
    for row, pad in enumerate(pads):
        alone = DynamicCache(config=student.model.config)
        text = real[row : row + 1, : LENGTH - pad]
        wanted = student.model(text, past_key_values=alone).logits[0]
        torch.testing.assert_close(padded[row][mask[row] == 1], wanted, atol=1e-4, rtol=0)
        far = alone.layers[1].rows["slot_score"][0] > -torch.inf
        for name in ("slot_k", "slot_v", "slot_score"):
            a, b = cache.layers[1].rows[name][row], alone.layers[1].rows[name][0]
            torch.testing.assert_close(a[far], b[far], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "text",
    [
        "slots=5",
        "slots=[0, 5], overlap=2, sinks=3",
        "slots=0",
        "slots=[2, 0], rest=mean",
        "slots=[2, 0], rest=mean, kv_dtype=float16",
        "slots=[2, 0], rest=mean, kv_dtype=mxint8",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_what_is_promised_and_does_not_grow(text, dtype):
    student = swap(tiny("llama").to(dtype), f"layer1:kv_slots(segment={N}, {text})")
    promised = part(student).state_bytes()
    assert student.plan.clauses[0].state_bytes == promised
    cache, held = DynamicCache(config=student.model.config), {}
    for at in range(12 * N):
        student.model(tokens(1, 1, seed=at), past_key_values=cache, use_cache=True)
        rows = cache.layers[1].rows.values()
        held[at + 1] = sum(x.nbytes for x in rows)
        assert held[at + 1] == sum(x.untyped_storage().nbytes() for x in rows)
    assert max(held.values()) == held[3 * N - 1] == held[12 * N - 1] == promised


class Largest(TorchDispatchMode):
    """The most numbers that any tensor holds which an operation gives."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.untyped_storage().nbytes())
        return out


def test_the_largest_tensor_is_linear_in_the_length():
    mechanism, found = module(slots=5, dtype=torch.float32), []
    for length in (128, 256, 512):
        with torch.no_grad(), Largest() as seen:
            x = stream(1, length, torch.float32)
            run(mechanism, x)
            mechanism.score_targets(hidden_states=x, position_embeddings=embeddings(mechanism, x))
        found.append(seen.most)
    assert found[2] - found[1] <= 2.02 * (found[1] - found[0])  # a square would be 4


def test_beams_take_their_slots_along():
    student = swap(llama(), f"layer1:kv_slots(segment={N}, slots=4)")
    spread(part(student))
    out = student.model.generate(
        tokens(2, 3 * N), max_new_tokens=2 * N + 1, num_beams=3, do_sample=False, pad_token_id=0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    # The score of the best beam is the mean log-likelihood of its tokens in one forward of the whole.
    logits = student.model(out.sequences).logits.log_softmax(-1)
    taken = logits[:, :-1].gather(2, out.sequences[:, 1:, None])[:, 3 * N - 1 :, 0]
    torch.testing.assert_close(taken.mean(1), out.sequences_scores, atol=1e-4, rtol=0)


def test_in_a_static_cache_it_is_the_whole():
    student = swap(llama(), f"layer1:kv_slots(segment={N}, slots=4)").model
    cache, ids = StaticCache(config=student.config, max_cache_len=32), tokens(1, 29)
    pieces = [
        student(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 13), (13, 14), (14, 29))
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), student(ids).logits, atol=1e-4, rtol=0)


# limits, words and refusals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", f"segment={(LENGTH + 1) // 2}, slots=0"),
        ("llama", f"segment=2, slots={LENGTH}, slot_score=random"),
        ("mistral_window", f"segment={(LENGTH + 1) // 2}, sinks=3"),  # within its own window
    ],
)
def test_it_is_the_teacher_at_its_limits(family, settings):
    model, ids = llama(family), tokens(2, LENGTH)
    student = swap(model, f"all:kv_slots({settings})").model
    torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-4, rtol=0)


def test_rest_in_a_module_with_a_window_of_its_own_is_refused():
    with pytest.raises(SurgeryError, match="this module reads the last 7 only"):
        swap(llama("mistral_window"), "layer1:kv_slots(rest=mean)")


def test_keys_and_values_in_fewer_bits_are_the_float32_ones_to_rounding():
    """Scores of the same hidden states, so the same tokens; fewer bytes but for the scores."""
    x = stream(dtype=torch.float32)
    whole, half, coarse, eight = (
        module(dtype=torch.float32, slots=5, kv_dtype=held)
        for held in (None, "float16", "bfloat16", "mxint8")
    )
    wanted = run(whole, x)
    errors = [
        float((run(each, x) - wanted).detach().norm() / wanted.detach().norm())
        for each in (half, coarse, eight)
    ]
    assert 0 < errors[0] < 1e-3 < errors[1] < 8e-3  # steps of 2^-11 and 2^-8
    assert 2e-3 < errors[2] < 2e-2  # 2^-7 of the largest in a block
    scores = (2 * N - 1 + 5) * 2 * 4  # of each token and slot, by kv head
    assert half.state_bytes() - scores == (whole.state_bytes() - scores) // 2
    assert (
        eight.state_bytes() - scores == (whole.state_bytes() - scores) * 9 // 32
    )  # 8 codes, 1 exponent


def test_half_precision_is_the_float32_one_to_rounding():
    """Scores of the same hidden states, so the same tokens."""
    whole, x = module(dtype=torch.float32, slots=5), stream(dtype=torch.bfloat16)
    half = module(dtype=torch.float32, slots=5).to(torch.bfloat16)
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        a.data = b.data.float()  # the same numbers
    wanted = run(whole, x.float())
    error = (run(half, x).float() - wanted).norm() / wanted.norm()
    assert error < 0.02  # a bfloat16 has 8 bits: 0.004, over four products


def test_a_list_of_another_length_is_shown_with_a_caret():
    with pytest.raises(SpecError) as caught:
        swap(llama(), "layer2:parallel(kv_slots(segment=8, slots=[1, 2, 3]))")
    assert str(caught.value) == (
        "`kv_slots` at layer 2 `attn`: `slots` has 3 numbers, and the module has 2 kv heads\n"
        "  kv_slots(segment=8, slots=[1, 2, 3])\n"
        "                      ^\n\n"
        "hint: give one number for all, or 2"
    )


def test_the_plan_notes_what_a_person_must_know():
    (untrained,) = swap(llama(), "layer1:kv_slots").plan.clauses[0].notes
    assert "the first tokens keep the slots" in untrained
    assert swap(llama(), "layer1:kv_slots(slot_score=first)").plan.clauses[0].notes == ()
    (window,) = swap(llama("mistral_window"), "layer1:kv_slots(slots=0)").plan.clauses[0].notes
    assert "own window of 7 tokens is kept" in window
    plan = swap(llama(), "layer1:kv_slots(slots=[0, 16])").plan
    assert plan.clauses[0].args == {"slots": (0, 16)}
    assert sum(plan.clauses[0].new_parameters.values()) == 24 * 64 + 64 + 64 * 2 + 2


@pytest.mark.parametrize("block", [5, 128])
@pytest.mark.parametrize("settings", [{}, {"overlap": 0, "sinks": 3}, {"segment": LENGTH}])
def test_targets_are_the_most_that_any_far_query_gives(monkeypatch, settings, block):
    monkeypatch.setattr("mismatch.mechanisms.parts.far_attention.QUERIES", block)
    mechanism, x = module(**settings), stream()
    found = mechanism.score_targets(hidden_states=x, position_embeddings=embeddings(mechanism, x))
    q, k, _ = mechanism.qkv(x)
    q, k = mechanism.rotate(q, k, embeddings(mechanism, x))
    config = mechanism.settings
    for row in range(len(x)):
        wanted = far_target(
            q[row].detach(), k[row].detach(), segment=config.segment, overlap=config.overlap,
            sinks=config.sinks, scaling=mechanism.scaling,
        )  # fmt: skip
        torch.testing.assert_close(found[row], wanted, atol=1e-12, rtol=0, equal_nan=True)
