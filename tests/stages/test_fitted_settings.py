"""Settings that nobody gave become as short as the context of the model, and the command says which did."""

from __future__ import annotations

import pytest

from mismatch.stages.opening import Opened
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.probe.config import ProbeConfig

CONTEXT = "has a context of 128 tokens"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PlanConfig(model="m", mechanism="zero", layers=1), "--seq-len 128 --length 128: "),
        (PlanConfig(model="m", mechanism="zero", layers=1, seq_len=64), "--length 128: "),
        (PlanConfig(model="m", mechanism="zero", layers=1, seq_len=64, length=64), ""),
        (ProbeConfig(model="m", swap=("layer1:zero",), lookup_length=64), "--seq-len 96 --lengths 128: "),
    ],
)  # fmt: skip
def test_what_became_shorter(config, said, toy_teacher, capsys):
    opened = Opened(config, teacher=toy_teacher, progress=True)
    opened.fit()
    assert capsys.readouterr().err == (f"{said}m {CONTEXT}\n" if said else "")
