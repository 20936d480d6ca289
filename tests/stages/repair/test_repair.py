"""Repair as a whole on the toy: it recovers, its checkpoint is the student, it resumes, and it refuses."""

from __future__ import annotations

import json

import pytest
import torch

import mismatch
from mismatch.cli import main
from mismatch.errors import ConfigError, DataError, SurgeryError
from mismatch.stages import runner
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.ladder import Ladder

SMALL = {
    "train_tokens": 2048,
    "self_generated": 0.0,
    "tokens": 512,
    "val_tokens": 256,
    "seq_len": 64,
    "batch_size": 4,
    "max_minutes": None,
    "epochs": 1,
    "controls": (),
}


@pytest.mark.pages
def test_repair_recovers_and_the_checkpoint_is_the_student(toy_teacher, tmp_path):
    result = mismatch.repair(
        toy_teacher,
        "layer2:infini(segment=16)",
        output=str(tmp_path / "run"),
        min_gain=0.0,
        # On less text two stages make it worse, and the ladder ends.
        **{**SMALL, "train_tokens": 8192},
    )
    frame = result.stages
    assert list(frame["stage"]) == [
        "swap",
        "closed-form",
        "local",
        "block",
        "window",
        "end-to-end",
    ]
    assert frame["kl"].iloc[-1] < 0.6 * frame["kl"].iloc[0]
    kept = frame[frame["kept"]]
    assert (kept["kl"].diff().dropna() <= 1e-9).all()
    assert frame["gap_closed"].iloc[-1] == pytest.approx(
        1 - frame["kl"].iloc[-1] / frame["kl"].iloc[0]
    )
    again = mismatch.load(str(result.checkpoint))
    batch = torch.randint(5, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.model(batch).logits, result.student.model(batch).logits)
    facts = json.loads((result.checkpoint / "mismatch.json").read_text())
    assert facts["repair"]["stages"][0]["name"] == "swap"
    assert (tmp_path / "run" / "figures" / "repair.csv").exists()
    assert "gap closed" in result.summary()


def test_repair_leaves_the_teacher_as_it_was(toy_teacher):
    before = {n: p.clone() for n, p in toy_teacher.model.named_parameters()}
    mismatch.repair(toy_teacher, "layer1.norms:dyt; layer2:nope", **{**SMALL, "train_tokens": 512})
    after = dict(toy_teacher.model.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any(p.requires_grad for p in after.values())


def test_new_parameters_train_alone_first_and_are_used(toy_teacher, tmp_path):
    result = mismatch.repair(
        toy_teacher,
        "layer2:infini(segment=16, overlap=1, normalizer=shared, feature_map=hedgehog, memory_position=far)",
        stages=("closed-form", "local"),
        output=str(tmp_path / "run"),
        **{**SMALL, "train_tokens": 8192, "probes": (), "trace_tokens": 0},
    )
    closed, local = result.plan.stages[1:]
    assert closed.notes == ["nothing in these parts has a closed form"]
    assert local.kept
    path = result.plan.clauses[0].path
    theirs = dict(toy_teacher.model.get_submodule(path).named_parameters())
    mine = dict(result.student.model.get_submodule(path).named_parameters())
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    moved = mine.keys() - theirs.keys()
    assert moved == {"gate", "gate_x", "map_q", "map_k", "own_q", "own_k"}
    assert (mine["own_q"] != 0).any()
    assert result.plan.gates.weighs == {}
    assert [name for name in result.plan.gates.end if name.endswith(".gate")]
    assert {branch.branch for branch in result.plan.branches} == {"memory", "local"}


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_several_modules(toy_teacher, order):
    result = mismatch.repair(
        toy_teacher,
        "layers[1,2]:sliding_window(window=8)",
        order=order,
        stages=("closed-form", "local"),
        **{**SMALL, "train_tokens": 512},
    )
    assert result.stages["kl"].iloc[-1] < result.stages["kl"].iloc[0]


def test_an_interrupted_repair_resumes_to_the_same_weights(toy_teacher, tmp_path, monkeypatch):
    settings = {**SMALL, "train_tokens": 1024, "stages": ("closed-form", "local")}
    straight = mismatch.repair(toy_teacher, "layer2:infini(segment=16)", **settings)
    config = RepairConfig(
        model="glassllm",
        device="cpu",
        swap=("layer2:infini(segment=16)",),
        output=str(tmp_path / "run"),
        **settings,
    )

    def stop_in_local(self, *args, **options):
        asked = iter([False] * 3 + [True] * 1000)
        self.stopping = lambda: next(asked)
        return real(self, *args, **options)

    real = Ladder._train
    monkeypatch.setattr(Ladder, "_train", stop_in_local)
    with pytest.raises(KeyboardInterrupt):
        runner.command("repair", config, progress=False)
    monkeypatch.setattr(Ladder, "_train", real)
    resumed = runner.command("repair", config, resume=tmp_path / "run", progress=False)
    ours = dict(resumed.student.model.named_parameters())
    assert all(torch.equal(p, ours[n]) for n, p in straight.student.model.named_parameters())


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"stages": ("locl",)}, r"unknown stage `locl`"),
        ({"stages": ("local", "closed-form")}, "the stages are out of order: local, closed-form"),
        ({"stages": ("local", "local")}, "the stage `local` is named twice"),
        ({"stages": ()}, "`stages` is empty"),
        ({"max_minutes": 0.0}, "`max_minutes` must be float > 0 or none, got 0.0"),
    ],
)
def test_wrong_settings(settings, text):
    with pytest.raises(ConfigError, match=text):
        RepairConfig(model="smollm2", swap=("layer12:infini",), **settings)


def test_training_and_evaluation_on_one_text_is_refused(toy_teacher):
    with pytest.raises(DataError, match="`wiki` would be trained on and evaluated on"):
        mismatch.repair(toy_teacher, "layer1:infini(segment=16)", train_data="wiki", **SMALL)


def test_a_module_outside_the_blocks_is_refused(toy_teacher):
    with pytest.raises(SurgeryError, match="`dyt` at final_norm cannot be repaired"):
        mismatch.repair(toy_teacher, "final_norm:dyt", **SMALL)


def test_the_command_refuses_before_it_loads(capsys):
    assert (
        main(["repair", "--model", "glassllm", "--swap", "layer1:infini", "--stages", "locl"]) == 2
    )
    assert "unknown stage `locl`" in capsys.readouterr().err
    assert (
        main(
            [
                "repair",
                "--model",
                "glassllm",
                "--swap",
                "layer1:infini",
                "--train-tokens",
                "1M",
                "--seq-len",
                "99999",
            ]
        )
        == 2
    )
