"""The command line: streams, exit codes, errors, and that what needs no torch does not load it."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mismatch import cli, config
from mismatch.cli.parser import read
from mismatch.errors import MismatchError, NumericsError, RunError
from mismatch.stages.base import Finding
from mismatch.stages.trace.config import TraceConfig

TRACE = ["trace", "--model", "m", "--swap", "layer1:zero"]


def run(*words, **env):
    """The real program. Fails when it imports torch; returns its seconds of CPU too."""
    code = (
        "import sys, time\n"
        "from mismatch.cli import main\n"
        "code = main()\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'matplotlib', 'nnsight'} & set(sys.modules)\n"
        "print(f'\\n#{time.process_time()} {sorted(heavy)}', file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )
    done.stderr, _, rest = done.stderr.rpartition("\n#")
    seconds, done.heavy = rest.strip().split(" ", 1)
    done.seconds = float(seconds)
    return done


@functools.cache
def bare_python() -> float:
    """Seconds of CPU for a few modules of Python's own, 0.04 on a fast machine: how slow this one is."""
    code = "import asyncio, time; print(time.process_time())"
    words = [sys.executable, "-c", code]
    return max(float(subprocess.check_output(words, text=True)) for _ in range(3))


class Runner:
    """Stands in for the runner: stages are tested elsewhere, the command line here."""

    def __init__(self, run_dir: Path) -> None:
        self.calls, self.error = [], None
        self.run_dir = run_dir

    def command(self, name, settings, **rest):
        self.calls.append((settings, rest))
        if self.error is not None:
            raise self.error
        found = {"run": str(self.run_dir), "findings": [{"severity": "medium"}]}
        return types.SimpleNamespace(
            summary=lambda: "SUMMARY",
            run_dir=self.run_dir,
            as_dict=lambda: found,
            findings=[Finding("medium", "title", "text")],
        )


@pytest.fixture
def runner(monkeypatch, tmp_path):
    found = Runner(tmp_path / "run")
    monkeypatch.setattr("mismatch.stages.runner.command", found.command)
    return found


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["trace", "--help"], 0),
        (["list", "mechanisms"], 0),
        (["list", "metrics"], 0),
        (["list", "sites"], 0),
        (["list", "models"], 0),
        (["list", "texts"], 0),
        (["explain", "zero"], 0),
        (["explain", "cka"], 0),
        (["trace", "--model", "m", "--swap", "layer1:zro"], 2),
        (["trace", "--model", "m", "--swap", "layer1:zero", "--tokens", "0"], 2),
        (["chekc"], 2),
        (["fetch", "no_such_model"], 1),
    ],
)
def test_answers_at_once(words, code):
    done = run(*words)
    assert (done.returncode, done.heavy) == (code, "[]"), done.stderr
    assert done.seconds < max(0.5, 12 * bare_python())
    assert bool(done.stdout) == (code == 0)
    assert bool(done.stderr) == (code != 0)
    if code:
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_lists_and_texts():
    assert [line.split()[0] for line in run("list", "sites").stdout.splitlines()] == [
        *("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "final", "logits"),
    ]
    assert json.loads(run("list", "models", "--json").stdout).keys() == {
        "smollm2",
        "glassllm",
        "gemma3-270m",
    }
    assert json.loads(run("list", "texts", "--json").stdout).keys() == {"sotu", "wiki"}
    text = run("explain", "infini").stdout
    assert text.startswith("infini   mechanism\n")
    assert "2404.07143" in text
    assert re.search(r"^  segment +int >= 1 +default 256 ", text, re.M)


def test_a_flag_that_is_not_given_is_none():
    args = read(TRACE)
    assert all(
        getattr(args, name) is None
        for name in config.fields(TraceConfig)
        if name not in ("model", "swap")
    )


def test_underscores_and_repeats(runner, tmp_path):
    words = ["--seq_len=64", "--moment_tokens", "7", "--swap", "layer2:zero", "--allow_pickle"]
    assert cli.main([*TRACE, *words, "--output", str(tmp_path / "a_b")]) == 0
    settings, rest = runner.calls[0]
    assert settings == TraceConfig(
        model="m",
        swap=("layer1:zero", "layer2:zero"),
        seq_len=64,
        moment_tokens=7,
        allow_pickle=True,
        output=str(tmp_path / "a_b"),
    )
    assert rest == {"resume": None, "overwrite": False, "progress": True}


def test_result_on_stdout_with_the_run_folder_last(runner, capsys, tmp_path):
    assert cli.main([*TRACE, "-q"]) == 0
    out, err = capsys.readouterr()
    assert out == f"SUMMARY\n{tmp_path}/run\n"
    assert err == ""
    assert runner.calls[0][1]["progress"] is False
    assert cli.main([*TRACE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "run": f"{tmp_path}/run",
        "findings": [{"severity": "medium"}],
    }


def test_check(monkeypatch, capsys):
    found = types.SimpleNamespace(text=lambda: "PLAN", as_dict=lambda: {"plan": 1})
    monkeypatch.setattr("mismatch.stages.trace.check.checked", lambda opened: found)
    assert cli.main(["check", *TRACE[1:]]) == 0
    assert capsys.readouterr().out == "PLAN\n"
    assert cli.main(["check", *TRACE[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"plan": 1}


@pytest.mark.parametrize(("limit", "code"), [("low", 3), ("medium", 3), ("high", 0)])
def test_fail_on(runner, limit, code):
    assert cli.main([*TRACE, "--fail-on", limit]) == code


@pytest.mark.parametrize(
    ("error", "code"),
    [(NumericsError("nan", hint="look"), 4), (RunError("nan", hint="look"), 1)],
)
def test_errors_of_the_work(runner, capsys, error, code):
    runner.error = error
    assert cli.main(TRACE) == code
    assert capsys.readouterr().err == "error: nan\n\nhint: look\n"


def test_unexpected_errors_leave_a_traceback_in_a_file(runner, capsys):
    runner.error = ZeroDivisionError("by zero\nand more")
    assert cli.main(TRACE) == 1
    err = capsys.readouterr().err
    found = re.fullmatch(
        r"error: unexpected ZeroDivisionError: by zero\n\n"
        r"hint: the traceback is in (\S+); -v prints it\n",
        err,
    )
    assert found
    log = Path(found.group(1))
    assert "in command" in log.read_text()
    log.unlink()
    assert cli.main([*TRACE, "-v"]) == 1
    assert "in command" in capsys.readouterr().err


def test_interrupted(runner, capsys):
    runner.error = KeyboardInterrupt()
    assert cli.main(TRACE) == 130
    assert capsys.readouterr().err == "interrupted\n"
    runner.error.run_dir = Path("runs/r")
    assert cli.main(TRACE) == 130
    assert capsys.readouterr().err == (
        "interrupted; runs/r can be resumed\n\nhint: mismatch trace --resume runs/r\n"
    )


def test_resume_takes_the_settings_of_the_run(runner, capsys, tmp_path):
    settings = TraceConfig(model="m", swap=("layer1:zero",), tokens=77)
    (tmp_path / "config.yaml").write_text(settings.to_yaml())
    assert cli.main(["trace", "--resume", str(tmp_path)]) == 0
    assert runner.calls[0] == (settings, {"resume": tmp_path, "overwrite": False, "progress": True})
    capsys.readouterr()
    assert cli.main(["trace", "--resume", str(tmp_path), "--overwrite"]) == 2
    assert capsys.readouterr().err == (
        "error: --resume and --overwrite do not go together\n\n"
        "hint: --resume goes on with the settings in the run folder\n"
    )


def test_only_the_first_rank_speaks(runner, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(TRACE) == 0
    assert cli.main(["explain", "nothing_of_this_name"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
    assert runner.calls[0][1]["progress"] is False
    # A fault that only this rank has must not be lost.
    runner.error = ZeroDivisionError("x")
    assert cli.main([*TRACE, "-v"]) == 1
    assert capsys.readouterr().err.startswith("error: unexpected ZeroDivisionError (rank 1): x\n")


def test_colour_only_on_a_terminal_that_wants_it(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.complain(MismatchError("x"))
    assert capsys.readouterr().err == "\x1b[1;31merror:\x1b[0m x\n"
    monkeypatch.setenv("NO_COLOR", "1")
    cli.complain(MismatchError("x"))
    assert capsys.readouterr().err == "error: x\n"


def test_verbose_is_hidden_from_nnsight(monkeypatch, capsys):
    """nnsight turns on its debug mode when it finds -v or --verbose in sys.argv."""
    monkeypatch.setattr(sys, "argv", ["mismatch", "list", "-v", "texts", "--verbose"])
    assert cli.main() == 0
    assert sys.argv == ["mismatch", "list", "texts"]


def test_a_reader_that_leaves_is_not_an_error():
    done = subprocess.run(
        f"{sys.executable} -m mismatch explain cka | true",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_env():
    done = subprocess.run(
        [sys.executable, "-m", "mismatch", "env", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cores"] == os.cpu_count()


def test_the_public_names_are_there_and_lazy():
    code = (
        "import sys, mismatch, time\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert mismatch.list_mechanisms()['infini'] and mismatch.list_metrics()['cka']\n"
        "assert mismatch.explain('cka').startswith('cka')\n"
        "from mismatch.texts.demo import fetch\n"
        "assert callable(mismatch.fetch) and mismatch.fetch is fetch.fetch\n"
        "assert 'torch' not in sys.modules\n"
        "try: mismatch.nothing\n"
        "except AttributeError as e: assert str(e) == \"module 'mismatch' has no attribute 'nothing'\"\n"
        "for name in mismatch.__all__: getattr(mismatch, name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_report_and_compare_hand_on_what_was_asked(capsys, monkeypatch):
    from mismatch.stages import reporting
    from mismatch.stages.trace.report import comparison

    calls = []

    def write(*args, **rest):
        calls.append((args, rest))
        return Path("page.html")

    monkeypatch.setattr(reporting, "write_html", write)
    monkeypatch.setattr(comparison, "compare", write)
    assert cli.main(["report", "runs/a"]) == 0
    assert cli.main(["report", "runs/a", "--output", "x.html"]) == 0
    assert cli.main(["compare", "runs/a", "runs/b", "--any-data"]) == 0
    assert capsys.readouterr().out == "page.html\n" * 3
    both = [Path("runs/a"), Path("runs/b")]
    assert calls == [
        ((Path("runs/a"), None), {}),
        ((Path("runs/a"), Path("x.html")), {}),
        ((both, Path("comparison.html")), {"any_data": True}),
    ]


def test_a_report_of_nothing_is_an_error(capsys, tmp_path):
    assert cli.main(["report", str(tmp_path / "no_run")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
