"""Mechanisms without a target, and layers without a mechanism: what is read, and each error on its text."""

from __future__ import annotations

import pytest

from mismatch import spec
from mismatch.errors import ConfigError, SpecError
from mismatch.stages.scan.config import ScanConfig


def test_templates_are_swaps_once_they_have_a_layer():
    found = spec.templates("infini(segment=64); nope; sliding_window(64,1); mlp:zero;")
    assert [str(t) for t in found] == [
        "infini(segment=64)",
        "nope",
        "sliding_window(window=64, sinks=1)",
        "mlp:zero",
    ]
    assert [spec.format(t.at(12)) for t in found] == [
        "layer12:infini(segment=64)",
        "layer12:nope",
        "layer12:sliding_window(window=64, sinks=1)",
        "layer12.mlp:zero",
    ]
    assert spec.templates(["infini", "zero"]) == spec.templates("infini; zero")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no mechanism\n\nhint: write mechanisms, such as `infini(segment=64); zero`"),
        (
            "zero; layers[0,3].mlp:zero",
            "`layers[0,3].mlp` is a target: here mechanisms stand without one\n"
            "  zero; layers[0,3].mlp:zero\n        ^\n\n"
            "hint: leave it out; --among names the layers",
        ),
        (
            "final_norm:dyt",
            "`final_norm` is a target: here mechanisms stand without one\n  final_norm:dyt\n  ^\n\n"
            "hint: it belongs to no layer: `mismatch trace` swaps it",
        ),
        (
            "zero;; nope",
            "a mechanism is missing\n  zero;; nope\n       ^\n\n"
            "hint: write mechanisms, such as `infini(segment=64); zero`",
        ),
        ("zero nope", "expected `;` or the end, got `nope`\n  zero nope\n       ^"),
        ("zero; nope; zero", "`zero` is named twice\n  zero; nope; zero\n              ^"),
        (
            "sliding_window(64,1); sliding_window(window=64, sinks=1)",
            "`sliding_window(window=64, sinks=1)` is named twice\n"
            "  sliding_window(64,1); sliding_window(window=64, sinks=1)\n"
            "                        ^",
        ),
        (
            "nope; mlp:infini",
            "`infini` cannot go into the slot `mlp`\n  nope; mlp:infini\n        ^\n\n"
            "hint: slots of `infini`: attn",
        ),
    ],
)
def test_what_no_template_is(text, message):
    with pytest.raises(SpecError) as caught:
        spec.templates(text)
    assert str(caught.value) == message


def test_an_unknown_mechanism_and_argument_are_shown_in_the_text_that_was_given():
    with pytest.raises(SpecError, match=r"unknown mechanism `infnii`\n  zero; infnii\n        \^"):
        spec.templates("zero; infnii")
    with pytest.raises(SpecError, match=r"no argument `segmnt`\n  zero; infini\(segmnt=1\)"):
        spec.templates("zero; infini(segmnt=1)")


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", range(12)),
        (" all ", range(12)),
        ("0-4", range(5)),
        ("0,4,8", (0, 4, 8)),
        ("8,0", (0, 8)),
        ("[1,2]", (1, 2)),
        ("0-last/2", range(0, 12, 2)),
        ("last", (11,)),
    ],
)
def test_layers(text, layers):
    assert spec.layers(text, 12) == tuple(layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12", "layer 12 does not exist: the model has 12 layers (0-11)\n  12\n  ^"),
        ("3-1", "empty range `3-1`\n  3-1\n  ^\n\nhint: did you mean `1-3`?"),
        ("1,1", "layer 1 is named twice in `layers[1,1]`\n  1,1\n    ^"),
        ("al", "unknown layers `al`\n  al\n  ^\n\nhint: write `all`, or ranges such as `0-9`"),
        ("0-3 4", "expected `,` or the end, got `4`\n  0-3 4\n      ^"),
    ],
)
def test_what_no_layers_are(text, message):
    with pytest.raises(SpecError) as caught:
        spec.layers(text, 12)
    assert str(caught.value) == message


def test_two_spellings_of_one_scan_have_one_fingerprint():
    one, two = (
        ScanConfig(model="m", swap=swap)
        for swap in (("sliding_window(64,1)", "zero"), ("sliding_window(window=64,sinks=1);zero",))
    )
    assert one.fingerprint() == two.fingerprint()
    assert one.fingerprint() != ScanConfig(model="m", swap=("zero",)).fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"swap": ()},
            'there is no swap\n\nhint: give mechanisms, such as --swap "infini(segment=64); nope; zero"',
        ),
        (
            {"tasks": ("txt",)},
            "unknown task `txt`\n\nhint: did you mean `text`? available: induction, kv_lookup, needles, passkey, text",
        ),
        ({"tasks": ("text", "text")}, "the task `text` is named twice"),
        ({"tasks": ()}, "`tasks` is empty\n\nhint: leave it out for all of them"),
        ({"scored": 0.0}, "`scored` must be float in 0.001..1, got 0.0"),
        ({"samples": 1}, "`samples` must be int >= 2, got 1"),
        ({"depth": 1.5}, "`depth` must be float in 0..1, got 1.5"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ConfigError) as caught:
        ScanConfig(**{"model": "m", "swap": ("zero",), **changes})
    assert str(caught.value) == message


def test_wrong_layers_are_refused_before_anything_is_read():
    with pytest.raises(SpecError, match="empty range `3-1`"):
        ScanConfig(model="m", swap=("zero",), among="3-1")
