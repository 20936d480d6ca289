"""A repair of a model whose matrices are kept in 4 bits: the swapped module trains in full, the rest stays."""

from __future__ import annotations

import pytest
import torch
from killed_repair import SETTINGS
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from wonderland import documents

import mismatch
from mismatch.models.quantised import is_quantised, quantised

pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")

TEXTS = {"data": documents(12), "train_data": documents(8, seed=1), "self_generated": 0.0}


@pytest.fixture(scope="module")
def teacher(toy_folder, toy):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        toy_folder, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    return mismatch.load((model, toy.tokenizer))


@torch.no_grad()
def logits(model):
    return model(torch.arange(8, 56)[None]).logits


@pytest.mark.parametrize(
    "swap",
    [pytest.param("layer1:infini(segment=16)", marks=pytest.mark.slow), "layer1:lora"],
)
def test_every_stage_runs_and_the_checkpoint_is_the_repaired_model(teacher, tmp_path, swap):
    before = logits(teacher.model)
    result = mismatch.repair(teacher, swap, output=tmp_path / "run", **SETTINGS, **TEXTS)
    assert torch.equal(logits(teacher.model), before)
    again = mismatch.load(tmp_path / "run" / "checkpoint")
    assert torch.equal(logits(again.model), logits(result.student.model))
    assert [*result.stages["stage"]][-1] == "end-to-end"
    blocks = again.model.model.layers
    assert not is_quantised(blocks[1].self_attn)
    assert [path for path, _ in quantised(blocks[0])] == [
        p for p, _ in quantised(teacher.model.model.layers[0])
    ]
