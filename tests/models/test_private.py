"""Copies on write: what shares memory, until when, and what cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mismatch
from mismatch.models.private import for_reading, private_copy, same_memory


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight  # tied
        self.one.bias.requires_grad_(False)
        self.register_buffer("table", torch.arange(8.0))
        self.register_buffer("end", self.table[4:])  # a view
        self.one.weight.mark = "theirs"


def shares(tree, other):
    pairs = zip(tree.state_dict().values(), other.state_dict().values(), strict=True)
    return [same_memory(a, b) for a, b in pairs]


def test_a_copy_costs_nothing_and_keeps_what_is_one():
    tree = Tree()
    made = private_copy(tree)
    assert all(shares(tree, made))
    assert made.two.weight is made.one.weight is not tree.one.weight
    assert made.one.weight.mark == "theirs"
    assert [p.requires_grad for p in made.parameters()] == [True, False, True]
    assert made.one.weight.grad_fn is None
    assert made.one.weight.is_leaf
    made.table[5] = 7
    assert made.end[1] == 7
    assert tree.table[5] == 5
    assert shares(tree, made) == [False, False, True, True, True, True]  # buffers come first


def test_views_of_one_memory_are_told_apart():
    table = torch.arange(8.0)
    assert same_memory(table[:4], table[:4])
    assert not same_memory(table[:4], table[4:])
    assert not same_memory(table, table.view(2, 4))
    assert not same_memory(torch.empty(2, device="meta"), torch.empty(2, device="meta"))


@pytest.mark.parametrize("first", [True, False])
def test_only_the_writer_sees_what_it_wrote(first):
    tree = Tree()
    made = private_copy(tree)
    writer, other = (tree, made) if first else (made, tree)
    before = copy.deepcopy(other.state_dict())
    for tensor in [*writer.parameters(), *writer.buffers()]:
        tensor.detach().zero_()
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_weights_over_a_mapped_file_are_moved_once(tmp_path):
    """As transformers loads them. Torch cannot share such memory until it is written to."""
    tree = Tree()
    state = {"one.weight": tree.one.weight, "one.bias": tree.one.bias}
    save_file({name: value.detach() for name, value in state.items()}, tmp_path / "w.safetensors")
    mapped = load_file(tmp_path / "w.safetensors")
    with pytest.raises(RuntimeError):
        torch._lazy_clone(mapped["one.weight"])
    weight = tree.one.weight
    weight.data = mapped["one.weight"]
    made, again = private_copy(tree), private_copy(tree)
    assert tree.one.weight is weight
    assert all(shares(tree, made))
    assert all(shares(made, again))
    made.one.weight.data.zero_()
    assert torch.equal(weight, mapped["one.weight"])
    assert torch.equal(again.one.weight, mapped["one.weight"])


def test_memory_of_several_processes_stays_theirs():
    tree = Tree().share_memory()
    made = private_copy(tree)
    assert all(t.is_shared() for t in tree.state_dict().values())
    assert not any(t.is_shared() for t in made.state_dict().values())
    assert made.two.weight is made.one.weight
    assert torch.equal(made.one.weight, tree.one.weight)


def test_without_values():
    with torch.device("meta"):
        tree = Tree()
    made = private_copy(tree)
    assert all(t.device.type == "meta" for t in made.state_dict().values())
    assert made.one.weight is not tree.one.weight


def test_what_is_read_by_pointer_costs_a_copy_that_does_not_stay():
    tree = Tree()
    made = private_copy(tree)
    assert for_reading(made.one.weight.detach()).numpy().shape == (4, 4)
    assert all(shares(tree, made))
    made.one.weight.detach().numpy()
    assert shares(tree, made) == [True, True, False, True, False, True]
    assert torch.equal(made.one.weight, tree.one.weight)
    plain = torch.ones(2)
    assert for_reading(plain) is plain


def test_a_trace_a_text_and_a_save_copy_no_weight(toy_teacher, tmp_path):
    student = mismatch.swap(toy_teacher, "layer2:infini(segment=16)")
    mismatch.trace(
        toy_teacher, student, data=["a b c d e f g " * 40], tokens=64, seq_len=32, controls=()
    )
    mismatch.generate(student, "The king", max_new_tokens=3)
    student.save(tmp_path / "saved")
    mismatch.load((student.model, student.tokenizer))
    ours = dict(student.model.named_parameters())
    for name, theirs in toy_teacher.model.named_parameters():
        assert same_memory(theirs, ours[name])
