"""Data sets of Hugging Face: a folder that `datasets` saved, or one of the hub. `datasets` is imported only here.

`hf:NAME[@REVISION][:CONFIG[:SPLIT]]`. The revision is looked up first and the rows are read of that very commit, one
after the other as they are needed: nothing is downloaded whole. Data sets that are Python code are not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mismatch.errors import DataError
from mismatch.texts.contents import Content
from mismatch.texts.readers.asked import Asked
from mismatch.texts.readers.rows import content_of, field_of

HUB = "hf:"


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made the folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def saved(folder: Path, asked: Asked) -> Iterator[tuple[str, Content]]:
    """The rows of a folder that `save_to_disk` made; of several splits one must be named.

    Raises:
        DataError: it is broken, or holds several splits.
    """
    library = _library(str(folder))
    try:
        found = library.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} is no data set that can be read: {error}") from error
    if isinstance(found, dict):
        split = _only(list(found), str(folder), f"{folder}/SPLIT")
        found = found[split]
    return _rows(found, folder.name, asked)


def on_hub(source: str, asked: Asked) -> tuple[str, Iterator[tuple[str, Content]]]:
    """The commit of a data set of the hub, and its rows.

    Raises:
        DataError: there is none, it cannot be reached, or a config or split must be named.
    """
    library = _library(source)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    address, _, part = source.removeprefix(HUB).partition(":")
    name, _, revision = address.partition("@")
    config, _, split = part.partition(":")
    try:
        commit = HfApi().dataset_info(name, revision=revision or None).sha
        splits = library.get_dataset_split_names(name, config or None, revision=commit)
        if not split:
            split = _only(splits, source, f"{HUB}{address}:{config or 'default'}:SPLIT")
        found = library.load_dataset(
            name, config or None, split=split, revision=commit, streaming=True
        )
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, HFValidationError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source} cannot be read from the hub: {said}",
            hint="hf:NAME[@REVISION][:CONFIG[:SPLIT]]; without a network, give a folder or a file",
        ) from error
    return str(commit), _rows(found, f"{name}/{split}", asked)


def _rows(found: Any, name: str, asked: Asked) -> Iterator[tuple[str, Content]]:
    if found.column_names is not None:
        found = found.select_columns([field_of(found.column_names, name, asked)])
    for at, row in enumerate(found, 1):
        yield f"{name}:{at}", content_of(row, f"{name}, row {at}", asked)


def _only(splits: list[str], where: str, how: str) -> str:
    if len(splits) == 1:
        return splits[0]
    raise DataError(f"{where} has several splits: {', '.join(splits)}", hint=f"name one: {how}")


def _library(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source} is a data set of Hugging Face, and the package `datasets` is not installed",
            hint='pip install "llm-mismatch[datasets]"',
        ) from error
    return datasets
