"""What a script of a user can be written with: the public names, beside the commands."""

from __future__ import annotations

import math
import subprocess
import sys
import types

import pytest
import torch
from wonderland import documents

import mismatch
from mismatch.errors import SpecError

SWAP = "layer2:infini(segment=16)"


@pytest.fixture(scope="module")
def cut(toy_teacher):
    text = mismatch.read_documents(documents(4))
    return mismatch.windows(text, toy_teacher.tokenizer, seq_len=64, tokens=256)


def test_values_at_the_sites_of_a_model(toy_teacher, cut):
    """The stream behind a block is the stream before it plus two updates."""
    layout = mismatch.layout_of(toy_teacher.model)
    seen = {}
    with torch.no_grad():
        mismatch.run_tapped(
            layout,
            torch.from_numpy(cut.ids),
            mismatch.taps(layout, 2),
            lambda tap, value: seen.__setitem__(tap.site, value),
        )
    assert seen["resid_post"].shape == (4, 64, layout.d_model)
    total = seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"]
    assert torch.allclose(total, seen["resid_post"], atol=1e-4)


def test_held_out_kl_of_a_student_is_that_of_a_trace(toy_teacher, cut):
    student = mismatch.swap(toy_teacher, SWAP)
    held_out = mismatch.HeldOut(toy_teacher.layout, cut, first=2)
    traced = mismatch.trace(
        toy_teacher,
        student,
        data=documents(4),
        tokens=256,
        seq_len=64,
        controls=(),
        metrics=("kl",),
    )
    assert isinstance(traced, mismatch.Traced) and isinstance(student, mismatch.Student)
    table = traced.table
    rows = table[(table["student"] == "swap") & (table["site"] == "logits")]
    [kl] = rows.loc[(rows["stat"] == "mean") & (rows["position"] == "all"), "value"]
    assert math.isclose(held_out.evaluate(student.layout).kl.mean().value, kl, rel_tol=1e-6)


def test_a_swap_text_can_be_read_without_a_model():
    parsed = mismatch.spec.check(mismatch.spec.parse("layers0-2: infini( segment=16 )"))
    assert mismatch.spec.format(parsed) == "layers0-2:infini(segment=16)"
    with pytest.raises(SpecError):
        mismatch.spec.check(mismatch.spec.parse("layer0:infinity"))


def test_versions_name_what_a_number_depends_on():
    assert {"python", "mismatch", "torch", "transformers"} <= mismatch.versions().keys()


def test_every_name_is_there_and_modules_are_the_submodules():
    found = {name: getattr(mismatch, name) for name in mismatch.__all__}
    modules = {name for name, value in found.items() if isinstance(value, types.ModuleType)}
    assert modules == {"errors", "spec"}


def test_names_without_torch():
    code = (
        "import sys, mismatch; mismatch.spec.parse; mismatch.versions(); mismatch.read_documents;"
    )
    code += "mismatch.windows; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
