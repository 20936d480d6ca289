"""Surgery: what is shared, what is replaced, what comes back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from mismatch import spec
from mismatch.errors import SpecError, SurgeryError
from mismatch.models.layout import Layout
from mismatch.models.private import same_memory
from mismatch.surgery import operate as surgery
from mismatch.surgery.operate import placed

IDS = torch.arange(3, 43).reshape(2, 20)


def operate(model, text, **options):
    layout = Layout.of(model)
    parsed = spec.parse(text)
    return surgery.operate(layout, placed(parsed, layout), spec=spec.format(parsed), **options)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_no_weight_exists_twice_and_undo_restores_every_bit(family, tiny):
    model = tiny(family)
    before = logits(model)
    names = [name for name, _ in model.named_parameters()]
    student = operate(model, "layer1:zero; layer2.mlp:zero")
    assert not torch.equal(logits(student.model), before)
    assert torch.equal(logits(model), before)
    theirs = dict(model.named_parameters())
    for name, own in student.model.named_parameters():
        name = name.replace("original.", "")
        assert own is not theirs[name]
        assert same_memory(own, theirs[name])
    student.undo()
    assert torch.equal(logits(student.model), before)
    assert [name for name, _ in student.model.named_parameters()] == names
    assert student.plan.clauses == ()


def test_identity_everywhere_changes_nothing(family, tiny):
    model = tiny(family)
    student = operate(model, "all.attn:identity; all.mlp:identity; norms:identity")
    assert torch.equal(logits(student.model), logits(model))


def test_plan_names_inherited_new_and_dropped(tiny):
    model = tiny("llama")
    student = operate(model, "layer1:random")
    clause = student.plan.clauses[0]
    sizes = {name: p.numel() for name, p in model.model.layers[1].self_attn.named_parameters()}
    assert clause.path == "model.layers.1.self_attn"
    assert (clause.old, clause.inherited) == ("LlamaAttention", {})
    assert clause.dropped == sizes
    assert sum(clause.new_parameters.values()) == sum(sizes.values())
    kept = operate(model, "layer1:zero").plan.clauses[0]
    assert (kept.inherited, kept.new_parameters, kept.dropped) == (sizes, {}, {})


def test_student_keeps_its_own_config(tiny):
    model = tiny("llama")
    student = operate(model, "layer1:zero")
    before = model.config.use_cache
    student.model.config.use_cache = not before
    assert model.config.use_cache is before


def test_two_builds_with_one_seed_are_equal(tiny):
    model = tiny("llama")
    first, second, other = (operate(model, "layer1:random", seed=s) for s in (0, 0, 1))
    assert torch.equal(logits(first.model), logits(second.model))
    assert not torch.equal(logits(first.model), logits(other.model))


def test_padding_reaches_the_swapped_part(tiny):
    model = tiny("llama")
    student = operate(model, "layer1:sliding_window(window=4, sinks=1)")
    alone = student.model(IDS[:1], use_cache=False).logits[0]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), IDS[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 20, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = student.model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(out[0, 5:], alone, atol=1e-4, rtol=1e-4)


def test_layer_that_does_not_exist(tiny):
    with pytest.raises(SpecError, match="layer 40 does not exist: the model has 3 layers"):
        operate(tiny("llama"), "layer40:zero")


def test_a_mechanism_that_fails_is_named_with_its_place(tiny, monkeypatch):
    from mismatch.mechanisms import zero

    def broken(self, *args):
        raise ValueError("no room")

    monkeypatch.setattr(zero.Zero, "__init__", broken)
    with pytest.raises(SurgeryError) as caught:
        operate(tiny("llama"), "layer1:zero")
    assert str(caught.value) == (
        "`zero` at layer 1 `attn` could not be built from LlamaAttention: ValueError: no room"
    )


def test_a_mechanism_that_wants_calibration_asks_for_it(tiny):
    with pytest.raises(SurgeryError, match="built from a calibration pass"):
        operate(tiny("llama"), "layer1:mean")


def test_the_model_of_a_student_does_not_keep_its_teacher(tiny):
    """A checkpoint is a swap over a model that nobody wants any more."""
    teacher = tiny("llama")
    student = operate(teacher, "layer1:parallel(infini(segment=4)); layer2.mlp:zero")
    kept, gone = student.model, weakref.ref(teacher)
    del teacher, student
    gc.collect()
    assert gone() is None
    assert kept(IDS).logits.isfinite().all()
