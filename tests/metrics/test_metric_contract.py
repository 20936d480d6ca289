"""What every metric must do. A new line in the table is tested here before its author writes a test."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from generator import N_DOCS, Both, D, make, of_logits, value

from mismatch.errors import UsageError
from mismatch.metrics import METRICS, load_metric, measure
from mismatch.metrics.base import LogitPair, Pair
from mismatch.registry import metrics

VECTORS = [name for name in METRICS if not of_logits(name)]
FACTS = ("unit", "range", "better", "null", "headline", "invariant", "blind", "source")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in METRICS] + [(name, torch.bfloat16) for name in VECTORS],
)
def test_reads_exactly_its_null_when_bit_equal(name, dtype):
    got = Both(name).update(*[make(name, s, dtype=dtype, equal=True) for s in range(3)])
    null = load_metric(name).null
    seen = {r.stat: r for r in got.read() if r.stat in null}
    assert {stat: r.value for stat, r in seen.items()} == null
    assert all(r.n > 0 for r in seen.values())
    assert all(r.value == null[r.stat] for r in got.read() if r.stat in null)  # by position too


@pytest.mark.parametrize("name", METRICS)
def test_a_planted_shift_moves_the_headline(name):
    got = Both(name).update(*[make(name, s) for s in range(3)])
    assert abs(value(got.read(), load_metric(name).headline)) > 1e-3


@pytest.mark.parametrize("name", METRICS)
def test_parts_merged_in_any_order_equal_one_pass(name):
    pairs = [make(name, seed) for seed in range(4)]
    whole = Both(name).update(*pairs).numbers()
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        parts = [Both(name).update(pairs[i]) for i in order]
        left, right = parts[0].merge(parts[1]), parts[2].merge(parts[3])
        got = Both(name).merge(left).merge(right).numbers()
        assert got.keys() == whole.keys()
        for key, wanted in whole.items():
            assert got[key] == pytest.approx(wanted, rel=1e-12, abs=1e-12, nan_ok=True), key


@pytest.mark.parametrize("name", METRICS)
def test_streaming_equals_all_at_once(name):
    parts = [make(name, seed, dtype=torch.float64) for seed in range(3)]
    first = parts[0]
    fields = ("teacher", "student", "targets", "docs", "positions")
    if isinstance(first, LogitPair):
        once = LogitPair(*(torch.cat([getattr(p, f) for p in parts]) for f in fields))
    else:
        fields = ("teacher", "student", "docs", "valid", "bulk", "sample")
        once = Pair(
            *(torch.cat([getattr(p, f) for p in parts]) for f in fields),
            tuple(torch.cat([p.before[i] for p in parts]) for i in (0, 1)),
        )
    whole, got = Both(name).update(once).numbers(), Both(name).update(*parts).numbers()
    for key, wanted in whole.items():
        assert got[key] == pytest.approx(wanted, rel=1e-10, abs=1e-12, nan_ok=True), key


@pytest.mark.parametrize("name", METRICS)
def test_state_goes_out_and_in_bit_for_bit(name):
    pairs = [make(name, seed, dtype=torch.float32) for seed in range(4)]
    straight = Both(name).update(*pairs)
    half, resumed = Both(name).update(*pairs[:2]), Both(name)
    resumed.teacher.load(half.teacher.state())
    resumed.student.load(half.student.state())
    half.update(pairs[3])  # what was saved must not follow
    resumed.update(*pairs[2:])
    for mine, theirs in ((resumed.teacher, straight.teacher), (resumed.student, straight.student)):
        got, wanted = mine.state(), theirs.state()
        assert got.keys() == wanted.keys()
        assert all(got[k].tobytes() == wanted[k].tobytes() for k in wanted)
        assert all(isinstance(a, np.ndarray) for a in got.values())
    assert str(resumed.read()) == str(straight.read())


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("equal", [False, True])
def test_masked_tokens_change_nothing(name, equal):
    clean = Both(name).update(make(name, 5, dtype=torch.float32, equal=equal))
    dirty = Both(name).update(make(name, 5, dtype=torch.float32, equal=equal, garbage=True))
    assert str(clean.read()) == str(dirty.read())


@pytest.mark.parametrize("name", [n for n in VECTORS if load_metric(n).mask == "sample"])
def test_second_moments_use_the_sample_alone(name):
    pair = make(name, 5)
    clean = Both(name).update(pair).read()
    teacher, student = pair.teacher.clone(), pair.student.clone()
    teacher[~pair.sample], student[~pair.sample] = 25_000.0, float("nan")
    dirty = Pair(teacher, student, pair.docs, pair.valid, pair.bulk, pair.sample)
    assert str(Both(name).update(dirty).read()) == str(clean)
    assert clean[0].n == int(pair.sample.sum()) < int(pair.bulk.sum())


def test_tokens_without_a_target_leave_nll_alone():
    pair = make("nll", 3)
    clean = Both("nll").update(pair).numbers()
    pair.student[pair.targets < 0] = float("nan")
    pair = pair.with_student(pair.student)
    assert Both("nll").update(pair).numbers() == clean


@pytest.mark.parametrize("name", VECTORS)
def test_bfloat16_is_widened_before_any_arithmetic(name):
    half = make(name, 8, dtype=torch.bfloat16)
    exact = Pair(
        half.teacher.double(), half.student.double(), half.docs, half.valid, half.bulk, half.sample,
        (half.before[0].double(), half.before[1].double()),
    )  # fmt: skip
    got, wanted = Both(name).update(half).numbers(), Both(name).update(exact).numbers()
    for key, numbers in wanted.items():
        assert got[key] == pytest.approx(numbers, rel=2e-5, abs=2e-6, nan_ok=True), key


def _orthogonal():
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)).double())[
        0
    ]


CHANGES = {
    "rotation": lambda x: x @ _orthogonal(),
    "permutation": lambda x: x.flip(-1),
    "scale": lambda x: x * 3.0,
    "shift": lambda x: x + torch.linspace(-2, 2, D).double(),
}


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("change", CHANGES)
def test_sees_all_but_what_it_declares_not_to_see(name, change):
    metric = load_metric(name)
    pair = make(name, 9)
    changed = pair.with_student(CHANGES[change](pair.student), pair.before[1])
    before = value(Both(name).update(pair).read(), metric.headline)
    after = value(Both(name).update(changed).read(), metric.headline)
    if change in metric.invariant:
        assert after == pytest.approx(before, rel=1e-9, abs=1e-9)
    elif (name, change) != ("massive", "rotation"):  # any rotation moves the largest number
        assert abs(after - before) > 1e-4


@pytest.mark.parametrize(
    "name", [n for n in METRICS if "joint rotation" in load_metric(n).invariant]
)
def test_joint_rotation(name):
    pair, q = make(name, 9), _orthogonal()
    turned = Pair(pair.teacher @ q, pair.student @ q, pair.docs, pair.valid, pair.bulk, pair.sample)
    got, wanted = Both(name).update(turned).numbers(), Both(name).update(pair).numbers()
    for key, numbers in wanted.items():
        assert got[key] == pytest.approx(numbers, rel=1e-9, nan_ok=True), key


@pytest.mark.parametrize("name", ["top1", "top5"])
def test_temperature_does_not_change_the_short_list(name):
    pair = make(name, 4, dtype=torch.float64)
    cooled = pair.with_student((pair.student * 3).log_softmax(-1))
    assert Both(name).update(pair).numbers() == Both(name).update(cooled).numbers()
    assert Both("kl").update(pair).numbers() != Both("kl").update(cooled).numbers()


@pytest.mark.parametrize("name", METRICS)
def test_second_students_share_the_teacher_and_read_the_same(name):
    alone = Both(name).update(make(name, 2)).read()
    first = make(name, 2, equal=True)
    Both(name).update(first)  # fills the caches of the teacher's side
    second = make(name, 2)
    stream = () if of_logits(name) else (second.before[1],)
    assert str(Both(name).update(first.with_student(second.student, *stream)).read()) == str(alone)


@pytest.mark.parametrize("name", METRICS)
def test_card_is_complete_and_read_without_importing(name):
    card = metrics().card(name)
    metric = load_metric(name)
    for fact in (*FACTS, "at", "mask"):
        assert card.facts[fact] == getattr(metric, fact), fact
    assert card.summary.endswith("?") or ":" in card.summary
    for word in ("Definition:", "Unit:", "Range:", "Null:", "Source:"):
        assert word in card.text, word
    assert "Leaves out" in card.text or "Uses" in card.text
    assert metric.better in ("lower", "higher", "none")
    assert metric.null[metric.headline] == 0.0
    assert metric.blind and metric.source


def test_the_table_imports_neither_torch_nor_a_metric():
    code = (
        "import sys; from mismatch.metrics import METRICS; assert METRICS;"
        "bad = [m for m in sys.modules if m == 'torch' or m.startswith('mismatch.metrics.')];"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metric_files_do_not_import_one_another():
    import ast
    from pathlib import Path

    import mismatch.metrics as package

    files = {target.split(":")[0] for target in METRICS.values()}
    for module in files:
        path = Path(package.__file__).with_name(module.rsplit(".", 1)[1] + ".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in files, f"{module} imports {node.module}"


def test_unknown_name_gets_a_hint():
    with pytest.raises(UsageError, match=r"unknown metric `ckaa`[\s\S]*did you mean `cka`"):
        measure("ckaa", np.zeros((8, 4)), np.zeros((8, 4)))


def test_shapes_that_do_not_fit():
    with pytest.raises(UsageError, match=r"rel_l2: teacher is \(8, 1, 4\), student is \(9, 1, 4\)"):
        measure("rel_l2", np.zeros((8, 4)), np.zeros((9, 4)))


@pytest.mark.parametrize("name", METRICS)
def test_no_tokens_reads_nan_and_a_count_of_0(name):
    for reading in Both(name).read():
        assert reading.n == 0
        assert math.isnan(reading.value)


def test_state_does_not_grow_with_the_tokens():
    def size(n_batches):
        size = 0
        for name in METRICS:
            both = Both(name).update(*[make(name, s) for s in range(n_batches)])
            for meter in (both.teacher, both.student):
                size += sum(array.nbytes for array in meter.state().values())
        return size

    assert size(1) == size(6)


def test_the_document_number_picks_the_block():
    both = Both("kl").update(make("kl", 1), make("kl", 2))
    counts = both.student.parts["kl"].counts
    assert counts.shape[0] == N_DOCS and counts.sum() == 80 and (counts.sum(1) > 0).all()
