"""Students of the contract, and a package of somebody else: `theirs`, and what stands in it."""

from __future__ import annotations

import functools
import sys

import pytest

SOURCE = '''
"""Parts of somebody's own."""
from __future__ import annotations
from dataclasses import dataclass
from typing import Annotated
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention
from mismatch.mechanisms.base import Wrapper
from mismatch.mechanisms.parts.calling import first_of, hidden_in, with_first
from mismatch.mechanisms.parts.projections import AttentionParts


@dataclass(frozen=True)
class HalfConfig:
    factor: Annotated[float, "0..1"] = 0.5
    """What the output is multiplied by."""


class Half(Wrapper):
    """Less of it."""

    Config = HalfConfig
    slots = ("attn", "mlp")
    identity = "factor=1"
    state = "the original's"
    source = "an example"

    def forward(self, *args, **kwargs):
        out = self.original(*args, **kwargs)
        return with_first(out, first_of(out) * self.settings.factor)


class OwnTokens(AttentionParts):
    """Each head reads its own token alone."""

    Config = HalfConfig
    slots = ("attn",)
    heads = True
    identity = "none: it mixes nothing"
    state = "none"
    source = "an example"

    def forward(self, *args, **kwargs):
        _, _, v = self.qkv(hidden_in(args, kwargs))
        return self.project(self.per_query_head(v)), None


class Quarter(Half):
    def forward(self, *args, **kwargs):
        return with_first(super().forward(*args, **kwargs), 0)


class Gated(nn.Module):
    """An MLP of one gate."""

    slots = ("mlp",)

    def __init__(self, config, width: int = 3, bias=True, name="x", kinds=()):
        super().__init__()
        self.down = nn.Linear(config.hidden_size, width, bias=bias)
        self.up = nn.Linear(width, config.hidden_size, bias=bias)
        self.seen = (width, bias, name, kinds)

    def forward(self, x):
        return self.up(torch.sigmoid(self.down(x)))


class Past(nn.Module):
    """Attention to the mean of all tokens so far, in no cache."""

    def __init__(self, config, layer_idx, scale=1.0):
        super().__init__()
        self.project = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_idx, self.scale = layer_idx, scale

    def forward(self, hidden_states, **kwargs):
        count = torch.arange(1, hidden_states.shape[1] + 1, device=hidden_states.device)
        mean = hidden_states.cumsum(1) / count[:, None].to(hidden_states.dtype)
        return self.scale * self.project(mean), None


class Told(nn.Module):
    """The same mean, of the real tokens of each text alone."""

    def __init__(self, config):
        super().__init__()
        self.project = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, token_facts=None, **kwargs):
        x = hidden_states
        texts, real = token_facts.texts(x), token_facts.real(x)
        if texts is None:
            texts = torch.zeros(x.shape[:2], dtype=torch.long)
        reads = (texts[:, :, None] == texts[:, None]).tril()
        if real is not None:
            reads = reads & real[:, None]
        reads = reads.to(x.dtype)
        return self.project(reads @ x / reads.sum(-1, keepdim=True).clamp(min=1)), None


class Pooled(nn.Module):
    """Not causal: the mean of all tokens, at every token."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states.mean(1, keepdim=True).expand_as(hidden_states), None


class PerToken(nn.Module):
    """What an attention may be that mixes nothing."""

    def __init__(self, config):
        super().__init__()
        self.project = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, **kwargs):
        return self.project(hidden_states), None


class Doubled(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return 2 * hidden_states


class Returns(nn.Module):
    """Gives back what it is told."""

    def __init__(self, what="tensor"):
        super().__init__()
        self.what = what

    def forward(self, hidden_states, **kwargs):
        h = hidden_states
        return {
            "tensor": h,
            "pair": (h, None),
            "three": (h, None, None),
            "narrow": (h[..., :3], None),
            "short": h[:, :-1],
            "wide_format": h.double(),
            "nothing": None,
            "list": [h],
        }[self.what]


class Closed(nn.Module):
    def forward(self, x):
        return x, None


class NotAModule:
    pass


def a_function():
    pass
'''


@pytest.fixture(scope="module")
def student():
    """`student(family, name, attn)`: one for each file, which must not change it."""

    def make(family, name, attn="sdpa"):
        # Not at the top: a conftest is imported before assertions of other files are rewritten.
        from callers import text
        from tiny_models import swap, tiny

        if name in ("qlora", "quantized"):
            pytest.importorskip("bitsandbytes")
        return swap(tiny(family, attn), text(name)).model

    return functools.cache(make)


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """`theirs.parts`, and `theirs` that only imports from it."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "__init__.py").write_text("from theirs.parts import Gated, a_function\n")
    (folder / "parts.py").write_text(SOURCE)
    (folder / "wrong.py").write_text("class Broken(:\n")
    (folder / "fails.py").write_text("import no_such_package\nclass Fine: pass\n")
    (folder / "raises.py").write_text("raise ValueError('not today')\nclass Fine: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("theirs")]:
        del sys.modules[name]
