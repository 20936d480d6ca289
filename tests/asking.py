"""Questions to tiny models: a setting without a fetched tokenizer or text, and subjects from a swap text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from random_models import VOCAB, build
from torch import nn

from mismatch import spec
from mismatch.mechanisms.base import Calibrator
from mismatch.models.layout import Layout
from mismatch.probes.base import Answers, Measure, Setting, Subject
from mismatch.surgery import operate as surgery
from mismatch.surgery.controls import control_specs
from mismatch.surgery.operate import Student, placed

CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
LENGTH = 420
"""Tokens of a passkey prompt: the tokenizer below has one for each character."""


class Letters:
    """A tokenizer with a token per character: ids 3 .. 98."""

    all_special_ids = (0, 1, 2)
    bos_token_id = 1

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[3 + CHARACTERS.index(letter) for letter in text])

    def decode(self, ids: Any) -> str:
        return "".join(CHARACTERS[int(i) - 3] for i in ids if 3 <= int(i) < 3 + len(CHARACTERS))

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def __len__(self) -> int:
        return VOCAB


def setting(samples: int = 4, seq_len: int = 80, windows: int = 16, **changes: Any) -> Setting:
    """Random text, a document a window."""
    ids = np.random.default_rng(7).integers(3, VOCAB, (windows, seq_len))
    given = {
        "words": np.arange(3, VOCAB),
        "text": ids,
        "docs": np.arange(windows),
        "tokenizer": Letters(),
        "bos": 1,
        "context": 512,
        "samples": samples,
        "batch_size": 3,  # does not divide the samples
        "lengths": (LENGTH,),
        "depths": (0.0, 1.0),
        "lookup_pairs": 4,
        "lookup_length": 240,
    }
    return Setting(**(given | changes))


def student(model: nn.Module, swap: str, name: str = "swap", seed: int = 0) -> Student:
    layout = Layout.of(model)
    parsed = spec.parse(swap)
    places = placed(parsed, layout)
    wanted: dict[Any, Calibrator] = surgery.calibrators(places)
    assert not wanted, "these tests calibrate nothing"
    text = spec.format(parsed)
    return surgery.operate(layout, places, spec=text, name=name, seed=seed)


def subjects(model: nn.Module, swap: str, controls: tuple[str, ...] = ()) -> list[Subject]:
    """Teacher, swap, controls."""
    first = student(model, swap)
    others = control_specs(controls, first.plan)
    made = [
        first,
        *(student(model, spec.format(text), name=name) for name, text in others.items()),
    ]
    return [Subject.teacher(Layout.of(model)), *map(Subject.of, made)]


def readings(answers: Answers, name: str = "swap") -> dict[Any, Measure]:
    """Measures by stat, or by (stat, layer, head) where there are such."""
    found = {}
    for measure in answers[name]:
        key = measure.stat
        if measure.layer is not None:
            key = (measure.stat, measure.layer, measure.head)
        assert (key, measure.site) not in found or measure.site != "logits"
        found[key if key not in found else (key, measure.site)] = measure
    return found


def tiny_llama(**changes: Any) -> nn.Module:
    return build("llama", **changes)


def log_softmax(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The plain way: all logits of a whole forward."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
