"""Repair before training: the tokens of a repair count, and every reading is drawn at both lengths."""

from __future__ import annotations

import json

import pytest
from scripts import script

from mismatch import spec

seed = script("repair_before_training")


def test_a_repaired_arm_begins_behind_its_repair(tmp_path):
    for arm, spent, start in (("published, trained", 0, 2.0), ("published, repaired", 12288, 0.5)):
        points = [
            {"tokens": spent + 8192 * at, "steps": 16 * at}
            | {
                f"{r} {n}": [start / (at + 1), 0.1, 3.0]
                for r in seed.READINGS
                for n in seed.LENGTHS
            }
            for at in range(3)
        ]
        seed._file(tmp_path, arm).write_text(json.dumps({"points": points}))
    frame = seed.table(tmp_path)
    assert len(frame) == 2 * 3 * len(seed.READINGS) * len(seed.LENGTHS)
    axes = seed.figure(frame).axes
    assert len(axes) == len(seed.READINGS) * len(seed.LENGTHS)
    trained, repaired = (bars.lines[0] for bars in axes[0].containers)
    assert list(trained.get_xdata()) == pytest.approx([0, 8.192, 16.384])
    assert list(repaired.get_xdata()) == pytest.approx([12.288, 20.48, 28.672])
    assert list(repaired.get_ydata()) == pytest.approx([0.5, 0.25, 0.5 / 3])


def test_every_arm_is_a_swap(tmp_path):
    for mechanism, _ in seed.ARMS.values():
        spec.check(spec.parse([f"all:{mechanism}"]))
    assert len({seed._file(tmp_path, arm) for arm in seed.ARMS}) == len(seed.ARMS)
