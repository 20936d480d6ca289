"""Documents that chose, calibrated or trained are not reported on, from one command to the next."""

from __future__ import annotations

import json

import pytest
from measured import cut
from refusals import refused
from wonderland import documents, jsonl

from mismatch import cli
from mismatch.errors import DataError
from mismatch.stages.chosen_on import ChosenOn
from mismatch.stages.text_role import MOST, Text, short
from mismatch.texts.documents import read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chosen")
    jsonl(folder / "text.jsonl", documents(12))
    jsonl(folder / "other.jsonl", documents(4, seed=1))
    return folder


@pytest.fixture(scope="module")
def shared(toy_folder, folder):
    return [
        *("--model", str(toy_folder), "--device", "cpu", "--quiet", "--seq-len", "64"),
        *("--data", str(folder / "text.jsonl"), "--controls", "none"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def scan(shared, folder):
    """A scan of text alone: it chooses on four documents."""
    run = folder / "scan"
    asked = ["--swap", "zero", "--tasks", "text", "--tokens", "256", "--output", str(run)]
    assert cli.main(["scan", *shared, *asked]) == 0
    return run


@pytest.fixture(scope="module")
def plan(shared, scan, folder):
    run = folder / "plan"
    asked = ["--mechanism", "zero", "--layers", "1", "--scan", str(scan), "--tokens", "256"]
    assert cli.main(["plan", *shared, *asked, "--samples", "2", "--output", str(run)]) == 0
    return run


def manifest(run):
    return json.loads((run / "manifest.json").read_text())


def digests(run, role="evaluation"):
    return set(manifest(run)["texts"][role]["digests"])


TRACE = ["--swap", "layer1:zero", "--tokens", "768"]


def test_a_trace_of_what_a_plan_chose_is_on_other_documents(shared, scan, plan, tmp_path, capsys):
    run = tmp_path / "trace"
    asked = [*TRACE, "--metrics", "kl", "--selected-by", str(plan), "--output", str(run)]
    assert cli.main(["trace", *shared, *asked]) == 0
    assert len(digests(run)) == 8  # of twelve
    assert not digests(run) & digests(scan)
    # What a plan only reports may be reported again.
    assert digests(plan) <= digests(run)
    assert set(manifest(run)["chosen_on"]["digests"]) == digests(scan)
    assert manifest(run)["chosen_on"]["run"] == "plan"
    # Told to, it takes all twelve, and says so.
    capsys.readouterr()
    said = [*asked[:-1], str(tmp_path / "said"), "--allow-overlap"]
    assert cli.main(["trace", *shared, *said]) == 0
    assert len(digests(tmp_path / "said")) == 12
    assert manifest(tmp_path / "said")["texts"]["evaluation"]["overlap"] == 4
    out = capsys.readouterr().out
    assert "4 of these documents chose, calibrated or trained what is evaluated here" in out


def test_a_control_without_an_earlier_run_sees_all_documents(shared, tmp_path):
    run = tmp_path / "trace"
    assert cli.main(["trace", *shared, *TRACE, "--metrics", "kl", "--output", str(run)]) == 0
    assert len(digests(run)) == 12
    assert "chosen_on" not in manifest(run)


def test_a_repair_hands_on_what_it_knows(shared, scan, plan, folder, tmp_path):
    run, after = tmp_path / "repair", tmp_path / "after"
    asked = [
        *("--swap", "layer1:linear_attention", "--stages", "closed-form", "--train-data"),
        *(str(folder / "other.jsonl"), "--train-tokens", "512", "--tokens", "256", "--val-tokens", "128"),
        *("--self-generated", "0", "--retrieval-text", "0", "--trace-tokens", "0", "--probes", "none"),
        *("--selected-by", str(plan), "--output", str(run)),
    ]  # fmt: skip
    assert cli.main(["repair", *shared, *asked]) == 0
    for role in ("evaluation", "validation"):
        assert not digests(run, role) & digests(scan)
    trace = [*TRACE, "--metrics", "kl", "--selected-by", str(run), "--output", str(after)]
    assert cli.main(["trace", *shared, *trace]) == 0
    assert not digests(after) & (digests(scan) | digests(run, "validation"))
    assert digests(run, "training") <= set(manifest(after)["chosen_on"]["digests"])
    assert digests(run) <= digests(after)  # what it reported on


def test_what_is_refused_before_weights(shared, scan, folder, tmp_path, capsys):
    chosen = ["--selected-by", str(scan)]
    few = jsonl(tmp_path / "few.jsonl", [])
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    with_digest = {short(d): t for d, t in zip(read(texts).hashes, texts, strict=True)}
    jsonl(few, [with_digest[one] for one in digests(scan)])
    words = ["trace", *shared, "--data", str(few), *TRACE, "--tokens", "256", *chosen]
    err = refused([*words, "--output", str(tmp_path / "run")], tmp_path, capsys)
    assert f"all 4 documents are such that {scan} chose, calibrated or trained on" in err
    assert "hint: give other --data; or take --allow-overlap" in err
    nowhere = ["trace", *shared, *TRACE, "--selected-by", "nowhere"]
    assert "there is no run in nowhere" in refused(nowhere, tmp_path, capsys, code=1)


def test_digests_are_bounded_and_large_overlaps_are_still_found():
    texts = read([f"{at} a b c" for at in range(3 * MOST)])
    windows = cut(8)
    whole = Text(texts, windows.__class__(**{**vars(windows), "names": texts.names}))
    assert len(whole.digests) == MOST == len(set(whole.digests))
    chosen = ChosenOn("x", frozenset(whole.digests))
    assert sum(chosen.shared(texts)) == MOST
    with pytest.raises(DataError):
        chosen.without(texts.without(not one for one in chosen.shared(texts)))
    assert len(chosen.without(texts)) == 2 * MOST
