"""What every command holds to: what is refused is refused before weights and leaves nothing; what fails is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mismatch import cli


def no_weights(*_args, **_options):
    raise AssertionError("the weights were read")


def refused(
    words: list[str], folder: Path, capsys: pytest.CaptureFixture[str], code: int = 2
) -> str:
    """What a refused command prints; `folder` is as it was, and no weight was read."""
    before = set(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mismatch.surgery.loading.load", no_weights)
        patch.chdir(folder)  # a run folder without --output would be made here
        assert cli.main(words) == code
    assert set(folder.rglob("*")) == before
    out, err = capsys.readouterr()
    assert out == ""
    return err


def assert_failed(run: Path, error: str) -> None:
    """A run that failed says so, and with which error, in its manifest and its log."""
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", error)
    assert (run / "log.txt").read_text().rstrip("\n").endswith(f" failed: {error}")
    assert not (run / "metrics.parquet").exists()
