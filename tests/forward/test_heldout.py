"""Held-out KL: that of whole models, whatever is scored, and the same number in every stage."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from measured import cut, measured, student_of

from mismatch import spec
from mismatch.errors import RunError
from mismatch.forward.heldout import HeldOut, Trial
from mismatch.models.layout import Layout
from mismatch.stages.scan.batches import measure
from mismatch.stages.scan.cells import cells, columns
from mismatch.stages.scan.sweep import Sweep
from mismatch.stages.scan.tasks import text_task
from mismatch.surgery import operate as surgery

SWAP = "infini(segment=8)"


def by_hand(model, other, windows):
    """KL and NLL difference of each token, float64 `windows pos` and `windows pos-1`, from whole logits."""
    ids = torch.from_numpy(windows.ids)
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (model, other))
    column = ids[:, 1:, None]
    nll = (p - q)[:, :-1].gather(-1, column)[..., 0]
    return (p.exp() * (p - q)).sum(-1), nll


@pytest.mark.parametrize("layer", [0, 1])
def test_it_is_that_of_whole_models(family, tiny, layer):
    model, windows = tiny(family), cut()
    student = student_of(model, f"layer{layer}.attn:random")
    found = HeldOut(Layout.of(model), windows, layer, 2).evaluate(student.layout)
    kl, nll = by_hand(model, student.model, windows)
    for got, wanted in ((found.kl, kl), (found.nll, nll)):
        sums = np.bincount(windows.doc, wanted.sum(1).numpy(), windows.n_docs)
        np.testing.assert_allclose(got.sums, sums, rtol=1e-3, atol=1e-5)
        assert got.counts.tolist() == [n * wanted.shape[1] for n in (2, 2, 1, 1)]


def test_every_stage_reads_the_same_bits(tiny):
    """Trace, scan and the text that repair and diagnose evaluate on: one engine, one number."""
    model, windows, layout = tiny("llama"), cut(), Layout.of(tiny("llama"))
    text = f"layer1:{SWAP}"
    found = HeldOut(layout, windows, 1, 2).evaluate(student_of(model, text).layout).kl.mean()
    table, _ = measured(model, text, metrics=("kl",), windows=windows)
    row = table[
        (table["site"] == "logits") & (table["stat"] == "mean") & (table["position"] == "all")
    ]
    assert tuple(row.iloc[0][["value", "lo", "hi", "n", "over"]]) == found
    (cell,) = cells(columns(spec.templates(SWAP), ()), (1,), layout)
    task = text_task(windows)
    sums = measure(Sweep(layout, surgery.blank(layout)), [cell], [task], batch_tokens=48)
    read = sums.damage(cell, task)
    assert (read.value, read.lo, read.hi, read.n, read.over) == found


def test_scored_tokens_are_the_same_for_everybody(tiny):
    model, windows = tiny("llama"), cut(12)
    student = student_of(model, f"layer1:{SWAP}")
    some = HeldOut(Layout.of(model), windows, 1, 3, scored=0.5, seed=4)
    kl, _ = by_hand(model, student.model, windows)
    scored = torch.zeros(windows.ids.shape, dtype=torch.bool)
    for batch in some.batches:
        scored[3 * batch.number : 3 * batch.number + 3].view(-1)[batch.at] = True
    assert 0.3 < scored.double().mean() < 0.7
    assert scored[:, -2].all()
    found = some.evaluate(student.layout).kl
    assert found.n == scored.sum()
    assert found.total == pytest.approx(float(kl[scored].sum()), rel=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_tokens_that_do_not_count_are_not_scored(tiny, share):
    model, windows = tiny("llama"), cut(6)
    counts = np.random.default_rng(0).random(windows.ids.shape) < 0.3
    counts[3] = False
    counts[3, 7] = True  # a window with one token that counts
    some = HeldOut(
        Layout.of(model), dataclasses.replace(windows, scored=counts), 1, 3, scored=share, seed=4
    )
    scored = np.zeros_like(counts)
    for batch in some.batches:
        scored[3 * batch.number : 3 * batch.number + 3].reshape(-1)[batch.at] = True
    assert not scored[~counts].any() and scored.any(1).all()
    assert scored.sum() == counts.sum() if share == 1 else scored.sum() < counts.sum()
    student = student_of(model, f"layer1:{SWAP}")
    kl, _ = by_hand(model, student.model, windows)
    found = some.evaluate(student.layout).kl
    assert found.n == scored.sum()
    assert found.total == pytest.approx(float(kl[torch.from_numpy(scored)].sum()), rel=1e-4)


def test_many_at_once_are_each_alone(tiny):
    model, windows = tiny("llama"), cut()
    held_out = HeldOut(Layout.of(model), windows, 1, 4)
    layouts = {text: student_of(model, f"layer1:{text}").layout for text in (SWAP, "nope", "zero")}
    together = held_out.evaluate_all([Trial(name, layout) for name, layout in layouts.items()])
    for name, layout in layouts.items():
        alone = held_out.evaluate(layout)
        assert np.array_equal(alone.kl.sums, together[name].kl.sums)
        assert np.array_equal(alone.nll.sums, together[name].nll.sums)


def test_the_teacher_itself_reads_nothing_and_what_is_changed_meanwhile_is_changed(tiny):
    model, ran = tiny("llama"), []
    layout = Layout.of(model)
    held_out = HeldOut(layout, cut(), 1, 4, progress=lambda: ran.append(1))

    @contextmanager
    def without_mlp(batch):
        handle = layout.blocks[2].mlp.register_forward_hook(lambda m, a, out: 0 * out)
        yield
        handle.remove()

    found = held_out.evaluate_all([Trial("teacher", layout), Trial("changed", layout, without_mlp)])
    assert found["teacher"].kl.total == found["teacher"].nll.total == 0
    assert found["changed"].kl.total > 0
    assert len(ran) == len(held_out.batches) * 3


def test_a_student_that_changes_the_stream_in_place_is_refused(tiny):
    model = tiny("llama")
    student = student_of(model, "layer1:nope")

    def spoil(_module, args, kwargs):
        (args[0] if args else kwargs["hidden_states"]).add_(1.0)

    handle = student.layout.blocks[1].register_forward_pre_hook(spoil, with_kwargs=True)
    held_out = HeldOut(Layout.of(model), cut(), 1, 2)
    with pytest.raises(RunError, match="changed the stream that it was given in place"):
        held_out.evaluate(student.layout)
    handle.remove()
