"""A seventh stage in one file and one line gets a command, a function, --resume, a manifest, a report, exit codes."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pandas as pd
import pytest
from matplotlib.figure import Figure
from wonderland import documents, jsonl

import mismatch
from mismatch import cli
from mismatch.config import DANGEROUS, MODEL, OUTPUT, CalibratedConfig, SwapConfig
from mismatch.errors import ConfigError, UsageError
from mismatch.registry import stages
from mismatch.report.figures import ReportFigure
from mismatch.report.page import tag
from mismatch.report.sections import Section
from mismatch.runs.folder import RunFolder, load_run
from mismatch.stages.base import Outcome, Result, Stage
from mismatch.stages.swapped import swap_texts

# ---- the stage ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CensusConfig(CalibratedConfig, SwapConfig):
    """Settings of `mismatch census`."""

    groups: ClassVar = {
        "model": MODEL,
        "swap": ("swap", "controls"),
        "text": (
            *("data", "tokens", "seq_len", "batch_size", "seed", "limit"),
            *("calibration_data", "calibration_tokens"),
        ),
        "output": OUTPUT,
        "dangerous": DANGEROUS,
    }

    tokens: Annotated[int, ">= 1"] = 128
    """Evaluation tokens."""
    seq_len: Annotated[int, ">= 2"] = 64
    """Tokens per window."""
    limit: Annotated[int, ">= 0"] = 0
    """Exit with 3 above so many new numbers; 0 = never."""


@dataclass(frozen=True, repr=False)
class Counted(Result):
    """What a census returns."""

    @property
    def new(self) -> int:
        return int(self.table.set_index("stat")["value"]["new"])

    def words(self) -> str:
        return f"the swap has {self.new} new numbers"


class Census(Stage):
    help = "Count the parameters of the swap."
    examples = (
        'mismatch census --model smollm2 --swap "layer12:infini"',
        'mismatch census --model smollm2 --swap "norms:dyt" --limit 100',
    )
    resumable = True
    Config = CensusConfig
    Result = Counted

    def prepare(self, opened):
        opened.planned()
        calibration, held_out = swap_texts(opened)
        opened.cut("evaluation", held_out, opened.config.tokens)
        return calibration

    def run(self, opened, prepared):
        swap = opened.students(prepared)[0]
        clause = swap.plan.clauses[0]
        counts = (clause.new_parameters, clause.inherited, clause.dropped)
        rows = [
            {
                **dict.fromkeys(("layer", "lo", "hi")),
                **{
                    "stage": "census",
                    "mode": "free",
                    "site": "logits",
                    "student": "swap",
                    "swapped": True,
                },
                **{"metric": "kl", "stat": stat, "value": float(sum(count.values())), "n": 1},
            }
            for stat, count in zip(("new", "inherited", "dropped"), counts, strict=True)
        ]
        if opened.config.seed == 13:
            raise UsageError("thirteen is refused")
        if opened.config.seed == 14:
            raise KeyboardInterrupt
        return Outcome(rows, {"spec": swap.plan.spec, "clauses": []})

    def exit_code(self, config, result):
        return 3 if config.limit and result.new > config.limit else 0

    def figures(self, run):
        return (ReportFigure("census", "How many", drawn, numbers, "Taller is more."),)

    def sections(self, run):
        return [Section("", (tag("p", "The census is complete."),))]


def drawn(table: pd.DataFrame, **_) -> Figure:
    figure = Figure()
    figure.subplots().bar(table["stat"].astype(str), table["value"])
    return figure


def numbers(table: pd.DataFrame, **_) -> pd.DataFrame:
    return table[["stat", "value"]]


# ---- what it gets ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def census():
    stages().add("census", Census)  # the one line


@pytest.fixture
def words(toy_folder, tmp_path):
    text = jsonl(tmp_path / "text.jsonl", documents(4))
    return [
        *("census", "--model", str(toy_folder), "--swap", "layer2:infini(segment=16)"),
        *("--data", str(text), "--device", "cpu", "--output", str(tmp_path / "run")),
    ]


@pytest.mark.pages
def test_a_command_with_manifest_report_and_figure(words, tmp_path, capsys):
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    texts, _, said = out.partition("\n\n")
    assert [line.split(":")[0] for line in texts.splitlines()] == [
        "text    calibration",
        "text    evaluation",
    ]
    assert said == f"the swap has 4 new numbers\n{tmp_path / 'run'}\n"
    assert "model   " in err
    run = load_run(tmp_path / "run")
    assert {"kind": "census", "status": "done", "seed": 0}.items() <= run.manifest.items()
    assert run.manifest["attention"] == "sdpa"
    assert run.manifest["texts"]["evaluation"]["tokens"] == 128
    assert len(run.table) == 3
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The census is complete." in page
    assert "Taller is more." in page
    assert (tmp_path / "run" / "figures" / "census.csv").exists()


def test_help_and_flags(capsys):
    assert cli.main(["census", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Count the parameters of the swap." in text
    assert "Exit with 3 above so many new numbers; 0 = never (default: 0)" in text
    assert cli.main(["census", "--limt", "3"]) == 2
    assert "did you mean `--limit`?" in capsys.readouterr().err


def test_exit_codes(words, capsys, tmp_path):
    assert cli.main([*words, "--limit", "3", "-q"]) == 3
    assert cli.main([*words, "-q"]) == 2  # the folder is there
    assert cli.main([*words, "-q", "--overwrite", "--seed", "13"]) == 2
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", "thirteen is refused")
    assert "failed: thirteen is refused" in (tmp_path / "run" / "log.txt").read_text()


def test_refused_before_anything_is_written(words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("mismatch.surgery.loading.load", None)  # no weights are loaded
    assert cli.main([*words, "--swap", "layer99:zero"]) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words) == 2
    assert "runs in one process, and torchrun started several" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_interrupted_and_resumed(words, capsys, tmp_path, monkeypatch):
    assert cli.main([*words, "-q", "--seed", "14"]) == 130
    run = tmp_path / "run"
    assert f"mismatch census --resume {run}" in capsys.readouterr().err
    monkeypatch.setattr(Census, "run", lambda *_: Outcome([], {}))
    with pytest.raises(UsageError, match="started with other settings"):
        mismatch.stages.runner.command(
            "census", CensusConfig(model="x", swap=("layer1:zero",)), resume=run
        )
    assert RunFolder.resume(run).manifest["status"] == "running"


def test_a_function_with_a_signature(toy_teacher):
    found = mismatch.census(toy_teacher, "layer2:infini(segment=16)", data=documents(4))
    assert found.run_dir is None
    assert repr(found).startswith("Counted(")
    assert list(found.table["stat"]) == ["dropped", "inherited", "new"]
    parameters = inspect.signature(mismatch.census).parameters
    assert list(parameters)[:2] == ["model", "swap"]
    assert (parameters["tokens"].default, parameters["tokens"].annotation) == (128, int)
    with pytest.raises(ConfigError, match=r"no setting `tokns`\n\nhint: did you mean `tokens`"):
        mismatch.census(toy_teacher, "layer2:zero", tokns=5)
