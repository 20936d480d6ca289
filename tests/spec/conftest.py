"""Mechanisms that these tests know: cards of a file that is never imported."""

from __future__ import annotations

import pytest

from mismatch.registry import Registry

CARDS = '''
"""Cards only: nothing here is ever imported."""
class InfiniConfig:
    segment: Annotated[int, ">= 1"] = 256
    update: Literal["linear", "delta"] = "linear"
    gate_init: float = 0.0
    note: str | None = None
    exact: bool = False
class Infini:
    Config = InfiniConfig
    slots = ("attn",)
    heads = ("update", "linear")
class Zero:
    heads = True
    slots = ("attn", "mlp", "norm1", "norm2", "final_norm", "block", "q_proj", "rope")
class DyT:
    slots = ("norms",)
class NoPE:
    slots = ("rope",)
    heads = True
class ParallelConfig:
    inner: Call
    alpha: float = 1.0
class Parallel:
    Config = ParallelConfig
    slots = ("attn", "mlp")
    heads = True
    stacks = True
class OpenConfig:
    rate: float
class Open:
    Config = OpenConfig
class ListConfig:
    words: tuple[str, ...] | None = None
class List:
    Config = ListConfig
    slots = ("attn",)
class IntsConfig:
    slots: Annotated[int | tuple[int, ...], ">= 0"] = 96
class Ints:
    Config = IntsConfig
    slots = ("attn",)
class Plain:
    slots = ("attn",)
'''


@pytest.fixture(autouse=True)
def known(tmp_path, monkeypatch):
    (tmp_path / "cards_of_test.py").write_text(CARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {
        "infini": "Infini",
        "zero": "Zero",
        "dyt": "DyT",
        "nope": "NoPE",
        "parallel": "Parallel",
    }
    table = {name: f"cards_of_test:{cls}" for name, cls in names.items()}
    registry = Registry("mechanism", table, "no.group")
    for file in ("placement", "heads"):
        monkeypatch.setattr(f"mismatch.spec.{file}.mechanisms", lambda: registry)
