"""`--sites`: the rows of these sites are those of a whole trace, and no other value is kept or worked out."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from measured import cut, measured, student_of

import mismatch
from mismatch import registry
from mismatch.errors import ConfigError, UsageError
from mismatch.forward import hooks
from mismatch.forward.paired_sites import stream
from mismatch.forward.sites import tapped
from mismatch.metrics import load_metric
from mismatch.models.layout import Layout
from mismatch.runs.site_names import READ_AT, SITES
from mismatch.stages.estimate import estimate
from mismatch.stages.trace.batches import runner_of
from mismatch.stages.trace.config import TraceConfig

CHOICES = (
    *((site,) for site in SITES),
    ("resid_pre", "attn_out"),
    ("mlp_out", "logits"),
    ("resid_mid", "final"),
)


def assert_those_of_the_whole(model, swap, choices):
    whole, _ = measured(model, swap, ("zero",))
    for sites in choices:
        some, _ = measured(model, swap, ("zero",), sites=sites)
        wanted = whole[whole["site"].isin(sites)].reset_index(drop=True)
        pd.testing.assert_frame_equal(some.reset_index(drop=True), wanted)
        assert len(some)


def test_the_rows_are_those_of_the_whole_trace(family, tiny):
    choices = (("resid_pre",), ("attn_out", "final"), ("mlp_out", "logits"))
    assert_those_of_the_whole(tiny(family), "layers0-2:random", choices)


@pytest.mark.parametrize("swap", ["layer1:random", "final_norm:zero"])
def test_the_rows_of_any_sites_are_those_of_the_whole_trace(tiny, swap):
    assert_those_of_the_whole(tiny("llama"), swap, CHOICES)


@pytest.mark.parametrize("sites", CHOICES, ids=",".join)
def test_no_other_value_is_kept(tiny, sites):
    model, seen = tiny("llama"), []
    layout, student = Layout.of(model), student_of(model, "layers[0,2]:random")

    def run(ran, ids, wanted, *args, **options):
        seen.append((ran is layout, {(tap.layer, tap.site) for tap in wanted}))
        return hooks.run(ran, ids, wanted, *args, **options)

    ids = torch.from_numpy(cut(2).ids)
    stream(layout, [runner_of(student)], ids, lambda pair: None, sites=sites, run=run)
    needed = tapped(layout, sites)
    of_teacher = {at for teacher, taps in seen if teacher for at in taps}
    # Block 2 runs alone on the stream that leaves block 1; block 0 begins at the embedding.
    assert of_teacher == {
        *((layer, site) for layer in range(3) for site in needed if site in SITES[:5]),
        *((0, "resid_pre"), (1, "resid_post")),
    }
    of_student = {site for teacher, taps in seen if not teacher for _, site in taps}
    assert of_student == needed & {*SITES[:5]}


def test_what_must_be_read_for_an_update_is_the_stream_it_is_added_to(family, tiny):
    layout = Layout.of(tiny(family))
    middle = "resid_pre" if layout.parallel else "resid_mid"
    assert tapped(layout, ("logits",)) == {"logits"}
    assert tapped(layout, ("attn_out",)) == {"attn_out", "resid_pre"}
    assert tapped(layout, ("mlp_out",)) == {"mlp_out", middle}
    assert tapped(layout, ("resid_pre",)) == {"resid_pre", "resid_post"}


def test_every_site_has_metrics_and_every_metric_a_site():
    at = {load_metric(name).at for name in registry.metrics().names()}
    assert {*READ_AT} == {*SITES}
    assert {kind for kinds in READ_AT.values() for kind in kinds} == at


def test_fewer_sites_are_estimated_to_need_less(tiny):
    layout = Layout.of(tiny("llama"))
    peaks = [
        estimate(
            layout, [0], TraceConfig(model="x", swap=("layer0:zero",), sites=sites, seq_len=4096)
        ).peak
        for sites in (("logits",), ("attn_out",), None)
    ]
    assert peaks[0] < peaks[1] < peaks[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ("logit",)}, "unknown site `logit`"),
        ({"sites": ()}, "`sites` is empty"),
        ({"sites": ("final", "final")}, "the site `final` is named twice"),
        (
            {"sites": ("logits",), "metrics": ("kl", "cka")},
            "--metrics cka has no number at --sites logits",
        ),
        (
            {"sites": ("resid_pre",), "metrics": ("lens_kl",)},
            "--metrics lens_kl has no number at --sites resid_pre",
        ),
    ],
)
def test_bad_sites_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TraceConfig(model="x", swap=("layer0:zero",), **settings)


def test_a_site_that_the_model_lacks_is_refused(tiny, toy):
    model = tiny("gpt_neox", vocab_size=len(toy.tokenizer))
    with pytest.raises(UsageError, match="of this model read the same stream"):
        mismatch.trace((model, toy.tokenizer), "layer1:zero", sites=("resid_mid",), seq_len=16)
