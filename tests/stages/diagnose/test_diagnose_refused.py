"""What a diagnosis refuses before weights are read, and how it ends when it fails or is stopped."""

from __future__ import annotations

import json

import pytest
from refusals import assert_failed, refused
from wonderland import documents, jsonl

from mismatch import cli
from mismatch.errors import NumericsError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose")
    jsonl(folder / "held_out.jsonl", documents(8))
    jsonl(folder / "calibration.jsonl", documents(8, seed=1))
    return folder


@pytest.fixture(scope="module")
def words(toy_folder, folder):
    return [
        *("diagnose", "--model", str(toy_folder), "--swap", "layer2:zero", "--device", "cpu", "--quiet"),
        *("--data", str(folder / "held_out.jsonl"), "--tokens", "256", "--seq-len", "64"),
        *("--calibration-data", str(folder / "calibration.jsonl"), "--fit-tokens", "256"),
        *("--controls", "none", "--heads", "0"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def probed(words, folder):
    """A finished probe of the same swap."""
    run = folder / "probe"
    mine = words[words.index("--model") : words.index("--fit-tokens")]
    at = mine.index("--tokens")
    more = ("--probes", "induction", "--samples", "3", "--controls", "none", "--output", str(run))
    assert cli.main(["probe", *mine[:at], *mine[at + 2 :], *more]) == 0
    return run


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--fit-tokens", "128"], "corrections are fitted on 4 or more"),
        (["--tokens", "32"], "--tokens 32 is less than one window of --seq-len 64"),
        (["--tokens", "64"], "a diagnosis rests on intervals; no interval: that takes"),
        (["--seq-len", "4096", "--tokens", "8192", "--fit-tokens", "16384"], "longer than the context of"),
        (["--controls", "zero,zero"], "the mechanism `zero` is named twice"),
        (["--data", "nowhere.txt"], "no text nowhere.txt"),
        (["--calibration-data", "nowhere.txt"], "no text nowhere.txt"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_nothing_and_loads_nothing(words, tmp_path, capsys, more, text):
    assert text in refused([*words, *more, "--output", str(tmp_path / "run")], tmp_path, capsys)


def of(words, swap):
    """The command about another swap."""
    return [swap if word == "layer2:zero" else word for word in words]


@pytest.mark.parametrize(
    ("swap", "text", "code"),
    [
        ("layer9:zero", "layer 9 does not exist: the model has 4 layers", 2),
        ("layer2:nothing", "unknown mechanism `nothing`", 2),
        ("final_norm:dyt", "nothing to diagnose stands inside a block", 1),
    ],
)
def test_a_swap_is_refused_before_weights(words, tmp_path, capsys, swap, text, code):
    given = [*of(words, swap), "--output", str(tmp_path / "run")]
    assert text in refused(given, tmp_path, capsys, code)


def test_texts_are_refused_before_weights(words, tmp_path, capsys):
    short = jsonl(tmp_path / "short.jsonl", documents(1, words=60, seed=5))
    err = refused([*words, "--calibration-data", str(short)], tmp_path, capsys)
    assert "windows of calibration text; corrections are fitted on 4 or more" in err
    both = jsonl(tmp_path / "both.jsonl", [*documents(1), *documents(8, seed=9)])
    err = refused([*words, "--calibration-data", str(both)], tmp_path, capsys)
    assert "share 1 document" in err


def test_an_earlier_run_of_another_swap_or_model(words, probed, model_folder, tmp_path, capsys):
    given = [*words, "--earlier-run", str(probed), "--output", str(tmp_path / "run")]
    err = refused([*words, "--earlier-run", "nowhere"], tmp_path, capsys, code=1)
    assert "there is no run in nowhere" in err
    err = refused(of(given, "layer1:zero"), tmp_path, capsys)
    assert "is of another swap: layer2:zero; this one is layer1:zero" in err
    # Of another model: the weights tell, and there is still no folder.
    other = model_folder(rms_norm_eps=1e-3)
    assert cli.main([*given, "--model", str(other)]) == 2
    assert f"the run in {probed} is of another model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_diagnosis_that_fails_says_so_in_its_folder(words, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def fails(*args):
        raise NumericsError("planted", hint="none")

    monkeypatch.setattr("mismatch.stages.diagnose.stage.TakenApart", fails)
    assert cli.main([*words, "--output", str(run)]) == 4
    assert capsys.readouterr().err == "error: planted\n\nhint: none\n"
    assert_failed(run, "planted\n\nhint: none")


def test_stopped_it_begins_anew(words, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("mismatch.stages.diagnose.stage.TakenApart", stopped)
    assert cli.main([*words, "--output", str(run)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    assert cli.main(["report", str(run)]) == 1
    assert "mismatch diagnose begins anew" in capsys.readouterr().err


def test_every_text_is_named_and_hashed(words, folder, tmp_path):
    run = tmp_path / "run"
    assert cli.main([*words, "--output", str(run)]) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    texts = manifest["texts"]
    assert {role: (text["source"], text["tokens"]) for role, text in texts.items()} == {
        "evaluation": (str(folder / "held_out.jsonl"), 256),
        "fit": (str(folder / "calibration.jsonl"), 256),
    }
    for role, text in texts.items():
        assert manifest["fingerprints"][role] == text["fingerprint"]
