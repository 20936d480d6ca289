"""What a scan refuses before weights are read, what it writes when it fails, and the texts that it names."""

from __future__ import annotations

import json

import pytest
from refusals import assert_failed, refused
from wonderland import documents, jsonl

from mismatch import cli
from mismatch.errors import NumericsError
from mismatch.stages.scan.batches import prove


@pytest.fixture
def words(toy_folder, tmp_path):
    held_out = jsonl(tmp_path / "held_out.jsonl", documents(4))
    calibration = jsonl(tmp_path / "calibration.jsonl", documents(3, seed=1))
    return [
        *("scan", "--model", str(toy_folder), "--device", "cpu", "--quiet", "--swap", "mean"),
        *("--data", str(held_out), "--calibration-data", str(calibration), "--tokens", "128"),
        *("--calibration-tokens", "128", "--seq-len", "64", "--tasks", "text", "--controls", "none"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--among", "0-4"], "layer 4 does not exist: the model has 4 layers"),
        (["--swap", "norm2:nope"], "`nope` cannot go into the slot `norm2`"),
        (["--swap", "layer1:zero"], "`layer1` is a target: here mechanisms stand without one"),
        (["--swap", "mlp:zero", "--by", "head"], "the slot `mlp` has no heads"),
        (["--swap", "lora", "--by", "kv-head"], "`lora` cannot take some heads"),
        (["--by", "head", "--controls", "skip"], "`skip` cannot take some heads"),
        (["--by", "row"], "row"),
        (["--seq-len", "4096", "--tokens", "8192"], "longer than the context of"),
        (["--tasks", "text,passkey", "--length", "512"], "longer than the context of"),
        (["--tokens", "32"], "--tokens 32 is less than one window of --seq-len 64"),
        (["--data", "nowhere.txt"], "no text nowhere.txt"),
        (["--calibration-data", "nowhere.txt"], "no text nowhere.txt"),
    ],
)
def test_what_is_refused_leaves_nothing_and_loads_nothing(words, tmp_path, capsys, more, text):
    assert text in refused([*words, *more], tmp_path, capsys)
    assert text in refused([*words, *more, "--output", str(tmp_path / "run")], tmp_path, capsys)


def test_texts_are_refused_before_weights(words, tmp_path, capsys):
    short = jsonl(tmp_path / "short.jsonl", ["a b c"])
    err = refused([*words, "--calibration-data", str(short)], tmp_path, capsys)
    assert f"{short}: no document fills a window of --seq-len 64" in err
    both = jsonl(tmp_path / "both.jsonl", [*documents(1), *documents(2, seed=1)])
    err = refused([*words, "--calibration-data", str(both)], tmp_path, capsys)
    assert "share 1 document" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    err = refused([*words, "--output", str(tmp_path / "full")], tmp_path, capsys)
    assert "exists and is not empty" in err
    err = refused([*words, "--output", str(tmp_path / "full"), "--overwrite"], tmp_path, capsys)
    assert "is not a run folder and is not overwritten: it holds note.txt" in err


def test_a_scan_that_fails_says_so_in_its_folder(words, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def fails(*args):
        raise NumericsError("planted", hint="none")

    monkeypatch.setattr("mismatch.stages.scan.stage.prove", fails)
    assert cli.main([*words, "--output", str(run)]) == 4
    assert capsys.readouterr().err == "error: planted\n\nhint: none\n"
    assert_failed(run, "planted\n\nhint: none")
    # It is not done, so it can go on.
    monkeypatch.setattr("mismatch.stages.scan.stage.prove", prove)
    assert cli.main(["scan", "--resume", str(run), "--quiet"]) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["resumed"]) == ("done", 1)


def test_every_text_is_named_and_hashed(words, tmp_path):
    run = tmp_path / "run"
    assert cli.main([*words, "--output", str(run)]) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    texts = manifest["texts"]
    assert {role: text["source"] for role, text in texts.items()} == {
        "evaluation": str(tmp_path / "held_out.jsonl"),
        "calibration": str(tmp_path / "calibration.jsonl"),
    }
    assert (texts["evaluation"]["windows"], texts["evaluation"]["tokens"]) == (2, 128)
    assert texts["calibration"]["tokens"] == 128
    for role, text in texts.items():
        assert manifest["fingerprints"][role] == text["fingerprint"]


def test_a_scan_without_text_still_calibrates(words, tmp_path):
    run = tmp_path / "run"
    more = ["--tasks", "induction", "--samples", "2", "--output", str(run)]
    assert cli.main([*words, *more]) == 0
    assert list(json.loads((run / "manifest.json").read_text())["texts"]) == ["calibration"]
