"""Scores on models in which it is known which layer matters for what, and giving back against whole traces."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from measured import cut, measured, student_of
from overflows import Overflows
from plans import scan_plan, task_plan
from planted import RETRIEVAL, TEXT, config, planted_layers, prompts, swept, text
from wonderland import documents

import mismatch
from mismatch import registry
from mismatch.errors import ConfigError, NumericsError, RunError, UsageError
from mismatch.forward import hooks
from mismatch.models.layout import Layout
from mismatch.runs.folder import Run
from mismatch.stages.plan import answers, ways
from mismatch.stages.plan.config import GREEDY
from mismatch.stages.plan.greedy import greedy
from mismatch.stages.plan.numbers import Numbers, at_random, spaced
from mismatch.stages.plan.restore import check_better, restored
from mismatch.stages.plan.scores import SCORES
from mismatch.stages.plan.words import sure_lines
from mismatch.stages.scan.batches import measure
from mismatch.stages.scan.reliability import Overlap
from mismatch.stages.scan.tasks import text_task
from mismatch.stages.scan.unit_sums import UnitSums
from mismatch.surgery.operate import given_back
from mismatch.surgery.students import Teacher


@pytest.fixture(scope="module")
def planted(tiny):
    return planted_layers(tiny)


def numbers(teacher, tasks, settings, able=("needles",)):
    every, sweep = swept(teacher, settings)
    sums = measure(sweep, every, tasks, batch_tokens=96)
    plan = scan_plan(
        units=sums.units(), tasks={task.name: task_plan(task.chance) for task in tasks}
    )
    return Numbers.of(plan, [str(t) for t in settings.templates], range(3), able)


def test_each_score_finds_the_layer_that_was_planted_for_it(planted):
    found = numbers(planted, (text(), prompts(planted)), config())
    costs = found.costs()
    kl, answer, halo = (costs.prices(score) for score in ("kl", "answer_nll", "halo"))
    assert kl[TEXT] > 0.01 and kl[1] == kl[RETRIEVAL] == 0
    assert answer[RETRIEVAL] > 0.01 and answer[1] == answer[TEXT] == 0
    assert np.argmax(halo) == RETRIEVAL and halo[TEXT] == 0
    # Whoever drew other documents and prompts would have found the same.
    drawn = found.drawn(0)
    assert (drawn.prices("kl").argmax(1) == TEXT).all()
    assert (drawn.prices("answer_nll").argmax(1) == RETRIEVAL).all()


def test_giving_back_finds_what_text_needs(planted):
    settings = config(score="restore_one")
    every, sweep = swept(planted, settings)
    regained = restored(sweep, every, text(), settings)
    means = regained.means([cell.key for cell in every])
    assert means[TEXT] > 0.01
    assert means[1] == means[RETRIEVAL] == 0


def test_greedy_by_answers_spares_the_layer_that_answers(planted):
    tasks = (text(), prompts(planted))
    for score, spared in (("kl", TEXT), ("answer_nll", RETRIEVAL)):
        settings = config(score=score)
        every, sweep = swept(planted, settings)
        able = ("needles",) if score == "answer_nll" else ()
        steps = greedy(sweep, every, tasks, settings, able)
        assert {step.cell.layer for step in steps} == {0, 1, 2} - {spared}
        assert all(0 <= step.again <= 1 for step in steps)


@pytest.mark.parametrize("mechanism", ["zero", "sliding_window(3)", "mlp:zero"])
def test_what_is_given_back_is_the_difference_of_two_traces(tiny, mechanism):
    model = tiny("llama")
    teacher = Teacher(model, None, Layout.of(model), None)
    settings = config(mechanism=mechanism, score="restore_one")
    every, sweep = swept(teacher, settings)
    regained = restored(sweep, every, text_task(cut()), settings)
    target, _, call = mechanism.rpartition(":")

    def kl(layers):
        swap = "; ".join(f"layer{at}{'.' * bool(target)}{target}:{call}" for at in layers)
        table, _ = measured(model, swap, metrics=("kl",), windows=cut())
        rows = table[(table["site"] == "logits") & (table["position"] == "all")]
        rows = rows[(rows["stat"] == "mean") & (rows["student"] == "swap")]
        return float(rows["value"].iloc[0])

    for cell in every:
        less = kl(at for at in range(3) if at != cell.layer)
        assert regained.means([cell.key])[0] == pytest.approx(kl(range(3)) - less, abs=2e-6)


def test_nothing_is_regained_of_what_changes_nothing(planted):
    settings = config(mechanism="identity", score="restore_one")
    every, sweep = swept(planted, settings)
    regained = restored(sweep, every, text(), settings)
    assert not regained.means([cell.key for cell in every]).any()


def test_layers_that_cost_the_same_are_not_surely_chosen(planted):
    """Every draw of equal costs takes the same layers, and that says nothing."""
    settings = config(mechanism="identity")
    found = numbers(planted, (text(),), settings, ())
    scores = found.scores(found.costs(), "kl")
    assert {score.price for score in scores} == {0.0}
    assert ways.sure(settings, found, scores, {0, 1}, {}) is None
    every, sweep = swept(planted, settings)
    assert [step.again for step in greedy(sweep, every, (text(),), settings)] == [None, None]
    other = config()
    found = numbers(planted, (text(),), other, ())
    sure = ways.sure(other, found, found.scores(found.costs(), "kl"), {1, 2}, {})
    assert sure is not None and sure.same == 1


def test_a_layer_is_given_back_only_for_a_while(planted):
    student = student_of(planted.model, "layers[0-2]:zero")
    ids = torch.from_numpy(cut(2, vocab=50).ids)
    before = hooks.run(student.layout, ids)
    one = hooks.run(student_of(planted.model, "layers[1-2]:zero").layout, ids)
    with given_back(student, TEXT):
        assert torch.equal(hooks.run(student.layout, ids), one)
        assert not torch.equal(one, before)
    assert torch.equal(hooks.run(student.layout, ids), before)
    with given_back(student, None):
        assert torch.equal(hooks.run(student.layout, ids), before)


def test_activations_that_are_not_finite_are_refused(planted):
    registry.mechanisms().add("overflows", Overflows)
    settings = config(mechanism="overflows", score="restore_one")
    every, sweep = swept(planted, settings)
    with pytest.raises(NumericsError, match="all 3 layers replaced activations are not finite"):
        restored(sweep, every, text(), settings)


def test_answers_are_the_mean_over_tasks_of_nats_per_token(planted):
    """Two tasks of other lengths count alike, and what the passkey lost is per key."""
    one = prompts(planted)
    keys = dataclasses.replace(prompts(planted, answer=5), name="passkey", summed=True)
    both = numbers(planted, (text(), one, keys), config(), ("needles", "passkey"))
    alone = [numbers(planted, (text(), t), config(), (t.name,)).costs() for t in (one, keys)]
    np.testing.assert_allclose(
        both.costs().answers, np.mean([costs.answers for costs in alone], axis=0)
    )
    assert both.digits == 5  # of `task_plan`: 10 scored in 2 rows
    np.testing.assert_allclose(both.costs().lost, 5 * alone[1].answers)


def test_whether_the_teacher_can_answer(planted):
    """What it loses of its own answers, against the loss that transformers counts."""
    task = prompts(planted)
    reads = answers.asked(planted.layout, (text(), task), 60)
    ids = torch.from_numpy(task.ids)
    logits = planted.model(ids).logits[:, -4:-1].log_softmax(-1)
    lost = -logits.gather(2, ids[:, -3:, None]).mean()
    assert list(reads) == ["needles"]
    assert reads["needles"][0] == pytest.approx(float(lost), rel=1e-5)
    settings = config(score="answer_nll")
    assert answers.check(settings, reads) == ("needles",)
    with pytest.raises(UsageError) as caught:
        answers.check(settings, {"needles": (2.2, 2.3), "passkey": (11.0, 12.0)})
    assert str(caught.value) == (
        "--score answer_nll needs answers, and the model itself gives none: of needles it loses 2.20 nats, and knowing "
        "nothing 2.30; of passkey it loses 11.0 nats, and knowing nothing 12.0\n\n"
        "hint: a shorter --length may be easier; or take --score kl"
    )
    with pytest.raises(UsageError, match="no question can be put to it"):
        answers.check(config(score="halo"), {})
    assert answers.check(config(), {}) == ()


@pytest.mark.parametrize("of", [5, 12, 30])
def test_even_spacing_is_as_even_as_can_be(of):
    for count in range(1, of + 1):
        found = spaced(range(of), count)
        assert len(set(found)) == count and min(found) >= 0 and max(found) < of
        gaps = {b - a for a, b in itertools.pairwise(found)}
        assert not gaps or max(gaps) - min(gaps) <= 1
    assert spaced((4, 9, 11), 3) == (4, 9, 11)


def test_layers_at_random_depend_on_the_seed_alone():
    drawn = {at_random(range(30), 8, seed) for seed in range(5)}
    assert len(drawn) == 5
    assert at_random(range(30), 8, 3) == at_random(range(30), 8, 3)
    assert all(len(set(found)) == 8 for found in drawn)
    assert set(at_random((4, 9, 11), 3, 0)) == {4, 9, 11}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"score": "restore_one", "budget_kl": 0.5},
            "--score restore_one makes no scan of layers one at a time, which --budget-kl is about\n\n"
            "hint: leave --budget-kl out, or take --score kl or answer_nll",
        ),
        ({"score": "even", "keep_retrieval": True}, "which --keep-retrieval is about"),
        ({"score": "random", "scan": "runs/x"}, "which --scan is about"),
        (
            {"score": "even", "mechanism": "zero; nope"},
            "--score even chooses layers for one mechanism, got 2\n\nhint: plan them one after the other",
        ),
        (
            {"score": "halo", "method": "greedy"},
            "greedy adds what a layer costs to those before, and halo is no such cost\n\n"
            "hint: take --score kl or answer_nll, or --method milp",
        ),
        ({"score": "restore_one", "method": "greedy"}, "and restore_one is no such cost"),
        ({"score": "kll"}, "`score` must be one of kl, answer_nll, restore_one, gates, halo, even, random"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert message in str(caught.value)


def test_the_table_holds_the_scores_that_can_be_asked_for():
    for score in SCORES:
        assert config(score=score).score == score
    assert set(GREEDY) <= set(SCORES)
    assert all(kind.what and kind.source and kind.forwards for kind in SCORES.values())


@pytest.mark.parametrize("score", ["restore_one", "even", "random"])
def test_a_plan_that_makes_no_scan(toy, score, tmp_path):
    run = tmp_path / "plan"
    made = mismatch.plan(
        (toy.model, toy.tokenizer), "infini(segment=16)", layers=2, score=score, output=str(run),
        data=documents(8), calibration_data=documents(3, seed=1), tokens=256, selection_tokens=256,
        seq_len=64, samples=2, length=120,
    )  # fmt: skip
    assert not (tmp_path / "plan-scan").exists()
    chosen = made.plan.choice["infini(segment=16)"]
    assert len(chosen) == 2 and made.plan.score == score
    assert f"(2 of 4 layers, milp by {score})" in made.words()
    # Where answers were scanned and text alone chose, it is said.
    overlaps = {"answer_nll": Overlap.between((1,), (2,), 4)}
    by_text = dataclasses.replace(made.plan, score="kl", overlaps=overlaps)
    assert sure_lines(by_text)[-1].startswith("  text alone chose: --score answer_nll")
    assert not any("text alone" in line for line in sure_lines(made.plan))
    if score == "even":
        assert chosen == (1, 3)
    if score == "restore_one":
        prices = {s.layer: s.cost for s in made.plan.scores}
        assert set(chosen) == set(sorted(prices, key=prices.get)[:2])
        assert all(np.isnan(s.kl) for s in made.plan.scores)
        assert made.plan.reliability.over == "documents"
    else:
        assert made.plan.reliability is None


def test_a_replaced_model_that_is_too_far_gone_says_nothing():
    def units(*regained):
        sums = {f"zero@{at}": (4 * x, 6 * x) for at, x in enumerate(regained)}
        return UnitSums("documents", (4, 6), sums)

    check_better(units(0.0, 0.0, 0.0))  # the identity
    check_better(units(-0.1, 0.3, -0.1))
    with pytest.raises(UsageError) as caught:
        check_better(units(-0.5, 0.3, -0.75))
    assert str(caught.value) == (
        "with all 3 layers replaced, giving one back made text worse for 2 of them, by 1.25 nats a token in all, and "
        "better for the others by 0.30: the replaced model is too far from the teacher to say what a layer is worth"
        "\n\nhint: narrow --among, or take --score answer_nll or kl"
    )


def test_a_model_that_cannot_answer_is_refused_before_it_is_scanned(toy, tmp_path):
    with pytest.raises(UsageError, match="--score answer_nll needs answers, and the model itself"):
        mismatch.plan(
            (toy.model, toy.tokenizer), "zero", layers=2, score="answer_nll", output=str(tmp_path / "plan"),
            data=documents(8), calibration_data=documents(3, seed=1), tokens=256, selection_tokens=256,
            seq_len=64, samples=2, length=120,
        )  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_a_scan_chooses_by_the_answers_of_its_table(toy):
    """The passkey of the toy, as if it could find it: its loss per digit, from the table alone."""
    made = mismatch.scan(
        (toy.model, toy.tokenizer), "infini(segment=16)", tasks=["text", "passkey"], controls=(), scored=1.0,
        data=documents(8), calibration_data=documents(3, seed=1), tokens=256, seq_len=64, samples=5, length=120,
    )  # fmt: skip
    tasks = made.plan.tasks
    easy = dataclasses.replace(tasks["passkey"], chance=1000.0)
    plan = dataclasses.replace(made.plan, tasks={**tasks, "passkey": easy})
    run = Run.in_memory(made.table, made.run.manifest, plan, {}, [])
    settings = config(mechanism="infini(segment=16)", score="answer_nll", scan="x")
    prepared = SimpleNamespace(layers=(0, 1, 2, 3), left_out={})
    choice, facts = ways.from_scan(settings, prepared, run)
    cells = made.cells.set_index(["task", "layer"])["value"]
    for score in facts["scores"]:
        assert score.cost == pytest.approx(cells["passkey", score.layer] / 5, rel=1e-5)
        assert score.lost == pytest.approx(cells["passkey", score.layer], rel=1e-5)
        assert score.kl == pytest.approx(cells["text", score.layer], rel=1e-5)
    best = cells["passkey"].nsmallest(2).index
    assert choice == {"infini(segment=16)": sorted(best)}
    assert facts["answers"] == ("passkey",)
    # Beside what text, HALO's ratio and even spacing choose.
    assert set(facts["overlaps"]) == {"even", "kl", "halo"}
    assert facts["overlaps"]["kl"] == Overlap.between(best, cells["text"].nsmallest(2).index, 4)
    assert facts["reliability"].over == "samples"
    with pytest.raises(UsageError, match="answer_nll needs answers, and the model itself"):
        ways.from_scan(settings, prepared, made.run)
    old = Run.in_memory(made.table, made.run.manifest, dataclasses.replace(plan, units={}), {}, [])
    with pytest.raises(RunError, match="kept no numbers of single documents"):
        ways.from_scan(settings, prepared, old)
