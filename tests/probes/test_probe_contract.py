"""What every probe must do. A new line in the table is tested here before its author writes a test."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import setting, subjects
from random_models import FAMILIES, build

import mismatch.probes as package
from mismatch import cli
from mismatch.probes import PROBES, load_probe
from mismatch.probes.base import rows
from mismatch.registry import explain as catalog
from mismatch.registry import probes
from mismatch.runs.table import as_table, conditions

FACTS = ("headline", "unit", "range", "better", "chance", "shows", "blind", "source", "needs")


def table(name, model, swap, controls=(), **changes):
    asked = subjects(model, swap, controls)
    answers = load_probe(name)(setting(**changes)).run(asked)
    swapped = {s.name: s.swapped for s in asked}
    return as_table([row | {"run_id": "test"} for row in rows(name, answers, swapped)])


@pytest.mark.parametrize("name", PROBES)
def test_teacher_against_itself_reads_exactly_0(name, family):
    """`identity` runs the original through a wrapper: another module tree, the same numbers."""
    found = table(name, build(family), "layer1.attn:identity")
    shifts = found[found["stat"].str.contains("_minus_teacher")]
    values = shifts[["value", "lo", "hi"]].to_numpy()
    assert not len(values) or set(np.nan_to_num(values).ravel()) == {0.0}
    assert set(found["metric"]) == {name}
    assert len(shifts) or name in ("rope_bands",)  # a family without RoPE


@pytest.mark.parametrize("name", PROBES)
def test_the_same_question_gets_the_same_answer(name):
    model = build("llama")
    first, second = (table(name, model, "layer1:infini(segment=8)") for _ in range(2))
    assert first.equals(second)


@pytest.mark.parametrize("name", PROBES)
def test_another_batch_size_gives_the_same_answer(name):
    model = build("llama")
    first = table(name, model, "layer1.attn:random", batch_size=4)
    second = table(name, model, "layer1.attn:random", batch_size=1)
    assert list(first["stat"]) == list(second["stat"])
    for column in ("value", "lo", "hi"):
        np.testing.assert_allclose(first[column], second[column], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PROBES)
def test_random_weights_move_what_is_read(name):
    found = table(name, build("llama"), "layer1.attn:random")
    shifts = found[(found["student"] == "swap") & found["stat"].str.contains("_minus_teacher")]
    sizes = shifts["value"].abs()
    assert sizes.max() > 1e-9 or name == "shift_invariance"  # RoPE is relative at any weights


@pytest.mark.parametrize("name", PROBES)
def test_the_headline_is_there_with_an_interval(name):
    found = table(name, build("llama"), "layer1.attn:random", ("zero",))
    headline = load_probe(name).headline
    mine = found[found["stat"].map(lambda stat: conditions(stat)[0] == headline)]
    assert {"teacher", "swap", "zero"} <= set(mine["student"])
    means = mine[(mine["student"] == "swap") & (mine["n"] > 0)]
    if name == "memory":  # the swap has no branches
        assert set(means["site"]) == {"logits"}
    assert len(means) and means["value"].notna().all()
    assert (means["lo"] <= means["value"] + 1e-12).all()
    assert (means["hi"] >= means["value"] - 1e-12).all()


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("swap", ["layer1.block:skip", "layer0.mlp:zero", "final_norm:zero"])
def test_any_slot_can_be_asked_about(name, swap):
    found = table(name, build("llama"), swap)
    assert set(found["student"]) <= {"teacher", "swap"}
    applicable = found[found["n"] > 0]
    assert applicable["value"].notna().all()
    assert found[found["n"] == 0]["value"].isna().all()


@pytest.mark.parametrize("name", PROBES)
def test_card_is_complete_and_read_without_importing(name):
    card, probe = probes().card(name), load_probe(name)
    for fact in FACTS:
        assert card.facts[fact] == getattr(probe, fact), fact
    assert "?" in card.summary
    for word in ("Definition", "Unit:", "Range:", "Null:", "Chance:", "Source:"):
        assert word in card.text, word
    assert probe.better in ("higher", "lower", "none")
    assert probe.needs in ("tokens", "text", "tokenizer", "tokenizer, haystack")


def test_the_table_imports_neither_torch_nor_a_probe():
    code = (
        "import sys; from mismatch.probes import PROBES; assert PROBES;"
        "bad = [m for m in sys.modules if m == 'torch' or m.startswith('mismatch.probes.')];"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_probe_files_do_not_import_one_another():
    files = {target.split(":")[0] for target in PROBES.values()}
    for module in files:
        path = Path(package.__file__).with_name(module.rsplit(".", 1)[1] + ".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in files, f"{module} imports {node.module}"


def test_every_family_is_asked_about_its_heads():
    """No family may fall back to `not applicable` unseen."""
    for family in FAMILIES:
        found = table("heads", build(family), "layer1.attn:identity")
        if family == "qwen3_5_text":  # its other layers have no heads that attend
            assert not found[found["layer"] != 1]["n"].any()
            found = found[found["layer"] == 1]
        assert (found["n"] > 0).all(), family
        assert not math.isnan(found["value"].sum()), family
    assert torch.is_grad_enabled()  # probes leave the caller's mode alone


@pytest.mark.parametrize("name", PROBES)
def test_a_model_in_bfloat16_can_be_asked(name):
    found = table(name, build("llama").to(torch.bfloat16), "layer1:infini(segment=16)")
    asked = found[found["n"] > 0]
    assert asked["value"].notna().all() and np.isfinite(asked["value"]).all()


def test_what_list_and_explain_say(capsys):
    assert set(catalog.list_probes()) == set(PROBES)
    assert cli.main(["list", "probes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == sorted(PROBES)
    assert cli.main(["explain", "passkey"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("passkey   probe\n\nCan the model find one number") and "headline" in out
