"""Whatever is done to a student, its teacher stays as it is; whatever is done to a teacher, its students do. And `undo`
brings the teacher's bits back."""

from __future__ import annotations

import pytest
import torch
from test_mechanism_contract import CALLS, extras, text  # noqa: F401  (`extras` is a fixture)
from tiny_models import VOCAB, swap, tiny, tokens

IDS = tokens(2, 12)


def trained(model):
    """A few steps on everything, as one trains a swapped model."""
    model.train().requires_grad_(True)
    steps = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        steps.step()
        steps.zero_grad()


def converted(model):
    model.to(torch.bfloat16)


def loaded(model):
    state = model.state_dict()
    model.load_state_dict({name: torch.ones_like(value) for name, value in state.items()})


def assigned(model):
    state = model.state_dict()
    ones = {name: torch.ones_like(value) for name, value in state.items()}
    model.load_state_dict(ones, assign=True)


def resized(model):
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)


def written(model):
    """By every way around autograd and the module."""
    for index, tensor in enumerate([*model.parameters(), *model.buffers()]):
        if not tensor.is_floating_point():
            continue
        if index % 3 == 0:
            tensor.data.view(-1)[0] = 7.0
        elif index % 3 == 1:
            tensor.detach().numpy()[...] = 7.0
        else:
            torch._foreach_mul_([tensor.data], 3.0)


WAYS = (trained, converted, loaded, assigned, resized, written)


def facts(model):
    """All that must not move: every bit, and what a caller set."""
    embedding = model.get_input_embeddings().weight
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        model(IDS, use_cache=False).logits,
        [(p.dtype, p.requires_grad, p.grad is None) for p in model.parameters()],
        (model.config.vocab_size, embedding.shape, model.training, type(model)),
        [name for name, _ in model.named_modules()],
    )


def same(one, other):
    assert one[2:] == other[2:]
    assert torch.equal(one[1], other[1])
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())


@pytest.fixture(scope="module")
def teacher():
    models = {}

    def of(family):
        if family not in models:
            model = tiny(family)
            model.get_input_embeddings().weight.requires_grad_(False)  # half frozen
            models[family] = model, facts(model)
        return models[family]

    return of


CASES = [("llama", name) for name in CALLS] + [
    ("gpt2", name)  # tied weights, Conv1D
    for name in ("infini", "lora", "low_rank_mlp", "parallel", "qlora", "random")
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_whatever_is_done_to_a_student_leaves_the_teacher_alone(teacher, family, name):
    model, before = teacher(family)
    bystander = swap(model, text(name, 1)).model
    beside = facts(bystander)
    for way in WAYS:
        student = swap(model, text(name, 1))
        way(student.model)
        same(facts(model), before)
        student.undo()
        same(facts(student.model), before)
        same(facts(model), before)
    same(facts(bystander), beside)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["lora", "infini", "parallel"])
def test_whatever_is_done_to_a_teacher_leaves_its_students_alone(name, way):
    model = tiny("llama")
    student = swap(model, text(name, 1)).model
    before = facts(student)
    way(model)
    same(facts(student), before)
