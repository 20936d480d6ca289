"""What a repair refuses, and what it survives: short disks, full memory, NaN, other models, texts that overlap."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from killed_repair import SETTINGS, SWAP
from wonderland import documents, jsonl

import mismatch
from mismatch import config
from mismatch.errors import DataError, MismatchError, OutputError
from mismatch.stages import runner
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.judge import Judge
from mismatch.stages.repair.ladder import Ladder
from mismatch.stages.repair.ladder_stages.local import LocalLoss
from mismatch.stages.repair.ladder_stages.training import Trainer

LOCAL = {"stages": ("local",), "epochs": 1}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    monkeypatch.setattr(runner, "write_html", lambda _folder: None)


def repaired(teacher, folder: Path | None = None, **settings):
    texts = {"data": documents(12), "train_data": documents(8, seed=1)}
    given = SETTINGS | LOCAL | texts | settings
    output = None if folder is None else str(folder)
    return mismatch.repair(teacher, given.pop("swap", SWAP), output=output, **given)


# ---- what runs short ----------------------------------------------------------------------------


def test_a_disk_budget_that_is_too_small_is_said_and_changes_no_weight(toy_teacher, tmp_path):
    stages = ("closed-form", "local")
    whole = repaired(toy_teacher, tmp_path / "whole", stages=stages)
    short = repaired(toy_teacher, tmp_path / "short", stages=stages, activations_gb=0.0)
    log = (tmp_path / "short" / "log.txt").read_text()
    # 384 tokens, d_model 128, in and out, float32
    assert (
        "the activations of 1 modules need 0.000393 GB and --activations-gb is 0: 1 of them" in log
    )
    assert "computed anew each time" in log
    assert "computed anew" not in (tmp_path / "whole" / "log.txt").read_text()
    weights = dict(whole.student.model.named_parameters())
    assert all(torch.equal(weights[n], p) for n, p in short.student.model.named_parameters())


def starve(monkeypatch, most: int) -> list[int]:
    """Memory for so many windows of the local loss and no more; the sizes that were tried."""
    tried: list[int] = []
    real = LocalLoss.__call__

    def loss(self, index, rows):
        tried.append(rows)
        if rows > most:
            raise torch.OutOfMemoryError("planted")
        return real(self, index, rows)

    monkeypatch.setattr(LocalLoss, "__call__", loss)
    return tried


def test_a_stage_that_had_no_time_is_left_out_and_not_evaluated_again(toy_teacher, monkeypatch):
    evaluated = []
    real = Judge.evaluate
    monkeypatch.setattr(Judge, "evaluate", lambda *args: evaluated.append(1) or real(*args))
    monkeypatch.setattr(Ladder, "_planned", lambda *_args: (3, 1))
    stages = ("closed-form", "local", "block")
    result = repaired(toy_teacher, stages=stages, max_minutes=5.0)
    _, fitted, local, block = result.plan.stages
    assert local.notes == block.notes == ["left out: the time that is left allows 3 steps"]
    assert local.kl == block.kl == fitted.kl and local.gap_lo == fitted.gap_lo
    assert len(evaluated) == 2  # the swap, and behind the closed form


@pytest.mark.parametrize("minutes", [None, 1.0])  # with a limit steps are timed first
def test_out_of_memory_halves_the_batch_and_says_so(toy_teacher, monkeypatch, minutes):
    tried = starve(monkeypatch, 1)
    result = repaired(toy_teacher, batch_size=4, train_tokens=768, epochs=4, max_minutes=minutes)
    stage = result.plan.stages[-1]
    assert "out of memory at step 0: 2 windows a batch from here on" in stage.notes
    assert "out of memory at step 0: 1 windows a batch from here on" in stage.notes
    assert tried[0] == 4 and tried[-1] == 1
    assert stage.tokens == stage.steps * 48
    assert "1 windows a batch" in result.summary()


@pytest.mark.parametrize("minutes", [None, 1.0])
def test_out_of_memory_with_one_window_is_an_error_with_a_way_out(
    toy_teacher, monkeypatch, minutes
):
    starve(monkeypatch, 0)
    with pytest.raises(MismatchError, match=r"out of memory .*, with one window a batch") as error:
        repaired(toy_teacher, max_minutes=minutes)
    assert "--seq-len" in error.value.hint


def test_a_loss_that_is_nan_ends_the_stage_at_the_last_good_weights(toy_teacher, monkeypatch):
    taken = []
    real = LocalLoss.__call__

    def loss(self, index, rows):
        taken.append(index)
        return real(self, index, rows) * (float("nan") if len(taken) == 4 else 1.0)

    monkeypatch.setattr(LocalLoss, "__call__", loss)
    result = repaired(toy_teacher, epochs=2)
    stage = result.plan.stages[-1]
    assert stage.steps == 3
    assert "the loss of step 3 is nan: stopped, the last good weights are kept" in stage.notes
    assert all(p.isfinite().all() for p in result.student.model.parameters())
    assert result.stages["kl"].iloc[-1] <= result.stages["kl"].iloc[0]
    assert "the loss of step 3 is nan" in result.summary()


# ---- other models, other swaps ------------------------------------------------------------------


def stopped(model: str, folder: Path, monkeypatch) -> Path:
    """A repair of the local stage that was interrupted in it."""
    real = Trainer._step

    def step(self, done):
        if done.steps == 2:
            self.stopping = lambda: True
        return real(self, done)

    texts = {
        "data": str(jsonl(folder / "held_out.jsonl", documents(12))),
        "train_data": str(jsonl(folder / "train.jsonl", documents(8, seed=1))),
    }
    given = SETTINGS | LOCAL | texts | {"output": str(folder / "run")}
    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        mismatch.repair(model, SWAP, **given)
    monkeypatch.setattr(Trainer, "_step", real)
    return folder / "run"


def test_resuming_with_another_swap_is_refused_and_says_which(toy_folder, tmp_path, monkeypatch):
    run = stopped(str(toy_folder), tmp_path, monkeypatch)
    told = config.load(RepairConfig, run / "config.yaml", {"swap": ("layer1:nope",)})
    with pytest.raises(OutputError, match="was started with other settings") as error:
        runner.command("repair", told, resume=run, progress=False)
    assert f"swap: ['{SWAP}'] then, ['layer1:nope'] now" in str(error.value)


def test_resuming_on_another_model_is_refused_and_says_which(model_folder, tmp_path, monkeypatch):
    """Under the same name: the weights in the folder are others."""
    folder = model_folder()
    run = stopped(str(folder), tmp_path, monkeypatch)
    import safetensors.torch

    (weights,) = folder.glob("*.safetensors")
    tensors = safetensors.torch.load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.5
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    told = config.load(RepairConfig, run / "config.yaml")
    with pytest.raises(OutputError, match="was started with other settings") as error:
        runner.command("repair", told, resume=run, progress=False)
    assert "\n  model: '" in str(error.value)
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"


def test_a_store_is_shared_by_swaps_and_not_by_models(toy_teacher, toy, tmp_path):
    store = str(tmp_path / "store")
    shards = lambda: {path.parent.name for path in Path(store).rglob("*.safetensors")}  # noqa: E731
    repaired(toy_teacher, activations_dir=store)
    kept = shards()
    repaired(toy_teacher, activations_dir=store, swap="layer2:sliding_window(window=8)")
    assert shards() == kept
    other = copy.deepcopy(toy.model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    repaired(mismatch.load((other, toy.tokenizer)), activations_dir=store)
    assert not shards() <= kept


# ---- texts that overlap -------------------------------------------------------------------------


def test_a_document_in_both_texts_is_refused_whatever_its_name(toy_teacher):
    held_out, trained_on = documents(12), documents(8, seed=1)
    with pytest.raises(DataError, match="trained on and evaluated on") as error:
        repaired(toy_teacher, data=held_out, train_data=[*trained_on, held_out[3]])
    assert "text 8" in str(error.value) and "text 3" in str(error.value)


def test_a_document_inside_a_larger_one_is_refused(toy_teacher):
    """Another hash, the same words: nothing but the tokens tells."""
    held_out, trained_on = documents(6), documents(8, seed=1)
    longer = f"{trained_on[0]} {' '.join(held_out)} {trained_on[1]}"
    given = {"seq_len": 128, "tokens": 512, "val_tokens": 256, "train_tokens": 20480}
    with pytest.raises(DataError, match=r"64 tokens in a row of the document .* also occur in"):
        repaired(toy_teacher, data=held_out, train_data=[longer, *trained_on[2:]], **given)


def test_texts_of_the_same_words_that_do_not_overlap_are_taken(toy_teacher):
    assert len(repaired(toy_teacher).stages) == 2


def test_the_same_documents_under_two_names_are_refused(toy_teacher, tmp_path):
    one = jsonl(tmp_path / "one.jsonl", documents(12))
    two = jsonl(tmp_path / "two.jsonl", documents(12))
    with pytest.raises(DataError, match="trained on"):
        repaired(toy_teacher, data=str(one), train_data=str(two))
