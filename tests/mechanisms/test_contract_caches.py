"""Every mechanism with every cache and every decoding: the text of no cache, or refused at once with a sentence."""

from __future__ import annotations

import functools

import pytest
import torch
from test_mechanism_contract import ATTENTION, CALLS, fits, slot
from tiny_models import FAMILIES, N_LAYERS, swap, tiny, tokens
from transformers import CompileConfig

from mismatch.errors import SurgeryError
from mismatch.mechanisms import MECHANISMS
from mismatch.registry import mechanisms

PROMPT, NEW = 12, 6  # longer together than the windows of the tiny models
LAYERS = {"llama": 1, "gemma3": 0, "gpt2": 0, "gpt_neox": 2, "smollm3": 1, "mistral_window": 2}
WHOLE = (
    "llama",
    "gemma3",
)  # families that try the whole table; the others what their attention can break
STATEFUL = (
    "gated_deltanet", "infini", "kda", "kv_slots", "linear_attention", "mamba", "mamba2", "parallel", "rwkv",
    "short_conv",
)  # fmt: skip
SIDE_BY_SIDE = (
    "attn:parallel(identity, alpha=0.5)",
    "attn:parallel(ring(block=8), alpha=0.5)",
    "attn:parallel(sliding_window(window=5), alpha=0.5)",
    "attn:parallel(parallel(zero, alpha=0.5), alpha=0.5)",
    "block:parallel(linear, alpha=0.5)",
    "block:parallel(skip, alpha=0.5)",
    "mlp:parallel(low_rank_mlp(rank=7), alpha=0.5)",
)
IN_HEADS = (
    "heads[0,1,3]:identity",
    "heads[0,1,3]:infini(segment=8, sinks=2)",
    "kv_heads[1]:sliding_window(window=5, sinks=2, global_every=4)",
    "heads[2,3]:ring(block=8)",
    "heads[0]:parallel(linear_attention(window=5), alpha=0.5)",
)
WITH_SINKS = (
    "attn:sliding_window(window=5, sinks=2, global_every=4)"  # over a window of the model's own too
)
STATIC = {"cache_implementation": "static"}
WAYS = {
    "sampled rows": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    "static, greedy": STATIC,
    "static, sampled rows": STATIC | {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    "static, beams": STATIC | {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "assistant": {"assistant_model": "almost the teacher", "num_assistant_tokens": 4},
}
GUESSING = ("prompt lookup", "assistant")


@pytest.fixture(scope="module")
def teacher():
    """`teacher(family)`: one model per family for the whole file; nothing here changes it."""
    return functools.cache(tiny)


@pytest.fixture(scope="module")
def assistant():
    """`assistant(family)`: guesses that are right now and then."""

    @functools.cache
    def made(family):
        model = tiny(family).requires_grad_(False)
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.03)
        return model

    return made


def prompt(way):
    """Text that repeats itself, so that there is something to look up."""
    half = tokens(1 if way in GUESSING else 2, PROMPT // 2)
    return torch.cat([half, half], dim=1)


def generated(model, way, assistant=None, **more):
    settings = WAYS[way] | more | {"max_new_tokens": NEW, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    if "assistant_model" in settings:
        settings["assistant_model"] = assistant
    torch.manual_seed(0)
    with torch.no_grad():
        return model.generate(prompt(way), **settings)


def check(model, way, assistant=None, **more):
    """What `generate` chose from is what the whole text gives in one call without a cache."""
    out = generated(model, way, assistant, **more)
    with torch.no_grad():
        whole = model(out.sequences, use_cache=False).logits[:, PROMPT - 1 : -1].float()
    if "beams" in way:
        new = out.sequences[:, PROMPT:, None]
        scores = whole.log_softmax(-1).gather(2, new)[..., 0].mean(1)
        torch.testing.assert_close(out.sequences_scores, scores, atol=1e-4, rtol=0)
    else:
        assert whole.shape[1] == NEW
        torch.testing.assert_close(torch.stack(out.logits, 1), whole, atol=1e-3, rtol=0)


def placed(name):
    """A mechanism in each of the slots that the caches pass through."""
    slots = mechanisms().card(name).facts["slots"]
    chosen = [s for s in slots if s in ("attn", "block", "mlp")] or [slot(name)]
    return chosen if name != "parallel" else ["attn"]


def cases():
    yield from (("llama", text) for text in SIDE_BY_SIDE)
    yield from (("gemma3", text) for text in SIDE_BY_SIDE)
    for family in ("llama", "gemma3", "gpt2"):
        yield from ((family, text) for text in IN_HEADS)
    for family, layer in LAYERS.items():
        yield family, WITH_SINKS
        for name in CALLS:
            if (family in WHOLE or name in ATTENTION) and fits(family, name, layer):
                slots = placed(name) if family == "llama" else placed(name)[:1]
                yield from ((family, f"{where}:{CALLS[name]}") for where in slots)


def keeps_a_state(text):
    name = text.split(":")[1].split("(")[0]
    return name in STATEFUL and text not in SIDE_BY_SIDE


@pytest.mark.parametrize(
    "family, text", [pytest.param(*case, id="-".join(case)) for case in cases()]
)
def test_with_a_cache_it_is_what_it_is_without_or_refused_at_once(teacher, assistant, family, text):
    if "qlora" in text or "quantized" in text:
        pytest.importorskip("bitsandbytes")
    model = swap(teacher(family), f"layer{LAYERS[family]}.{text}").model
    for way in WAYS:
        if way not in GUESSING or not keeps_a_state(text):
            check(model, way, assistant(family))
            continue
        calls = []
        handle = model.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        with pytest.raises(SurgeryError, match="no token can be taken back out of a state") as got:
            generated(model, way, assistant(family))
        handle.remove()
        assert len(calls) == 1  # not at the first guess that is wrong
        assert "without assistant_model and prompt_lookup_num_tokens" in str(got.value.hint)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_student_that_keeps_a_state_refuses_to_guess_for_another(teacher, name):
    student = swap(teacher("llama"), f"layer1:{CALLS[name]}").model
    with pytest.raises(SurgeryError, match="no token can be taken back out of a state"):
        generated(teacher("llama"), "assistant", student)


@pytest.mark.parametrize("where", ["attn", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_beside_nothing_the_text_from_a_static_cache_is_the_teachers(teacher, family, where):
    model = teacher(family)
    inner = "infini(segment=8)" if where == "attn" else "linear"
    for layer in range(N_LAYERS):
        student = swap(model, f"layer{layer}.{where}:parallel({inner}, alpha=0)").model
        for way in ("static, greedy", "static, beams"):
            got, wanted = generated(student, way), generated(model, way)
            assert torch.equal(got.sequences, wanted.sequences)
            assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))


@pytest.mark.parametrize("text", ["attn:parallel(infini(segment=8))", "block:parallel(identity)"])
def test_beside_nothing_the_text_from_a_quantised_cache_is_the_teachers(teacher, text):
    model = teacher("llama")
    student = swap(model, f"layer1.{text}").model
    cache = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    got, wanted = (generated(m, "sampled rows", **cache) for m in (student, model))
    assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))


def test_the_second_path_gets_the_cache_that_the_model_was_given(teacher):
    """With its class and with what it does besides keeping, such as offloading."""
    student = swap(teacher("llama"), "layer1:parallel(identity, alpha=0.5)").model
    seen = []
    for path in student.model.layers[1].self_attn.children():
        path.register_forward_pre_hook(
            lambda *call: seen.append(call[-1]["past_key_values"]), with_kwargs=True
        )
    generated(student, "static, greedy")
    assert {type(cache).__name__ for cache in seen} == {"StaticCache"}
    assert all(hasattr(cache, "offloading") for cache in seen)


@pytest.mark.parametrize("name", ["gated_deltanet", "short_conv"])
def test_a_mixer_compiles(name):
    model, ids = tiny("llama", num_hidden_layers=1), tokens(2, 9)
    mixer = swap(model, f"layer0:{name}").model
    with torch.no_grad():
        compiled = torch.compile(mixer, backend="eager")
        got = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(got, mixer(ids, use_cache=False).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at inputs
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", sorted({*MECHANISMS} - {"qlora", "quantized"}))
def test_compiled_it_is_itself_with_its_gradients_and_in_pieces(name, backend):
    torch.compiler.reset()
    model = tiny("llama", num_hidden_layers=1).requires_grad_(True)
    student, ids = swap(model, f"layer0:{CALLS[name]}").model, tokens(2, 12)
    compiled = torch.compile(student, backend=backend)
    grads = []
    for run in (student, compiled):
        student.zero_grad()
        out = run(ids, use_cache=False).logits
        out.pow(2).mean().backward()
        grads.append((out, [p.grad for p in student.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-3)
    compiling = CompileConfig(backend=backend, mode=None)
    compiling._compile_all_devices = True  # transformers compiles on a GPU alone by itself
    student.requires_grad_(False)
    check(student, "static, greedy", compile_config=compiling)
