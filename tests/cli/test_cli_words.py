"""The words of the command line: what they mean, what is said of wrong ones, and that each setting has its flag."""

from __future__ import annotations

import re

import pytest

from mismatch import cli, config
from mismatch.cli.parser import EXAMPLES, read
from mismatch.registry import stages

COMMANDS = (
    *(
        "trace",
        "check",
        "probe",
        "diagnose",
        "scan",
        "plan",
        "repair",
        "train",
        "generate",
        "merge",
    ),
    *("fetch", "report", "compare", "list", "explain", "env"),
)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("resid_mid", "resid_mid   site\n\nthe stream between attention and MLP"),
        (
            "NumericsError",
            "NumericsError   error\n\nNan or infinity where numbers should be.\n\nexit code 4\n"
            "MismatchError > NumericsError",
        ),
        ("SpecError", "SpecError   error\n\nThe swap text is wrong; shows it with a caret."),
        ("cka", "cka   metric\n\n"),
    ],
)
def test_explain(capsys, name, start):
    assert cli.main(["explain", name]) == 0
    assert capsys.readouterr().out.startswith(start)


def test_explain_of_nothing(capsys):
    assert cli.main(["explain", "resid_mdi"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: nothing is called `resid_mdi`\n\nhint: did you mean `resid_mid`? available: "
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "no command\n\nhint: mismatch COMMAND ...; commands: " + ", ".join(COMMANDS)),
        (
            ["trcae"],
            "unknown command `trcae`\n\nhint: did you mean `trace`? available: "
            + ", ".join(sorted(COMMANDS)),
        ),
        (
            ["list", "metric"],
            "unknown what `metric`\n\nhint: did you mean `metrics`? available: "
            "mechanisms, metrics, models, probes, sites, texts",
        ),
        (
            ["trace", "--tokns", "5"],
            "`mismatch trace` has no flag `--tokns`\n\nhint: did you mean `--tokens`?",
        ),
        (
            [
                "trace",
                "--tok",
                "5",
            ],  # no abbreviations: a new flag must not change what an old one means
            "`mismatch trace` has no flag `--tok`\n\nhint: did you mean `--tokens`?",
        ),
        (
            ["env", "now"],
            "`mismatch env` does not know what to do with `now`\n\n"
            "hint: `mismatch env --help` shows what there is",
        ),
        (
            ["explain"],
            "the following arguments are required: NAME\n\n"
            "hint: `mismatch explain --help` shows what there is",
        ),
        (
            ["env", "-q", "-v"],
            "argument -v/--verbose: not allowed with argument -q/--quiet\n\n"
            "hint: `mismatch env --help` shows what there is",
        ),
        (
            ["trace", "--model"],
            "argument --model: expected one argument\n\n"
            "hint: `mismatch trace --help` shows what there is",
        ),
    ],
)
def test_usage_errors(capsys, words, text):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    # -v shows where an error was raised; its text comes after that.
    assert err.endswith(f"error: {text}\n") if "-v" in words else err == f"error: {text}\n"


def examples_of(command):
    known = stages()
    return known.card(command).facts["examples"] if command in known else EXAMPLES[command]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_opens_with_two_examples_that_parse(capsys, command):
    assert cli.main([*([command] if command else []), "--help"]) == 0
    text = capsys.readouterr().out
    body = text.split("\n\n", 1)[1]
    assert body.startswith("examples:\n  mismatch ")
    assert re.match(r"examples:\n(  mismatch .+\n){2}\n", body)
    if command:
        for example in examples_of(command):
            words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example)]
            assert read(words[1:]).command == command


@pytest.mark.parametrize("name", stages().names())
def test_every_setting_is_a_flag_in_one_group(name):
    kind = stages().config(name)
    names = [name for group in kind.groups.values() for name in group]
    assert sorted(names) == sorted(config.fields(kind))


@pytest.mark.parametrize("name", stages().names())
def test_what_can_be_resumed_is_what_has_the_flag(name):
    """The command that is printed for an unfinished run must exist."""
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', examples_of(name)[0])]
    assert hasattr(read(words[1:]), "resume") == stages().get(name).resumable


@pytest.mark.parametrize("name", stages().names())
def test_a_default_is_shown_for_every_setting_that_has_one(capsys, name):
    """0 and an empty list are defaults too."""
    cli.main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: )" not in text
    for arg in config.fields(stages().config(name)).values():
        if isinstance(arg.default, int | float | tuple) and not isinstance(arg.default, bool):
            shown = (
                ",".join(arg.default) or "none" if isinstance(arg.default, tuple) else arg.default
            )
            after = text.split(f"--{arg.name.replace('_', '-')} ")[-1]
            after = after.replace("- ", "-")  # a line may end behind a hyphen
            assert f"(default: {shown})" in after, arg.name
