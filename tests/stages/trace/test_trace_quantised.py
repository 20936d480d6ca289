"""A trace of a model in 4 bits that is in memory: the control `random` is no teacher, the floor is there."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from wonderland import documents

import mismatch

pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_control_random_is_not_the_teacher(toy_folder, toy, dtype):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        toy_folder, quantization_config=settings, dtype=dtype, device_map={"": "cpu"}
    )
    result = mismatch.trace(
        (model, toy.tokenizer),
        "layer1:infini(segment=16)",
        data=documents(8),
        tokens=256,
        seq_len=48,
        controls=("random", "zero"),
    )
    kl = result.table[result.table.metric.eq("kl") & result.table.stat.eq("mean")]
    found = kl.groupby("student").value.first()
    assert found["random"] > 0.3 * found["zero"] > 0
    assert found["floor"] < 0.01 * found["zero"]
