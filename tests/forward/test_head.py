"""The head in chunks gives what whole logits give."""

from __future__ import annotations

import pytest
import torch
from asking import log_softmax, subjects
from random_models import build

from mismatch.forward.head import CHUNK, Predictions, chunk_of, compare, log_probs, scores
from mismatch.forward.shared_prefix import finals
from mismatch.metrics.sums.logits import LogitPair, kl_float64, kl_per_token
from mismatch.models.layout import Layout


def batch(rows=3, length=20, seed=0):
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_log_probs_are_those_of_the_model(family):
    model = build(family)
    subject = subjects(model, "layer1.attn:identity")[0]
    with torch.no_grad():
        (_, final), *_ = finals([subject], batch())
        got = log_probs(subject.layout, final)
    assert torch.allclose(got.double(), log_softmax(model, batch()), atol=1e-5)


def test_scores(family):
    model = build(family)
    ids, scored = batch(), torch.zeros(3, 20, dtype=torch.bool)
    scored[0, 1] = scored[1, [5, 19]] = scored[2, 7] = True
    subject = subjects(model, "layer1.attn:identity")[0]
    with torch.no_grad():
        (_, final), *_ = finals([subject], ids)
        value, right = scores(subject.layout, final, ids, scored)
    plain = log_softmax(model, ids)
    for row, at in scored.nonzero().tolist():
        wanted = plain[row, at - 1]
        assert float(value[row, at]) == pytest.approx(float(wanted[ids[row, at]]), abs=1e-5)
        assert bool(right[row, at]) == (int(wanted.argmax()) == int(ids[row, at]))
    assert (value[~scored] == 0).all() and right[~scored].all()


def test_kl_is_that_of_torch():
    p, q = (torch.randn(5, 31, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    wanted = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(kl_float64(p, q), wanted, rtol=1e-10)
    assert (kl_float64(p, p) == 0).all()


def test_the_two_kl_are_one():
    p, q = (torch.randn(70, 31).log_softmax(-1) for _ in range(2))
    assert torch.allclose(kl_per_token(p, q).double(), kl_float64(p, q), rtol=1e-5)
    none = torch.zeros(70, dtype=torch.long)
    assert torch.equal(kl_per_token(p, q), LogitPair(p, q, none, none, none).kl)


def test_a_token_that_is_ruled_out_costs_nothing():
    p, q = torch.randn(5, 31, dtype=torch.float64), torch.randn(5, 31, dtype=torch.float64)
    p[:, 7] = q[:, 7] = -torch.inf
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    rest = [i for i in range(31) if i != 7]
    assert torch.allclose(kl_float64(p, q), kl_float64(p[:, rest], q[:, rest]))


def test_predictions_say_what_follows_and_whose_it_is():
    ids, docs = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([4, 2])
    told = Predictions.of(ids, docs)
    assert told.targets.tolist() == [6, 7, -1, 9, 10, -1]
    assert told.docs.tolist() == [4, 4, 4, 2, 2, 2]
    assert told.positions.tolist() == [0, 1, 2, 0, 1, 2]
    some = Predictions.of(ids, docs, torch.tensor([1, 5]))
    assert (some.targets.tolist(), some.docs.tolist()) == ([7, -1], [4, 2])
    assert told[3:].positions.tolist() == [0, 1, 2]


def test_every_student_meets_every_chunk_of_the_teacher():
    """More tokens than a chunk; the pairs put together are those of whole logits."""
    model = build("llama")
    teacher, *students = subjects(model, "layer1:nope", ("zero",))
    ids = torch.randint(3, 101, (2, CHUNK), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = {
            s.name: (s.layout, final.flatten(0, 1))
            for s, final in finals([teacher, *students], ids)
        }
        _, reference = states.pop("teacher")
        given = [(name, *state) for name, state in states.items()]
        told = Predictions.of(ids, torch.tensor([0, 1]))
        pairs = list(compare(teacher.layout, reference, given, told))
        assert [name for name, _ in pairs] == [*states] * 2
        for name, (layout, final) in states.items():
            mine = [pair for known, pair in pairs if known == name]
            assert mine[0].teacher.data_ptr() == pairs[0][1].teacher.data_ptr()
            assert torch.equal(torch.cat([p.targets for p in mine]), told.targets)
            q, p = log_probs(layout, final), log_probs(teacher.layout, reference)
            kl = torch.cat([pair.kl for pair in mine])
            assert torch.allclose(kl, kl_per_token(p, q), rtol=1e-4, atol=1e-7)
        assert list(compare(teacher.layout, reference, [], told)) == []


def test_a_pair_in_parts_is_the_pair():
    p, q = (torch.randn(12, 31).log_softmax(-1) for _ in range(2))
    facts = [torch.arange(12) + i for i in range(3)]
    parts = LogitPair(p, q, *facts).split(4)
    assert torch.equal(torch.cat([part.kl for part in parts]), kl_per_token(p, q))
    assert torch.equal(torch.cat([part.docs for part in parts]), facts[1])


def test_a_large_vocabulary_goes_through_the_head_in_smaller_chunks(tiny):
    small, large = (Layout.of(tiny("llama", vocab_size=n)) for n in (101, 2**19))
    assert (chunk_of(small), chunk_of(large)) == (128, 32)
