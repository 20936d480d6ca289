"""A scan: each cell is the trace of its swap; nulls; what cannot be built, asked, or is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from measured import cut, measured, student_of

from mismatch import registry, spec
from mismatch.errors import LayoutError, NumericsError, RunError, SurgeryError
from mismatch.mechanisms.base import Mechanism
from mismatch.metrics.base import PerDocument
from mismatch.models.layout import Layout
from mismatch.models.private import same_memory
from mismatch.models.skeleton import skeleton_of
from mismatch.runs.table import as_table
from mismatch.stages.scan import sweep as sweeping
from mismatch.stages.scan.batches import measure, prove, prove_restored
from mismatch.stages.scan.cells import cells, columns, joint, refused
from mismatch.stages.scan.prepared import Prepared
from mismatch.stages.scan.sums import Sums
from mismatch.stages.scan.sweep import Sweep
from mismatch.stages.scan.tasks import Task, text_task
from mismatch.surgery import operate as surgery

SWAP = "infini(segment=8); nope; sliding_window(8, 1); identity; random; mlp:random"


def scanned(model, swap=SWAP, controls=("zero",), *, tasks=None, layers=(0, 1, 2), batch=48):
    """The sums of a scan of a tiny model, and its rows as a table."""
    layout = Layout.of(model)
    made = columns(spec.templates(swap), controls)
    every = cells(made, layers, layout)
    sweep = Sweep(layout, surgery.blank(layout))
    sums = measure(sweep, every, tasks or (text_task(cut()),), batch_tokens=batch)
    rows = [*sums.rows({c.name: c.controls for c in made}), *sums.teacher_rows()]
    return sums, as_table([row | {"run_id": "test"} for row in rows]), sweep


def value(table, student, layer, metric="kl", stat="mean", position="all"):
    rows = table[
        (table["student"] == student)
        & (table["layer"] == layer)
        & (table["metric"] == metric)
        & (table["stat"] == stat)
        & (table["position"] == position)
    ]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.fixture(scope="module")
def llama(tiny):
    return scanned(tiny("llama"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_a_cell_is_the_trace_of_the_same_swap(tiny, family):
    """Every metric, statistic and position bin at the logits, bit for bit: it is the same arithmetic."""
    model = tiny(family)
    swap = "infini(segment=8); random; mlp:zero"
    _, table, _ = scanned(model, swap, ())
    for template in spec.templates(swap):
        for layer in range(3):
            text = spec.format(template.at(layer))
            one, _ = measured(model, text, metrics=("kl", "nll", "top1"), windows=cut())
            theirs = one[(one["site"] == "logits") & (one["student"] == "swap")]
            ours = table[(table["student"] == str(template)) & (table["layer"] == layer)]
            keys = ["metric", "stat", "position"]
            both = ours.merge(theirs, on=keys, suffixes=("", "_trace"), validate="one_to_one")
            assert len(both) == len(theirs) == len(ours) > 20
            for column in ("value", "lo", "hi", "n"):
                np.testing.assert_array_equal(both[column], both[f"{column}_trace"])


def test_identity_is_exactly_nothing_in_all_layers(llama):
    _, table, _ = llama
    mine = table[(table["student"] == "identity") & ~table["stat"].str.contains("_minus_")]
    shifts = mine[~mine["stat"].isin(["teacher", "student"])]
    assert set(shifts["layer"]) == {0, 1, 2}
    assert (shifts["value"] == 0).all()


def test_the_paired_difference_to_the_control_of_its_slot(llama):
    _, table, _ = llama
    for student, control in (
        ("infini(segment=8)", "zero"),
        ("nope", "zero"),
        ("mlp:random", "mlp:zero"),
    ):
        for layer in range(3):
            pair = value(table, student, layer, stat=f"mean_minus_{control}")
            apart = value(table, student, layer)["value"] - value(table, control, layer)["value"]
            assert pair["value"] == pytest.approx(apart, rel=1e-12, abs=1e-15)
            assert pair["lo"] <= pair["value"] <= pair["hi"]


def test_columns_name_the_controls_of_their_slots():
    made = columns(spec.templates("infini; mlp:random; skip; nope; zero"), ("zero", "mean"))
    assert {c.name: (c.controls, c.control) for c in made} == {
        "infini": (("zero", "mean"), False),
        "mlp:random": (("mlp:zero", "mlp:mean"), False),
        # Deleting a block with its stream says nothing about any layer: what it adds is deleted instead.
        "skip": (("block:mean",), False),
        "nope": (("zero", "mean"), False),
        "zero": (("mean",), True),
        "mean": ((), True),
        "mlp:zero": ((), True),
        "mlp:mean": ((), True),
        "block:mean": ((), True),
    }


def test_scoring_a_share_of_the_predictions(tiny):
    """The share is the same for all cells, does not depend on batches, and is what a full scan says of those tokens."""
    model, windows = tiny("llama"), cut(8)
    task = text_task(windows, 0.4, seed=3)
    assert 0.25 < task.asked.mean() < 0.55
    _, table, sweep = scanned(model, "random", (), tasks=(task,))
    _, other, _ = scanned(model, "random", (), tasks=(task,), batch=24 * 8)
    np.testing.assert_allclose(table["value"], other["value"], rtol=1e-6)
    student = student_of(model, "layer1:random")
    ids = torch.from_numpy(windows.ids)
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (model, student.model))
    kl = (p.exp() * (p - q)).sum(-1)[torch.from_numpy(task.asked)]
    row = value(table, "random", 1)
    assert row["n"] == len(kl) == task.asked.sum()
    assert row["value"] == pytest.approx(float(kl.mean()), rel=1e-4)
    # 1 share of the blocks, 0.4 of the head.
    assert sweep.work.blocks == windows.ids.size * (3 + 3 + 2 + 1)
    assert sweep.work.head == 4 * task.asked.sum()


def test_a_task_reads_the_log_loss_of_the_tokens_it_asks_for(tiny):
    """`logprob` per row and `nll` per token against plain forwards; the difference is paired over rows."""
    model = tiny("llama")
    ids = np.random.default_rng(1).integers(3, 101, (5, 20))
    asked = np.zeros(ids.shape, bool)
    asked[:, 10:13] = True
    rows = np.arange(5)
    per_key = Task("passkey", ids, asked, rows, "logprob", summed=True)
    per_token = Task("induction", ids, asked, rows, "nll_second")
    _, table, _ = scanned(model, "random", ("zero",), tasks=(per_key, per_token))
    whole = torch.from_numpy(ids)
    means = {}
    for name in ("random", "zero", None):
        with torch.no_grad():
            net = model if name is None else student_of(model, f"layer2:{name}").model
            log = net(whole).logits.double().log_softmax(-1)[:, 10:13]
            means[name] = log.gather(2, whole[:, 11:14, None])[..., 0].sum(1)
    own = means["random"] - means[None]
    expected = {
        ("passkey", "logprob"): means["random"].mean(),
        ("passkey", "logprob_minus_teacher"): own.mean(),
        ("passkey", "logprob_minus_zero"): (means["random"] - means["zero"]).mean(),
        ("induction", "nll_second"): -means["random"].mean() / 3,
        ("induction", "nll_second_minus_teacher"): -own.mean() / 3,
        ("induction", "nll_second_minus_zero"): -(means["random"] - means["zero"]).mean() / 3,
    }
    for (metric, stat), wanted in expected.items():
        row = value(table, "random", 2, metric, stat)
        assert row["value"] == pytest.approx(float(wanted), rel=1e-5)
        assert row["lo"] < row["value"] < row["hi"]
    teacher = table[(table["student"] == "teacher") & (table["metric"] == "passkey")].iloc[0]
    assert teacher["value"] == pytest.approx(float(means[None].mean()), rel=1e-5)
    # The interval is over rows: that of five numbers.
    _, lo, hi = PerDocument(own.numpy(), np.ones(5)).mean()[:3]
    row = value(table, "random", 2, "passkey", "logprob_minus_teacher")
    assert (row["lo"], row["hi"]) == pytest.approx((lo, hi), rel=1e-5, abs=2e-6)  # float32 logits
    assert row["over"] == "samples"


def test_the_tree_is_the_teachers_again_and_holds_no_copy(llama, tiny):
    _, _, sweep = llama
    prove_restored(sweep)
    assert sweep.base.plan.clauses == ()
    ours, held = (dict(m.named_parameters()) for m in (sweep.teacher.model, sweep.base.model))
    assert ours.keys() == held.keys()
    assert all(same_memory(ours[name], held[name]) for name in ours)


def test_one_part_more_than_a_base_is_the_joint_swap(tiny):
    """What greedy planning asks: cells on a tree that holds a swap already, in front of it and behind it."""
    model, windows = tiny("llama"), cut()
    layout = Layout.of(model)
    base = student_of(model, "layer1:random")
    (template,) = spec.templates("zero")
    more = cells(columns((template,), ()), (0, 2), layout)
    sums = measure(Sweep(layout, base), more, (text_task(windows),), batch_tokens=48)
    assert base.plan.spec == "layer1:random"
    for cell in more:
        swap = f"layer1:random; layer{cell.layer}:zero"
        one, _ = measured(model, swap, metrics=("kl",), windows=windows)
        whole = one[
            (one["site"] == "logits") & (one["stat"] == "mean") & (one["position"] == "all")
        ]
        ours = sums.damage(cell, sums.tasks[0])
        assert ours.value == pytest.approx(float(whole["value"].iloc[0]), abs=1e-6)


def test_a_joint_cell_and_the_sum_of_its_parts(tiny):
    model = tiny("llama")
    layout = Layout.of(model)
    singles = cells(columns(spec.templates("random"), ()), (0, 2), layout)
    both = joint("swap", spec.parse("layers[0,2]:random"), layout)
    assert (both.first, both.layer, both.key) == (0, None, "swap@joint")
    task = text_task(cut())
    sums = measure(Sweep(layout, surgery.blank(layout)), (both, *singles), (task,), batch_tokens=48)
    parts = [sums.damage(cell, task).value for cell in singles]
    assert sums.total(singles, task).value == pytest.approx(sum(parts), rel=1e-12)
    rest = sums.minus_total(both, singles, task)
    assert rest.value == pytest.approx(sums.damage(both, task).value - sum(parts), rel=1e-9)
    assert rest.lo <= rest.value <= rest.hi
    one, _ = measured(model, "layers[0,2]:random", metrics=("kl",), windows=cut())
    theirs = one[(one["site"] == "logits") & (one["stat"] == "mean") & (one["position"] == "all")]
    assert sums.damage(both, task).value == pytest.approx(float(theirs["value"].iloc[0]), abs=1e-6)


def test_cells_that_wait_for_the_head_in_parts(tiny, monkeypatch, llama):
    """However few final states fit into memory, the numbers are the same bits."""
    monkeypatch.setattr(sweeping, "HELD", 1)
    _, table, _ = scanned(tiny("llama"))
    assert table.equals(llama[1])


class Broken(Mechanism):
    """A part that overflows in layer 1, changes its input in place in layer 2, and cannot be built in layer 0."""

    slots = ("attn",)
    identity = "none"
    state = "none"
    source = "a test"
    Config = registry.mechanisms().get("zero").Config

    def __init__(self, original, config, context):
        super().__init__(original, config, context)
        if context.layer == 0:
            raise SurgeryError(f"{context.where}: not here")
        self.original = original

    def forward(self, hidden_states, *args, **kwargs):
        if self.context.layer == 2:
            hidden_states.add_(1.0)
        out = self.original(hidden_states, *args, **kwargs)
        return (out[0] * float("inf"), *out[1:])


@pytest.fixture
def broken():
    registry.mechanisms().add("broken", Broken)
    yield "broken"
    registry.mechanisms()._added.pop("broken")


def test_a_cell_that_is_not_finite_is_said_and_the_others_stand(tiny, broken):
    model = tiny("llama")
    sums, table, _ = scanned(model, "broken; zero", (), layers=(1,))
    assert sums.broken == {("broken@1", "text")}
    row = value(table, "broken", 1)
    assert math.isnan(row["value"])
    assert row["n"] == 0
    _, plain, _ = scanned(model, "zero", (), layers=(1,))
    mine = table[table["student"] == "zero"].reset_index(drop=True)
    assert mine.equals(plain[plain["student"] == "zero"].reset_index(drop=True))


def test_what_cannot_be_built_in_one_layer_is_left_out_with_the_reason(tiny, broken):
    layout = Layout.of(tiny("llama"))
    every = cells(columns(spec.templates("broken; zero"), ()), (0, 1, 2), layout)
    not_here = refused(every, skeleton_of(layout))
    assert {cell.key: reason for cell, reason in not_here.items()} == {
        "broken@0": "layer0.attn: not here"
    }
    with pytest.raises(SurgeryError, match=r"layer0\.attn: not here"):
        refused([cell for cell in every if cell.layer == 0], skeleton_of(layout))


def test_a_mechanism_that_some_layers_of_a_family_cannot_hold(tiny):
    """smollm3 has no RoPE in layer 2; layers 0 and 1 are scanned all the same."""
    layout = Layout.of(tiny("smollm3"))
    every = cells(columns(spec.templates("nope"), ()), (0, 1, 2), layout)
    not_here = refused(every, skeleton_of(layout))
    assert [cell.layer for cell in not_here] == [2]
    prepared = Prepared((), every, not_here, (), {}, None, None, None, 3)
    assert prepared.notes() == [
        "nope is not applicable in layers 2: rope: SmolLM3Attention has no rotary embedding to remove"
    ]


def test_layers_of_a_linear_attention_are_scanned_by_what_they_can_hold(tiny):
    """qwen3_5 holds a linear attention in layers 0 and 2; controls go there, too."""
    layout = Layout.of(tiny("qwen3_5_text"))
    every = cells(columns(spec.templates("nope; infini(segment=8); zero"), ()), (0, 1, 2), layout)
    not_here = refused(every, skeleton_of(layout))
    names = ["nope", "infini(segment=8)"]
    assert {(c.name, c.layer) for c in not_here} == {(n, layer) for n in names for layer in (0, 2)}
    notes = Prepared((), every, not_here, (), {}, None, None, None, 3).notes()
    assert [note.split(":")[0] for note in notes] == [
        f"{name} is not applicable in layers 0, 2" for name in names
    ]
    _, table, _ = scanned(tiny("qwen3_5_text"), "zero", ())
    assert (table[table["metric"] == "kl"].groupby("layer")["value"].max() > 0).all()


def test_a_stream_that_is_changed_in_place_is_found(tiny, broken):
    class Adds(Broken):
        def forward(self, hidden_states, *args, **kwargs):
            hidden_states.add_(1.0)
            return self.original(hidden_states, *args, **kwargs)

    registry.mechanisms().add("broken", Adds)
    # The norm in front of an attention hands over a new tensor; a whole block is handed the stream itself.
    Adds.slots = ("block",)
    with pytest.raises(
        RunError, match=r"`broken` at layer 2 changed the stream that it was given in place"
    ):
        scanned(tiny("llama"), "broken", (), layers=(2,))


def test_a_teacher_that_is_not_finite_is_an_error(tiny):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        NumericsError, match=r"(NaN|infinity) in the teacher's activations: final states"
    ):
        scanned(model, "zero", ())


def test_a_mechanism_that_changes_what_it_replaces_leaves_the_tree_as_it_was(tiny, broken):
    class Meddles(Broken):
        def __init__(self, original, config, context):
            super().__init__(original, config, context)
            original.scaling = 2 * original.scaling
            original.q_proj.weight.data.mul_(2)

    registry.mechanisms().add("broken", Meddles)
    _, _, sweep = scanned(tiny("llama"), "broken", (), layers=(1,))
    prove_restored(sweep)


def test_a_tree_that_was_left_changed_is_found(llama):
    _, _, sweep = llama
    handle = sweep.base.layout.blocks[0].mlp.register_forward_hook(lambda m, a, out: out * 1.5)
    with pytest.raises(LayoutError, match="a mechanism of this scan left the model changed"):
        prove_restored(sweep)
    handle.remove()


def test_the_prefix_is_proved_to_be_shared(tiny):
    layout = Layout.of(tiny("llama"))
    every = cells(columns(spec.templates("random"), ()), (0, 1, 2), layout)
    sweep = Sweep(layout, surgery.blank(layout))
    prove(sweep, every)
    handle = sweep.base.layout.blocks[0].mlp.register_forward_hook(lambda m, a, out: out * 1.5)
    with pytest.raises(LayoutError, match="mlp_out of layer 0 changed"):
        prove(sweep, every)
    handle.remove()


def test_sums_come_back_from_their_state_bit_for_bit(llama):
    sums, _, _ = llama
    again = Sums(sums.cells, sums.tasks).load(sums.state())
    rows = [row | {"run_id": "test"} for row in again.rows({})]
    mine = [row | {"run_id": "test"} for row in sums.rows({})]
    assert as_table(rows).equals(as_table(mine))


@pytest.mark.parametrize("by, count, word", [("head", 4, "heads"), ("kv-head", 2, "kv_heads")])
def test_a_cell_of_a_head_is_the_trace_of_the_same_swap(tiny, by, count, word):
    model = tiny("llama")
    layout = Layout.of(model)
    made = columns(spec.templates("sliding_window(8, 1); nope"), ("zero",))
    every = cells(made, (0, 2), layout, by)
    assert [(c.layer, c.head) for c in every if c.name == "nope"] == [
        (layer, head) for layer in (0, 2) for head in range(count)
    ]
    sums = measure(
        Sweep(layout, surgery.blank(layout)), every, (text_task(cut()),), batch_tokens=48
    )
    table = as_table(
        [row | {"run_id": "test"} for row in sums.rows({c.name: c.controls for c in made})]
    )
    for name, head in (("sliding_window(window=8, sinks=1)", 1), ("nope", 0), ("zero", count - 1)):
        cell = value(table[table["head"] == head], name, 2)
        traced, _ = measured(model, f"layer2.{word}[{head}]:{name}", metrics=("kl",))
        traced = traced[(traced["site"] == "logits") & (traced["student"] == "swap")]
        wanted = traced[(traced["stat"] == "mean") & (traced["position"] == "all")].iloc[0]
        assert tuple(cell[["value", "lo", "hi"]]) == tuple(wanted[["value", "lo", "hi"]])
    apart = value(table[table["head"] == 1], "nope", 2, stat="mean_minus_zero")["value"]
    nope, zero = (value(table[table["head"] == 1], n, 2)["value"] for n in ("nope", "zero"))
    assert apart == pytest.approx(nope - zero, abs=1e-9)


def test_where_a_family_has_one_kv_head_it_is_the_layer(tiny):
    model = tiny("llama", num_key_value_heads=1)
    layout = Layout.of(model)
    made = columns(spec.templates("zero"), ())
    tables = []
    for by in ("layer", "kv-head"):
        every = cells(made, (1,), layout, by)
        sums = measure(
            Sweep(layout, surgery.blank(layout)), every, (text_task(cut()),), batch_tokens=48
        )
        tables.append(as_table([row | {"run_id": "test"} for row in sums.rows({})]))
    whole, one = (value(table, "zero", 1)["value"] for table in tables)
    assert one == pytest.approx(whole, rel=1e-5)
