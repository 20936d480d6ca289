"""What a run, its report and a checkpoint must not hold: the home folder and secrets."""

from __future__ import annotations

import pytest
from wonderland import command

import mismatch
from mismatch import cli
from mismatch.runs.environment import private

SECRET = "a-secret-of-the-shell"


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home" / "jane"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return folder


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("HOME/texts/a.txt and HOME", "~/texts/a.txt and ~"),
        ("HOMEr/a, /mntHOME/a", "HOMEr/a, /mntHOME/a"),
        ("https://jane:pass@host/x", "https://jane:***@host/x"),
        ("http://host:8080/x@y", "http://host:8080/x@y"),
        ("mismatch x --token abc --tokens 8", "mismatch x --token *** --tokens 8"),
        ("--hub-token=abc", "--hub-token=***"),
        ("https://host/x?access_token=abc&b=1", "https://host/x?access_token=***&b=1"),
        (f"Bearer {SECRET}", "Bearer ***"),
        ("hf_" + "a1B2" * 8, "***"),
        ("KL per token 5, a key to it, --train-tokens 64", "KL per token 5, a key to it, --train-tokens 64"),
    ],
)  # fmt: skip
def test_what_is_taken_out_of_a_text(home, text, left):
    assert private(text.replace("HOME", str(home))) == left.replace("HOME", str(home))


@pytest.mark.pages
def test_no_file_of_a_run_or_a_checkpoint_says_where_one_works(
    home, model_folder, monkeypatch, capsys
):
    model = model_folder().rename(home / "model")
    words = [*command(home, model), "--output", str(home / "run")]
    monkeypatch.setattr("sys.argv", ["mismatch", *words, f"https://jane:{SECRET}@host"])
    assert cli.main(words) == 0
    student = mismatch.swap(mismatch.load(model), "layer1:nope")
    student.save(home / "saved", extra={"made in": str(home)})
    files = [p for folder in ("run", "saved") for p in (home / folder).rglob("*") if p.is_file()]
    assert {"manifest.json", "report.html", "config.yaml", "log.txt", "config.json"} <= {
        path.name for path in files
    }
    for path in files:
        assert str(home).encode() not in path.read_bytes(), path
        assert SECRET.encode() not in path.read_bytes(), path
    assert (home / "run" / "config.yaml").read_text().startswith("model: ~/model\n")
    assert "model with layer1:nope" in mismatch.load(home / "saved").info.note
    # The settings still lead there, and a run is the same run from wherever it is read.
    assert cli.main(["check", "--config", str(home / "run" / "config.yaml")]) == 0
