"""What the README and `mismatch explain` say of parameters, state and families is what is counted here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mismatch.mechanisms import MECHANISMS
from mismatch.registry import explain as catalog

ROOT = Path(__file__).resolve().parent.parent.parent
TOKEN = 2 * 3 * 64 * 4
"""Bytes of one token's keys and values: 3 kv heads of 64, float32."""
MATRIX = 9 * 64 * 64 * 4
"""Bytes of one 64 x 64 matrix per query head."""
MEMORY = 3 * 64 * (64 + 1) * 4
"""Bytes of a matrix and a normaliser per kv head, 64 features."""
# By hand, from what each file promises: bytes after 1024 tokens, after 2048, and at most.
KEPT = (1024 * TOKEN, 2048 * TOKEN, 2048 * TOKEN)
OPEN = 255 * TOKEN * 3 // 2  # keys, values and keys without position of an open segment
# One segment before the open one, the sink and the slots; a float32 score in each kv head, not of the sink.
FAR = (64 + 1 + 96) * TOKEN + (64 + 96) * 12
OWN = {
    "gated_deltanet": (MATRIX + 3 * 576 * 4 * 4,) * 3,  # four columns of q, k and v
    "gqa": tuple(size // 3 for size in KEPT),
    "infini": (MEMORY, MEMORY, MEMORY + OPEN),
    "kda": (MATRIX + 3 * 576 * 4 * 4,) * 3,
    "kv_slots": (FAR, FAR, FAR + 63 * (TOKEN + 12)),
    "linear_attention": (3 * 128 * 65 * 4,) * 3,  # hedgehog: 128 features
    "mamba": (1152 * 16 * 4 + 1152 * 4 * 4,) * 3,
    "mamba2": (MATRIX + 3 * 576 * 4 * 4,) * 3,
    "mla": tuple(size // 2 for size in KEPT),  # 64 + 128 numbers of 384
    "parallel": (KEPT[0] + MEMORY, KEPT[1] + MEMORY, 2047 * TOKEN + MEMORY + OPEN),
    "rwkv": (MATRIX + 576 * 4,) * 3,
    "short_conv": (3 * 576 * 4,) * 3,
}
NONE = ("dyt", "linear", "low_rank_mlp", "parallel_adapter")


@pytest.fixture(scope="module")
def costs():
    """The analysis that made the tables."""
    path = ROOT / "analyses" / "mechanism_costs.py"
    found = importlib.util.spec_from_file_location("mechanism_costs", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(costs):
    return {row["mechanism"]: row for row in costs.read(costs.COSTS)}


def expected(name: str) -> tuple[int, int, int]:
    return (0, 0, 0) if name in NONE else OWN.get(name, KEPT)


@pytest.mark.parametrize("name", MECHANISMS)
def test_counts_are_as_written_and_state_as_promised(costs, written, name):
    if name in ("qlora", "quantized"):
        pytest.importorskip("bitsandbytes")
    found = costs.counts(name)
    assert {key: str(value) for key, value in found.items()}.items() <= written[name].items()
    states = tuple(found[f"state_{when}"] for when in ("1024", "2048", "most"))
    assert states == expected(name)


@pytest.mark.parametrize("name", ["lora", "nope", "rwkv", "dyt"])
def test_families_are_as_written(costs, written, name):
    """One of each kind; that each mechanism works in its families is asked by the contract."""
    assert " ".join(costs.families(name)) == written[name]["families"]


@pytest.mark.parametrize("name", MECHANISMS)
def test_explain_says_it_in_bytes(name):
    text = " ".join(catalog.explain(name).split())
    first, second, most = expected(name)
    said = text.partition("state in bytes ")[2]
    if second == 0:
        assert said.startswith("0 ")
        return
    where = "a layer of SmolLM2-135M, one text, float32)"
    assert where in said
    said = said.partition(where)[0]
    assert f"{first:,}" in said and f"{second:,}" in said
    assert ("whatever the length" in said) == (first == second)
    assert most in (first, second) or first != second or f"{most:,}" in said


def test_every_mechanism_is_written(costs, written):
    assert written.keys() == MECHANISMS.keys()
    assert {row["mechanism"] for row in costs.read(costs.STATE)} == MECHANISMS.keys()


def test_what_was_not_counted_is_not_said():
    assert catalog.state_bytes("my_package:Mine") is None
