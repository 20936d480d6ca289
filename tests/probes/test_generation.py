"""Greedy continuations: as `generate` writes them; where two texts part, and what is said there."""

from __future__ import annotations

import pytest
import torch
from asking import readings, setting, student, subjects
from random_models import build
from torch.nn import functional as F

from mismatch.probes.base import Subject
from mismatch.probes.generation import NEW, PROMPT, Generation, _compared, greedy


@pytest.mark.parametrize(
    "swap", ["layer1:infini(segment=8)", "layer0:infini(segment=8)", "layer1:nope"]
)
def test_greedy_is_what_generate_writes(swap):
    model = build("llama", eos_token_id=None)
    made = student(model, swap)
    ids = torch.randint(3, 101, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = greedy(Subject.of(made), ids)
        whole = made.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
        )
    assert torch.equal(got, whole[:, PROMPT:])


def test_readings_by_hand():
    model = build("llama")
    made = student(model, "layer1.attn:random")
    probe = Generation(setting())
    answers = probe.run([subjects(model, "layer1:nope")[0], Subject.of(made)])
    got, ids = readings(answers), torch.from_numpy(probe.ids)
    ours = theirs = ids
    for _ in range(NEW):  # without a cache
        with torch.no_grad():
            a, b = model(ours).logits[:, -1], made.model(theirs).logits[:, -1]
        ours = torch.cat([ours, a.argmax(-1, keepdim=True)], 1)
        theirs = torch.cat([theirs, b.argmax(-1, keepdim=True)], 1)
    agreed, apart = [], []
    for row in range(len(ids)):
        same = (ours[row, PROMPT:] == theirs[row, PROMPT:]).tolist()
        agreed.append(same.index(False))
        common = ours[row : row + 1, : PROMPT + agreed[-1]]
        with torch.no_grad():
            p = model(common).logits[0, -1].double().log_softmax(-1)
            q = made.model(common).logits[0, -1].double().log_softmax(-1)
        apart.append(float(F.kl_div(q, p, log_target=True, reduction="sum")))
    assert got["agreed"].value() == sum(agreed) / 4
    assert got["kl_there"].value() == pytest.approx(sum(apart) / 4, rel=1e-4)
    assert got["rank_there"].value() >= 1
    same = (ours == theirs)[:, PROMPT:].double().mean()
    assert got["same"].value() == pytest.approx(float(same), rel=1e-12)


def test_the_teacher_agrees_with_itself_to_the_end():
    answers = Generation(setting()).run(subjects(build("llama"), "layer1.attn:identity"))
    for name in ("teacher", "swap"):
        got = readings(answers, name)
        assert (got["agreed"].value(), got["same"].value()) == (NEW, 1.0)
        assert got["kl_there"].n == 0  # they never part


def test_numbers_of_two_texts():
    ours = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 1, 2, 1, 2]])
    theirs = torch.tensor([[1, 2, 9, 4, 9, 9], [1, 2, 1, 2, 1, 2]])
    said = torch.zeros(2, 6, 12)
    said[0, 2, 3], said[0, 2, 7] = 5.0, 4.0  # the teacher holds 3 and 7 likelier than 9
    said[0, 2, 9] = 3.0
    got = _compared(ours, theirs, said.log_softmax(-1), said.log_softmax(-1))
    assert got["agreed"].tolist() == [2, 6]
    assert got["differs"].tolist() == [1, 0]
    assert got["same"].tolist() == [0.5, 1.0]
    assert got["rank_there"][0] == 2
    assert got["repeats"].tolist() == pytest.approx([0.0, 1 - 2 / 3])  # 1212, 2121, 1212
    assert got["kl_there"][0] == 0
