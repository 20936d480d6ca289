"""The files around the package agree: versions, the Pythons that are tested, the tools of make, CI and pre-commit."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mismatch.stages import STAGES
from mismatch.stages.runner import stage_of

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(target: str) -> set[str]:
    """The tools that a target of the Makefile calls."""
    block = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text("Makefile"), re.M)[1]
    return {" ".join(line.split()[:2]) for line in re.findall(r"\$\(BIN\)/(.*)", block)}


def test_one_version():
    assert yaml.safe_load(text("CITATION.cff"))["version"] == PROJECT["version"]
    heading = re.search(r"^## (.*)$", text("CHANGELOG.md"), re.M)[1]
    assert PROJECT["version"].removesuffix(".dev0") in heading
    assert ("Unreleased" in heading) == PROJECT["version"].endswith(".dev0")


def test_every_python_that_is_promised_is_tested():
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    assert jobs["test"]["steps"][-1] == {"run": ".ci/run"}
    named = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if ":: 3." in line]
    assert tested == named
    assert all(version in SpecifierSet(PROJECT["requires-python"]) for version in tested)


def test_pre_commit_runs_the_tools_of_make_lint():
    [repo] = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in repo["hooks"]]
    tools = {entry.split(" --")[0] for entry in entries}
    assert tools == {tool.split(" --")[0].removesuffix(" .") for tool in commands("lint")}


def test_the_pins_satisfy_every_bound():
    pins = dict(line.split("==") for line in text("constraints.txt").splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    wanted = [*PROJECT["dependencies"]]
    for extra in PROJECT["optional-dependencies"].values():
        wanted += extra
    for requirement in map(Requirement, wanted):
        if requirement.name != PROJECT["name"]:
            pin = pins[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(pin), f"{requirement} but {pin} is pinned"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md", "analyses/README.md"])
def test_files_that_are_named_are_there(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text(name))
    paths = re.findall(r"`((?:mismatch|tests)/[\w./]+?)/?`", text(name))
    for path in [*((ROOT / name).parent / link for link in links), *(ROOT / p for p in paths)]:
        if "NAME" not in path.as_posix():
            assert path.exists(), path


def test_the_changelog_names_flags_that_are_there():
    """Those that were renamed; `train` is new."""
    rows = re.findall(r"^  \| ([\w ]+) \|[^|]+\| ([^|]+) \|", text("CHANGELOG.md"), re.M)[1:]
    for command, new in rows:
        but = command.removeprefix("all but ")
        for name in (command,) if command == but else set(STAGES) - {but, "train"}:
            fields = {field.name for field in dataclasses.fields(stage_of(name).Config)}
            flags = {flag.replace("-", "_") for flag in re.findall(r"`--([\w-]+)`", new)}
            assert flags and flags <= fields, (name, flags - fields)
