"""The paired stream: prefix sharing, forced and free, the floor, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from mismatch import spec
from mismatch.errors import LayoutError, NumericsError, RunError
from mismatch.forward import hooks
from mismatch.forward import verify as probe
from mismatch.forward.paired_sites import Runner, stream
from mismatch.forward.sites import massive, taps
from mismatch.models.layout import Layout
from mismatch.stages.trace.batches import runner_of
from mismatch.surgery import operate as surgery
from mismatch.surgery.operate import placed

IDS = torch.arange(3, 43).reshape(2, 20)


def operate(model, text):
    layout = Layout.of(model)
    parsed = spec.parse(text)
    return surgery.operate(layout, placed(parsed, layout), spec=spec.format(parsed))


def pairs(teacher, runners, **options):
    met = []
    stream(teacher, runners, IDS, met.append, **options)
    return met


def test_free_values_are_those_of_the_whole_student(family, tiny):
    model = tiny(family)
    teacher, student = Layout.of(model), operate(model, "layer1:random")
    met = {(m.mode, m.layer, m.site): m for m in pairs(teacher, [runner_of(student)])}
    for layout, side in ((teacher, "teacher"), (student.layout, "value")):
        whole = {}
        with torch.no_grad():
            wanted = [t for layer in (1, 2) for t in taps(layout, layer)]
            final = hooks.run(layout, IDS, wanted, lambda t, v, w=whole: w.__setitem__(t, v))
        assert torch.equal(getattr(met["free", None, "final"], side), final)
        for tap, value in whole.items():
            assert torch.equal(getattr(met["free", tap.layer, tap.site], side), value)


def test_sites_before_the_swap_never_run(tiny):
    model = tiny("llama")
    met = pairs(Layout.of(model), [runner_of(operate(model, "layer2:zero"))])
    assert {m.layer for m in met} == {2, None}


def test_forced_gives_each_swapped_layer_the_teachers_stream(tiny):
    model = tiny("llama")
    student = operate(model, "layers0-2:random")
    met = pairs(Layout.of(model), [runner_of(student)])
    forced = {(m.layer, m.site): m for m in met if m.mode == "forced"}
    assert {layer for layer, _ in forced} == {0, 1, 2}
    with torch.no_grad():
        for layer in range(3):
            m = forced[layer, "resid_pre"]
            assert torch.equal(m.teacher, m.value)
            block = student.layout.blocks[layer]
            positions = torch.arange(20)[None]
            rope = student.layout.decoder.rotary_emb(m.teacher, position_ids=positions)
            expected = block(m.teacher, position_embeddings=rope, attention_mask=None)
            assert torch.equal(forced[layer, "resid_post"].value, expected)
    free = {(m.layer, m.site): m for m in met if m.mode == "free"}
    assert torch.equal(free[0, "resid_post"].value, forced[0, "resid_post"].value)
    assert not torch.equal(free[2, "resid_post"].value, forced[2, "resid_post"].value)


def test_inside_of_a_replaced_block_is_not_a_site(tiny):
    model = tiny("llama")
    met = pairs(Layout.of(model), [runner_of(operate(model, "layer1:skip"))])
    assert {m.site for m in met if m.layer == 1} == {"resid_pre", "resid_post"}


def test_final_norm_alone(tiny):
    model = tiny("llama")
    student = operate(model, "final_norm:dyt(alpha=0.5)")
    met = pairs(Layout.of(model), [runner_of(student)])
    assert [m.site for m in met] == ["final"]
    with torch.no_grad():
        whole = student.layout.decoder(input_ids=IDS, use_cache=False).last_hidden_state
    assert torch.equal(met[0].value, whole)


def test_floor_runs_a_part_of_the_batch_beside_the_students(tiny):
    model = tiny("llama")
    teacher, student = Layout.of(model), operate(model, "layer2:zero")
    met = pairs(teacher, [runner_of(student), Runner("floor", teacher, 0, crop=(1, 7))])
    floor = [m for m in met if m.student == "floor"]
    assert {m.layer for m in floor} == {0, 1, 2, None}
    assert all(m.value.shape[:2] == m.teacher.shape[:2] == (1, 7) for m in floor)
    assert max(float((m.value - m.teacher).abs().max()) for m in floor) < 1e-5
    assert all(m.value.shape[:2] == (2, 20) for m in met if m.student == "swap")


def test_nan_is_named(tiny):
    model = tiny("llama")
    student = operate(model, "layer1:random")
    with torch.no_grad():
        student.model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError) as caught:
        pairs(Layout.of(model), [runner_of(student)])
    assert caught.value.message == "NaN in the swap's activations: layer 1, attn_out"
    assert caught.value.exit_code == 4


def test_infinity_is_named(tiny):
    model = tiny("llama")
    student = operate(model, "layer2.mlp:random")
    handle = student.model.model.layers[2].mlp.register_forward_hook(
        lambda m, a, out: out + float("inf")
    )
    with pytest.raises(NumericsError, match="infinity in the swap's activations: layer 2, mlp_out"):
        pairs(Layout.of(model), [runner_of(student)])
    handle.remove()


def test_a_stored_value_changed_in_place_is_found(tiny):
    model = tiny("llama")
    student = operate(model, "layer1:zero")
    teacher = Layout.of(model)
    first = []

    def met(meeting):
        if not first:
            first.append(meeting)
            meeting.teacher.add_(1.0)

    with pytest.raises(RunError, match=r"resid_pre of layer 1 was changed in place"):
        stream(teacher, [runner_of(student), runner_of(student)], IDS, met)


def test_a_change_before_the_swap_is_found(tiny):
    model = tiny("llama")
    teacher, student = Layout.of(model), operate(model, "layer2:zero")
    probe.prove_student(teacher, student.layout, 2)
    handle = student.model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: out * 1.5)
    with pytest.raises(
        LayoutError, match="mlp_out of layer 0 changed, although the first swap is at layer 2"
    ):
        probe.prove_student(teacher, student.layout, 2)
    handle.remove()


def test_massive_tokens_are_judged_row_by_row():
    x = torch.ones(2, 8, 4)
    x[0, 3] *= 30
    valid = torch.ones(2, 8, dtype=torch.bool)
    found = massive(x, valid)
    assert found.nonzero().tolist() == [[0, 3]]
    assert torch.equal(massive(x[:1], valid[:1]), found[:1])
