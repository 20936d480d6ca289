"""Students that were trained elsewhere: every stage reads them as the trained one in memory, and as plain forwards."""

from __future__ import annotations

import copy
import json
import shutil

import pandas as pd
import pytest
import torch
import transformers
from wonderland import documents, jsonl

import mismatch
from mismatch.cli import main
from mismatch.errors import MismatchError, ModelError, SurgeryError, UsageError
from mismatch.runs.state import State
from mismatch.stages.trace import batches

SWAP = "layer2:infini(segment=16)"
TEXTS, OTHERS = documents(4), documents(3, seed=1)
SMALL = {"data": TEXTS, "tokens": 256, "seq_len": 64, "batch_size": 2}
GIVEN = {**SMALL, "calibration_data": OTHERS, "calibration_tokens": 128}
BLOCKS = (0, 1, 2, 3)


def train(model, tokenizer, steps=10):
    """AdamW on every tensor."""
    ids = tokenizer(" ".join(OTHERS), return_tensors="pt").input_ids[0, : 4 * 64].view(4, 64)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


def made(teacher, moved=lambda model: None):
    """A student of the toy, after something was done to it."""
    student = mismatch.swap(teacher, SWAP)
    with torch.no_grad():
        moved(student.model)
    return student


@pytest.fixture(scope="module")
def trained(toy_teacher):
    student = made(toy_teacher)
    train(student.model, student.tokenizer)
    return student


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    return trained.save(tmp_path_factory.mktemp("elsewhere") / "trained")


@pytest.fixture(scope="module")
def fine_tune(toy_teacher, tmp_path_factory):
    """An ordinary folder of the same shape, without a tokenizer, as a trainer leaves it."""
    model = copy.deepcopy(toy_teacher.model)
    train(model, toy_teacher.tokenizer, 3)
    folder = tmp_path_factory.mktemp("elsewhere") / "fine_tune"
    model.save_pretrained(folder)
    return folder


def rows(result):
    return result.table.drop(columns="run_id")


def equal(one, other):
    pd.testing.assert_frame_equal(rows(one), rows(other), check_exact=True)


def shift(result, student="swap", **where):
    where = {"metric": "kl", "site": "logits", "stat": "mean", "position": "all", **where}
    found = result.table[result.table["student"] == student]
    for name, value in where.items():
        found = found[found[name] == value]
    assert len(found) == 1, f"{len(found)} rows at {where}"
    return float(found["value"].item())


def direct(teacher, model):
    """KL of the output over the same windows, from plain forwards."""
    text = mismatch.read_documents(TEXTS)
    ids = torch.from_numpy(mismatch.windows(text, teacher.tokenizer, 64, 256, 0).ids)
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (teacher.model, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


# ---- a checkpoint ---------------------------------------------------------------------------------


def test_trace_reads_what_the_student_in_memory_reads(toy_teacher, trained, checkpoint):
    before = copy.deepcopy(toy_teacher.model.state_dict())
    mine = mismatch.trace(toy_teacher, trained, **GIVEN)
    assert shift(mine) == pytest.approx(direct(toy_teacher, trained.model), rel=1e-4)
    assert mine.plan.apart.blocks == BLOCKS and mine.plan.apart.front and mine.plan.first == 0
    assert mine.plan.warnings == (
        "not only what was swapped differs from the teacher: the embedding, blocks 0-3, the final norm or head; what "
        "is measured is the work of all that was trained",
    )
    untrained = mismatch.trace(toy_teacher, made(toy_teacher), **GIVEN)
    assert shift(mine) > 1.5 * shift(untrained)
    assert all(shift(mine, name) == shift(untrained, name) for name in ("zero", "mean"))
    for other in (checkpoint, mismatch.load(checkpoint), (trained.model, trained.tokenizer)):
        equal(mine, mismatch.trace(toy_teacher, other, **GIVEN))
    by_name = mismatch.trace(toy_teacher, student=str(checkpoint), **GIVEN)
    equal(mine, by_name)
    about = by_name.run.manifest
    assert about["student_info"]["name"] == str(checkpoint)
    assert about["student_info"]["sha256"] == about["fingerprints"]["student"]
    assert about["swap"] == f"student {checkpoint.parent.name}/trained"
    after = toy_teacher.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("moved", "blocks", "first", "front", "end"),
    [
        (lambda m: m.model.layers[2].self_attn.gate.add_(1.0), None, 2, False, False),
        (lambda m: m.model.layers[1].mlp.up_proj.weight[0].mul_(2.0), (1, 2), 1, False, False),
        (lambda m: m.model.layers[3].mlp.up_proj.weight[0].mul_(2.0), (2, 3), 2, False, False),
        (lambda m: m.model.norm.weight.mul_(1.1), (2,), 2, False, True),
        (lambda m: m.model.embed_tokens.weight[5:300].mul_(1.5), (2,), 0, True, None),
        (lambda m: setattr(m.config, "rope_theta", 2e4), BLOCKS, 0, True, True),
        (
            lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 0.1),
            BLOCKS,
            0,
            True,
            True,
        ),
    ],
    ids=["swap", "in front", "behind", "final norm", "embedding", "config", "an attribute"],
)
def test_a_prefix_is_shared_where_it_is_bit_equal(toy_teacher, moved, blocks, first, front, end):
    student = made(toy_teacher, moved)
    result = mismatch.trace(toy_teacher, student, controls=(), **SMALL)
    assert shift(result) == pytest.approx(direct(toy_teacher, student.model), rel=1e-3)
    plan = result.plan
    assert plan.first == first
    assert plan.apart is None if blocks is None else plan.apart.blocks == blocks
    assert plan.front is front
    assert end is None or plan.end is end
    # The swapped block gets the teacher's own input, whatever stands in front of it.
    swap = mismatch.trace(toy_teacher, SWAP, controls=(), **SMALL)
    at = {"metric": "rel_l2", "mode": "forced", "layer": 2, "site": "attn_out"}
    if blocks != BLOCKS and blocks is not None:
        assert shift(result, **at) == shift(swap, **at)
    entering = {"metric": "rel_l2", "mode": "free", "layer": 0, "site": "resid_pre"}
    changed = front and blocks != BLOCKS
    assert (shift(result, **entering) > 0.01) is changed


def test_a_student_of_a_student(toy_teacher, tmp_path):
    first = made(toy_teacher)
    second = mismatch.swap(mismatch.load((first.model, first.tokenizer)), "layer3.mlp:zero")
    mine = mismatch.trace(toy_teacher, second, controls=("zero",), **SMALL)
    assert shift(mine) == pytest.approx(direct(toy_teacher, second.model), rel=1e-4)
    assert [(c.layer, c.slot) for c in mine.plan.clauses] == [(2, "attn"), (3, "mlp")]
    assert mine.plan.apart is None and mine.plan.layers == (2, 3)
    equal(
        mine,
        mismatch.trace(toy_teacher, second.save(tmp_path / "two"), controls=("zero",), **SMALL),
    )
    # Beside the first student only the second swap is one.
    beside = mismatch.trace(
        mismatch.load((first.model, first.tokenizer)), second, controls=(), **SMALL
    )
    assert beside.plan.spec == "layer3.mlp:zero" and beside.plan.first == 3


def test_probe_and_diagnose_read_the_same(toy_teacher, trained, checkpoint):
    asked = {"data": TEXTS, "probes": ("induction", "heads"), "samples": 3, "seq_len": 64}
    equal(
        mismatch.probe(toy_teacher, trained, **asked),
        mismatch.probe(toy_teacher, checkpoint, **asked),
    )
    settings = {**GIVEN, "fit_tokens": 256, "scored": 1.0, "heads": 0}
    mine = mismatch.diagnose(toy_teacher, trained, **settings)
    other = mismatch.diagnose(toy_teacher, checkpoint, **settings)
    equal(mine, other)
    damage = other.plan.diagnosis.damage.value
    assert damage == pytest.approx(direct(toy_teacher, trained.model), rel=1e-4)
    assert other.plan.apart.front
    said = [found for found in other.findings if found.title.startswith("unexplained")]
    assert "what else differs from the teacher (the embedding, blocks 0-3" in said[0].text
    assert f"--student {checkpoint}" in said[0].next


def test_repair_goes_on_training_it(toy_teacher, trained, checkpoint, tmp_path):
    settings = {
        **{
            "data": TEXTS,
            "tokens": 128,
            "train_data": OTHERS,
            "train_tokens": 256,
            "val_tokens": 64,
        },
        **{
            "seq_len": 64,
            "calibration_tokens": 128,
            "stages": ("local", "end-to-end"),
            "epochs": 1,
        },
        **{
            "self_generated": 0.0,
            "probes": (),
            "trace_tokens": 0,
            "controls": (),
            "max_minutes": None,
        },
    }
    result = mismatch.repair(toy_teacher, checkpoint, output=str(tmp_path / "run"), **settings)
    evaluated = {**SMALL, "tokens": 128, "controls": ()}
    inherited = mismatch.trace(toy_teacher, trained, **evaluated)
    assert result.plan.students["swap"].kl[0] == pytest.approx(shift(inherited), rel=1e-5)
    assert result.plan.students["repaired"].kl[0] < 0.97 * shift(inherited)
    again = mismatch.trace(toy_teacher, result.checkpoint, **evaluated)
    assert shift(again) == pytest.approx(result.plan.students["repaired"].kl[0], rel=1e-5)
    assert [c.mechanism for c in again.plan.clauses] == ["infini", "lora", "lora"]
    # What does not train stays the student's own, not the teacher's.
    found, given = result.student.model.state_dict(), trained.model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[name], given[name])
    assert not torch.equal(found[name], toy_teacher.model.state_dict()[name])


def test_on_the_command_line(toy_folder, checkpoint, fine_tune, tmp_path, capsys):
    data = ("--data", str(jsonl(tmp_path / "a.jsonl", TEXTS)), "--seq-len", "64", "--tokens", "256")
    more = ("--calibration-data", str(jsonl(tmp_path / "b.jsonl", OTHERS)), "--calibration-tokens")
    words = [
        "--model",
        str(toy_folder),
        *data,
        *more,
        "128",
        "--device",
        "cpu",
        "--batch-size",
        "2",
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    student = ["--student", str(checkpoint)]
    assert main(["check", *words, *student]) == 0
    assert "infini(segment=16" in capsys.readouterr().out
    few = ["--metrics", "kl,rel_l2", "-q"]
    assert main(["trace", *words, *student, *few, "--output", str(first)]) == 0
    assert f"mismatch diagnose {first}" in capsys.readouterr().out
    manifest = json.loads((first / "manifest.json").read_text())
    assert manifest["student_info"]["sha256"] == manifest["fingerprints"]["student"]
    mine = mismatch.trace(str(toy_folder), checkpoint, metrics=("kl", "rel_l2"), **GIVEN)
    equal(mismatch.load_run(first), mine)
    plain = ["--student", str(fine_tune)]
    assert main(["trace", *words, *plain, *few, "--output", str(second)]) == 0
    assert main(["compare", str(first), str(second), "--output", str(tmp_path / "c.html")]) == 0
    page = (tmp_path / "c.html").read_text()
    assert "The student moves the output" in page and "The swap moves the output" in page
    fits = ["--fit-tokens", "256", "--heads", "0", "--tokens", "256", "-q", "--seq-len", "64"]
    capsys.readouterr()
    assert main(["diagnose", str(first), *fits, "--output", str(tmp_path / "d")]) == 0
    assert mismatch.load_run(tmp_path / "d").config["student"] == str(checkpoint)
    assert main(["diagnose", str(second), *fits, "--output", str(tmp_path / "e")]) == 1
    assert "nothing was swapped in this student" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
    assert main(["scan", *words, *student]) == 2
    assert "`mismatch trace --student`" in capsys.readouterr().err


def test_a_resumed_run_knows_its_student(
    toy_folder, toy_teacher, trained, tmp_path, monkeypatch, capsys
):
    held_out, run = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "run"
    given = trained.save(tmp_path / "student")
    words = ["trace", "--model", str(toy_folder), "--student", str(given), "--data", str(held_out)]
    words += ["--seq-len", "64", "--tokens", "256", "--controls", "none", "--metrics", "kl", "-q"]
    words += ["--batch-size", "2", "--output", str(run)]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(batches, "SAVE_EVERY", -1.0)
    with monkeypatch.context() as patch:
        plain = State.save
        patch.setattr(State, "save", lambda *a, **k: (plain(*a, **k), stop()))
        assert main(words) == 130
    made(toy_teacher).save(given, overwrite=True)
    capsys.readouterr()
    assert main(["trace", "--resume", str(run), "-q"]) == 2
    assert "was started with other settings:\n  student: '" in capsys.readouterr().err
    trained.save(given, overwrite=True)
    assert main(["trace", "--resume", str(run), "-q"]) == 0
    mine = mismatch.trace(
        str(toy_folder), given, controls=(), metrics=("kl",), **{**SMALL, "data": str(held_out)}
    )
    equal(mismatch.load_run(run), mine)


def test_a_quantised_student(toy_teacher, toy_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        toy_folder,
        quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    model.save_pretrained(tmp_path / "int8")
    result = mismatch.trace(toy_teacher, tmp_path / "int8", **SMALL)
    # Its activations are rounded by their range in the batch.
    assert 1e-5 < shift(result) == pytest.approx(direct(toy_teacher, model), rel=0.2)
    assert "differs from the teacher's in quantization_config" in result.plan.warnings[0]


# ---- a fine-tune ----------------------------------------------------------------------------------


def test_a_fine_tune_is_measured_layer_by_layer(toy_teacher, fine_tune):
    result = mismatch.trace(toy_teacher, fine_tune, **GIVEN)
    model = mismatch.load(_with_tokenizer(fine_tune, toy_teacher)).model
    assert shift(result) == pytest.approx(direct(toy_teacher, model), rel=1e-4)
    equal(result, mismatch.trace(toy_teacher, (model, toy_teacher.tokenizer), **GIVEN))
    table = result.table
    forced = table[(table["mode"] == "forced") & (table["metric"] == "rel_l2")]
    assert set(forced["layer"]) == set(BLOCKS) and not table["swapped"].any()
    assert set(table["student"]) == {"swap", "floor"}
    assert result.plan.warnings == (
        "no control is measured (zero, mean): nothing was swapped in this student, so there is no slot for one",
    )
    titles = " ".join(f"{found.title} {found.text}" for found in result.findings)
    assert "swap" not in titles and "delet" not in titles
    assert "changed most" in titles and "against the model that it was made from" in titles
    said = result.summary()
    assert "\nstudent\n  no module was replaced; not the teacher's own: the embedding" in said
    assert "swap" not in said.replace("nothing was swapped", "")


def _with_tokenizer(folder, teacher):
    made = folder.parent / "whole"
    if not made.exists():
        shutil.copytree(folder, made)
        teacher.tokenizer.save_pretrained(made)
    return made


def test_what_has_no_meaning_is_refused(toy_teacher, fine_tune, trained):
    with pytest.raises(SurgeryError, match="no module to correct"):
        mismatch.diagnose(toy_teacher, fine_tune, **GIVEN, fit_tokens=256)
    with pytest.raises(SurgeryError, match="no module to repair"):
        mismatch.repair(toy_teacher, fine_tune, seq_len=64)
    for call in (mismatch.scan, mismatch.plan):
        for student in (trained, fine_tune, (trained.model, trained.tokenizer)):
            with pytest.raises(UsageError, match="takes mechanisms, not a student"):
                call(toy_teacher, student)
    with pytest.raises(UsageError, match="given a swap and a student"):
        mismatch.trace(toy_teacher, SWAP, student=trained)
    with pytest.raises(MismatchError, match=r"no model folder /no/such/student"):
        mismatch.trace(toy_teacher, "/no/such/student", **SMALL)
    asked = ("induction", "heads", "rope_bands", "order_sensitivity")
    result = mismatch.probe(toy_teacher, fine_tune, data=TEXTS, samples=2, seq_len=64, probes=asked)
    assert "\nstudent\n" in result.summary()


# ---- what cannot be set beside the teacher --------------------------------------------------------


@pytest.fixture
def changed(checkpoint, tmp_path):
    """`changed(**config)`: the checkpoint's small files, another config, and no weights."""

    def copied(**config):
        folder = tmp_path / "changed"
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | config))
        return folder

    return copied


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 3}, "layers 3, the teacher's is 4"),
        ({"hidden_size": 64}, "width 64, the teacher's is 128"),
        ({"vocab_size": 1030}, "vocabulary 1030, the teacher's is 1024"),
    ],
)
def test_another_shape_is_refused_before_weights(toy_teacher, changed, config, said):
    with pytest.raises(ModelError) as caught:
        mismatch.trace(toy_teacher, changed(**config), **SMALL)
    assert f"not of the teacher's shape: {said}" in caught.value.message
    assert "made from this teacher" in caught.value.hint


def test_another_family_or_tokenizer_is_refused(toy_teacher, changed, tmp_path, tiny):
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"family gpt2, the teacher's is llama"):
        mismatch.trace(toy_teacher, tmp_path / "gpt2", **SMALL)
    folder = changed()
    tokens = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    one, two = [word for word in vocab if vocab[word] in (500, 501)]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(
        ModelError, match=r"has another tokenizer than the teacher: token 50[01] is"
    ):
        mismatch.trace(toy_teacher, folder, **SMALL)


def test_what_the_plan_says_of_another_dtype_or_base(toy_teacher, toy_folder, checkpoint, tmp_path):
    half = mismatch.load(checkpoint, dtype="bfloat16")
    with pytest.raises(ModelError, match=r"dtype is bfloat16, the teacher's is float32") as caught:
        mismatch.trace(toy_teacher, half, **SMALL)
    assert "dtype=" in caught.value.hint
    mismatch.save_checkpoint(half, tmp_path / "half")
    result = mismatch.trace(toy_teacher, tmp_path / "half", controls=(), **SMALL)
    assert (
        "the student was saved in bfloat16 and runs in float32, as the teacher does"
        in result.plan.warnings
    )
    found = mismatch.trace(str(toy_folder), checkpoint, controls=(), **SMALL).plan.warnings
    assert "the student was made from a loaded model (" in " ".join(found)
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    (run / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        mismatch.trace(toy_teacher, run, **SMALL)
    assert (
        caught.value.hint
        == f"this is the run of a repair: give the model in it, {run / 'checkpoint'}"
    )
