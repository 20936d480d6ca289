"""Scripts of `analyses/` that answer a question: each can be imported, and its verdict follows planted numbers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from mismatch import spec

ANALYSES = Path(__file__).resolve().parent.parent / "analyses"


def script(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, ANALYSES / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # a dataclass looks up the module of its annotations
    found.loader.exec_module(module)
    return module


# ---- update_size ------------------------------------------------------------------------------------


def sizes(damage_of) -> pd.DataFrame:
    """Thirty layers, two cases; `damage_of(case, size, noise)` plants the answer."""
    rng = np.random.default_rng(0)
    rows = []
    for case in ("a", "b"):
        for layer in range(30):
            size, noise = rng.uniform(0.1, 1), rng.uniform(0.1, 1)
            rows.append(
                {
                    "case": case, "layer": layer, "size": size, "turn": noise,
                    "fisher": damage_of(case, size, noise), "damage": damage_of(case, size, noise),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("damage_of", "word"),
    [
        (lambda case, size, noise: size**2, "holds"),
        (lambda case, size, noise: -size, "does not hold"),
        (lambda case, size, noise: size if case == "a" else -size, "depends on the part"),
    ],
)
def test_update_size_follows_what_was_planted(damage_of, word):
    module = script("update_size")
    said = module.verdict(module.correlations(sizes(damage_of)))
    assert said.startswith(f"Update size predicts damage over layers: {word}.")


def test_update_size_names_what_does_better():
    module = script("update_size")
    said = module.verdict(module.correlations(sizes(lambda case, size, noise: size + 5 * noise)))
    assert "turn for a" in said
    assert "fisher for b (1.00)" in said
    assert "layer" not in said.partition("Better")[2]


# ---- parallel_alpha ---------------------------------------------------------------------------------


def alphas(module: ModuleType, scale: dict[str, float], at_0: float = 0.0) -> pd.DataFrame:
    """KL = scale * alpha^2 at each layer, intervals of 10 %."""
    rows = []
    for inner, factor in scale.items():
        for layer in (4, 12):
            for alpha in module.grid(inner):
                kl = factor * alpha**2 if alpha else at_0
                rows.append((inner, "beside", alpha, layer, kl))
            if inner != "identity":
                rows.append((inner, "replaced", np.nan, layer, 2 * factor))
            rows.append((inner, "zero", np.nan, layer, 0.05))
    found = pd.DataFrame(rows, columns=["inner", "how", "alpha", "layer", "value"])
    return found.assign(lo=0.9 * found["value"], hi=1.1 * found["value"])


def test_the_alpha_at_the_mark_is_found_with_its_interval():
    module = script("parallel_alpha")
    found = alphas(module, {"random": 4.0})
    row = module.crossings(found).iloc[0]
    assert row["alpha"] == pytest.approx(0.05, rel=1e-6)  # 4 alpha^2 = 0.01
    assert row["lo"] == pytest.approx(0.05 / 1.1**0.5, rel=1e-6)
    assert row["hi"] == pytest.approx(0.05 / 0.9**0.5, rel=1e-6)
    assert row["power"] == pytest.approx(2, rel=1e-3)


def test_an_alpha_off_the_grid_is_said_to_be():
    module = script("parallel_alpha")
    never, at_once = module.crossings(alphas(module, {"infini": 1e-6, "random": 1e6}))["alpha"][::4]
    assert never == np.inf
    assert at_once == 0


def test_alpha_0_and_what_alpha_depends_on():
    module = script("parallel_alpha")
    same = alphas(module, {"random": 4.0, "mamba2": 4.0})
    apart = alphas(module, {"random": 4.0, "mamba2": 0.4})
    broken = alphas(module, {"random": 4.0}, at_0=1e-9)
    said = [module.verdict(found, module.crossings(found)) for found in (same, apart, broken)]
    assert "keeps the model: holds" in said[0]
    assert "is the same everywhere" in said[0]
    assert "depends on mechanism and layer" in said[1]
    assert "keeps the model: does not hold" in said[2]
    assert "less than in place of the attention in 4 of 4 cells" in said[0]


# ---- norms_or_attention -----------------------------------------------------------------------------


def norm_cells(module: ModuleType, share: dict[str, float]) -> pd.DataFrame:
    """Cells of 30 layers in which each mechanism costs a share of its control, 1 nat everywhere."""
    shares = dict.fromkeys(module.CASES, 0.5) | dict.fromkeys(("zero", "mlp:zero", "skip"), 1.0)
    rows = [
        (student, layer, value * (1 + 0.01 * (layer % 3)))
        for student, value in (shares | share).items()
        for layer in range(30)
    ]
    found = pd.DataFrame(rows, columns=["student", "layer", "value"])
    return found.assign(lo=found["value"], hi=found["value"])


def norm_verdict(module: ModuleType, share: dict[str, float], norm: float) -> str:
    found = module.shares(norm_cells(module, share))
    together = pd.DataFrame(
        [(kind, norm if kind == "norm" else 1.0) for kind, _ in module.EVERYWHERE.values()],
        columns=["kind", "kl"],
    )
    together = together.assign(lo=0.9 * together["kl"], hi=1.1 * together["kl"])
    return module.verdict(found, module.summary(found), together)


def test_norms_are_easier_only_if_all_of_them_are():
    module = script("norms_or_attention")
    norms = dict.fromkeys(module.NORMS, 0.1)
    said = norm_verdict(module, norms, norm=0.1)
    assert "raw KL: holds" in said
    assert "share of what deleting costs: holds" in said
    assert "all layers at once: holds" in said
    assert "in 30 of 30 layers" in said
    said = norm_verdict(module, norms | {"norm2:dyt": 2.0}, norm=5.0)
    assert "raw KL: depends on the mechanism" in said
    assert "all layers at once: does not hold" in said
    assert "raw KL: does not hold" in norm_verdict(module, dict.fromkeys(module.NORMS, 2.0), 0.1)


def test_a_share_is_taken_of_the_control_of_the_same_place():
    module = script("norms_or_attention")
    found = module.shares(norm_cells(module, {"mlp:zero": 4.0, "norm2:dyt": 2.0}))
    share = found.groupby("student")["share"].median()
    assert share["norm2:dyt"] == pytest.approx(0.5)
    assert share["norm1:dyt"] == pytest.approx(0.5)


# ---- nope_layers ------------------------------------------------------------------------------------


def nope(worst: int, change: float, few: float, rest: float) -> tuple:
    """One layer costs 5 nats, the others 0.1; RoPE missing in few layers or in the rest costs so much."""
    rows = [
        (task, layer, 5.0 if layer == worst else 0.1)
        for task in ("text", "induction", "passkey")
        for layer in range(30)
    ]
    where = pd.DataFrame(rows, columns=["task", "layer", "value"])
    where = where.assign(lo=0.9 * where["value"], hi=1.1 * where["value"])
    where["best_previous"] = where["value"]
    local = pd.DataFrame(
        [
            ("swap", "change[keep=1]", "attn_out", change),
            ("swap", "r2", "resid_post", 0.6),
            ("teacher", "r2", "resid_post", 0.7),
        ],
        columns=["student", "stat", "site", "value"],
    )
    together = pd.DataFrame(
        [("the k", 1, "induction", few), ("all others", 1, "induction", rest)],
        columns=["removed", "k", "task", "value"],
    )
    return where, local, together.assign(lo=0.9 * together["value"], hi=1.1 * together["value"])


def test_nope_names_the_layer_and_the_carrier():
    module = script("nope_layers")
    where, local, together = nope(worst=16, change=3e-7, few=6.0, rest=1.0)
    said = module.verdict(where, local, together, module.ranked_by_head(where))
    assert "induction loses most in one layer: 16" in said
    assert "the layer itself knows no order any more" in said
    assert "R2 0.60 to 0.60 (with RoPE 0.70 to 0.70)" in said
    assert "RoPE in the 1 layers that copying needs most is worth more" in said
    where, local, together = nope(worst=16, change=0.3, few=1.0, rest=6.0)
    said = module.verdict(where, local, together, module.ranked_by_head(where))
    assert "still knows order" in said
    assert "no few layers carry it" in said


# ---- infini_failure ---------------------------------------------------------------------------------


def failure(module: ModuleType, slow_moved: float, memory: float, lost: tuple) -> tuple:
    moved = pd.DataFrame(
        [
            (rate, *((0.04, slow_moved) if rate == 3e-4 else (4.0, 2.0)), 0.01)
            for rate in module.GATE_RATES
        ],
        columns=["gate_lr", "travel", "moved", "kl"],
    )
    moved = moved.assign(lo=0.9 * moved["kl"], hi=1.1 * moved["kl"])
    read = pd.DataFrame(
        [
            (name, f"query_variation[branch={branch}]", layer, 0.9 if branch == "local" else memory)
            for name in module.MAPS
            for branch in ("local", "memory")
            for layer in range(3)
        ],
        columns=["feature_map", "stat", "layer", "value"],
    )
    rows = [
        (name, "lost", segments, value)
        for name in module.STUDENTS
        for segments, value in zip((0, 1, 3, 7), lost, strict=True)
    ]
    rows += [(name, "kl", np.nan, 0.1) for name in module.STUDENTS]
    found = pd.DataFrame(rows, columns=["student", "stat", "segments", "value"])
    return moved, read, found.assign(lo=found["value"] - 0.1, hi=found["value"] + 0.1)


def test_infini_failure_follows_what_was_planted():
    module = script("infini_failure")
    said = module.verdict(*failure(module, 0.03, 0.02, (0.0, 2.0, 4.0, 6.0)))
    assert "usual rate: holds" in said[0]
    assert "does not measurably change" in said[0]
    assert "ignores the query: holds" in said[1]
    assert "falls with each compression" in said[2]
    said = module.verdict(*failure(module, 3.0, 0.95, (0.0, 2.0, 2.0, 2.0)))
    assert "usual rate: does not hold" in said[0]
    assert "ignores the query: depends on the layer" in said[1]
    assert "falls at the first border" in said[2]
    for lost, word in (
        ((-0.1, -0.1, -0.1, -0.05), "keeps"),
        ((3.0, 3.0, 3.1, 3.0), "is lost without any border too"),
        ((0.0, 0.1, 0.1, 0.1), "falls at no border for sure"),
    ):
        assert word in module.verdict(*failure(module, 3.0, 0.95, lost))[2]


def test_travel_is_about_half_of_rate_times_steps():
    module = script("infini_failure")
    assert module.travel(3e-2, 400) == pytest.approx(0.5 * 3e-2 * 400, rel=0.06)


# ---- one_or_all -------------------------------------------------------------------------------------


def by_document(module: ModuleType, together_of) -> pd.DataFrame:
    """Eight documents; layer i costs document d (i + 1)(d + 1); `together_of(k)` times their sum together."""
    places = [(layer,) for layer in range(30)] + [s for k in module.NUMBERS for s in module.sets(k)]
    rows = [
        (
            " ".join(map(str, layers)), len(layers), document,
            (document + 1) * sum(i + 1 for i in layers) * together_of(len(layers)), 10,
        )
        for layers in places
        for document in range(8)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["layers", "k", "document", "kl", "n"])


def test_the_ratio_of_together_to_alone_is_paired_by_document():
    module = script("one_or_all")
    found = module.ratios(by_document(module, lambda k: 1 if k == 1 else 0.5 + k / 8))
    assert (
        found[["ratio", "lo", "hi"]].nunique(axis=1).eq(1).all()
    )  # documents differ, their ratio does not
    pooled = found[found["layers"] == "pooled"].set_index("k")["ratio"]
    assert pooled.to_dict() == pytest.approx({k: 0.5 + k / 8 for k in module.NUMBERS})
    said = module.verdict(found.assign(name="infini"))
    assert "depends on mechanism and number" in said[0]
    assert "2 layers 0.75 [0.75, 0.75] less" in said[1]
    assert "4 layers 1.00 [1.00, 1.00] additive" in said[1]
    assert "30 layers 4.25 [4.25, 4.25] more" in said[1]


def test_sets_of_layers_are_even_and_whole():
    module = script("one_or_all")
    for k in module.NUMBERS:
        assert all(len(set(layers)) == k and max(layers) < 30 for layers in module.sets(k))
    assert module.sets(30) == [tuple(range(30))]
    assert module.REPAIRED in module.sets(4)


@pytest.mark.parametrize(
    ("after", "word"), [(0.10, "holds"), (0.18, "does not hold"), (0.02, "holds")]
)
def test_repair_of_several_is_held_against_the_sum_of_single_ones(after, word):
    module = script("one_or_all")
    rows = [("5", 1, 0.1, 0.05), ("13", 1, 0.1, 0.05), ("5 13", 2, 0.2, after)]
    mended = pd.DataFrame(rows, columns=["layers", "k", "before", "after"]).assign(zero=0.2)
    mended["gap_closed"] = 1 - mended["after"] / mended["before"]
    for end, off in (("lo", -0.05), ("hi", 0.05)):
        mended[f"gap_{end}"] = mended["gap_closed"] + off
        mended[f"after_{end}"] = mended["after"] + off / 10
    said = module.repair_verdict(mended)
    assert f"Sequential repair scales to 2 layers: {word}." in said
    assert "0.200 -> 0.100 nats, 50% [45%, 55%]" in said


# ---- kept_or_replaced -------------------------------------------------------------------------------


def kept(module: ModuleType, beside: float, random: float = 0.001) -> pd.DataFrame:
    """Replaced: 0.1 nats, mended to 0.05; added: `beside`, mended to 0.001 with alpha turned to 0.02."""
    rows = []
    for case in module.cases():
        adapter = case.mechanism in module.ADAPTERS
        before = 0.0 if adapter else 0.1 if case.column == "replaced" else beside
        after = before / 2 if adapter or case.column == "replaced" else 0.001
        if case.mechanism == "random" and case.column != "replaced":
            after = random
        alpha = 0.02 if "parallel(" in case.swap else np.nan
        rows.append((case.mechanism, case.column, case.slot, case.swap, before, after, alpha))
    columns = ["mechanism", "column", "slot", "swap", "before", "after", "alpha"]
    found = pd.DataFrame(rows, columns=columns).assign(gap_closed=0.5, zero=0.2, linear=0.08)
    for name in ("before", "after", "zero", "linear"):
        found[f"{name}_lo"], found[f"{name}_hi"] = 0.9 * found[name], 1.1 * found[name]
    return found


def test_every_cell_of_the_table_is_a_swap():
    module = script("kept_or_replaced")
    swaps = [case.swap for case in module.cases()]
    assert len(set(swaps)) == len(swaps)
    for swap in swaps:
        spec.check(spec.parse(swap))
    assert sum(bool(case.controls) for case in module.cases()) == len(module.CONTROLLED)


def test_kept_or_replaced_follows_what_was_planted():
    module = script("kept_or_replaced")
    said = module.verdict(kept(module, beside=0.01))
    assert (
        "before repair: added in full in 8 of 8 (holds), a tenth added in 8 of 8 (holds)" in said[0]
    )
    assert "from 1 to 0.02 .. 0.02, down by more than half in 8 of 8" in said[2]
    assert "not measurably worse than the mechanism in 7 of 7 (added in full), 7 of 7" in said[2]
    assert "Mamba-2 0.0500 [0.0450, 0.0550] (better than)" in said[3]
    assert "start at 0 in 6 of 6; not: none" in said[4]
    said = module.verdict(kept(module, beside=0.3, random=0.1))
    assert "before repair: added in full in 0 of 8 (does not hold)" in said[0]
    assert "not measurably worse than the mechanism in 0 of 7" in said[2]
    assert (
        "after repair: added in full in 7 of 8 (depends on the mechanism: not random weights)"
        in said[1]
    )


# ---- repair_table -----------------------------------------------------------------------------------


def row_of(**students: tuple[float, float, float]) -> dict:
    """A row of the table; each student as value, lower and upper end."""
    row = {"gap_closed": 0.8, "gap_lo": 0.7, "gap_hi": 0.9}
    usual = {
        "swap": (0.08, 0.06, 0.10), "repaired": (0.02, 0.015, 0.025),
        "zero": (0.10, 0.09, 0.11), "linear": (0.06, 0.05, 0.07),
    }  # fmt: skip
    for name, values in (usual | students).items():
        row |= dict(zip((name, f"{name}_lo", f"{name}_hi"), values, strict=True))
    return row


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (row_of(), "repairs"),
        (row_of(swap=(0.001, 0.0009, 0.0011)), "little to repair: 1 % of what deleting costs"),
        (row_of(repaired=(0.055, 0.05, 0.06)), "repairs; no better than a linear map"),
        (row_of(repaired=(0.09, 0.08, 0.10)), "repairs; worse than a linear map"),
        (row_of(swap=(0.2, 0.18, 0.22)), "repairs; began worse than no layer"),
        (row_of() | {"gap_lo": 0.4}, "repairs in part"),
        (row_of() | {"gap_closed": 0.1, "gap_lo": 0.0, "gap_hi": 0.2}, "does not repair"),
    ],
)
def test_repair_table_says_what_the_numbers_say(row, said):
    assert script("repair_table").verdict(row, False) == said
    # Where there was little to repair no branch has to be used.
    through = said if "little" in said else f"{said}; by bypass"
    assert script("repair_table").verdict(row, True) == through


# ---- planted_faults ---------------------------------------------------------------------------------


def test_planted_faults_are_right_only_if_the_planted_one_leads():
    module = script("planted_faults")
    rows = [
        {
            "fault": kind, "panel": "part", "name": wanted if kind != "delayed" else "linear",
            "leading": kind != "first", "share": 0.9, "lo": 0.8, "hi": 1.0, "damage": 0.1,
        }
        for kind, (_, wanted) in module.FAULTS.items()
    ]  # fmt: skip
    found = module.named(pd.DataFrame(rows))
    wrong = {kind for kind, said in found.items() if not said["right"]}
    assert wrong == {"delayed", "first"}
    assert found["first"]["leading"] is None
    assert found["scaled"]["share"] == 0.9
    assert module.draw(pd.DataFrame(rows)).axes
