"""A student that was trained and saved is set beside its teacher as it was in memory, whatever stands in it."""

from __future__ import annotations

import pytest
import torch
from test_mechanism_contract import CALLS, extras, text  # noqa: F401  (`extras` is a fixture)
from test_reload import moved, reloaded
from tiny_models import swap, tiny, tokens

from mismatch.forward import hooks
from mismatch.forward.shared_prefix import run_prefix, run_suffix
from mismatch.models.layout import Layout
from mismatch.models.load import describe
from mismatch.models.skeleton import skeleton_of
from mismatch.runs.plan import Apart
from mismatch.surgery import elsewhere, loading
from mismatch.surgery.compared import compared
from mismatch.surgery.operate import Student, layout_of
from mismatch.surgery.students import Teacher


@pytest.mark.parametrize("name", CALLS)
def test_its_prefix_is_the_teachers_and_the_rest_its_own(name, tmp_path):
    model = tiny("llama")
    teacher = Teacher(model, None, Layout.of(model), describe(model))
    student = swap(model, text(name, 1))
    for block in student.layout.blocks[1:]:
        moved(block)
    saved = reloaded(student.model, tmp_path / "saved", "llama")
    record, plain = elsewhere.record_of(saved), loading.bare(saved.config)
    made = elsewhere.foreseen(skeleton_of(teacher.layout), plain, record, "saved", tmp_path)
    there = elsewhere.adopted(teacher, Student(saved, layout_of(saved), made.plan))
    mine = compared(teacher.layout, student)
    assert there.plan.apart == mine.plan.apart == Apart((1, 2))
    assert [c.path for c in there.plan.clauses] == [c.path for c in mine.plan.clauses]
    ids = tokens(2, 20)
    with torch.no_grad():
        _, streams = run_prefix(teacher.layout, ids, [there.plan.first])
        suffix = run_suffix(there.layout, ids, there.plan.first, streams, "student")
        assert torch.equal(suffix, hooks.run(student.layout, ids))
        assert torch.equal(suffix, hooks.run(there.layout, ids))
