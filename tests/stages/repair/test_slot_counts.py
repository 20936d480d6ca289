"""A budget of bytes shared out as slots: the curves against whole modules, the climb by hand, what is saved."""

from __future__ import annotations

import itertools

import pytest
import torch
from refusals import refused
from test_repair import SMALL
from wonderland import documents, jsonl

import mismatch
from mismatch.errors import ConfigError, UsageError
from mismatch.models.layout import Layout
from mismatch.stages import runner
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.ladder import Ladder
from mismatch.stages.repair.ladder_stages import scores, slot_counts
from mismatch.stages.repair.ladder_stages.module_pair import pairs_of, watch
from mismatch.surgery.rewritten import rewrite

SWAP = "layers1-2:kv_slots(segment=4, slots=3, slot_score=key_norm)"


@pytest.fixture
def kept(tiny):
    teacher = Layout.of(tiny("qwen2"))  # its projections have biases
    student = mismatch.swap((teacher.model, None), SWAP)
    return teacher, student, slot_counts.keepers(pairs_of(teacher, student))


def ids(count: int = 3, length: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 101, (1, length), generator=generator) for _ in range(count)]


def test_the_error_of_a_head_is_that_of_the_module_when_the_others_keep_everything(kept):
    teacher, _, keepers = kept
    (batch,) = ids(1)
    found = slot_counts.measured(teacher, keepers, [batch])
    for keeper, level in itertools.product(keepers, (0, 8)):
        layer, part = keeper.part.layer, keeper.part
        block = teacher.slot_path(layer, "block")
        seen = watch(teacher, [part.path, block], batch, last=layer)
        x, y, call = seen[part.path]
        stream = seen[block][0]
        heads = len(keeper.choice.counts)
        for head in range(heads):
            counts = tuple(level if h == head else 40 for h in range(heads))
            with keeper.having(counts), torch.no_grad():
                off = call(part.student, x) - y
            wanted = (off.square().sum(-1) / stream.square().sum(-1))[:, 8:].mean()
            got = found[layer][head][slot_counts.LEVELS.index(level)]
            assert float(got) == pytest.approx(float(wanted), rel=1e-3)
            assert wanted > 1e-6
        assert keeper.choice.counts == (3, 3)  # as it was


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_the_error_is_that_of_what_a_norm_behind_the_attention_adds(tiny, family):
    teacher, (batch,) = Layout.of(tiny(family)), ids(1)
    student = mismatch.swap((teacher.model, None), SWAP.replace("layers1-2", "layer1"))
    [keeper] = slot_counts.keepers(pairs_of(teacher, student))
    found = slot_counts.measured(teacher, [keeper], [batch])[1]
    block = teacher.slot_path(1, "block")
    norm = f"{block}.{teacher.site_path(1, 'attn_out')}"
    assert norm != keeper.part.path
    before, heads = watch(teacher, [norm, block], batch, last=1), len(keeper.choice.counts)
    for head, level in itertools.product(range(heads), (0, 8)):
        with keeper.having(tuple(level if h == head else 40 for h in range(heads))):
            after = watch(student.layout, [norm], batch, last=1)
        off = (after[norm][1] - before[norm][1]).square().sum(-1)
        wanted = (off / before[block][0].square().sum(-1))[:, 8:].mean()
        got = found[head][slot_counts.LEVELS.index(level)]
        assert float(got) == pytest.approx(float(wanted), rel=1e-3)


def test_a_head_with_a_slot_for_every_far_token_has_no_error(kept, monkeypatch):
    teacher, _, keepers = kept
    monkeypatch.setattr(slot_counts, "LEVELS", (0, 34))
    monkeypatch.setattr(slot_counts, "_levels", lambda *_: [0, 34])
    for curve in slot_counts.measured(teacher, keepers, ids(1)).values():
        assert (curve[:, 0] > 1e-6).all()
        assert (curve[:, 1] < 1e-10).all()


def test_slots_go_where_the_error_falls_most_and_a_late_gain_is_not_passed_by(monkeypatch):
    monkeypatch.setattr(slot_counts, "LEVELS", (0, 8, 16, 32))
    curves = {
        4: torch.tensor([[10.0, 9.9, 2.0, 2.0], [5.0, 4.0, 3.5, 3.0]]),
        7: torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 0.9, 0.0]]),
    }
    costs = {4: 10, 7: 20}
    # Head 4.0 goes to 16 in one step (8 / 16 tokens), then 4.1 and 7.1 to 8 each (1/8/10 = 2/8/20).
    assert slot_counts.climbed(curves, costs, 160) == {4: (16, 0), 7: (0, 0)}
    assert slot_counts.climbed(curves, costs, 400) == {4: (16, 8), 7: (0, 8)}
    assert slot_counts.climbed(curves, costs, 159)[4][0] == 0
    assert slot_counts.climbed(curves, costs, 10**6) == {4: (16, 32), 7: (0, 32)}
    assert slot_counts.climbed(curves, costs, 0) == {4: (0, 0), 7: (0, 0)}


def test_what_was_shared_out_stays_within_the_bytes_and_comes_back_from_a_checkpoint(
    kept, tmp_path
):
    teacher, student, keepers = kept
    budget = slot_counts.least(keepers) + 9 * keepers[0].bytes_per_slot
    counts = slot_counts.shared_out(teacher, keepers, ids(), budget)
    assert sum(map(sum, counts.values())) == 8
    for keeper in keepers:
        keeper.set(counts[keeper.part.layer])
    rewrite(student, "slots", counts)
    assert sum(clause.state_bytes for clause in student.plan.clauses) <= budget
    assert student.plan.spec == "; ".join(
        f"layer{layer}:kv_slots(segment=4, slots=[{', '.join(map(str, mine))}], slot_score=key_norm)"
        for layer, mine in sorted(counts.items())
    )
    assert [clause.args["slots"] for clause in student.plan.clauses] == [*counts.values()]
    student.save(tmp_path / "saved")
    again = mismatch.load(tmp_path / "saved")
    (text,) = ids(1)
    with torch.no_grad():
        assert torch.equal(again.model(text).logits, student.model(text).logits)
    cache = student.model(text, use_cache=True).past_key_values
    held = sum(x.nbytes for layer in (1, 2) for x in cache.layers[layer].rows.values())
    assert held <= budget


def test_what_cannot_be_shared_out_is_refused(kept, tiny):
    teacher, _, keepers = kept
    with pytest.raises(UsageError, match=r"less than .* what 2 modules hold of a text"):
        slot_counts.check_budget(keepers, 100)
    slot_counts.check_budget(keepers, slot_counts.least(keepers))
    for text, said in (
        ("layer1:infini(segment=4)", "no mechanism of the swap has any"),
        ("layer1.heads[0,1]:kv_slots", "swaps some heads"),
    ):
        student = mismatch.swap((teacher.model, None), text)
        with pytest.raises(UsageError, match=said):
            slot_counts.keepers(pairs_of(teacher, student))


# the stage ----------------------------------------------------------------------------------------

BUDGETED = {
    **SMALL,
    "swap": "layers[1,2]:kv_slots(segment=8, slots=3, rest=mean)",
    "stages": ("scores", "slots", "closed-form"),
    "state_bytes": 30_000,
    "trace_tokens": 0,
    "probes": (),
    "min_gain": 0.0,
}


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(scores, "STEPS", 20)
    monkeypatch.setattr(runner, "write_html", lambda _folder: None)


def test_a_repair_keeps_to_the_bytes_and_its_checkpoint_holds_the_slots(
    toy_teacher, tmp_path, fast
):
    given = {name: value for name, value in BUDGETED.items() if name != "swap"}
    result = mismatch.repair(toy_teacher, BUDGETED["swap"], **given)
    stage = result.plan.stages[2]
    assert stage.name == "slots" and stage.kept
    used = sum(clause.state_bytes for clause in result.plan.clauses)
    assert 25_000 < used <= 30_000
    assert stage.notes[0].startswith(f"{used:,} of 30,000 bytes of state; slots of each kv head, ")
    counts = {int(layer): tuple(own) for layer, own in stage.slots.items()}
    assert sorted(counts) == [1, 2] and counts != {1: (3, 3), 2: (3, 3)}
    assert result.plan.spec == "; ".join(
        f"layer{layer}:kv_slots(segment=8, slots=[{', '.join(map(str, own))}], rest=mean)"
        for layer, own in counts.items()
    )
    result.student.save(tmp_path / "saved")
    text = torch.randint(5, 900, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = result.student.model(text).logits
        assert torch.equal(mismatch.load(tmp_path / "saved").model(text).logits, wanted)


def test_the_bytes_are_kept_to_when_no_time_is_left(toy_teacher, fast, monkeypatch):
    monkeypatch.setattr(Ladder, "_exhausted", lambda self: True)
    given = {name: value for name, value in BUDGETED.items() if name != "swap"}
    result = mismatch.repair(toy_teacher, BUDGETED["swap"], **given)
    assert [stage.name for stage in result.plan.stages] == ["swap", "slots"]
    assert sum(clause.state_bytes for clause in result.plan.clauses) <= 30_000


def test_a_run_that_was_stopped_behind_it_goes_on_with_its_slots(
    toy_folder, tmp_path, fast, monkeypatch
):
    texts = {
        "data": str(jsonl(tmp_path / "held_out.jsonl", documents(12))),
        "train_data": str(jsonl(tmp_path / "train.jsonl", documents(8, seed=1))),
    }
    settings = RepairConfig(
        **BUDGETED, **texts, model=str(toy_folder), output=str(tmp_path / "run")
    )

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(Ladder, "_closed_form", stop)
        with pytest.raises(KeyboardInterrupt):
            runner.command("repair", settings, progress=False)
    with monkeypatch.context() as once:  # neither is run again
        once.setattr(Ladder, "_scores", stop)
        once.setattr(Ladder, "_slots", stop)
        done = runner.command("repair", settings, resume=tmp_path / "run", progress=False)
    assert [stage.name for stage in done.plan.stages] == [
        "swap",
        "scores",
        "slots",
        "closed-form",
    ]
    assert sum(clause.state_bytes for clause in done.plan.clauses) <= 30_000
    own = done.plan.stages[2].slots["1"]
    assert f"layer1:kv_slots(segment=8, slots=[{own[0]}, {own[1]}], rest=mean)" in done.plan.spec


def test_a_budget_that_is_too_small_is_refused_before_weights(toy_folder, tmp_path, capsys):
    words = ["repair", f"--model={toy_folder}", f"--swap={BUDGETED['swap']}", "--state-bytes=9000"]
    said = refused([*words, f"--output={tmp_path / 'run'}", "--probes=none"], tmp_path, capsys)
    assert "--state-bytes 9,000 is less than" in said


def test_bytes_without_the_stage_that_shares_them_out_are_refused():
    with pytest.raises(ConfigError, match="in the stage `slots`, which --stages leaves out"):
        RepairConfig(**{**BUDGETED, "stages": ("scores",)}, model="m", data="d")


def test_a_model_in_half_precision_is_measured_too(tiny):
    teacher = Layout.of(tiny("llama").to(torch.bfloat16))
    student = mismatch.swap((teacher.model, None), SWAP)
    keepers = slot_counts.keepers(pairs_of(teacher, student))
    for curve in slot_counts.measured(teacher, keepers, ids(1)).values():
        assert curve.isfinite().all() and (curve[:, 0] > curve[:, -1]).all()
    counts = slot_counts.shared_out(teacher, keepers, ids(1), slot_counts.least(keepers) + 2000)
    assert sum(map(sum, counts.values())) > 0
