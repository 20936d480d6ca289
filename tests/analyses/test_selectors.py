"""The tables of `analyses/selector_study.py` and `analyses/selectors_repaired.py` follow planted rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scripts import script


def planted(folder, score, chosen, lost, noise):
    """One row: what is lost in eight documents that differ, and in prompts that do not."""
    cost = {"over": "documents", "counts": [10] * 8, "sums": list(10 * (lost + noise))}
    alike = {"over": "samples", "counts": [5] * 8, "sums": [5 * lost] * 8}
    row = {
        "mechanism": "infini",
        "layers": 2,
        "n_layers": 6,
        "score": score,
        "answers": ["needles"],
        "set": chosen,
        "reliability": {"same": 0.5, "kept": 1.5} if score == "kl" else None,
        "costs": {"text": cost, **dict.fromkeys(("induction", "needles", "kv_lookup"), alike)},
    }
    folder.mkdir(exist_ok=True)
    (folder / f"2_{score}.json").write_text(json.dumps(row))


def test_sets_are_compared_on_the_same_documents(tmp_path):
    module, noise = script("selector_study"), np.random.default_rng(0).normal(size=8)
    planted(tmp_path / "infini", "kl", [0, 1], 1.0, noise)
    planted(tmp_path / "infini", "even", [1, 4], 1.5, noise)
    (tmp_path / "infini" / "restored.json").write_text("{}")  # no row
    frame = module.table(tmp_path).set_index("score")
    assert list(frame.index) == ["kl", "even"]
    kl = frame.loc["kl"]
    # Documents differ by more than the sets do, and the difference is the same in each.
    assert kl["text lost hi"] - kl["text lost lo"] > 1
    assert [kl[f"text minus even{end}"] for end in ("", " lo", " hi")] == pytest.approx([-0.5] * 3)
    assert [kl[f"needles lost{end}"] for end in ("", " lo", " hi")] == pytest.approx([1.0] * 3)
    assert (kl["shared with even"], kl["same set"]) == (1, 0.5)
    # Of 15 pairs out of 6 six share no layer with a given pair.
    assert kl["p even"] == pytest.approx(9 / 15)
    assert frame.loc["even", "text minus even"] == 0
    assert frame.loc["even", "text minus kl"] == pytest.approx(0.5)
    assert len(module.figure(module.table(tmp_path)).axes) == 4


def repaired(folder, score, before, after):
    """One row: eight documents and prompts of each text; the second text loses a nat more."""

    def costs(value):
        return {
            text: {
                task: {"over": "documents", "counts": [10] * 8, "sums": [10 * (value + more)] * 8}
                for task in ("text", "induction", "needles", "kv_lookup")
            }
            for text, more in (("wiki", 0.0), ("sotu:late", 1.0))
        }

    row = {"mechanism": "infini", "layers": 2, "score": score, "repair_seconds": 1.0}
    folder.mkdir(parents=True, exist_ok=True)
    row["costs"] = {"swapped": costs(before), "repaired": costs(after)}
    (folder / f"2_{score}.json").write_text(json.dumps(row))


def test_both_texts_together_and_paired_with_even_spacing(tmp_path):
    module = script("selectors_repaired")
    repaired(tmp_path / "infini" / "repaired", "kl", 1.0, 0.5)
    repaired(tmp_path / "infini" / "repaired", "even", 2.0, 0.75)
    frame = module.table(tmp_path).set_index(["score", "state"])
    assert list(frame.index) == [(s, t) for s in ("kl", "even") for t in ("swapped", "repaired")]
    # Half of the documents lose a nat more, so the mean is not sure, and the difference is.
    assert frame.loc[("kl", "repaired"), "text lost"] == pytest.approx(1.0)
    assert frame.loc[("kl", "repaired"), "text lost lo"] < 0.8
    band = [frame.loc[("kl", "repaired"), f"needles minus even{end}"] for end in ("", " lo", " hi")]
    assert band == pytest.approx([-0.25] * 3)
    assert frame.loc[("even", "swapped"), "text lost, sotu:late"] == pytest.approx(3.0)
    assert len(module.figure(module.table(tmp_path)).axes) == 4
