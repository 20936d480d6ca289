"""The swap grammar: what is read, and where it lands."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from placing import GEMMA, LLAMA, placed

from mismatch.errors import SpecError
from mismatch.spec import Call, Placement, Range, check, explicit, format, parse, resolve


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("layer12:infini", "layer12:infini"),
        ("  layers12 :  infini ( ) ;", "layer12:infini"),
        ("layers8-15:zero", "layers8-15:zero"),
        ("layer[8-15].attn:zero", "layers8-15.attn:zero"),
        ("layers[0,4,8]:zero", "layers[0,4,8]:zero"),
        ("layers0,4,8:zero", "layers[0,4,8]:zero"),
        ("layers[0-last/2]:zero", "layers0-last/2:zero"),
        ("layers0-8/3:zero", "layers0-6/3:zero"),
        ("layers5-5:zero", "layer5:zero"),
        ("layerlast:zero", "layerlast:zero"),
        ("layers[3-last, 1]:zero", "layers[3-last,1]:zero"),
        ("all.mlp:zero;norms:dyt;final_norm:dyt", "all.mlp:zero; norms:dyt; final_norm:dyt"),
        ("all.norms:dyt", "all.norms:dyt"),
        # Arguments in the order of the Config, defaults left out, in the declared type.
        ("layer1:infini(update=delta,segment=64)", "layer1:infini(segment=64, update=delta)"),
        ("layer1:infini(segment=256, update=linear)", "layer1:infini"),
        ("layer1:infini(gate_init=1)", "layer1:infini(gate_init=1.0)"),
        ("layer1:infini(gate_init=-1e-3)", "layer1:infini(gate_init=-0.001)"),
        ("layer1:infini(gate_init=.5, exact=true)", "layer1:infini(gate_init=0.5, exact=true)"),
        ("layer1:infini(note=none)", "layer1:infini"),
        ('layer1:infini(note="none")', 'layer1:infini(note="none")'),
        ("layer1:infini(note='a \"b\" \\\\ ;)')", 'layer1:infini(note="a \\"b\\" \\\\ ;)")'),
        ('layer1:infini(note="word")', "layer1:infini(note=word)"),
        (
            "layer12:parallel(infini(segment=64),alpha=0)",
            "layer12:parallel(infini(segment=64), alpha=0.0)",
        ),
        ("layer12:parallel(alpha=1.0, inner=infini)", "layer12:parallel(infini)"),
        ("layer12:parallel(alpha=0, inner=infini(segment=8))", None),
        (
            "layer12.attn:cards_of_test:Open(rate=1)",
            "layer12.attn:cards_of_test:Open(rate=1.0)",
        ),
        # A mechanism that is not known keeps its arguments as written.
        ("layer3:mamba9(b=1,a=x, c=1.50)", "layer3:mamba9(b=1, a=x, c=1.5)"),
    ],
)
def test_canonical_text(text, canonical):
    canonical = canonical or "layer12:parallel(infini(segment=8), alpha=0.0)"
    assert format(parse(text)) == canonical
    assert format(parse(canonical)) == canonical


def test_what_is_parsed():
    clause = parse("layers[0, 2-last/3].mlp:f(a=1, b=g(x=2.5), c=true, d=none, e=w-1)").clauses[0]
    assert clause.target.ranges == (Range(0, 0), Range(2, None, 3))
    assert clause.target.slot == "mlp"
    inner = Call("g", (("x", 2.5),))
    assert clause.call.arguments() == {"a": 1, "b": inner, "c": True, "d": None, "e": "w-1"}
    assert clause.call.printable() == {"a": 1, "b": "g(x=2.5)", "c": True, "d": None, "e": "w-1"}
    assert list(clause.call.nested()) == [clause.call, inner]


def test_several_texts_are_one_spec():
    assert parse(["layer1:zero;", "layer2:zero\n; layer3:zero"]) == parse(
        "layer1:zero; layer2:zero; layer3:zero"
    )


def test_format_of_parse_is_idempotent_on_random_specs():
    """And says the same places: canonical text and text mean one thing."""
    rng = random.Random(0)

    def value():
        return rng.choice(
            ["7", "-3", "0.50", "1e-7", "+2", ".5", "3.", "true", "none", "word", '"q;) ="', "'it'"]
        )

    def space():
        return rng.choice(["", "", " ", "  "])

    def call(depth):
        name = rng.choice(["infini", "zero", "dyt", "f9", "a.b:C", "x_y"])
        args = [f"k{i}{space()}={space()}{value()}" for i in range(rng.randrange(3))]
        if depth and rng.random() < 0.4:
            args.insert(0, call(depth - 1))
        return name + (f"{space()}({(space() + ',' + space()).join(args)})" if args else "")

    def ends():
        low, high = sorted((rng.randrange(30), rng.randrange(30)))
        text = rng.choice(
            [f"{low}", f"{low}-{high}", f"{low}-last", "last", f"{low}-{high}/{rng.randint(1, 5)}"]
        )
        return text

    def clause():
        target = rng.choice(["all", "norms", "final_norm", "layers", "layer"])
        if target.startswith("layer"):
            inside = f"{space()},{space()}".join(ends() for _ in range(rng.randint(1, 3)))
            target += f"[{space()}{inside}{space()}]" if rng.random() < 0.5 else inside
        if target not in ("norms", "final_norm") and rng.random() < 0.4:
            target += rng.choice([".attn", ".mlp", ".norms", ".block"])
        return f"{target}{space()}:{space()}{call(2)}"

    for _ in range(500):
        text = ";".join(space() + clause() + space() for _ in range(rng.randint(1, 3)))
        spec = parse(text)
        canonical = format(spec)
        again = parse(canonical)
        assert format(again) == canonical, text
        assert [c.target for c in again.clauses] == [c.target for c in spec.clauses], text


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("layer12:infini", [(12, "attn", "infini")]),
        ("layers[3,1-2]:zero", [(1, "attn", "zero"), (2, "attn", "zero"), (3, "attn", "zero")]),
        ("layers0-last/10:nope", [(0, "rope", "nope"), (10, "rope", "nope"), (20, "rope", "nope")]),
        ("layerlast.mlp:zero", [(29, "mlp", "zero")]),
        ("layer4:dyt", [(4, "norm1", "dyt"), (4, "norm2", "dyt")]),
        ("layer4.norm2:dyt", [(4, "norm2", "dyt")]),
        ("final_norm:dyt", [(None, "final_norm", "dyt")]),
        (
            "layer4:zero; layer4:parallel(infini, alpha=0)",
            [(4, "attn", "zero"), (4, "attn", "parallel(infini, alpha=0.0)")],
        ),
    ],
)
def test_where_it_lands(text, places):
    assert placed(text) == places


def test_all_and_norms():
    assert placed("all:infini", 3) == [(layer, "attn", "infini") for layer in range(3)]
    assert placed("norms:dyt", 2, GEMMA, "gemma2") == [
        *[(0, slot, "dyt") for slot in ("norm1", "norm1_post", "norm2", "norm2_post")],
        *[(1, slot, "dyt") for slot in ("norm1", "norm1_post", "norm2", "norm2_post")],
        (None, "final_norm", "dyt"),
    ]
    assert placed("norms:zero", 1) == [
        (0, "norm1", "zero"),
        (0, "norm2", "zero"),
        (None, "final_norm", "zero"),
    ]


def test_a_placement_names_its_clause_and_its_checked_call():
    found = resolve(parse("layer1:zero; layer2:parallel(infini, alpha=1)"), 4, LLAMA, "llama")
    assert found[1] == Placement(2, "attn", Call("parallel", (("inner", Call("infini")),)), 1)
    assert check(parse("layer2:infini(gate_init=2)")).clauses[0].call.arguments() == {
        "gate_init": 2.0
    }


def test_a_list_of_words():
    name = "cards_of_test:List"
    (call,) = (c.call for c in check(parse(f"layer1:{name}(words=[ a,b_c ,d.e ])")).clauses)
    assert call.arguments() == {"words": ("a", "b_c", "d.e")}
    assert call.printable() == {"words": ("a", "b_c", "d.e")}
    assert format(parse(f"layer1:{name}(words=[a,b])")) == f"layer1:{name}(words=[a, b])"
    assert format(parse(f"layer1:{name}(words=a)")) == f"layer1:{name}(words=[a])"
    assert format(parse(f"layer1:{name}(words=none)")) == f"layer1:{name}"


@pytest.mark.parametrize(
    ("value", "message", "at", "hint"),
    [
        ("[]", "`words` needs words or numbers in `[ ]`, got `]`", 1, ""),
        ("[a, 3]", "`words` needs words in `[ ]`, got `3`", 4, ""),
        ("[a b]", "expected `,` or `]`, got `b`", 3, ""),
        ("[a", "`[` is never closed", 0, "\n\nhint: close it with `]`"),
        ("3", "`words` must be a list of words or none, got 3", 0, ""),
    ],
)
def test_a_list_of_words_that_is_none(value, message, at, hint):
    start = "layer1:cards_of_test:List(words="
    with pytest.raises(SpecError) as caught:
        check(parse(f"{start}{value})"))
    where = " " * (len(start) + at)
    assert str(caught.value) == f"{message}\n  {start}{value})\n  {where}^{hint}"


@pytest.mark.parametrize(
    ("written", "value", "canonical"),
    [
        ("3", 3, "(slots=3)"),
        ("96", 96, ""),  # the default
        ("[96]", (96,), "(slots=[96])"),
        ("[ 0,16 , 96]", (0, 16, 96), "(slots=[0, 16, 96])"),
        ("[0]", (0,), "(slots=[0])"),
    ],
)
def test_a_number_or_a_list_of_numbers(written, value, canonical):
    name = "cards_of_test:Ints"
    parsed = check(parse(f"layer1:{name}(slots={written})"))
    call = parsed.clauses[0].call
    assert call.arguments() == ({"slots": value} if canonical else {})
    assert format(parsed) == f"layer1:{name}{canonical}"
    assert check(parse(format(parsed))) == parsed
    assert check(parse(explicit(parsed))) == parsed
    assert json.loads(json.dumps(call.printable())) == (
        {"slots": [*value] if isinstance(value, tuple) else value} if canonical else {}
    )


@pytest.mark.parametrize(
    ("value", "message", "at"),
    [
        ("-1", "`slots` must be int >= 0, or a list of such, got -1", 0),
        ("[0, -1]", "`slots` must be int >= 0, or a list of such, got `[0, -1]`", 0),
        ("[0, 1.5]", "`slots` must be int >= 0, or a list of such, got `[0, 1.5]`", 0),
        ("[a, b]", "`slots` must be int >= 0, or a list of such, got `[a, b]`", 0),
        ("true", "`slots` must be int >= 0, or a list of such, got true", 0),
        ("none", "`slots` must be int >= 0, or a list of such, got none", 0),
        ("[0, a]", "`slots` needs numbers in `[ ]`, got `a`", 4),
        ("[0,]", "`slots` needs numbers in `[ ]`, got `]`", 3),
        ("[0 1]", "expected `,` or `]`, got `1`", 3),
        (f"[{'9' * 19}]", "a number of 19 digits is too large", 1),
    ],
)
def test_numbers_that_are_none(value, message, at):
    start = "layer1:cards_of_test:Ints(slots="
    with pytest.raises(SpecError) as caught:
        check(parse(f"{start}{value})"))
    where = " " * (len(start) + at)
    assert str(caught.value) == f"{message}\n  {start}{value})\n  {where}^"


def test_a_list_where_none_is_wanted():
    with pytest.raises(SpecError, match=r"^`segment` must be int >= 1, got `\[a, b\]`"):
        check(parse("layer1:infini(segment=[a, b])"))


def test_a_class_without_a_config_gets_its_arguments_as_they_are_written():
    text = "layer1:cards_of_test:Plain(b=2, a=x, c=[u, v], d=infini(segment=256))"
    call = check(parse(text)).clauses[0].call
    assert call.arguments() == {"b": 2, "a": "x", "c": ("u", "v"), "d": Call("infini")}
    assert format(parse(text)) == "layer1:cards_of_test:Plain(b=2, a=x, c=[u, v], d=infini)"


def test_numbers_without_a_key_fill_the_fields_in_their_order():
    call = check(parse("layer2:infini(64, update=delta)")).clauses[0].call
    assert call.arguments() == {"segment": 64, "update": "delta"}
    mixed = check(parse("layer2:parallel(infini(64), 0.5)")).clauses[0].call
    assert str(mixed) == "parallel(infini(segment=64), alpha=0.5)"
    assert str(parse("layer2:unknown(64, -1, a=2)")) == "layer2:unknown(64, -1, a=2)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "layer1:parallel(infini, 1, 2)",
            "`parallel` takes 2 arguments\n  layer1:parallel(infini, 1, 2)\n"
            "                             ^\n\nhint: arguments: alpha",
        ),
        (
            "layer1:zero(1)",
            "`zero` takes 0 arguments\n  layer1:zero(1)\n              ^\n\n"
            "hint: `zero` takes no arguments",
        ),
        (
            "layer1:infini(64, segment=3)",
            "`infini` got `segment` twice\n  layer1:infini(64, segment=3)\n                    ^",
        ),
        (
            "layer1:infini(0)",
            "`segment` must be int >= 1, got 0\n  layer1:infini(0)\n                ^",
        ),
        (
            "layer1:infini(64, 2)",
            "`update` must be one of linear, delta, got 2\n  layer1:infini(64, 2)\n"
            "                    ^",
        ),
    ],
)
def test_numbers_without_a_key_that_do_not_fit(text, message):
    with pytest.raises(SpecError) as caught:
        check(parse(text))
    assert str(caught.value) == message


ALL = "segment=64, update=linear, gate_init=0.0, note=none, exact=false"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("layer1:zero", "layer1:zero"),
        ("layer1:infini(64)", f"layer1:infini({ALL})"),
        (
            "layers[0-last/2]:parallel(infini(segment=64)); norms:dyt",
            f"layers0-last/2:parallel(infini({ALL}), alpha=1.0); norms:dyt",
        ),
        ("layer1:cards_of_test:List", "layer1:cards_of_test:List(words=none)"),
        ("layer1:cards_of_test:List(words=[a, b])", "layer1:cards_of_test:List(words=[a, b])"),
        ("layer1.attn:cards_of_test:Open(rate=2)", "layer1.attn:cards_of_test:Open(rate=2.0)"),
    ],
)
def test_explicit_text_says_every_argument_and_means_the_same(text, wanted):
    assert explicit(parse(text)) == wanted
    assert check(parse(wanted)).clauses == check(parse(text)).clauses


def test_no_torch():
    code = (
        "import sys; from mismatch.spec import parse, format; format(parse('layer12:infini; norms:dyt'));"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_caret_counts_in_the_joined_text():
    with pytest.raises(SpecError) as caught:
        resolve(parse(["layer1:zero", "layer99:zero"]), 30, LLAMA, "llama")
    assert str(caught.value).splitlines()[1:] == [
        "  layer1:zero; layer99:zero",
        "                    ^",
    ]
