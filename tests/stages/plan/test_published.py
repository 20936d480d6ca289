"""Published lists beside what plans and scans chose, and files of lists that are refused."""

from __future__ import annotations

import json

import pytest
from wonderland import documents, jsonl

from mismatch import cli
from mismatch.errors import DataError
from mismatch.stages.plan.published import read

LISTS = "model: glassllm\nlayers: 4\nreplaced:\n  mine: [1, 3]\nkept:\n  theirs: [0, 1, 2]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_folder):
    """A plan of even spacing, which is layers 1 and 3, and a scan; of a model that is called glassllm."""
    folder = tmp_path_factory.mktemp("published")
    model = folder / "glassllm"
    model.symlink_to(toy_folder)
    shared = [
        *("--model", str(model), "--device", "cpu", "--quiet", "--controls", "none", "--seq-len", "64"),
        *("--data", str(jsonl(folder / "text.jsonl", documents(8))), "--samples", "2", "--length", "120"),
        *("--tokens", "256"),
    ]  # fmt: skip
    plan = ["plan", *shared, "--mechanism", "zero", "--layers", "2", "--selection-tokens", "256"]
    assert cli.main([*plan, "--score", "even", "--output", str(folder / "plan")]) == 0
    scan = ["scan", *shared, "--swap", "zero", "--tasks", "text", "--output", str(folder / "scan")]
    assert cli.main(scan) == 0
    return folder


def told(folder, text, *runs):
    path = folder / "lists.yaml"
    path.write_text(text)
    return ["compare", *(str(folder / run) for run in runs), "--ranking", str(path)]


def test_lists_beside_a_plan_and_a_scan(folder, capsys):
    capsys.readouterr()
    assert cli.main([*told(folder, LISTS, "plan", "scan"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    found = {(row["run"], row["choice"], row["list"]): row for row in rows}
    assert found["plan", "even", "mine"] == {
        "run": "plan", "choice": "even", "list": "mine", "shared": 2, "of": 2, "chance": 1.0, "p": pytest.approx(1 / 6),
    }  # fmt: skip
    # `theirs` keeps all but layer 3.
    assert (found["plan", "even", "theirs"]["shared"], found["plan", "even", "theirs"]["of"]) == (
        1,
        1,
    )
    assert found["scan", "zero, text", "theirs"]["p"] in (0.25, 1.0)
    assert found["", "mine", "theirs"]["shared"] == 1
    assert cli.main(told(folder, LISTS, "plan")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "choice",
        "beside",
        "shared",
        "by",
        "chance",
        "p",
        "of",
        "as",
        "many",
        "by",
        "chance",
    ]
    assert lines[1].split() == ["plan", "even", "mine", "2", "of", "2", "1.0", "0.167"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("glassllm", "Qwen2.5-3B"), "are of Qwen2.5-3B with 4 layers, and the run in"),
        (("layers: 4", "layers: 36"), "are of glassllm with 36 layers, and the run in"),
        (("layers: 4", "layers: 0"), "{path}: `layers` must be >= 1, got 0"),
        (("layers: 4", "layers: 1000000000000"), "with 1000000000000 layers, and the run in"),  # not counted up
        (("[1, 3]", "[1, 4]"), "the list `mine` in {path} names layer 4: the model has 4 layers (0-3)"),
        (("[1, 3]", "[1, 1]"), "the list `mine` in {path} names a layer twice"),
        (("[1, 3]", "[]"), "the list `mine` in {path} names no layer"),
        (("[1, 3]", "[x]"), "{path} is no file of layer lists: `replaced.mine[0]` must be int, got 'x'"),
        (("theirs", "mine"), "{path} has the list `mine` twice: replaced and kept"),
        (("model: glassllm", "of: it"), "{path} is no file of layer lists: `model` is missing"),
        (("layers: 4", "layers: ["), "{path} is not YAML"),
    ],
)  # fmt: skip
def test_lists_that_are_refused(folder, capsys, change, message):
    assert cli.main(told(folder, LISTS.replace(*change), "plan")) == 2
    assert message.format(path=folder / "lists.yaml") in capsys.readouterr().err


def test_what_is_no_file_of_lists(tmp_path):
    (tmp_path / "empty.yaml").write_text("model: a\nlayers: 3\n")
    with pytest.raises(DataError, match="holds no list of layers"):
        read(tmp_path / "empty.yaml")
    with pytest.raises(DataError):
        read(tmp_path / "nowhere.yaml")


def test_a_run_that_chose_nothing(folder, capsys, toy_folder):
    assert cli.main([
        *("trace", "--model", str(toy_folder), "--swap", "layer1:zero", "--device", "cpu", "--quiet"),
        *("--data", str(folder / "text.jsonl"), "--seq-len", "64", "--controls", "none", "--metrics", "kl"),
        *("--tokens", "128", "--output", str(folder / "trace")),
    ]) == 0  # fmt: skip
    capsys.readouterr()
    assert cli.main(told(folder, LISTS, "trace")) == 2
    assert "is a trace: it chose no layers" in capsys.readouterr().err
