"""Random models that are written shard by shard, and what it takes to load one."""

from __future__ import annotations

import sys

import pytest
import torch
from scripts import script

import mismatch


@pytest.fixture(scope="module")
def large():
    return script("large_model")


def test_a_model_in_shards_loads(large, tmp_path, monkeypatch, toy_folder):
    monkeypatch.setattr(large, "SHARD", 2e6)
    monkeypatch.setattr(large, "WORDS", 1024)
    monkeypatch.setattr(large.mismatch, "fetch", lambda _name: toy_folder)
    large.write_model("tiny", tmp_path / "made")
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 2
    teacher = mismatch.load(tmp_path / "made", dtype="auto", device="cpu")
    assert teacher.model.dtype == torch.bfloat16
    assert teacher.layout.n_layers == large.SIZES["tiny"]["num_hidden_layers"]
    assert teacher.info.parameters == sum(p.numel() for p in set(teacher.model.parameters()))


def test_a_command_that_is_short_of_memory_is_told_apart(large):
    line = [sys.executable, "-c", "bytearray(10**9); print('made')"]
    assert large._run(line).code == 0
    done = large._run(line, cap=0.5)
    assert done.code == 1 and "MemoryError" in done.said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_loading_needs_little_more_than_the_file(large, tmp_path):
    """Weights in bfloat16 stay so: not twice the file, as a detour through float32 would take."""
    folder = tmp_path / "made"
    large.write_model("0.5B", folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    began = large._run([sys.executable, "-c", large.IMPORTS]).peak
    peak = large._run([sys.executable, "-c", large.LOAD, str(folder), "bfloat16"]).peak
    assert 0.9 < (peak - began) / size < 1.2
