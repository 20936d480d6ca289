"""What a plan refuses before weights are read, how it fails and stops, and the texts that it keeps apart."""

from __future__ import annotations

import json
import signal

import pytest
from refusals import assert_failed, refused
from wonderland import documents, jsonl

import mismatch
from mismatch import cli
from mismatch.errors import NumericsError
from mismatch.runs.folder import load_run
from mismatch.stages.scan import batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts, and what the module's own scan is written into."""
    folder = tmp_path_factory.mktemp("plan")
    jsonl(folder / "held_out.jsonl", documents(8))
    jsonl(folder / "calibration.jsonl", documents(3, seed=1))
    jsonl(folder / "other.jsonl", documents(8, seed=2))
    return folder


@pytest.fixture(scope="module")
def shared(toy_folder, folder):
    return [
        *("--model", str(toy_folder), "--device", "cpu", "--quiet", "--tokens", "256"),
        *("--data", str(folder / "held_out.jsonl"), "--seq-len", "64", "--samples", "2"),
        *("--calibration-data", str(folder / "calibration.jsonl"), "--calibration-tokens", "128"),
        *("--length", "120", "--controls", "none"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def words(shared):
    return ["plan", *shared, "--mechanism", "zero", "--layers", "2", "--selection-tokens", "256"]


@pytest.fixture(scope="module")
def scan(shared, folder):
    """A finished scan of text alone."""
    run = folder / "scan"
    assert (
        cli.main(["scan", *shared, "--swap", "zero", "--tasks", "text", "--output", str(run)]) == 0
    )
    return run


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--among", "3-9"], "layer 9 does not exist: the model has 4 layers"),
        (["--layers", "5"], "5 layers asked for, and 4 can hold zero\n\nhint: take --layers 4"),
        (["--layers", "5", "--method", "greedy"], "5 layers asked for, and 4 can hold zero"),
        (["--layers", "5", "--score", "even"], "5 layers asked for, and 4 can hold zero"),
        (["--layers", "5", "--score", "restore_one"], "5 layers asked for, and 4 can hold zero"),
        (["--keep-retrieval", "--length", "200"], "needs a passkey, and none is measured: a passkey prompt"),
        (
            ["--keep-retrieval", "--length", "200", "--method", "greedy"],
            "needs a passkey, and none is measured: a passkey prompt",
        ),
        (["--selection-tokens", "65536"], "none is left to evaluate it on"),
        (["--selection-tokens", "32"], "--selection-tokens 32 is less than one window of --seq-len 64"),
        (["--tokens", "32"], "--tokens 32 is less than one window of --seq-len 64"),
        (["--data", "nowhere.txt"], "no text nowhere.txt"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_nothing_and_loads_nothing(words, tmp_path, capsys, more, text):
    assert text in refused([*words, *more, "--output", str(tmp_path / "run")], tmp_path, capsys)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--mechanism", "nope"], "has no `nope`"),
        (["--layers", "5"], "5 layers asked for, and 4 can hold zero"),
        (["--budget-kl", "0.0001"], "no choice of 2 layers stays within a KL of 0.000100"),
        (["--keep-retrieval"], "needs a passkey, and none is measured: the scan left it out"),
    ],
)  # fmt: skip
def test_a_finished_scan_is_refused_before_weights(words, scan, tmp_path, capsys, more, text):
    given = [*words, "--scan", str(scan), *more, "--output", str(tmp_path / "run")]
    assert text in refused(given, tmp_path, capsys)


def test_folders_are_refused_before_weights(words, tmp_path, capsys):
    err = refused([*words, "--scan", "nowhere"], tmp_path, capsys, code=1)
    assert "there is no run in nowhere" in err
    beside = tmp_path / "run-scan"
    beside.mkdir()
    (beside / "note.txt").write_text("mine")
    given = [*words, "--output", str(tmp_path / "run")]
    assert "run-scan exists and is not empty" in refused(given, tmp_path, capsys)
    assert "it holds note.txt" in refused([*given, "--overwrite"], tmp_path, capsys)


def test_a_scan_by_heads_is_refused(words, shared, tmp_path, capsys):
    run = tmp_path / "heads"
    asked = ["--swap", "zero", "--tasks", "text", "--by", "kv-head", "--among", "1"]
    assert cli.main(["scan", *shared, *asked, "--output", str(run)]) == 0
    assert load_run(run).table["head"].dropna().nunique() > 1
    capsys.readouterr()
    err = refused([*words, "--scan", str(run)], tmp_path, capsys)
    assert "is by kv-head, and a plan chooses whole layers" in err


def texts_of(run):
    return json.loads((run / "manifest.json").read_text())["texts"]


def test_the_text_that_chose_and_the_text_that_is_evaluated(words, scan, folder, tmp_path):
    """The choice names the text of the scan; the numbers are of other documents, however they are cut."""
    theirs = texts_of(scan)["evaluation"]
    assert len(theirs["digests"]) == theirs["documents"] == 4
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((folder / "held_out.jsonl").read_bytes())
    made = {}
    for name, more in (
        ("new", []),
        ("given", ["--scan", str(scan)]),
        ("short", ["--scan", str(scan), "--seq-len", "32", "--seed", "1"]),
        ("copy", ["--scan", str(scan), "--data", str(copy)]),
        ("other", ["--scan", str(scan), "--data", str(folder / "other.jsonl")]),
    ):
        run = tmp_path / name
        assert cli.main([*words, *more, "--output", str(run)]) == 0
        made[name] = texts_of(run)
        assert made[name]["selection"] == theirs
        evaluated = made[name]["evaluation"]
        assert evaluated["overlap"] == 0 and evaluated["tokens"] == 256
        assert not set(evaluated["digests"]) & set(theirs["digests"])
    assert made["new"] == made["given"]


def test_where_no_document_is_left_it_is_refused_or_said(words, shared, folder, tmp_path, capsys):
    run, few = tmp_path / "all", jsonl(tmp_path / "few.jsonl", documents(4))
    every = ["--data", str(few), "--tokens", "256"]
    assert (
        cli.main(
            ["scan", *shared, *every, "--swap", "zero", "--tasks", "text", "--output", str(run)]
        )
        == 0
    )
    capsys.readouterr()
    given = [*words, "--scan", str(run), *every]
    err = refused([*given, "--output", str(tmp_path / "run")], tmp_path, capsys)
    assert (
        f"error: {few}: all 4 documents are such that {run} chose, calibrated or trained on, and none is left to "
        "evaluate it on: a number would be reported on what it was chosen by\n\n"
        "hint: give other --data; or take --allow-overlap, and the report says that they are the same\n"
    ) in err
    # Told so, it takes what stands behind the windows that chose, and says so.
    said = [*given, "--allow-overlap", "--output", str(tmp_path / "said")]
    assert cli.main(said) == 0
    assert "4 of these documents chose, calibrated or trained what is evaluated here" in (
        capsys.readouterr().out
    )
    texts = texts_of(tmp_path / "said")
    assert texts["evaluation"]["overlap"] == 4
    assert texts["evaluation"]["fingerprint"] != texts["selection"]["fingerprint"]
    # Documents that are left, and too short for a window, are none.
    more = jsonl(tmp_path / "more.jsonl", [*documents(4), "Short.", "Shorter."])
    said[-1] = str(tmp_path / "short")
    assert cli.main([*said, "--data", str(more)]) == 0
    assert texts_of(tmp_path / "short")["evaluation"]["overlap"] == 4
    # A scan that does not say what it chose on is not believed.
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["texts"]["evaluation"]["digests"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main([*given, "--output", str(tmp_path / "run")]) == 1
    assert f"the run in {run} does not say on which documents it chose" in capsys.readouterr().err


def test_controls_calibrate_where_the_mechanism_does_not(words, tmp_path):
    run = tmp_path / "run"
    assert cli.main([*words, "--controls", "mean", "--output", str(run)]) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["texts"]["calibration"]["tokens"] == 128
    assert "mean" in set(mismatch.load_run(run).table["student"])


def test_a_plan_that_fails_says_so_in_its_folder(words, scan, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def fails(*args):
        raise NumericsError("planted", hint="none")

    monkeypatch.setattr("mismatch.stages.plan.stage.evaluate", fails)
    assert cli.main([*words, "--scan", str(scan), "--output", str(run)]) == 4
    assert capsys.readouterr().err == "error: planted\n\nhint: none\n"
    assert_failed(run, "planted\n\nhint: none")


def test_a_scan_that_fails_inside_a_plan(words, tmp_path, monkeypatch):
    def fails(*args):
        raise NumericsError("planted")

    monkeypatch.setattr("mismatch.stages.scan.stage.prove", fails)
    assert cli.main([*words, "--output", str(tmp_path / "run")]) == 4
    assert_failed(tmp_path / "run", "planted")
    assert_failed(tmp_path / "run-scan", "planted")


def test_stopped_while_it_scans_the_scan_can_go_on(words, tmp_path, capsys, monkeypatch):
    run, beside = tmp_path / "run", tmp_path / "run-scan"
    with monkeypatch.context() as patch:
        real, calls = batches.Sweep.run, []

        def stopped(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return real(self, *args, **kwargs)

        patch.setattr(batches.Sweep, "run", stopped)
        assert cli.main([*words, "--output", str(run)]) == 130
    err = capsys.readouterr().err
    assert err.endswith(
        f"interrupted; {beside} can be resumed\n\nhint: mismatch scan --resume {beside}\n"
    )
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    assert json.loads((beside / "manifest.json").read_text())["status"] == "interrupted"
    assert cli.main(["scan", "--resume", str(beside), "--quiet"]) == 0
    assert cli.main([*words, "--scan", str(beside), "--output", str(tmp_path / "next")]) == 0


def test_stopped_while_it_evaluates_it_begins_anew(words, scan, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mismatch.stages.plan.stage.evaluate", stopped)
    assert cli.main([*words, "--scan", str(scan), "--output", str(run)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    assert cli.main(["plan", "--resume", str(run)]) == 2
