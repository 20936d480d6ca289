"""How a repair begins and fails: what is refused before weights are loaded, a trained student, a run that fails."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killed_repair import SETTINGS, SWAP
from refusals import assert_failed, no_weights, refused
from wonderland import documents, jsonl

import mismatch
from mismatch.cli import main
from mismatch.errors import MismatchError, SurgeryError, UsageError
from mismatch.stages import runner
from mismatch.stages.repair.ladder import Ladder
from mismatch.stages.repair.ladder_stages.module_pair import pairs_of
from mismatch.surgery import loading
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher
from mismatch.texts.documents import read
from mismatch.texts.windows import windows

CLOSED_FORM = SETTINGS | {"stages": ("closed-form",)}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    monkeypatch.setattr(runner, "write_html", lambda _folder: None)


@pytest.fixture
def words(tmp_path: Path, toy_folder: Path) -> Callable[..., list[str]]:
    """`mismatch repair` on the toy into tmp_path/run: short texts, one stage."""
    texts = {
        "data": jsonl(tmp_path / "held_out.jsonl", documents(12)),
        "train-data": jsonl(tmp_path / "train.jsonl", documents(8, seed=1)),
    }
    sizes = {"train-tokens": 384, "tokens": 192, "val-tokens": 96, "seq-len": 48, "batch-size": 2}
    rest = {"controls": "none", "probes": "none", "trace-tokens": 0, "max-minutes": "none"}
    rest |= {"stages": "closed-form", "device": "cpu", "output": tmp_path / "run"}

    def make(swap: str = SWAP, **changes: object) -> list[str]:
        named = {name.replace("_", "-"): value for name, value in changes.items()}
        flags = {**texts, **sizes, **rest, **named}
        given = [f"--{name}={value}" for name, value in flags.items()]
        return ["repair", "--model", str(toy_folder), "--swap", swap, "--quiet", *given]

    return make


# ---- a student that is there already ------------------------------------------------------------


def kl(teacher: Teacher, student: Student, ids: torch.Tensor) -> float:
    """Mean KL(teacher || student) in nats per token, from whole logits in float64."""
    with torch.no_grad():
        p, q = (one.model(ids).logits.double().log_softmax(-1) for one in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def train_a_little(teacher: Teacher, student: Student, ids: torch.Tensor) -> None:
    """A few steps towards the teacher's predictions, on tensors that are the student's own."""
    (part,) = pairs_of(teacher.layout, student)
    mine = list(part.student.parameters())
    for parameter in mine:
        parameter.requires_grad_(True)
    steps = torch.optim.Adam(mine, lr=1e-3)
    with torch.no_grad():
        p = teacher.model(ids).logits.log_softmax(-1)
    for _ in range(20):
        q = student.model(ids).logits.log_softmax(-1)
        steps.zero_grad()
        (p.exp() * (p - q)).sum(-1).mean().backward()
        steps.step()
    for parameter in mine:
        parameter.requires_grad_(False)


def test_a_repair_of_a_student_starts_from_its_own_weights(toy_teacher):
    texts = {"data": documents(12), "train_data": documents(8, seed=1)}
    cut = windows(read(texts["data"]), toy_teacher.tokenizer, 48, CLOSED_FORM["tokens"], 0)
    ids = torch.from_numpy(cut.ids)
    student = mismatch.swap(toy_teacher, SWAP)
    untrained = kl(toy_teacher, student, ids)
    train_a_little(toy_teacher, student, ids)
    trained = kl(toy_teacher, student, ids)
    assert trained < 0.8 * untrained
    before = {name: p.clone() for name, p in student.model.state_dict().items()}
    result = mismatch.repair(toy_teacher, student, **CLOSED_FORM, **texts)
    assert result.stages["kl"].iloc[0] == pytest.approx(trained, rel=1e-4)
    assert result.plan.students["swap"].kl[0] == pytest.approx(trained, rel=1e-4)
    fresh = mismatch.repair(toy_teacher, SWAP, **CLOSED_FORM, **texts)
    assert fresh.stages["kl"].iloc[0] == pytest.approx(untrained, rel=1e-4)
    # The student that was handed over is not the one that is repaired.
    assert result.student is not student
    after = student.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.plan.spec == student.plan.spec
    assert result.plan.spec in result.run.manifest["swap"]


def test_a_student_without_a_swap_is_refused(toy, toy_teacher):
    other = mismatch.load((copy.deepcopy(toy.model), toy.tokenizer))
    with pytest.raises(SurgeryError, match="nothing was swapped in this student") as error:
        mismatch.repair(toy_teacher, other, **CLOSED_FORM)
    assert "mismatch trace" in error.value.hint
    student = mismatch.swap(other, SWAP)
    student.undo()
    with pytest.raises(UsageError, match="holds no swap any more"):
        mismatch.repair(other, student, **CLOSED_FORM)


# ---- refused before weights ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("swap", "flags", "code", "said"),
    [
        ("layer99:infini", {}, 2, "layer99"),
        ("final_norm:dyt", {}, 1, "`dyt` at final_norm cannot be repaired"),
        (SWAP, {"trained_controls": "parallel"}, 2, "parallel"),
        (SWAP, {"controls": "zreo"}, 2, "unknown mechanism `zreo`"),
        (SWAP, {"seq_len": 4096}, 2, "--seq-len 4096 is longer than the context"),
        (SWAP, {"probes": "passkey"}, 2, "a passkey prompt of 256 tokens is longer"),
        (SWAP, {"train_data": "missing.jsonl"}, 2, "missing.jsonl"),
        (SWAP, {"tokens": "1M"}, 2, "none is left for validation"),
    ],
)
def test_what_can_be_refused_is_refused_before_weights_and_leaves_no_folder(
    words, swap, flags, code, said, tmp_path, capsys
):
    assert said in refused(words(swap, **flags), tmp_path, capsys, code)


def test_the_function_refuses_before_weights_too(tmp_path, toy_folder, monkeypatch):
    monkeypatch.setattr(loading, "load", no_weights)
    texts = {"data": documents(12), "train_data": documents(8, seed=1)}
    with pytest.raises(SurgeryError, match="cannot be repaired"):
        mismatch.repair(
            str(toy_folder), "final_norm:dyt", output=str(tmp_path / "run"), **CLOSED_FORM, **texts
        )
    assert not (tmp_path / "run").exists()


# ---- what a run leaves behind -------------------------------------------------------------------


@pytest.mark.parametrize("error", [MismatchError("planted"), ValueError("planted")])
def test_a_failing_run_says_so_in_manifest_and_log(words, tmp_path, monkeypatch, error):
    def fail(_self, _name):
        raise error

    monkeypatch.setattr(Ladder, "_closed_form", fail)
    assert main(words()) == 1
    assert_failed(tmp_path / "run", "planted")


def test_a_run_names_its_texts_and_may_be_written_over(words, tmp_path, capsys):
    assert main([*words(self_generated=0.25), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = tmp_path / "run"
    assert found["run"] == str(run)
    assert found["checkpoint"] == str(run / "checkpoint")
    assert [row["stage"] for row in found["stages"]] == ["swap", "closed-form"]
    manifest = json.loads((run / "manifest.json").read_text())
    texts = manifest["texts"]
    assert set(texts) == {"evaluation", "validation", "training"}
    assert [texts[role]["tokens"] for role in texts] == [192, 96, 384 - 96]
    assert texts["training"]["source"].endswith("train.jsonl")
    prints = manifest["fingerprints"]
    assert prints["evaluation"] == texts["evaluation"]["fingerprint"]
    # The self-generated text is training text too.
    assert prints["training"] != texts["training"]["fingerprint"]
    assert {"load", "work", "before and after"} == set(manifest["seconds"])
    plan = json.loads((run / "plan.json").read_text())
    assert plan["spec"] == mismatch.load_run(run).manifest["swap"]
    assert set(plan) == {
        *("spec", "clauses", "warnings", "apart"),
        *("stages", "branches", "gates", "notes", "over", "students", "teacher"),
    }
    assert (run / "log.txt").read_text().splitlines()[-1].endswith("done")
    assert main(words()) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([*words(), "--overwrite"]) == 0
    assert not (run / "state").exists()
