"""A student that begins from the teacher's stream gives what it gives when it runs whole."""

from __future__ import annotations

import pytest
import torch
from asking import student, subjects
from random_models import build

from mismatch.errors import NumericsError, RunError
from mismatch.forward.shared_prefix import finals, run_prefix, run_suffix
from mismatch.models.layout import Layout

SWAPS = (
    "layer2:nope",
    "layer1:infini(segment=8)",
    "layer0.mlp:zero",
    "layer1.block:skip",
    "final_norm:zero",
)


def batch(rows=3, length=20, seed=0):
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("swap", SWAPS)
def test_final_states_are_those_of_whole_forwards(swap):
    model = build("llama")
    made = student(model, swap)
    teacher, other = subjects(model, swap)
    with torch.no_grad():
        got = {s.name: final for s, final in finals([teacher, other], batch())}
        for name, whole in (("teacher", model), ("swap", made.model)):
            wanted = whole.base_model(input_ids=batch(), use_cache=False).last_hidden_state
            assert torch.equal(got[name], wanted), name


def test_infinity_is_named():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(
        NumericsError, match=r"(NaN|infinity) in the teacher's activations: final states"
    ):
        list(finals(subjects(model, "layer1:nope")[:1], batch()))


def test_a_run_goes_on_from_what_another_kept():
    """Streams of two models in one place: the second run begins where the first swapped block stands."""
    model = build("llama")
    teacher, other = Layout.of(model), student(model, "layer1:nope").layout
    with torch.no_grad():
        final, streams = run_prefix(teacher, batch(), {0, 1})
        assert set(streams) == {1}
        assert torch.equal(final, run_suffix(teacher, batch(), 1, streams, "the teacher"))
        whole, streams = run_prefix(other, batch(), {2}, begin=1, streams=streams)
        assert set(streams) == {1, 2}
        assert torch.equal(whole, run_suffix(other, batch(), 2, streams, "the swap"))
        assert torch.equal(whole, run_prefix(other, batch(), ())[0])


def test_a_model_that_changes_its_stream_in_place_is_named():
    model = build("llama")
    made = student(model, "layer1:nope")

    def spoil(_module, args, kwargs):
        (args[0] if args else kwargs["hidden_states"]).add_(1.0)

    block = made.layout.blocks[1]
    handle = block.register_forward_pre_hook(spoil, with_kwargs=True)
    with torch.no_grad():
        _, streams = run_prefix(Layout.of(model), batch(), {1})
        with pytest.raises(
            RunError, match="the swap changed the stream that it was given in place"
        ):
            run_suffix(made.layout, batch(), 1, streams, "the swap")
    handle.remove()
