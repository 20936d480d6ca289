"""Other rotary embeddings: against models that were built with them, and against the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import in_chunks, part, positions, swap, tiny, tokens

from mismatch.errors import SpecError, SurgeryError
from mismatch.mechanisms.parts.rotary import Rule, own_parameters

ROTARY = (
    "llama", "mistral", "mistral_window", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3",
    "smollm3", "gpt_neox",
)  # fmt: skip
PARTIAL = ("phi3", "gpt_neox")  # half of each head rotates
WIDTH, LENGTH = 8, 64  # of a head; of the text that the tiny models were "trained" for

# What is written in a swap, and the same in a config.json.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
CASES = {
    "default, theta=500": {"rope_theta": 500.0},
    "linear, factor=4": {"factor": 4.0},
    "dynamic, factor=4": {"factor": 4.0},
    "yarn, factor=4": {"factor": 4.0},
    "longrope, factor=4": {"factor": 4.0, **LISTS},
    "llama3, factor=8, theta=500": {"factor": 8.0, "rope_theta": 500.0, **LLAMA3},
    "proportional, factor=2, fraction=0.5": {"factor": 2.0, "partial_rotary_factor": 0.5},
}


def kind(case: str) -> str:
    return case.split(",")[0]


def plain(family, **changes):
    """A model with the trained length LENGTH and rotary embedding in every layer."""
    if family == "smollm3":
        changes["no_rope_layers"] = [1, 1, 1]
    if family == "phi3":  # its config counts pairs from hidden_size / heads
        changes |= {"original_max_position_embeddings": LENGTH, "hidden_size": 32}
    return tiny(family, max_position_embeddings=LENGTH, **changes)


def born_with(family, case):
    """The same weights in a model whose config.json says it, as transformers builds it."""
    model = plain(family)
    own = own_parameters(model.config, 0)
    given = {k: v for k, v in own.items() if k in ("rope_theta", "partial_rotary_factor")}
    more = CASES[case]
    if family in PARTIAL and "short_factor" in more:
        more = {k: v[:2] if isinstance(v, list) else v for k, v in more.items()}
    given |= {"rope_type": kind(case), **more}
    if family == "gemma3":
        kinds = model.config.rope_parameters
        given = {name: {**given, **{"rope_theta": p["rope_theta"]}} for name, p in kinds.items()}
        for name in given:
            given[name] |= {k: v for k, v in more.items() if k == "rope_theta"}
    if family == "phi3" and kind(case) != "longrope":  # its config refuses what its code can do
        native = plain(family)
        native.config.rope_parameters = given
        native.model.rotary_emb = type(native.model.rotary_emb)(native.config)
    else:
        native = plain(family, rope_parameters=given)
    native.load_state_dict(model.state_dict())
    return model, native


def native_cases():
    for family in ROTARY:
        for case in CASES:
            # There transformers rotates the whole head, in other pairs than the trained ones.
            if not (family in PARTIAL and kind(case) == "proportional"):
                yield pytest.param(family, case, id=f"{family}-{kind(case)}")


@pytest.mark.parametrize("length", [20, 90])
@pytest.mark.parametrize("family, case", native_cases())
def test_it_is_the_model_that_was_built_with_it(family, case, length):
    model, native = born_with(family, case)
    ids = tokens(2, length)
    got = swap(model, f"all:rope(type={case})").model(ids).logits
    torch.testing.assert_close(got, native(ids).logits, atol=2e-5, rtol=0)
    within = length <= LENGTH
    if not (within and kind(case) == "dynamic"):
        assert (got - model(ids).logits).abs().max() > 1e-2
    if kind(case) == "yarn":
        short = swap(model, "all:yarn(factor=4)").model(ids).logits
        assert torch.equal(short, got)


def by_hand(case: str, theta=1e4, factor=4.0, trained=64, length=None, fraction=0.5):
    """Frequencies and attention factor in float64, from the papers, pair by pair."""
    f = np.array([theta ** (-2 * i / WIDTH) for i in range(WIDTH // 2)])
    turns, a = trained * f / (2 * math.pi), 1.0
    if case == "linear":
        f = f / factor
    if case == "dynamic" and length is not None:
        grown = theta * (factor * length / trained - (factor - 1)) ** (WIDTH / (WIDTH - 2))
        f = np.array([grown ** (-2 * i / WIDTH) for i in range(WIDTH // 2)])
    if case == "yarn":  # ends of the ramp in pairs, rounded outwards
        at = [
            WIDTH * math.log(trained / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (32, 1)
        ]
        low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), WIDTH - 1)
        keep = 1 - np.clip((np.arange(WIDTH // 2) - low) / (high - low), 0, 1)
        f, a = keep * f + (1 - keep) * f / factor, 0.1 * math.log(factor) + 1
    if case == "longrope":
        f = f if length is None else f / factor
        a = math.sqrt(1 + math.log(factor) / math.log(trained))
    if case == "llama3":
        smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
        f = smooth * f + (1 - smooth) * f / factor
    if case == "proportional":
        f = np.where(np.arange(WIDTH // 2) < fraction * WIDTH / 2, f / factor, 0)
    return f, a


@pytest.mark.parametrize("theta, trained", [(1e4, 64), (500.0, 300), (1e5, 8192)])
@pytest.mark.parametrize("length", [None, 9000])
@pytest.mark.parametrize("case", [kind(case) for case in CASES])
def test_the_frequencies_are_those_of_the_papers(case, length, theta, trained):
    if case not in ("dynamic", "longrope"):
        length = None
    rule = Rule(case, 4.0, theta, trained, 0.5 if case == "proportional" else 1.0)
    got, factor = rule.frequencies(WIDTH, length, "cpu")
    f, a = by_hand(case, theta, 4.0, trained, length)
    np.testing.assert_allclose(got.double().numpy(), f, rtol=1e-5, atol=0)
    assert factor == pytest.approx(a)


@pytest.mark.parametrize(
    "limit",
    [
        "rope",
        "rope(type=linear)",
        "rope(type=dynamic, factor=4)",
        "rope(type=yarn)",
        "rope(type=longrope)",
        "rope(type=llama3)",
        "rope(type=proportional)",
        "yarn(factor=1)",
        "partial_rope(fraction=1)",
    ],
)
@pytest.mark.parametrize("family", ROTARY)
def test_at_its_identity_limit_the_student_is_the_teacher(family, limit):
    model, ids = plain(family), tokens(2, LENGTH)
    student = swap(model, f"all.rope:{limit}").model
    torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


CALLS = ("rope(type=linear, factor=4)", "rope(type=llama3, factor=8)", "yarn(factor=4)")


@pytest.mark.parametrize("call", [*CALLS, "partial_rope(fraction=0.5)"])
@pytest.mark.parametrize("family", ROTARY)
def test_left_padded_and_fed_in_chunks_it_is_the_row_alone(family, call):
    student = swap(plain(family), f"all:{call}").model
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    alone = student(ids[:1, 7:]).logits
    for size in (20, 6, 1):
        padded = in_chunks(student, ids.masked_fill(mask == 0, 0), size, mask)
        torch.testing.assert_close(padded[:1, 7:], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("call", [*CALLS, "partial_rope(fraction=0.5)"])
def test_beside_the_original_in_parallel(call):
    model, ids = plain("llama"), tokens(2, 20)
    student = swap(model, f"layer1.rope:parallel({call}, alpha=0.5)")
    inputs = {}

    def keep(_module, args, kwargs):
        inputs.update(kwargs)

    handle = part(student).register_forward_pre_hook(keep, with_kwargs=True)
    whole = student.model(ids, use_cache=False).logits
    handle.remove()
    alone = swap(model, f"layer1:{call}")
    got = part(student)(**inputs)[0]
    wanted = model.model.layers[1].self_attn(**inputs)[0] + 0.5 * part(alone)(**inputs)[0]
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(in_chunks(student.model, ids, 6), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt_neox"])
def test_infini_rotates_by_the_new_angles_too(family):
    model, native = born_with(family, "linear, factor=4")
    ids = tokens(2, 20)
    call = "all:infini(segment=8, sinks=2)"
    wanted = swap(native, call).model(ids).logits
    student = swap(model, f"{call}; all:rope(type=linear, factor=4)").model
    torch.testing.assert_close(student(ids).logits, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(in_chunks(student, ids, 6), wanted, atol=1e-4, rtol=0)
    assert (swap(model, call).model(ids).logits - wanted).abs().max() > 1e-2


def test_a_scaling_of_the_model_is_replaced_and_the_plan_says_so():
    model, native = born_with("llama", "llama3, factor=8, theta=500")
    ids = tokens(2, 40)
    student = swap(native, "all:rope(type=linear, factor=4)")
    wanted = swap(model, "all:rope(type=linear, factor=4, theta=500)").model(ids).logits
    torch.testing.assert_close(student.model(ids).logits, wanted, atol=1e-5, rtol=0)
    assert student.plan.clauses[0].notes == (
        "rotary: linear, factor 4, theta 500",
        "replaces the model's own rotary scaling: llama3 (factor 8)",
    )
    # Factor 1 takes the scaling away ...
    plain_rope = swap(model, "all:rope(theta=500)").model(ids).logits
    torch.testing.assert_close(
        swap(native, "all:yarn(factor=1)").model(ids).logits, plain_rope, atol=1e-5, rtol=0
    )
    # ... and partial_rope keeps it.
    kept = swap(native, "all:partial_rope(fraction=1)").model(ids).logits
    assert torch.equal(kept, native(ids).logits)


def test_the_trained_length_of_a_scaled_model_is_that_before_its_scaling():
    own = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = tiny("llama", rope_parameters=own, max_position_embeddings=128)
    notes = swap(model, "layer1:yarn(factor=2)").plan.clauses[0].notes
    assert notes[0] == "rotary: yarn, factor 2, theta 10000, trained length 32"
    notes = swap(model, "layer1:yarn(factor=2, original=50)").plan.clauses[0].notes
    assert notes[0] == "rotary: yarn, factor 2, theta 10000, trained length 50"


def test_a_model_trained_with_longrope_keeps_its_lists():
    own = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 9.0],
        "factor": 4.0,
    }
    model = plain("phi3", rope_parameters=own)
    for length in (20, 90):
        ids = tokens(2, length)
        got = swap(model, "all:rope(type=longrope, factor=4)").model(ids).logits
        torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=0)
    assert (swap(model, "all:rope").model(ids).logits - model(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("call", ["rope(type=dynamic, factor=4)", "rope(type=longrope, factor=4)"])
def test_a_long_text_leaves_nothing_behind(call):
    student = swap(plain("llama"), f"all:{call}").model
    short, middle = tokens(1, 20), tokens(1, 70)
    before = [student(ids).logits for ids in (short, middle)]
    student(tokens(1, 90))
    for ids, wanted in zip((short, middle), before, strict=True):
        assert torch.equal(student(ids).logits, wanted)


def test_each_layer_type_of_gemma3_keeps_its_own_theta():
    student = swap(plain("gemma3"), "all:yarn(factor=4)")
    thetas = [clause.notes[0].split("theta ")[1].split(",")[0] for clause in student.plan.clauses]
    assert thetas == ["10000", "1e+06", "10000"]


def test_in_bfloat16_the_angles_are_rounded_once_and_the_frequencies_never():
    ids = tokens(2, 60)
    for attention in ("llama", "olmo2"):  # olmo2 keeps cos and sin in float32
        seen = {}
        for dtype in (torch.float32, torch.bfloat16):
            student = swap(plain(attention).to(dtype), "layer1:rope(type=linear, factor=4)")

            def keep(_module, args, kwargs, dtype=dtype, seen=seen):
                seen[dtype] = kwargs["position_embeddings"]

            part(student).original.register_forward_pre_hook(keep, with_kwargs=True)
            student.model(ids)
        cos, rounded = seen[torch.float32][0], seen[torch.bfloat16][0]
        assert torch.equal(rounded, cos.to(rounded.dtype))


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("family", [f for f in ROTARY if f not in PARTIAL])
def test_partial_rope_is_proportional_rope_without_a_factor(family, fraction):
    model, ids = plain(family), tokens(2, 20)
    wanted = swap(model, f"all:rope(type=proportional, fraction={fraction})").model(ids).logits
    got = swap(model, f"all:partial_rope(fraction={fraction})").model(ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ROTARY)
def test_partial_rope_without_any_pair_is_nope(family):
    model, ids = plain(family), tokens(2, 20)
    got = swap(model, "all:partial_rope(fraction=0)").model(ids).logits
    assert torch.equal(got, swap(model, "all:nope").model(ids).logits)


def test_partial_rope_written_out_by_complex_numbers():
    """One head, one layer: pair i of q and k turned by p f_i, and only the first half of them."""
    attention = part(swap(plain("llama"), "layer1:partial_rope(fraction=0.5)"))
    x, p = torch.randn(1, 12, 24), torch.arange(12)[None]
    cos, sin = plain("llama").model.rotary_emb(x, p)
    got = attention(
        hidden_states=x, position_embeddings=(cos, sin), attention_mask=None, position_ids=p
    )[0]
    own = attention.original
    q, k, v = (
        proj(x).double().view(12, -1, 8).transpose(0, 1)
        for proj in (own.q_proj, own.k_proj, own.v_proj)
    )
    turn = torch.exp(1j * p[0].double()[:, None] * torch.tensor([1.0, 1e-1, 0.0, 0.0]).double())
    q, k = (torch.complex(y[..., :4], y[..., 4:]) * turn for y in (q, k))
    k, v = (y.repeat_interleave(2, dim=0) for y in (k, v))
    logits = (q @ k.mH).real / math.sqrt(8)
    mask = torch.ones(12, 12).tril().bool()
    heads = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    wanted = own.o_proj(heads.transpose(0, 1).flatten(1).float())
    torch.testing.assert_close(got[0], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("call", [*CALLS, "partial_rope(fraction=0.5)"])
def test_where_there_is_no_rotary_embedding_it_is_refused(call):
    with pytest.raises(SurgeryError, match=r"layer1\.rope: SmolLM3Attention has no rotary embed"):
        swap(tiny("smollm3"), f"layer1:{call}")
    with pytest.raises(SurgeryError, match=r"layer1\.rope: Infini has no rotary embedding"):
        swap(tiny("smollm3"), f"layer1:infini; layer1:{call}")
    with pytest.raises(SpecError, match=r"gpt2 has no slot `rope` \(learned positions\)"):
        swap(tiny("gpt2"), f"layer1:{call}")


@pytest.mark.parametrize(
    "text, words",
    [
        ("rope(type=yarm)", r"`type` must be one of default, .*, got `yarm`[\s\S]*mean `yarn`"),
        ("rope(type=linear, factor=0.5)", r"`factor` must be float >= 1, got 0\.5"),
        ("yarn(factor=0.5)", r"`factor` must be float >= 1, got 0\.5"),
        ("yarn", r"`yarn` needs `factor`: float >= 1"),
        ("partial_rope(fraction=2)", r"`fraction` must be float in 0\.\.1, got 2"),
    ],
)
def test_wrong_arguments_are_refused_by_the_spec(text, words):
    with pytest.raises(SpecError, match=words):
        swap(tiny("llama"), f"layer1:{text}")


@pytest.mark.parametrize(
    "text, words",
    [
        ("factor=4", "type `default` does not use `factor`"),
        ("type=linear, factor=2, original=9", "type `linear` does not use `original`"),
        ("type=yarn, factor=2, fraction=0.5", "type `yarn` does not use `fraction`"),
    ],
)
def test_an_argument_that_the_type_does_not_use_is_refused(text, words):
    with torch.device("meta"):
        model = tiny("llama")
    with pytest.raises(SurgeryError, match=words):
        swap(model, f"layer1:rope({text})")


def test_a_config_without_theta_is_refused():
    model = tiny("llama")
    model.config.rope_parameters = {"rope_type": "default"}
    with pytest.raises(
        SurgeryError, match="layer 1: the config of this llama model names no `rope_"
    ):
        swap(model, "layer1:yarn(factor=4)")


def test_an_attention_called_without_positions_is_refused():
    student = swap(tiny("llama"), "layer1:yarn(factor=4)")
    x = torch.zeros(1, 9, 24)
    with pytest.raises(SurgeryError, match=r"layer1\.rope: .* called without `position_ids`"):
        part(student)(hidden_states=x, position_embeddings=(x, x), attention_mask=None)


def test_positions_that_jump_are_followed():
    """Angles come from the positions of the call, not from a count of tokens."""
    model, ids = plain("llama"), tokens(2, 20)
    mask = torch.ones_like(ids)
    given = {"attention_mask": mask, "position_ids": 2 * positions(mask)}
    student = swap(model, "all:rope(type=linear, factor=2)").model
    torch.testing.assert_close(student(ids, **given).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mixer", ["rwkv", "short_conv", "mamba2"])
def test_over_a_mixer_that_rotates_nothing_it_is_refused(mixer):
    for call in ("nope", "yarn(factor=4)"):
        with pytest.raises(SurgeryError, match="has no rotary embedding to"):
            swap(tiny("llama"), f"layer1:{mixer}; layer1:{call}")
