"""The arms of initial values: counted against the attention deleted, document by document, seeds together."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scripts import script

from mismatch import spec
from mismatch.stages.repair.config import RepairConfig

study = script("initial_values")
COUNTS = [100, 120, 90, 110]
ZERO = np.array([5.0, 7.0, 4.0, 5.0])


def write(folder, mechanism, arm, seed, **shares):
    made = {
        when: {"total": (share * ZERO).tolist(), "count": COUNTS} for when, share in shares.items()
    }
    made |= {
        "layer": 12,
        "seed": seed,
        "mechanism": mechanism,
        "arm": arm,
        "cpu_seconds": [4.0, 9.0],
    }
    (folder / f"layer12-seed{seed}-{mechanism}-{arm}.json").write_text(json.dumps(made))


def test_the_share_is_of_what_deleting_costs(tmp_path):
    for seed in (1, 2):
        write(tmp_path, "control", "zero", seed, after=1.0)
        write(tmp_path, "control", "linear", seed, after=0.6)
    for seed, after in ((1, 0.2), (2, 0.4)):
        write(tmp_path, "rwkv", "all", seed, before=0.5, after=after)
    write(tmp_path, "rwkv", "random", 1, before=1.1, after=0.9)
    frame = study.table(tmp_path).set_index(["mechanism", "arm", "when"])
    assert frame.index.get_level_values("arm").tolist() == [
        *("zero", "linear", "random", "random", "all", "all")
    ]
    closed = frame["closed"]
    assert closed["control", "zero", "after"] == pytest.approx(0.0, abs=1e-12)
    assert closed["rwkv", "all", "before"] == pytest.approx(0.5)
    assert closed["rwkv", "all", "after"] == pytest.approx(0.7)  # the seeds are one text
    assert closed["rwkv", "random", "before"] == pytest.approx(-0.1)
    assert frame["seeds"]["rwkv", "random", "after"] == 1
    assert frame["kl"]["control", "zero", "after"] == pytest.approx(ZERO.sum() / sum(COUNTS))
    panel, *more = study.figure(frame.reset_index()).axes
    assert not more and panel.get_title(loc="left") == "rwkv"
    assert [label.get_text() for label in panel.get_yticklabels()] == ["random", "all"]


def test_every_arm_is_a_swap_and_settings_that_exist():
    for call in (*study.MECHANISMS.values(), *study.CONTROLS.values()):
        spec.check(spec.parse([f"layer12:{call}"]))
    for parts in study.ARMS.values():
        RepairConfig(model="smollm2", swap=("layer12:rwkv",), initial_values=parts)
