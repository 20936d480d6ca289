"""A diagnosis from Python and from the command line: against references, its files, its words, what it refuses."""

from __future__ import annotations

import itertools
import json

import faults
import numpy as np
import pytest
import torch
from plans import read_back, replaced
from wonderland import documents, jsonl

import mismatch
from mismatch import cli
from mismatch.errors import ConfigError, DataError, NumericsError, SurgeryError, UsageError
from mismatch.forward.heldout import Evaluated
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.stages.diagnose.corrections import CAUSES, SUBSETS
from mismatch.stages.diagnose.numbers import Found
from mismatch.stages.diagnose.shapley import causes_of
from mismatch.stages.diagnose.verdict import verdicts

SMALL = {"fit_tokens": 1024, "tokens": 512, "seq_len": 64, "scored": 1.0, "calibration_tokens": 256}
SWAP = "layer2:infini(segment=16)"


@pytest.fixture(scope="module")
def texts():
    return {"data": documents(8), "calibration_data": documents(8, seed=1)}


@pytest.fixture(scope="module")
def diagnosed(toy_teacher, texts):
    return mismatch.diagnose(toy_teacher, SWAP, **texts, **SMALL)


def log_probs(model, ids):
    with torch.no_grad():
        return model(ids).logits.double().log_softmax(-1)


def windows_of(teacher, texts):
    from mismatch.texts.documents import read
    from mismatch.texts.windows import windows

    cut = windows(read(texts["data"]), teacher.tokenizer, 64, 512, 0)
    return torch.from_numpy(cut.ids)


# numbers against references ----------------------------------------------------------------------


def test_the_damage_is_what_a_trace_says(diagnosed, toy_teacher, texts):
    traced = mismatch.trace(
        toy_teacher, swap=SWAP, tokens=512, seq_len=64, controls=("zero",), metrics=("kl", "nll"),
        calibration_tokens=256, **texts,
    ).table  # fmt: skip
    rows = traced[(traced["site"] == "logits") & (traced["position"] == "all")]
    for student, ours in (
        ("swap", diagnosed.found.damage), ("zero", diagnosed.found.controls["zero"]),
    ):  # fmt: skip
        row = rows[
            (rows["student"] == student) & (rows["metric"] == "kl") & (rows["stat"] == "mean")
        ]
        theirs = tuple(row.iloc[0][["value", "lo", "hi", "n"]])
        assert (ours.value, ours.lo, ours.hi, ours.n) == pytest.approx(theirs, rel=1e-4)


def test_a_correction_is_the_student_with_that_changed(diagnosed, toy_teacher, texts):
    """By hand: whole models, one hook, log-probabilities in float64."""
    ids = windows_of(toy_teacher, texts)
    student = mismatch.swap(toy_teacher, SWAP)
    theirs = toy_teacher.model.model.layers[2].self_attn
    ours = student.model.model.layers[2].self_attn
    seen = {}
    handle = theirs.register_forward_hook(lambda m, a, out: seen.update(y=out[0]))
    p = log_probs(toy_teacher.model, ids)
    handle.remove()

    def kl(change):
        handle = ours.register_forward_hook(lambda m, a, out: (change(out[0]), out[1]))
        q = log_probs(student.model, ids)
        handle.remove()
        return float((p.exp() * (p - q)).sum(-1).mean())

    fitted = diagnosed.found.places[0]["fitted"]
    bulk = torch.ones(ids.shape, dtype=torch.bool)
    bulk[:, 0] = False

    def sized(s):
        ratio = fitted["size"] * seen["y"].norm(dim=-1) / s.norm(dim=-1)
        return torch.where(bulk[..., None], s * ratio[..., None], s)

    for name, change in (
        ("swap", lambda s: s),
        ("first", lambda s: torch.cat([seen["y"][:, :1], s[:, 1:]], 1)),
        ("size", sized),
    ):
        wanted = diagnosed.found.damage if name == "swap" else diagnosed.found.get(name).kl
        assert wanted.value == pytest.approx(kl(change), rel=1e-3)
    assert kl(lambda s: seen["y"]) < 1e-12
    one = mismatch.swap(toy_teacher, f"{SWAP[:-1]}, sinks=1)")
    q = log_probs(one.model, ids)
    given_back = diagnosed.found.get("with first_token").kl.value
    assert given_back == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_places_given_back_whole_leave_the_others(toy_teacher, texts):
    found = mismatch.diagnose(
        toy_teacher, "layer1:infini(segment=16); layer2.mlp:random; layer3.block:zero",
        **texts, **SMALL | {"heads": 0, "controls": ()},
    ).found  # fmt: skip
    assert [(p["layer"], p["site"]) for p in found.places] == [
        (1, "attn_out"), (2, "mlp_out"), (3, "resid_post"),
    ]  # fmt: skip
    ids = windows_of(toy_teacher, texts)
    rest = mismatch.swap(toy_teacher, "layer1:infini(segment=16); layer3.block:zero")
    p, q = log_probs(toy_teacher.model, ids), log_probs(rest.model, ids)
    wanted = float((p.exp() * (p - q)).sum(-1).mean())
    # What the MLP of the teacher adds to the teacher's stream, in a student whose stream is another one.
    assert found.get("layer 2 mlp_out").kl.value == pytest.approx(wanted, rel=0.1)
    assert any(text.startswith("heads") for text in found.not_applicable) is False


def test_shapley_shares_add_up_and_split_what_two_can_mend():
    names = tuple(CAUSES)
    value = dict(zip(SUBSETS, (0.6, 0.6, 0.1, 0.6, 0.7, 0.7, 0.8), strict=True))
    docs = np.array([10.0, 20.0, 5.0, 8.0])

    def evaluated(kl):
        return Evaluated(*[PerDocument(kl, np.full(4, 7.0))] * 2)

    joint = {chosen: evaluated(docs * (1 - v)) for chosen, v in value.items()}
    shares, rest = causes_of(joint, evaluated(docs))
    # The textbook formula, with weights by the size of the set that stands before.
    for name in names:
        others = [n for n in names if n != name]
        wanted = 0.0
        for size, weight in ((0, 1 / 3), (1, 1 / 6), (2, 1 / 3)):
            for before in itertools.combinations(others, size):
                after = tuple(n for n in names if n in (*before, name))
                wanted += weight * (value[after] - value.get(before, 0.0))
        assert shares[name].value == pytest.approx(wanted)
    assert shares["distribution"].value == pytest.approx(shares["position"].value)
    assert sum(s.value for s in shares.values()) + rest.value == pytest.approx(1.0)
    assert rest.lo == pytest.approx(0.2)  # the same in every document: nothing to be unsure of


# result, words, files ----------------------------------------------------------------------------


def test_the_result(diagnosed):
    found = diagnosed.found
    assert diagnosed.run_dir is None
    assert read_back(found) == found
    assert read_back(diagnosed.plan) == diagnosed.plan
    assert set(found.causes) == set(CAUSES)
    total = sum(share.value for share in found.causes.values()) + found.unexplained.value
    assert total == pytest.approx(1.0)
    assert diagnosed.verdict.startswith(f"KL {found.damage.value:.3g} nats per token [")
    assert {"without memory", "without local", "with first_token"} <= {
        r.name for r in found.corrections
    }
    assert len([r for r in found.corrections if r.head is not None]) == 3
    assert found.places[0]["update_to_stream"] > 0
    assert found.behind["layers"] == [2, 3]
    assert found.behind["growth"] == pytest.approx(
        found.behind["errors"][1] / found.behind["errors"][0]
    )
    rows = diagnosed.table
    assert set(rows["stage"]) == {"diagnose"}
    row = rows[rows["stat"] == "recovered[correction=scale]"].iloc[0]
    assert row["value"] == found.get("scale").share.value
    assert "* " in diagnosed.summary() or found.leading is None
    assert len(diagnosed.figure().axes) == 5
    assert diagnosed.shares["panel"].iloc[0] == "cause"


def test_no_branches_and_no_rope_are_not_applicable(toy_teacher, texts):
    found = mismatch.diagnose(
        toy_teacher, "layer1.mlp:random", **texts, **SMALL | {"controls": ()}
    ).found
    assert found.not_applicable == (
        "rope: no attention is swapped",
        "heads: the swapped module does not share the output projection of the teacher's heads",
        "branches: random names no branch and nothing that it could restore",
    )
    assert not any(r.group == "part" for r in found.corrections)


def test_every_verdict_names_a_next_command(diagnosed, toy_teacher):
    from mismatch.stages.diagnose.config import DiagnoseConfig

    config = DiagnoseConfig(model="m", swap=("layer18:infini(segment=64); layer16:nope",))
    reading = {
        "probe": "passkey",
        "what": "passkey logprob",
        "teacher": -0.07,
        "value": -8.9,
        "lo": -9.5,
        "hi": -8.1,
    }
    clauses = [replaced("infini", "attn"), replaced("nope", "rope")]
    found = Found(**{**vars(diagnosed.found), "evidence": (reading,)})
    said = verdicts(found, config, clauses)
    first = said[0]  # the worst
    assert (first.severity, first.title) == (
        "high",
        "retrieval is carried here (passkey -8.90 nats)",
    )
    assert "Do not replace the part" in first.text
    assert first.next == (
        'mismatch trace --model m --swap "layer18.attn:parallel(infini(segment=64), alpha=0.1); '
        'layer16.rope:parallel(nope, alpha=0.1)"'
    )
    # Where attention alone was swapped, what keeps retrieval is named; a teacher that guesses says nothing.
    single = DiagnoseConfig(model="m", swap=("layer18:infini(segment=64)",))
    needles = reading | {"probe": "needles", "teacher": -0.2, "value": -1.7, "lo": -1.8, "hi": -1.6}
    for teacher, told in ((-0.2, 1), (-2.2, 0)):
        evidence = (needles | {"teacher": teacher},)
        found = Found(**{**vars(diagnosed.found), "evidence": evidence})
        first = [f for f in verdicts(found, single, clauses[:1]) if "retrieval" in f.title]
        assert len(first) == told
        assert all("kv_slots(slots=96" in f.next and "mismatch repair" in f.next for f in first)
    sure = [f for f in said if f.severity in ("medium", "high") and "behind" not in f.title]
    assert all(f.next for f in sure)
    assert not [f for f in verdicts(diagnosed.found, config, clauses) if f.severity == "high"]


def words(folder, model, *more):
    held_out = jsonl(folder / "held_out.jsonl", documents(8))
    calibration = jsonl(folder / "calibration.jsonl", documents(8, seed=1))
    return [
        *("--model", str(model), "--swap", SWAP, "--device", "cpu", "--quiet"),
        *("--data", str(held_out), "--calibration-data", str(calibration), "--calibration-tokens", "256"),
        *more,
    ]  # fmt: skip


FAST = [
    "--fit-tokens",
    "512",
    "--tokens",
    "256",
    "--seq-len",
    "64",
    "--device",
    "cpu",
    "--heads",
    "1",
]


@pytest.mark.pages
def test_the_command_goes_on_from_a_trace(toy_folder, tmp_path, capsys):
    traced, run = tmp_path / "trace", tmp_path / "why"
    short = ("--tokens", "256", "--seq-len", "64", "--controls", "none", "--metrics", "kl")
    begin = words(tmp_path, toy_folder, *short, "--probes", "induction")
    assert cli.main(["trace", *begin, "--output", str(traced)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(traced)
    assert out[-2].startswith(f"next: mismatch diagnose {traced}")
    assert cli.main(["diagnose", str(traced), *FAST, "--json", "--output", str(run)]) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert made["run"] == str(run)
    assert made["diagnosis"]["evidence"][0]["probe"] == "induction"
    assert f"fit     {tmp_path / 'calibration.jsonl'}, 512 tokens\n" in err
    assert f"text    {tmp_path / 'held_out.jsonl'}, 256 tokens of 4 documents\n" in err
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["kind"], manifest["status"]) == ("diagnose", "done")
    assert json.loads((run / "plan.json").read_text())["verdict"] == made["verdict"]
    assert json.loads((run / "findings.json").read_text()) == made["findings"]
    for name in ("diagnosis.png", "diagnosis.svg", "diagnosis.csv", "diagnosis.json"):
        assert (run / "figures" / name).exists()
    page = (run / "report.html").read_text()
    assert "mismatch diagnose of " in page
    assert "Which correction recovers the damage" in page
    assert not (run / "state").exists()
    # It is not overwritten; another command does not start from it.
    assert cli.main(["diagnose", str(traced), *FAST, "--output", str(run)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert cli.main(["diagnose", str(run), *FAST]) == 2
    assert "was made by `mismatch diagnose`, not by a trace or a probe" in capsys.readouterr().err
    assert cli.main(["diagnose", str(traced), *FAST, "--swap", "layer1:zero"]) == 2
    assert (
        f"the run in {traced} is of another swap: {SWAP}; this one is layer1:zero"
        in capsys.readouterr().err
    )


# what is refused ---------------------------------------------------------------------------------


def test_bad_input(toy_teacher, texts):
    def refuse(error, text, swap="layer2:zero", **more):
        with pytest.raises(error) as caught:
            mismatch.diagnose(toy_teacher, swap, **{**texts, **SMALL, **more})
        assert text in str(caught.value)

    refuse(SurgeryError, "nothing to diagnose stands inside a block", "final_norm:dyt")
    refuse(
        DataError,
        "a diagnosis rests on intervals; no interval: that takes 4",
        data=documents(1, words=60),
    )
    refuse(DataError, "share 1 document", calibration_data=texts["data"][:1] + documents(3, seed=9))
    refuse(
        ConfigError,
        "--fit-tokens 128 are 2 windows of --seq-len 64; corrections are fitted on 4 or more",
        fit_tokens=128,
    )
    refuse(
        DataError, "windows of calibration text", calibration_data=documents(1, words=60, seed=5)
    )
    refuse(
        UsageError, "longer than the context", seq_len=1 << 20, fit_tokens=1 << 23, tokens=1 << 22
    )
    refuse(ConfigError, "the mechanism `zero` is named twice", controls=("zero", "zero"))


def test_few_documents_are_said(toy_teacher, texts):
    made = mismatch.diagnose(
        toy_teacher, "layer2:mean", **texts, **SMALL | {"tokens": 256, "heads": 0}
    )
    assert made.plan.warnings == (
        "4 evaluation documents: intervals are wide; take --tokens 512 or more, or text of more documents",
    )
    assert made.words().splitlines()[2].startswith("warning: 4 evaluation documents")


def test_what_is_not_a_number_ends_it(toy_teacher, texts, monkeypatch):
    faults.plant()
    monkeypatch.setattr(faults.Fault, "_spoilt", lambda self, y: y * float("inf"))
    with pytest.raises(NumericsError) as caught:
        mismatch.diagnose(
            toy_teacher, "layer0:fault", **texts, **SMALL
        )  # layer 0: nothing to share in front
    assert "the KL of the swap is not a number" in str(caught.value)
