"""A model while it is measured: alone, in eval mode, and as it was afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import mismatch
from mismatch.forward.measured import lock_of, measured


def model():
    made = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    made.train()
    made[1][1].eval()
    return made


def modes(one):
    return [module.training for module in one.modules()]


def test_every_module_gets_its_mode_back_even_when_it_raises():
    one = model()
    before = modes(one)

    def stopped():
        with measured(one):
            with measured(one, model()):  # inside itself
                assert not any(modes(one))
            assert not any(modes(one))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert modes(one) == before == [True, True, True, True, False]


def test_the_modes_of_the_caller_do_not_reach_inside():
    with torch.inference_mode(), measured():
        weight = torch.ones(2, requires_grad=True)
        assert not weight.is_inference()
        weight.sum().backward()
        assert weight.grad is not None


def test_one_thread_at_a_time_and_two_orders_do_not_lock_each_other():
    first, second = model(), model()
    inside, most = [], []

    def work(*models):
        for _ in range(20):
            with measured(*models):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [
        threading.Thread(target=work, args=pair) for pair in ((first, second), (second, first))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    assert max(most) == 1
    assert modes(first) == modes(second) == [True, True, True, True, False]


def test_a_student_has_the_lock_of_its_teacher(toy_teacher):
    student = mismatch.swap(toy_teacher, "layer2:zero")
    behind = mismatch.swap((student.model, toy_teacher.tokenizer), "layer3:zero")
    assert lock_of(behind.model) is lock_of(student.model) is lock_of(toy_teacher.model)
    assert lock_of(model()) is not lock_of(toy_teacher.model)
