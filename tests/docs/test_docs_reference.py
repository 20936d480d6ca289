"""Whatever the code registers, parses or raises has its place in the reference, with its own words."""

from __future__ import annotations

import importlib
import inspect

import pytest
from docs_pages import commands

import mismatch
from mismatch import errors
from mismatch.models.families import FAMILIES
from mismatch.registry import mechanisms, metrics, probes, stages
from mismatch.runs.table import COLUMNS
from mismatch.texts.demo.fetch import SOURCES


@pytest.mark.parametrize("registry", [mechanisms, metrics, probes])
def test_every_name_has_a_page_with_its_arguments(reference, registry):
    table = registry()
    for name in table.names():
        page = reference[f"{table.kind}s/{name}.md"]
        assert f"[`{name}`]({name}.md)" in reference[f"{table.kind}s/index.md"]
        assert all(f"| `{arg.name}` |" in page for arg in table.card(name).args)


def test_a_card_is_told_whole(reference):
    page = reference["metrics/cka.md"]
    assert "**Definition:**" in page and "```text" in page
    assert "arXiv [1905.00414](https://arxiv.org/abs/1905.00414)" in page
    assert "[`cka_minibatch`](cka_minibatch.md)" in page


def test_every_command_has_a_page_with_every_flag(reference):
    for name, parser in commands().items():
        page = reference[f"commands/{name}.md"]
        flags = [flag for action in parser._actions for flag in action.option_strings]
        assert all(f"`{flag}`" in page for flag in flags if flag not in ("-h", "--help")), name
        assert f"mismatch {name} " in page  # an example to copy


def test_a_default_of_the_help_is_in_the_table(reference):
    assert "| `--tokens` | `N` | `8192` |" in reference["commands/trace.md"]


def test_every_exit_code_is_there(reference):
    page = reference["commands/index.md"]
    assert all(f"| {code} | " in page for code in (0, 1, 2, 3, 4, 130))


def test_every_column_error_family_and_source_is_there(reference):
    assert all(f"| `{column.name}` |" in reference["table.md"] for column in COLUMNS)
    raised = [
        v for v in vars(errors).values() if inspect.isclass(v) and v.__module__ == "mismatch.errors"
    ]
    assert all(f"## {error.__name__}" in reference["errors.md"] for error in raised)
    assert all(f"| `{family.name}` |" in reference["models.md"] for family in FAMILIES)
    assert all(f"| `{name}` |" in reference["models.md"] for name in SOURCES)


def test_every_public_name_is_there(reference):
    page = reference["python.md"]
    for name in mismatch.__all__:
        value = getattr(mismatch, name)
        if inspect.isfunction(value):
            assert f".. autofunction:: mismatch.{name}" in page
        elif inspect.isclass(value):
            assert f".. autoclass:: {value.__module__}.{value.__qualname__}" in page


def test_what_each_stage_returns_is_there(reference):
    for name in stages().names():
        kind = stages().get(name).Result
        assert f".. autoclass:: {kind.__module__}.{kind.__qualname__}" in reference["python.md"]


def test_what_is_documented_exists(reference):
    for line in reference["python.md"].splitlines():
        if line.startswith(".. auto"):
            path = line.split(":: ")[1].split(".")
            thing = importlib.import_module(".".join(path[:-1]))
            assert hasattr(thing, path[-1]), line
