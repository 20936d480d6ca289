"""Find the folder of a model's name: a folder, the cache, an installed package, or a hub id. No torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from mismatch.errors import ModelError
from mismatch.texts.demo import fetch

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REASON = 200  # characters of a hub error that are shown
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


@dataclass(frozen=True)
class Source:
    """The folder behind a model name. `folder` is None for a hub id, whose files are not here yet."""

    name: str
    folder: Path | None
    note: str = ""


@dataclass(frozen=True)
class Located:
    """A model whose small files are at hand.

    Attributes:
        name, note: as of `Source`.
        folder: with the small files.
        hub: it is a hub id: the weights come when they are asked for.
        revision: branch, tag or commit of a hub id.
    """

    name: str
    folder: Path
    note: str = ""
    hub: bool = False
    revision: str | None = None


def locate(name_or_path: str | Path | Located, revision: str | None, *, code: bool) -> Located:
    """Where a name leads, with its small files at hand; what was located already is taken as it is.

    Args:
        name_or_path: see `resolve`.
        revision: branch, tag or commit of a hub id.
        code: also Python files.

    Raises:
        ModelError: as `resolve` and `from_hub`.
    """
    if isinstance(name_or_path, Located):
        return name_or_path
    source = resolve(name_or_path)
    if source.folder is not None:
        return Located(source.name, source.folder, source.note)
    folder = from_hub(source.name, revision, code=code)
    return Located(source.name, folder, source.note, True, revision)


def resolve(name_or_path: str | Path) -> Source:
    """Find the source of a name: explicit path, cache, installed package, hub id, in this order.

    An installed package is converted into the cache. Nothing is downloaded.

    Raises:
        ModelError: no such folder, a text's name, a fetchable model that was not fetched.
    """
    name = str(name_or_path)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return Source(name, path.resolve())
        if path.is_file():
            raise ModelError(f"{name} is a file", hint="give the folder that it is in")
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, `~` of nobody
        raise ModelError(f"no model folder {name!a:.200}: {error!s:.80}", hint=_known()) from error
    if package := fetch.SOURCES.get(name):
        return _fetched(package)
    looks_like_path = isinstance(name_or_path, Path) or name.startswith((".", "/", "~"))
    if looks_like_path or not _HUB_ID.fullmatch(name):
        raise ModelError(f"no model folder {name}", hint=_near(name) or _known())
    if near := _near(name):
        raise ModelError(f"no model is called {name!r}", hint=near)
    return Source(name, None, "from the Hugging Face hub")


def _fetched(package: fetch.Package) -> Source:
    if package.kind != "model":
        raise ModelError(f"{package.name} is a text, not a model", hint=_known())
    if folder := fetch.find(package.name):
        return Source(package.name, folder, f"{package.what} ({package.licence})")
    raise ModelError(
        f"the model {package.name} is not here yet: neither in {fetch.cache_dir()} nor installed",
        hint=f"mismatch fetch {package.name}   ({package.megabytes:g} MB, {package.licence})",
    )


def _near(name: str) -> str | None:
    models = [p.name for p in fetch.SOURCES.values() if p.kind == "model"]
    near = difflib.get_close_matches(name.lower(), models, n=1)
    return f"did you mean `{near[0]}`?" if near else None


def _known() -> str:
    models = [p.name for p in fetch.SOURCES.values() if p.kind == "model"]
    return f"a folder, a hub id such as `owner/name`, or one to fetch: {', '.join(models)}"


def from_hub(
    name: str,
    revision: str | None = None,
    *,
    weights: bool = False,
    code: bool = False,
    pickle: bool = False,
) -> Path:
    """The folder of a hub id in the hub's own cache.

    The small files come first and alone, so that what must be refused is refused before gigabytes
    are downloaded; a second call with `weights` adds the rest.

    Args:
        name: hub id.
        revision: branch, tag or commit.
        weights: also the safetensors files.
        code: also Python files.
        pickle: also pickle weights, when there are no safetensors.

    Raises:
        ModelError: unknown id, no access, no network, no safetensors.
    """
    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]
    folder = _snapshot(name, revision, patterns)
    if not weights or any(folder.glob("*.safetensors")):
        return folder
    if pickle:
        return _snapshot(name, revision, [*patterns, "*.bin"])
    raise ModelError(
        f"{name} has no safetensors on the hub; pickle weights are refused: a pickle can run code "
        "when it is read",
        hint="another revision may have them; or, when you trust its owner, --allow-pickle",
    )


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises types of three libraries
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"no model {name!r}: no such folder, nothing to fetch by this name, and the Hugging "
            f"Face hub did not deliver it ({reason[:_REASON]})",
            hint=_known(),
        ) from error
