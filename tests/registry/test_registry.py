"""Names resolve, cards are read without an import, and what is wrong is said in full."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from mismatch.errors import ConfigError, SpecError, UsageError
from mismatch.registry import Registry, card, did_you_mean, mechanisms, metrics
from mismatch.registry.card import REQUIRED, Arg
from mismatch.registry.source import CardError

SOURCE = '''"""wave: adds a wave to the stream.

    y = x + a sin(x)
"""
raise RuntimeError("a card must not import its file")

@dataclass(frozen=True)
class Base:
    seed: int = 7
    """Inherited."""

@dataclass(frozen=True)
class WaveConfig(Base):
    length: Annotated[int, ">= 1"]
    """Tokens per
    wave."""
    shape: Literal["sine", "saw"] = "sine"
    gain: Annotated[float, "0..1"] | None = None
    loud: bool = False
    inner: Call = None

class Common:
    source = "nowhere"
    identity = "none"

class Wave(Common, Unknown):
    Config = WaveConfig
    slots = ("attn", "mlp")
    identity = "gain = 0"
    _hidden = 1
    computed = len("x")
'''


@pytest.fixture
def registry(tmp_path, monkeypatch):
    (tmp_path / "waves").mkdir()
    (tmp_path / "waves" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "waves" / "wave.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Registry("mechanism", {"wave": "waves.wave:Wave", "gone": "waves.gone:Gone"}, "no.group")


def test_card_is_read_without_importing_the_file_or_its_package(registry):
    found = registry.card("wave")
    assert found.name == "wave"
    assert found.summary == "wave: adds a wave to the stream."
    assert found.text.endswith("y = x + a sin(x)")
    assert found.facts == {
        "source": "nowhere",
        "identity": "gain = 0",
        "slots": ("attn", "mlp"),
    }
    assert found.args == (
        Arg("seed", "int", default=7, doc="Inherited."),
        Arg("length", "int", bound=">= 1", default=REQUIRED, doc="Tokens per\nwave."),
        Arg("shape", "str", choices=("sine", "saw"), default="sine"),
        Arg("gain", "float", optional=True, bound="0..1", default=None),
        Arg("loud", "bool", default=False),
        Arg("inner", "Call", default=None),
    )
    assert not [name for name in sys.modules if name.startswith("waves")]


def test_names_are_sorted_and_a_target_stands_for_itself(registry):
    assert registry.names() == ("gone", "wave")
    assert "wave" in registry
    assert "waves.wave:Wave" not in registry
    assert registry.card("waves.wave:Wave").facts["slots"] == ("attn", "mlp")


def test_unknown_name(registry):
    with pytest.raises(UsageError) as caught:
        registry.get("wvae")
    assert str(caught.value) == (
        "unknown mechanism `wvae`\n\nhint: did you mean `wave`? available: gone, wave"
    )
    with pytest.raises(SpecError):
        registry.card("wvae", SpecError)
    assert did_you_mean("zzz", ["b", "a"]) == "available: a, b"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("gone", "the mechanism `gone` cannot be used: there is no module `waves.gone`"),
        (
            "no_such.m:A",
            "the mechanism `no_such.m:A` cannot be used: there is no module `no_such.m`\n\n"
            "hint: Python must be able to import it: install its package, or put its folder on PYTHONPATH",
        ),
        (
            "waves.wave:Tide",
            "the mechanism `waves.wave:Tide` cannot be used: module `waves.wave` has no class `Tide`",
        ),
    ],
)
def test_a_card_that_cannot_be_read(registry, target, text):
    with pytest.raises(UsageError) as caught:
        registry.card(target)
    assert str(caught.value) == text


def test_a_card_is_read_without_running_its_module(planted, registry):
    """Also that of a class which the module only imports from elsewhere."""
    assert registry.card("planted.parts:Evil").facts == {"slots": ("attn",)}
    assert registry.card("planted.far:Evil").facts == {"slots": ("attn",)}
    for name in ("planted.parts:Good", "planted.nowhere:Evil", ".:Evil", "sys:exit", "json:loads"):
        with pytest.raises(UsageError, match="cannot be used"):
            registry.card(name)
    assert not planted.exists()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("a: list[int] = 3", "the type of `a` is not understood: `list[int]`"),
        ("a: int | str = 3", "the type of `a` is not understood: `int | str`"),
        ("a: int = len('x')", "the default of `a` must be a literal, got `len('x')`"),
        ("a: Annotated[int, '= 3'] = 3", "the bound of `a` is not understood: '= 3'"),
        ("a: Annotated[str, '> 3'] = 3", "`a` is no number, so it cannot have the bound '> 3'"),
    ],
)
def test_a_config_that_is_not_understood(tmp_path, monkeypatch, line, text):
    (tmp_path / "odd.py").write_text(f"class C:\n    {line}\nclass Odd:\n    Config = C\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CardError) as caught:
        card.read("odd", "odd:Odd")
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["Wave", "wave_", "_wave", "wa ve", "2wave", ""])
def test_a_name_must_be_lower_snake(registry, name):
    with pytest.raises(UsageError) as caught:
        registry.add(name, "m:A")
    assert str(caught.value) == (
        f"`{name}` cannot name a mechanism\n\n"
        "hint: use lower case words joined by `_`, such as `sliding_window`"
    )


def test_a_name_is_taken_once(registry):
    with pytest.raises(UsageError) as caught:
        registry.add("wave", "other:Wave")
    assert str(caught.value) == (
        "the mechanism `wave` is registered twice: `waves.wave:Wave` and `other:Wave`\n\n"
        "hint: give one of them another name"
    )
    registry.add("tide", "other:Tide")
    registry.add("tide", "other:Flood")  # a notebook cell that runs again
    assert registry.target("tide") == "other:Flood"
    with pytest.raises(UsageError, match="points at `nowhere`"):
        registry.add("ebb", "nowhere")


def test_an_entry_point_of_another_package(tmp_path, monkeypatch):
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[some.group]\nspike = plug.spike:Spike\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Registry("mechanism", {"wave": "a:B"}, "some.group").names() == ("spike", "wave")
    with pytest.raises(UsageError, match=r"registered twice: `a:B` and `plug\.spike:Spike`"):
        Registry("mechanism", {"spike": "a:B"}, "some.group").names()


def test_a_class_of_a_notebook(registry):
    @dataclass(frozen=True)
    class LocalConfig:
        size: Annotated[int, ">= 2"] = 4
        kind: Literal["a", "b"] = "a"
        rate: float | None = None

    class Local:
        """Made in a cell."""

        Config = LocalConfig
        slots = ("mlp",)

    registry.add("local", Local)
    assert registry.get("local") is Local
    found = registry.card("local")
    assert (found.summary, found.facts["slots"]) == ("Made in a cell.", ("mlp",))
    assert found.args == (
        Arg("size", "int", bound=">= 2", default=4),
        Arg("kind", "str", choices=("a", "b"), default="a"),
        Arg("rate", "float", optional=True, default=None),
    )


@pytest.mark.parametrize(
    ("arg", "good", "bad", "allowed"),
    [
        (Arg("a", "int", bound=">= 1"), [1, 5], [0, 1.0, True, "1", None], "int >= 1"),
        (Arg("a", "float", bound="> 0"), [0.1, 1], [0, 0.0, True, "x"], "float > 0"),
        (Arg("a", "float", bound="0..1"), [0, 1.0], [1.1, -0.1], "float in 0..1"),
        (Arg("a", "bool"), [True, False], [0, 1, "true", None], "bool"),
        (Arg("a", "int", choices=(1, 2)), [1, 2], [True, 3, "1"], "one of 1, 2"),
        (Arg("a", "str", optional=True), ["x", None], [1], "str or none"),
        (Arg("a", "list"), [["x"], (), ("a", "b")], ["x", [1], None], "a list of words"),
    ],
)
def test_what_an_argument_accepts(arg, good, bad, allowed):
    assert arg.allowed == allowed
    for value in good:
        arg.accept(value)
    for value in bad:
        with pytest.raises(ValueError, match=r"^must be "):
            arg.accept(value)
    if arg.type == "float":
        assert type(arg.accept(1)) is float


@pytest.mark.parametrize("registry_", [mechanisms(), metrics()], ids=["mechanisms", "metrics"])
def test_every_entry_resolves_and_has_a_card(registry_):
    assert registry_.names()
    for name in registry_.names():
        found = registry_.card(name)
        assert registry_.get(name, ConfigError).__name__ == registry_.target(name).split(":")[1]
        assert len(found.summary) > len(name), f"{name} says nothing about itself"
