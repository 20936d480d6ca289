"""Raw hooks and nnsight see the same values, bit for bit, whatever was swapped; and the transformers' own do not."""

from __future__ import annotations

import pytest
import torch

from mismatch import spec
from mismatch.forward import hooks
from mismatch.forward.sites import taps
from mismatch.models.layout import Layout
from mismatch.surgery import operate as surgery
from mismatch.surgery.operate import placed

IDS = torch.arange(3, 43).reshape(2, 20)
SWAPS = [
    "layer1:zero",  # attention
    "layer1.mlp:random",
    "layer1:skip",  # the whole block
    "layer1:parallel(zero, alpha=0.5)",  # a wrapper around the old module
    "layer0:infini(segment=8); layer2:sliding_window(window=4)",  # two layers at once
    "norms:dyt(alpha=0.5)",
    "layer1:nope",
]


def student_of(model, text):
    layout = Layout.of(model)
    parsed = spec.parse(text)
    return surgery.operate(layout, placed(parsed, layout), spec=spec.format(parsed))


def record(run, layout, whole, **options):
    first, last = options.get("start", 0), options.get("stop") or layout.n_layers
    seen = {}
    wanted = [
        t for layer in range(first, last) for t in taps(layout, layer, inner=layer not in whole)
    ]
    with torch.no_grad():
        final = run(
            layout, IDS, wanted, lambda tap, value: seen.__setitem__(tap, value.clone()), **options
        )
    assert list(seen) == wanted
    return seen, final


@pytest.mark.parametrize("text", SWAPS)
def test_nnsight_and_hooks_are_bit_equal(tiny, text):
    from mismatch.forward import nnsight_backend

    model = tiny("llama")
    student = student_of(model, text)
    whole = student.whole_blocks()
    ours, our_final = record(hooks.run, student.layout, whole)
    before = [set(vars(module)) for module in student.model.modules()]
    theirs, their_final = record(nnsight_backend.run, student.layout, whole)
    assert [set(vars(module)) for module in student.model.modules()] == before
    assert torch.equal(our_final, their_final)
    assert all(torch.equal(ours[tap], theirs[tap]) for tap in ours)
    stream = ours[next(t for t in ours if t.layer == 0 and t.site == "resid_post")]
    options = {"start": 1, "stop": 2, "stream": stream}
    ours, _ = record(hooks.run, student.layout, whole, **options)
    theirs, _ = record(nnsight_backend.run, student.layout, whole, **options)
    assert all(torch.equal(ours[tap], theirs[tap]) for tap in ours)


def test_suffix_is_bit_equal_and_leaves_no_trace(family, tiny):
    layout = Layout.of(tiny(family))
    whole, final = record(hooks.run, layout, ())
    stream = whole[next(t for t in whole if t.layer == 1 and t.site == "resid_post")]
    suffix, again = record(hooks.run, layout, (), start=2, stream=stream)
    assert torch.equal(final, again)
    assert all(torch.equal(whole[tap], suffix[tap]) for tap in suffix)
    assert all("forward" not in block.__dict__ for block in layout.blocks)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in layout.model.modules())


def test_hooks_are_gone_after_an_error(tiny):
    layout = Layout.of(tiny("llama"))

    def fail(tap, value):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        hooks.run(layout, IDS, taps(layout, 1), fail)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in layout.model.modules())


def test_output_hidden_states_of_transformers_is_wrong_after_surgery(tiny):
    """Why it is never used: entries go missing without a warning. Ours are complete."""
    student = student_of(tiny("llama"), "layer1:zero")
    whole = student.model.model
    assert len(whole(IDS, output_hidden_states=True).hidden_states) == 4

    class Foreign(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    whole.layers[1] = Foreign()
    assert len(whole(IDS, output_hidden_states=True).hidden_states) == 3  # one is silently lost
    seen, _ = record(hooks.run, student.layout, {1})
    assert {t.layer for t in seen if t.site == "resid_post"} == {0, 1, 2}


def test_swapped_model_opens_in_nnsight(toy):
    import mismatch

    teacher = mismatch.load((toy.model, toy.tokenizer))
    student = mismatch.swap(teacher, "layer1:zero")
    opened = mismatch.open_nnsight(student)
    with torch.no_grad(), opened.trace("Alice was beginning"):
        out = opened.model.layers[1].self_attn.output[0].save()
    assert torch.count_nonzero(out) == 0
