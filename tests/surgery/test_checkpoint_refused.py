"""Checkpoints that are refused, and what saving leaves behind when it fails."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import mismatch
from mismatch.errors import MismatchError, ModelError, OutputError, RunError, SurgeryError
from mismatch.models import swap_record as record
from mismatch.surgery import loading as checkpoint
from mismatch.surgery import saving

IDS = torch.arange(3, 43).reshape(2, 20)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def edited(folder, **changes):
    """The record in config.json, changed."""
    config = json.loads((folder / "config.json").read_text())
    config["mismatch"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors(folder, change):
    """The weights, changed in place by `change(dict)`."""
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def refused(folder, **options):
    with pytest.raises(MismatchError) as caught:
        mismatch.load(folder, **options)
    return caught.value


def test_another_format(saved_copy):
    error = refused(edited(saved_copy, format=2, version="9.1"))
    assert isinstance(error, ModelError)
    assert str(error) == (
        f"{saved_copy} is a checkpoint of format 2, written by mismatch 9.1; this is mismatch "
        f"{mismatch.__version__}, which reads format 1\n\nhint: load it with the version that wrote it"
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"swaps": []}, "it names no swap"),
        (
            {"swaps": [{"swap": "all:zero"}]},
            "in its `mismatch` entry `swaps[0].seed` is missing",
        ),
        ({"shared": None}, "in its `mismatch` entry `shared` must be dict, got None"),
    ],
)
def test_a_broken_record(saved_copy, change, what):
    assert f"{saved_copy} is not a whole checkpoint: {what}" in str(
        refused(edited(saved_copy, **change))
    )


def test_no_record_at_all(saved_copy):
    config = json.loads((saved_copy / "config.json").read_text())
    del config["mismatch"]
    (saved_copy / "config.json").write_text(json.dumps(config))
    assert "config.json has no `mismatch` entry with a format" in str(refused(saved_copy))


def test_an_unknown_mechanism(saved_copy):
    error = refused(edited(saved_copy, swaps=[{"swap": "layer1:infinit(segment=8)", "seed": 0}]))
    assert str(error).startswith(
        f"{saved_copy}: its swap cannot be made again: unknown mechanism `infinit`\n  layer1:infinit(segment=8)\n"
        "         ^\n\nhint: it was written by mismatch "
    )


def test_a_swap_that_does_not_fit(saved_copy):
    error = refused(edited(saved_copy, swaps=[{"swap": "layer9:zero", "seed": 0}]))
    assert "its swap cannot be made again: layer 9 does not exist" in str(error)


def test_a_class_named_by_its_module_wants_trust(saved_copy):
    edited(saved_copy, swaps=[{"swap": "layer1:parallel(some_package.part:Evil)", "seed": 0}])
    error = refused(saved_copy)
    assert str(error) == (
        f"{saved_copy}: its swap needs `some_package.part:Evil`, a class that is not mismatch's own; importing it "
        "runs its code, which is off\n\nhint: read that code first, then --trust-remote-code "
        "(in Python: trust_remote_code=True)"
    )
    assert "cannot be made again" in str(refused(saved_copy, trust_remote_code=True))


def test_no_tokenizer(saved_copy):
    (saved_copy / "tokenizer.json").unlink()
    (saved_copy / "tokenizer_config.json").unlink()
    assert "has no tokenizer that can be loaded" in str(refused(saved_copy))


def test_no_weights(saved_copy):
    (saved_copy / "model.safetensors").unlink()
    assert "has a config but no weights" in str(refused(saved_copy))


def test_a_truncated_file(saved_copy):
    path = saved_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert "is truncated" in str(refused(saved_copy))


def test_tensors_that_are_missing(saved_copy):
    names = ["model.layers.1.self_attn.gate", "model.layers.0.mlp.up_proj.weight"]
    tensors(saved_copy, lambda held: [held.pop(name) for name in names])
    error = refused(saved_copy)
    assert str(error).startswith(
        f"{saved_copy}: 2 tensors are not in its weights, first model.layers.0.mlp.up_proj.weight\n\n"
        "hint: the folder is not as student.save() wrote it, or another version of mismatch builds"
    )


def test_tensors_that_belong_nowhere(saved_copy):
    tensors(saved_copy, lambda held: held.update(other=torch.zeros(2)))
    assert "1 tensors belong to no module of it, first other" in str(refused(saved_copy))


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.gate", "model.layers.0.mlp.up_proj.weight"]
)
def test_tensors_of_another_shape(saved_copy, name, remote_code):
    tensors(saved_copy, lambda held: held.update({name: torch.zeros(3)}))
    assert f"1 tensors have another shape than its modules, first {name}" in str(
        refused(saved_copy)
    )
    with pytest.raises(ModelError, match="have another shape"):
        AutoModelForCausalLM.from_pretrained(saved_copy, **remote_code)


def test_a_second_name_of_nothing(saved_copy):
    shared = {**record.read(saved_copy).shared, "model.nothing": "model.embed_tokens.weight"}
    assert "belong to no module of it, first model.nothing" in str(
        refused(edited(saved_copy, shared=shared))
    )


def test_code_of_a_plain_folder(toy_folder):
    with pytest.raises(ModelError, match="is not a checkpoint of mismatch"):
        checkpoint.MismatchForCausalLM.from_pretrained(toy_folder)


# Writing


def test_nothing_is_overwritten_unasked(swapped_toy, saved_toy, tmp_path):
    with pytest.raises(OutputError) as caught:
        swapped_toy.save(saved_toy)
    assert str(caught.value) == (
        f"the folder {saved_toy} exists and is not empty\n\n"
        "hint: give another path, or overwrite=True to replace the checkpoint in it"
    )
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        swapped_toy.save(tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="is not a checkpoint of mismatch and is not overwritten"):
        swapped_toy.save(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"


def test_overwrite_replaces_all_of_an_older_checkpoint(toy_teacher, saved_copy):
    student = mismatch.swap(toy_teacher, "layer3:nope")
    student.save(saved_copy, overwrite=True)
    assert not (saved_copy / "mismatch.json").exists()
    assert torch.equal(logits(mismatch.load(saved_copy).model), logits(student.model))
    assert [path.name for path in saved_copy.parent.iterdir() if path.name.startswith(".")] == []


def test_an_empty_folder_is_taken(toy_teacher, tmp_path):
    (tmp_path / "empty").mkdir()
    mismatch.swap(toy_teacher, "layer3:nope").save(tmp_path / "empty")
    assert (tmp_path / "empty/config.json").exists()


@pytest.mark.parametrize("at", ["save_file", "write_atomic"])
def test_a_save_that_fails_leaves_what_was_there(swapped_toy, saved_copy, monkeypatch, at):
    def full(*args, **kwargs):
        if at == "write_atomic":
            raise OSError(28, "No space left on device")
        raise SafetensorError("Error while serializing: I/O error: ... (os error 28)")

    before = {path.name: path.read_bytes() for path in saved_copy.iterdir()}
    monkeypatch.setattr(saving, at, full)
    for path, options in ((saved_copy, {"overwrite": True}), (saved_copy.parent / "new", {})):
        with pytest.raises(RunError, match="No space left on device"):
            swapped_toy.save(path, **options)
    assert {path.name: path.read_bytes() for path in saved_copy.iterdir()} == before
    assert [path.name for path in saved_copy.parent.iterdir()] == [saved_copy.name]


def test_a_state_that_is_no_tensor_is_refused(toy_teacher, tmp_path):
    class Stateful(nn.Identity):
        def get_extra_state(self):
            return {"step": 3}

    student = mismatch.swap(toy_teacher, "layer3:nope")
    student.model.model.layers[3].self_attn.memory = Stateful()
    with pytest.raises(SurgeryError, match="is not a tensor but dict: safetensors cannot hold it"):
        student.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
