"""Several clauses, wrappers around replacements, whole-depth patterns, whole blocks: planned, run, traced, undone."""

from __future__ import annotations

import pytest
import torch
from measured import collector_of, cut, tokens
from transformers import DynamicCache

import mismatch
from mismatch import spec
from mismatch.errors import SpecError, SurgeryError
from mismatch.forward.calibrate import calibrate
from mismatch.models.layout import Layout
from mismatch.runs.table import as_table
from mismatch.stages.trace.batches import measure
from mismatch.surgery import operate as surgery
from mismatch.surgery.operate import placed

EXACT = 1e-4  # of the logits, between one way of feeding a text and another
FAMILIES = ("llama", "gemma3_text", "gpt2", "gpt_neox")  # where the families differ most


def swapped(model, text):
    """The student of a swap text, calibrated on random tokens."""
    layout = Layout.of(model)
    parsed = spec.parse(text)
    places = placed(parsed, layout)
    wanted = surgery.calibrators(places)
    if wanted:
        calibrate(layout, wanted, [tokens(cut(4, seed=9))])
    return surgery.operate(layout, places, spec=spec.format(parsed), calibrations=wanted)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def fed(model, ids, size):
    """Logits of a text that comes piece by piece through the cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [
            model(input_ids=piece, past_key_values=cache, use_cache=True).logits
            for piece in ids.split(size, dim=1)
        ]
    return torch.cat(pieces, dim=1)


def traced(model, student, windows):
    students = [student]
    collector = collector_of(model, students, windows, ("kl", "rel_l2"))
    measure(Layout.of(model), students, collector, windows, batch_size=2)
    table = as_table([row | {"run_id": "test"} for row in collector.rows()])
    asked = {"student": "swap", "mode": "free", "position": "all"}
    return table[(table[list(asked)] == list(asked.values())).all(axis=1)]


WHOLE = [
    "layer1.block:zero",
    "layer1:skip",
    "layer1.block:linear",
    "layer1.block:random",
    "layer1.mlp:zero",
    "layer1.mlp:linear",
    "layer1.mlp:low_rank_mlp",
]
SEVERAL = [
    "layer1:rwkv; layer1.norms:dyt",
    "layer1:rwkv; layer1.mlp:linear; layer2:skip",
    "layers[0-last/2]:rwkv; layer1:sliding_window(window=6)",
    "all:rwkv; norms:dyt",
    "layer1:rwkv; layer1:parallel(zero, alpha=0.5)",
    "layer1:rwkv; layer1.block:parallel(skip, alpha=0.5)",
    "layer1:parallel(rwkv, alpha=0.5); layer2.mlp:parallel(linear, alpha=0.5)",
    "layer1.block:parallel(linear, alpha=0.1)",
]


@pytest.mark.parametrize("text", WHOLE + SEVERAL)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_in_pieces_and_comes_back(family, tiny, text):
    model, ids = tiny(family), tokens(cut(2))
    before = logits(model, ids)
    student = swapped(model, text)
    whole = logits(student.model, ids)
    assert whole.isfinite().all()
    assert not torch.equal(whole, before)
    for size in (1, 7):
        torch.testing.assert_close(fed(student.model, ids, size), whole, atol=EXACT, rtol=0)
    student.undo()
    assert torch.equal(logits(student.model, ids), before)


@pytest.mark.parametrize("text", WHOLE + SEVERAL)
def test_a_trace_reads_what_plain_forwards_say(tiny, text):
    model, windows = tiny("llama"), cut(4)
    student = swapped(model, text)
    table = traced(model, student, windows)
    p, q = (logits(m, tokens(windows)).double().log_softmax(-1) for m in (model, student.model))
    kl = table[(table["metric"] == "kl") & (table["site"] == "logits") & (table["stat"] == "mean")]
    assert kl["value"].item() == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    first = student.plan.first
    in_front = table[(table["layer"] < first) & (table["metric"] == "rel_l2")]
    assert (in_front["value"] == 0).all()
    assert len(in_front) > 0 or first == 0
    inside = table[table["swapped"] & table["layer"].notna()]
    assert set(inside["layer"]) == set(student.plan.layers)


@pytest.mark.parametrize(
    "text",
    [
        "layer1.block:identity",
        "layer1:parallel(rwkv, alpha=0)",
        "layer1.block:parallel(linear, alpha=0)",
        "layer1.mlp:parallel(linear, alpha=0); layer2:parallel(rwkv, alpha=0)",
        "all:parallel(rwkv, alpha=0); norms:parallel(dyt, alpha=0)",
    ],
)
def test_at_the_identity_it_is_the_teacher_to_the_bit(family, tiny, text):
    changes = {}
    if family == "qwen3_5_text":  # a linear attention has no second path, and rwkv no gate below it
        changes = {"layer_types": ["full_attention"] * 3}
        text = text.replace("rwkv", "rwkv(init=fresh)")
    model, ids = tiny(family, **changes), tokens(cut(2))
    assert torch.equal(logits(swapped(model, text).model, ids), logits(model, ids))


@pytest.mark.parametrize(
    "around, plain",
    [
        ("layer1:rwkv; layer1:identity", "layer1:rwkv"),
        ("layer1:rwkv; layer1.block:identity", "layer1:rwkv"),
        ("layer1:rwkv; layer1.block:skip", "layer1:skip"),
        ("layer1:rwkv; layer1:zero", "layer1:zero"),
        ("layer1:rwkv; layer1:parallel(zero, alpha=1)", "layer1:rwkv"),
        # What is named after the wrapper around it is replaced all the same.
        ("layer1.block:identity; layer1.attn:zero", "layer1:zero"),
        ("layer1:identity; layer1.o_proj:zero", "layer1.o_proj:zero"),
        ("layer1.block:parallel(zero, alpha=1); layer1.mlp:zero", "layer1.mlp:zero"),
        ("layer1.block:identity; layer1:identity; layer1.q_proj:zero", "layer1.q_proj:zero"),
        ("layer1:nope; layer1.q_proj:zero", "layer1.q_proj:zero; layer1:nope"),
    ],
)
def test_a_wrapper_around_a_part_is_that_part(tiny, around, plain):
    model, ids = tiny("llama"), tokens(cut(2))
    student = swapped(model, around)
    got = logits(student.model, ids)
    assert torch.equal(got, logits(swapped(model, plain).model, ids))
    assert not torch.equal(got, logits(model, ids))
    student.undo()
    assert torch.equal(logits(student.model, ids), logits(model, ids))


@pytest.mark.parametrize(
    "pattern, layers",
    [
        ("layers[0-last/4]:rwkv", (0, 4, 8)),
        ("layers[0-last/2]:rwkv; layers[1-last/2]:sliding_window(window=6)", tuple(range(9))),
        ("layers[0-3,8]:rwkv; layer8.mlp:linear", (0, 1, 2, 3, 8)),
    ],
)
def test_a_pattern_over_the_whole_depth(tiny, pattern, layers):
    model, ids = tiny("llama", num_hidden_layers=9), tokens(cut(2))
    student = swapped(model, pattern)
    assert student.plan.layers == layers
    whole = logits(student.model, ids)
    torch.testing.assert_close(fed(student.model, ids, 5), whole, atol=EXACT, rtol=0)


@pytest.mark.parametrize("text", WHOLE + SEVERAL)
def test_check_plans_it_without_weights(tiny, tmp_path, text):
    tiny("llama").config.save_pretrained(tmp_path)
    plan = mismatch.check(str(tmp_path), text, seq_len=64).plan
    assert "the text was not read" in plan.warnings[-1]  # there is no tokenizer either
    done = swapped(tiny("llama"), text).plan
    facts = [
        [(c.path, c.mechanism, c.inherited, c.new_parameters, c.dropped) for c in p.clauses]
        for p in (plan, done)
    ]
    assert facts[0] == facts[1]
    assert plan.spec == done.spec


@pytest.mark.parametrize(
    "text, error, says",
    [
        ("layer1:rwkv; layer1:infini", SpecError, "layer 1 `attn` is replaced twice: by `rwkv`"),
        ("layer1:rwkv; layer1.block:linear", SpecError, "layer 1 `attn` lies inside `block`"),
        ("layer1.block:linear; layer1:rwkv", SpecError, "layer 1 `attn` lies inside `block`"),
        ("layer1.block:rwkv", SpecError, "`rwkv` cannot go into the slot `block`"),
        ("layer1.mlp:skip", SpecError, "`skip` cannot go into the slot `mlp`"),
        (
            "layer1.block:linear; layer1.attn:zero",
            SurgeryError,
            "`zero` at layer 1 `attn`: the module around it was replaced as a whole",
        ),
        (
            "layer1:linear; layer1.q_proj:zero",
            SurgeryError,
            "`zero` at layer 1 `q_proj`: the module around it was replaced as a whole",
        ),
        (
            "layer1:rwkv; layer1:parallel(infini, alpha=0.5)",
            SurgeryError,
            "layer1.attn: the attention was already replaced by `RWKV`",
        ),
    ],
)
def test_what_cannot_stand_together_is_refused(tiny, tmp_path, text, error, says):
    """By `check`: before any weight is loaded."""
    tiny("llama").config.save_pretrained(tmp_path)
    with pytest.raises(error) as caught:
        mismatch.check(str(tmp_path), text, seq_len=64)
    assert says in str(caught.value)
    assert "hint:" in str(caught.value)
