"""Weights on disk or in host memory (accelerate): every stage reads what it reads of the whole model, or refuses."""

from __future__ import annotations

import json

import accelerate
import pytest
import torch
from wonderland import documents, jsonl

import mismatch
from mismatch import cli
from mismatch.errors import ModelError, SurgeryError, UsageError
from mismatch.models import load as models
from mismatch.models.offloaded import maps, offloaded, value_of
from mismatch.models.target import as_map
from mismatch.runs.folder import load_run

SWAP, MECHANISM = "layer2:infini(segment=16)", "gqa(groups=1)"
TEXTS = {
    "data": documents(8), "calibration_data": documents(6, seed=1), "calibration_tokens": 256,
    "seq_len": 64,
}  # fmt: skip
STAGES = {
    "trace": (SWAP, {"tokens": 256}),
    "probe": (
        SWAP,
        {"probes": ("heads", "induction", "memory"), "samples": 4, "seq_len": 48, "controls": ()},
    ),
    "scan": (MECHANISM, {"tokens": 256, "tasks": ("text",), "controls": ("mean",), "among": "1,2"}),
    "plan": (
        MECHANISM,
        {"tokens": 128, "layers": 1, "selection_tokens": 256, "length": 64, "samples": 4},
    ),
    "diagnose": (SWAP, {"tokens": 512, "fit_tokens": 512, "controls": ()}),
}
PLACES = {
    **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
    **{f"model.layers.{at}": "disk" if at >= 2 else "cpu" for at in range(4)},
}


@pytest.fixture(scope="module")
def on_disk(toy_folder):
    return mismatch.load(toy_folder, device_map=PLACES)


def run(teacher, name: str):
    what, own = STAGES[name]
    return getattr(mismatch, name)(teacher, what, **{**TEXTS, **own}).table.drop(columns="run_id")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow if one == "plan" else ()) for one in STAGES]
)
def test_the_numbers_are_those_of_the_whole_model(name, on_disk, toy_teacher):
    assert "model.layers.2.self_attn.q_proj.weight" in offloaded(on_disk.model)
    assert run(on_disk, name).equals(run(toy_teacher, name))
    assert "model.layers.2.self_attn.q_proj.weight" in offloaded(on_disk.model)


def test_host_memory_is_not_copied(toy_folder):
    """Weights that wait in host memory are there once, however many students read them."""
    teacher = mismatch.load(toy_folder, device="cpu")
    wanted = mismatch.trace(teacher, SWAP, tokens=128, **TEXTS).table
    accelerate.cpu_offload(teacher.model, execution_device=torch.device("cpu"))
    student = mismatch.swap(teacher, SWAP)
    ours, theirs = ({id(one) for one in maps(m)} for m in (student.model, teacher.model))
    assert ours == theirs and len(theirs) > 0
    assert mismatch.trace(teacher, SWAP, tokens=128, **TEXTS).table.equals(wanted)


def test_values_that_are_elsewhere(on_disk, toy_teacher):
    ours, theirs = (t.layout.blocks[2].self_attn.o_proj for t in (on_disk, toy_teacher))
    assert ours.weight.is_meta
    assert torch.equal(value_of(ours, "weight"), theirs.weight)
    assert value_of(theirs, "weight") is theirs.weight


def words(folder, model, command: str, *more: str) -> list[str]:
    held_out = jsonl(folder / "held_out.jsonl", documents(8))
    others = jsonl(folder / "others.jsonl", documents(12, seed=1))
    text = "--train-data" if command == "repair" else "--calibration-data"
    return [
        *(command, "--model", str(model), "--swap", SWAP, "--data", str(held_out)),
        *(text, str(others), "--seq-len", "64", "--tokens", "256"),
        *("--device-map", json.dumps(PLACES), *more),
    ]


def test_a_map_on_the_command_line(toy_folder, toy_teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mismatch.stages.runner.write_html", lambda path: None)
    assert cli.main(words(tmp_path, toy_folder, "trace", "--output", str(tmp_path / "run"))) == 0
    own = {**TEXTS, "calibration_tokens": None, "calibration_data": tmp_path / "others.jsonl"}
    other = mismatch.trace(
        toy_teacher, SWAP, tokens=256, **{**own, "data": tmp_path / "held_out.jsonl"}
    )
    assert (
        load_run(tmp_path / "run")
        .table.drop(columns="run_id")
        .equals(other.table.drop(columns="run_id"))
    )
    assert cli.main(words(tmp_path, toy_folder, "check")) == 0


def test_a_repair_is_refused_before_weights_are_read(toy_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "pretrained", lambda *a, **k: pytest.fail("read weights"))
    assert cli.main(words(tmp_path, toy_folder, "repair")) == 2
    said = capsys.readouterr().err
    assert "model.layers.2 is offloaded (2 parts of the model are), and a repair trains" in said
    assert "--dtype bfloat16" in said


def test_a_repair_of_an_offloaded_teacher_is_refused(on_disk):
    with pytest.raises(UsageError, match=r"layers\.2\.\S+ is offloaded \(\d+ parts of the model"):
        mismatch.repair(on_disk, SWAP, data=documents(8), train_data=documents(6, seed=1))


def test_a_student_from_elsewhere_is_refused(on_disk, toy_folder):
    with pytest.raises(ModelError, match=r"was offloaded .* compared with its teacher tensor by"):
        mismatch.trace(on_disk, toy_folder, tokens=128, **TEXTS)


def test_nothing_offloaded_is_saved(on_disk, tmp_path):
    with pytest.raises(SurgeryError, match="lies on no device"):
        mismatch.swap(on_disk, SWAP).save(tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "given, said",
    [
        ("{oops", "the device map is not JSON: "),
        ("everywhere", "the device map names 'everywhere', which is no device"),
        ({"model": "disc"}, "the device map names 'disc', which is no device"),
        ({"model": True}, "the device map names True, which is no device"),
        ("disk", "the device map names 'disk', which is no device"),
    ],
)
def test_maps_that_are_none(given, said):
    with pytest.raises(ModelError, match=said):
        as_map(given)


def test_parts_on_disk_are_not_counted_into_memory(toy_folder):
    whole, mapped = (
        mismatch.check(str(toy_folder), SWAP, data=documents(4), seq_len=64, **given).estimate
        for given in ({}, {"device_map": json.dumps(PLACES)})
    )
    block = 4 * sum(p.numel() for p in mismatch.load(toy_folder).layout.blocks[2].parameters())
    assert whole.weights - mapped.weights == block  # of two one is there at a time
    assert whole.peak - mapped.peak == block


def test_maps():
    assert as_map("auto") == "auto"
    assert as_map("cuda:1") == "cuda:1"
    assert as_map('{"": 0, "lm_head": "disk"}') == {"": 0, "lm_head": "disk"}
