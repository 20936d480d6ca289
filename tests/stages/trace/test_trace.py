"""The whole trace against what it must read: exact nulls, and numbers worked out directly from plain forwards."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from measured import SEQ_LEN, cut, measured, student_of, tokens

from mismatch import registry
from mismatch.forward import hooks
from mismatch.forward.sites import massive, taps
from mismatch.metrics import load_metric
from mismatch.models.layout import Layout
from mismatch.stages.trace.batch import LENS_TOKENS

KEY = ["student", "mode", "layer", "site", "metric", "stat", "position"]
NULLS = {name: load_metric(name).null for name in registry.metrics().names()}


def nulls(table: pd.DataFrame) -> pd.Series:
    """What each row reads when nothing changed; nan where its stat has no such value."""
    pairs = zip(table["metric"], table["stat"], strict=True)
    return pd.Series([NULLS[m].get(s, np.nan) for m, s in pairs], index=table.index)


def assert_all_null(table: pd.DataFrame) -> None:
    wanted = nulls(table)
    due = table[wanted.notna()].assign(null=wanted)
    assert len(due)
    wrong = due[due["value"] != due["null"]]  # nan is wrong too
    assert wrong.empty, wrong[[*KEY, "value"]].to_string()
    for end in ("lo", "hi"):
        off = due[due[end].notna() & (due[end] != due["null"])]
        assert off.empty, off[[*KEY, end]].to_string()


def row(table: pd.DataFrame, **at: object) -> pd.Series:
    at = {"student": "swap", "mode": "free", "position": "all", "stat": "mean", **at}
    found = table
    for name, value in at.items():
        found = found[found[name].isna() if value is None else found[name] == value]
    assert len(found) == 1, f"{len(found)} rows at {at}"
    return found.iloc[0]


@pytest.mark.parametrize("swap", ["layer1:identity", "all:identity; norms:identity"])
def test_identity_reads_the_null_everywhere(family, tiny, swap):
    table, _ = measured(tiny(family), swap)
    assert_all_null(table[table["student"] == "swap"])
    # ... and everything was asked: each metric, at each site that feeds it, of each layer.
    layers = {1} if swap == "layer1:identity" else {0, 1, 2}
    mid = set() if family == "gpt_neox" else {"resid_mid"}
    streams = {"resid_pre", "attn_out", "mlp_out", "resid_post"} | mid
    swapped = table[table["student"].eq("swap") & table["layer"].isin(layers)]
    for (mode, layer), part in swapped.groupby(["mode", "layer"]):
        assert set(part["site"]) == streams - ({"resid_pre"} if mode == "forced" else set())
        for name in NULLS:
            sites = set(part[part["metric"] == name]["site"])
            at = load_metric(name).at
            assert bool(sites) == (at != "logits" and (at != "lens" or mode == "free")), (
                name,
                layer,
            )
    assert {"kl", "js", "top1", "top5", "nll"} == set(table[table["site"] == "logits"]["metric"])


@pytest.mark.parametrize(
    "swap", ["layer1.block:identity", "layer0.mlp:identity", "final_norm:identity"]
)
def test_identity_in_other_slots(tiny, swap):
    table, _ = measured(tiny("llama"), swap)
    assert_all_null(table[table["student"] == "swap"])


def test_against_plain_forwards(family, tiny):
    """One swap in the middle: what is before it, its output shift, and its sites, each worked out directly."""
    model, windows = tiny(family), cut()
    table, (student,) = measured(model, "layer1:random", windows=windows)
    before = (table["layer"] < 1) | ((table["layer"] == 1) & (table["site"] == "resid_pre"))
    assert_all_null(table[before & (table["student"] == "swap")])
    layers = set(table[before & (table["student"] == "swap")]["layer"])
    assert layers == {0, 1}

    ids = tokens(windows)
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (model, student.model))
    kl = (p.exp() * (p - q)).sum(-1)
    found = row(table, metric="kl", site="logits")
    assert found["value"] == pytest.approx(float(kl.mean()), rel=1e-6)
    assert found["n"] == windows.tokens
    last = row(table, metric="kl", site="logits", position=f"16-{SEQ_LEN - 1}")
    assert last["value"] == pytest.approx(float(kl[:, 16:].mean()), rel=1e-6)
    assert last["n"] == len(ids) * (SEQ_LEN - 16)
    assert row(table, metric="kl", site="logits", stat="max")["value"] == pytest.approx(
        float(kl.max()), rel=1e-5
    )
    after = ids[:, 1:, None]
    nll = [-x[:, :-1].gather(2, after).mean() for x in (p, q)]
    for stat, value in (("teacher", nll[0]), ("student", nll[1]), ("mean", nll[1] - nll[0])):
        found = row(table, metric="nll", site="logits", stat=stat)
        assert found["value"] == pytest.approx(float(value), abs=1e-6)
        assert found["n"] == len(ids) * (SEQ_LEN - 1)
    agree = (p.argmax(-1) != q.argmax(-1)).double().mean()
    assert row(table, metric="top1", site="logits")["value"] == pytest.approx(
        float(agree), abs=1e-12
    )

    seen: list[dict] = [{}, {}]
    teacher = Layout.of(model)
    finals = []
    for layout, values in zip((teacher, student.layout), seen, strict=True):
        wanted = [tap for layer in (1, 2) for tap in taps(layout, layer)]
        with torch.no_grad():
            finals.append(
                hooks.run(
                    layout, ids, wanted, lambda t, v, s=values: s.__setitem__((t.layer, t.site), v)
                )
            )
    pairs = {at: (seen[0][at].double(), seen[1][at].double()) for at in seen[0]}
    pairs[None, "final"] = tuple(final.double() for final in finals)
    for (layer, site), (t, s) in pairs.items():
        if (layer, site) == (1, "resid_pre"):
            continue
        error = ((s - t).norm(dim=-1) / t.norm(dim=-1)).mean()
        found = row(table, metric="rel_l2", site=site, layer=layer)
        assert found["value"] == pytest.approx(float(error), rel=1e-6), (layer, site)
        assert found["n"] == windows.tokens
        assert found["swapped"] == (layer == 1)
    t, s = pairs[2, "resid_post"]
    keep = ~massive(seen[0][2, "resid_post"], torch.ones_like(ids, dtype=torch.bool))
    keep[:, 0] = False
    t, s = t[keep], s[keep]
    found = row(table, metric="mean_shift", site="resid_post", layer=2, stat="value")
    spread = t.var(0).sum().sqrt()
    assert found["value"] == pytest.approx(float((s.mean(0) - t.mean(0)).norm() / spread), rel=1e-5)
    assert found["n"] == int(keep.sum())
    # The lens: the model's own final norm and head on the stream, at a few tokens of each window.
    lens = row(table, metric="lens_kl", site="resid_post", layer=2)
    assert lens["n"] == LENS_TOKENS * len(ids)
    assert 0 < lens["value"] <= float(kl.max())


def test_lens_kl_is_the_output_kl_at_the_last_layer(tiny):
    """All tokens as lens tokens: what the lens reads behind the last block is the output itself."""
    windows = cut(4, seq_len=LENS_TOKENS)
    table, _ = measured(tiny("gemma2"), "layer1:random", windows=windows)
    lens = row(table, metric="lens_kl", site="resid_post", layer=2)
    assert lens["value"] == pytest.approx(row(table, metric="kl", site="logits")["value"], rel=1e-9)


def test_forced_rows_are_of_swapped_layers_alone_on_the_teachers_stream(tiny):
    model, windows = tiny("qwen3"), cut()
    table, (student, _) = measured(model, "layers[0,2]:random", ("zero",), windows=windows)
    forced = table[table["mode"] == "forced"]
    assert set(forced["layer"]) == {0, 2}
    assert forced["swapped"].all()
    assert set(forced["student"]) == {"swap", "zero"}
    # In the first swapped layer free is forced.
    keys = ["student", "site", "metric", "stat", "position"]
    first = table[(table["layer"] == 0) & table["student"].isin(("swap", "zero"))]
    first = first[(first["site"] != "resid_pre") & (first["metric"] != "lens_kl")]
    parts = [first[first["mode"] == mode].set_index(keys)["value"] for mode in ("free", "forced")]
    pd.testing.assert_series_equal(*(part.sort_index() for part in parts))
    # In the second one it is that layer alone on what the teacher hands to it.
    teacher = Layout.of(model)
    ids, seen = tokens(windows), {}
    with torch.no_grad():
        wanted = [tap for tap in taps(teacher, 2) if tap.site in ("resid_pre", "attn_out")]
        hooks.run(teacher, ids, wanted, lambda t, v: seen.__setitem__(t.site, v))
        single = student_of(model, "layer2:random")
        # The same weights as those of the student (its draw depends on the order of the clause).
        single.model.model.layers[2] = student.model.model.layers[2]
        own = {}
        hooks.run(
            single.layout, ids, [tap for tap in taps(teacher, 2) if tap.site == "attn_out"],
            lambda t, v: own.__setitem__(t.site, v),
        )  # fmt: skip
    t, s = seen["attn_out"].double(), own["attn_out"].double()
    error = float(((s - t).norm(dim=-1) / t.norm(dim=-1)).mean())
    found = row(table, metric="rel_l2", site="attn_out", layer=2, mode="forced")
    assert found["value"] == pytest.approx(error, rel=1e-6)
    free = row(table, metric="rel_l2", site="attn_out", layer=2)
    assert free["value"] != pytest.approx(error, rel=1e-3)


def test_paired_differences(tiny):
    table, _ = measured(tiny("llama"), "layer1:sliding_window(window=4)", ("zero", "skip"))
    for control in ("zero", "skip"):
        for metric in ("kl", "nll"):
            difference = row(table, metric=metric, site="logits", stat=f"mean_minus_{control}")
            ours = row(table, metric=metric, site="logits")
            theirs = row(table, metric=metric, site="logits", student=control)
            assert difference["value"] == pytest.approx(ours["value"] - theirs["value"], abs=1e-12)
            assert difference["lo"] <= difference["value"] <= difference["hi"]
            assert difference["n"] == ours["n"]


def test_a_swap_of_the_final_norm_alone(tiny):
    model, windows = tiny("llama"), cut()
    table, (student,) = measured(model, "final_norm:dyt(alpha=0.5)", windows=windows)
    swap = table[table["student"] == "swap"]
    assert_all_null(swap[swap["layer"].notna()])
    assert set(swap["layer"].dropna()) == {0, 1, 2}
    with torch.no_grad():
        p, q = (
            m(input_ids=tokens(windows)).logits.double().log_softmax(-1)
            for m in (model, student.model)
        )
    found = row(table, metric="kl", site="logits")
    assert found["value"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    # The student's own lens differs at every layer, so none is claimed to read 0.
    assert "lens_kl" not in set(swap["metric"])


def test_batch_size_does_not_matter(tiny):
    model, windows = tiny("gemma3_text"), cut(8)
    names = list(NULLS)
    tables = [
        measured(
            model, "layer1:random", ("zero",), windows=windows, metrics=names, batch_size=size
        )[0]
        for size in (1, 2, 3, 8)
    ]
    tables = [t[t["student"] != "floor"].set_index(KEY) for t in tables]
    for other in tables[1:]:
        assert other.index.equals(tables[0].index)
        assert other["n"].equals(tables[0]["n"])
        # float32 kernels add up in another order in another batch shape
        for column in ("value", "lo", "hi"):
            np.testing.assert_allclose(
                other[column].to_numpy(), tables[0][column].to_numpy(), rtol=2e-5, atol=2e-6
            )


def test_the_sample_bounds_second_moments_alone(tiny):
    whole, _ = measured(tiny("llama"), "layer1:zero")
    part, _ = measured(tiny("llama"), "layer1:zero", sample=0.5)
    at = {"site": "resid_post", "layer": 2}
    n = [row(t, metric="frechet", stat="value", **at)["n"] for t in (whole, part)]
    assert n[0] == 6 * (SEQ_LEN - 1)
    assert 0.3 * n[0] < n[1] < 0.7 * n[0]
    for metric in ("rel_l2", "kurtosis"):
        if load_metric(metric).mask == "sample":
            continue
        pair = [row(t, metric=metric, **at) for t in (whole, part)]
        assert pair[0]["value"] == pair[1]["value"]


def test_a_few_metrics_alone(tiny):
    table, _ = measured(tiny("llama"), "layer1:zero", ("zero",), metrics=("rel_l2", "kl"))
    assert set(table["metric"]) == {"rel_l2", "kl"}
    whole, _ = measured(tiny("llama"), "layer1:zero", ("zero",))
    for found in (table, whole):
        found.set_index(KEY, inplace=True)
    common = whole.loc[table.index]
    np.testing.assert_array_equal(common["n"], table["n"])
    np.testing.assert_allclose(common["value"], table["value"], rtol=1e-6)  # with js kl is fused
