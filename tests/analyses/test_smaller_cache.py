"""Table and figure of `analyses/smaller_cache.py`, from planted rows."""

from __future__ import annotations

import json

from scripts import script

from mismatch import spec


def test_the_table_reads_what_was_measured_and_the_figure_draws_it(tmp_path):
    module = script("smaller_cache")
    for at, (layers, name) in enumerate(
        (("12", "mla, half"), ("12", "nothing"), ("all", "gqa, mean"))
    ):
        place = module._file(tmp_path, layers, name)
        place.parent.mkdir(exist_ok=True)
        made = {"swapped": [0.2 + at, 0.1, 0.3], "closed": [0.1, 0.05, 0.2 + at]}
        place.write_text(json.dumps(made))
    frame = module.table(tmp_path)
    assert list(frame.name) == ["mla, half", "nothing", "gqa, mean"]
    assert list(frame.swapped) == [0.2, 1.2, 2.2]
    assert list(frame.closed_hi) == [0.2, 1.2, 2.2]
    assert list(frame.cache) == ["1/2", "0", "1/3"]
    assert len(module.figure(frame).axes) == 2


def test_every_row_is_a_swap():
    for swap, _ in script("smaller_cache").ROWS.values():
        assert spec.check(spec.parse(f"layer12:{swap}")).clauses
