"""The functions: their settings are keyword arguments with types, in Python and in the stub."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import mismatch
from mismatch.config import fields
from mismatch.errors import ConfigError, UsageError
from mismatch.registry import stages
from mismatch.stages import STAGES
from mismatch.stages.signatures import STUB, stub


def test_the_stub_is_what_the_settings_make():
    assert STUB.read_text(encoding="utf-8") == stub(), "python -m mismatch.stages.signatures"


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_is_a_keyword_argument(name):
    signature = inspect.signature(getattr(mismatch, name))
    known = fields(stages().config(name))
    assert set(signature.parameters) == {*known, "progress"}
    for setting, parameter in signature.parameters.items():
        if parameter.default is not parameter.empty and setting != "progress":
            assert parameter.default == known[setting].default
    text = getattr(mismatch, name).__doc__
    assert all(f"    {setting}: " in text for setting in known)


@pytest.mark.parametrize("name", STAGES)
def test_a_typo_names_the_nearest(name):
    with pytest.raises(ConfigError, match=r"no setting `sed`\n\nhint: did you mean `seed`"):
        getattr(mismatch, name)("m", "layer1:zero", sed=1)
    with pytest.raises(
        UsageError, match=r"it takes model, (swap|mechanism), and settings|there is no swap"
    ):
        getattr(mismatch, name)("m")


def test_what_a_user_catches_is_reachable():
    code = "import mismatch\ntry: raise mismatch.errors.SpecError('x')\nexcept mismatch.errors.MismatchError: pass"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_opening(toy_folder, monkeypatch):
    """One look-up of the model, one config, one tokenizer, each text cut once."""
    from mismatch.models import load as models
    from mismatch.models import resolve
    from mismatch.stages import opening
    from mismatch.stages.trace.config import TraceConfig

    counts: dict[str, int] = {}

    def counted(module, name, key):
        original = getattr(module, name)

        def call(*args, **kwargs):
            counts[key] = counts.get(key, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(resolve, "resolve", "look-ups")
    counted(opening, "load_tokenizer", "tokenizers")
    counted(models, "load_tokenizer", "tokenizers again")
    counted(opening, "windows", "cuts")
    made = TraceConfig.__post_init__
    monkeypatch.setattr(
        TraceConfig,
        "__post_init__",
        lambda self: (counts.__setitem__("configs", counts.get("configs", 0) + 1), made(self))[1],
    )
    text = ["Alice was beginning to get very tired of sitting by her sister on the bank. " * 40] * 2
    mismatch.trace(
        str(toy_folder), "layer2:zero", data=text, tokens=128, seq_len=64, controls=(), device="cpu"
    )
    assert counts == {"look-ups": 1, "tokenizers": 1, "cuts": 1, "configs": 1}
