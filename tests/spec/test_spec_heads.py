"""Heads in the swap grammar: what is read, which heads are meant, and each error on its full text."""

from __future__ import annotations

import pytest
from placing import LLAMA

from mismatch.errors import SpecError
from mismatch.spec import Heads, Range, check, explicit, format, parse, resolve
from mismatch.spec.heads import named

MODEL = Heads(query=9, kv=3)


def placed(text, heads=MODEL):
    found = resolve(parse(text), 30, LLAMA, "llama", heads=heads)
    return [(p.layer, p.slot, p.heads, str(p.call)) for p in found]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("layer18.heads[0-5,8]:infini", "layer18.heads[0-5,8]:infini"),
        ("layer18.attn.heads[ 0 - 5 , 8 ]:infini()", "layer18.attn.heads[0-5,8]:infini"),
        ("layer18.heads0-5,8:zero", "layer18.heads[0-5,8]:zero"),
        ("layer18.kv_heads[2]:zero", "layer18.kv_heads[2]:zero"),
        ("layer18.kv_heads2:zero", "layer18.kv_heads[2]:zero"),
        ("all.heads[last]:zero", "all.heads[last]:zero"),
        ("layers0-3.heads[0-last/2]:zero", "layers0-3.heads[0-last/2]:zero"),
        (
            "layer1.heads[0]:zero;layer1.heads[1]:nope",
            "layer1.heads[0]:zero; layer1.heads[1]:nope",
        ),
    ],
)
def test_canonical_text(text, canonical):
    assert format(parse(text)) == canonical
    assert format(parse(canonical)) == canonical
    assert str(check(parse(text))) == canonical


def test_every_argument_is_written_out_and_the_heads_stay():
    text = explicit(parse("layer18.kv_heads[0,2]:parallel(zero)"))
    assert text == "layer18.kv_heads[0,2]:parallel(zero, alpha=1.0)"


def test_what_is_parsed():
    target = parse("layer18.attn.kv_heads[0-last/2]:zero").clauses[0].target
    assert (target.slot, target.heads_kind) == ("attn", "kv_heads")
    assert target.heads == (Range(0, None, 2),)
    assert parse("layer18:zero").clauses[0].target.heads == ()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("layer18.heads[0-5,8]:infini", [(18, "attn", (0, 1, 2, 3, 4, 5, 8), "infini")]),
        ("layer18.heads[8,0]:infini", [(18, "attn", (0, 8), "infini")]),
        ("layer18.kv_heads[2]:zero", [(18, "attn", (6, 7, 8), "zero")]),
        ("layer18.kv_heads[2,0]:zero", [(18, "attn", (0, 1, 2, 6, 7, 8), "zero")]),
        ("layer18.heads[0-last/4]:zero", [(18, "attn", (0, 4, 8), "zero")]),
        ("layers2-3.heads[last]:zero", [(i, "attn", (8,), "zero") for i in (2, 3)]),
        ("layer1.heads[0]:nope", [(1, "rope", (0,), "nope")]),
        (
            "layer1.heads[0]:infini; layer1.kv_heads[1]:nope; layer1:parallel(zero)",
            [
                (1, "attn", (0,), "infini"),
                (1, "rope", (3, 4, 5), "nope"),
                (1, "attn", (), "parallel(zero)"),
            ],
        ),
    ],
)
def test_where_it_lands(text, found):
    assert placed(text) == found


def test_without_groups_a_kv_head_is_a_query_head():
    assert placed("layer1.kv_heads[2]:zero", Heads(4, 4)) == [(1, "attn", (2,), "zero")]
    assert placed("layer1.kv_heads[0]:zero", Heads(4, 1)) == [(1, "attn", (0, 1, 2, 3), "zero")]


def test_heads_as_they_are_written():
    assert named((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"


ERRORS = [
    (
        "layer18.heads[]:zero",
        """`heads[]` names no head
  layer18.heads[]:zero
          ^

hint: write `heads[0-3]`""",
    ),
    (
        "layer18.heads[9]:zero",
        """query head 9 does not exist: the model has 9 query heads (0-8)
  layer18.heads[9]:zero
                ^""",
    ),
    (
        "layer18.heads[0,7-12]:zero",
        """query head 12 does not exist: the model has 9 query heads (0-8)
  layer18.heads[0,7-12]:zero
                  ^""",
    ),
    (
        "layer18.kv_heads[3]:zero",
        """kv head 3 does not exist: the model has 3 kv heads (0-2)
  layer18.kv_heads[3]:zero
                   ^""",
    ),
    (
        "layer18.heads[0-5,3]:zero",
        """query head 3 is named twice in `layer18.heads[0-5,3]`
  layer18.heads[0-5,3]:zero
                    ^""",
    ),
    (
        "layer18.heads[x]:zero",
        """expected a head number or `last`, got `x`
  layer18.heads[x]:zero
                ^

hint: heads count from 0, as in `heads[0-3]`""",
    ),
    (
        "layer18.heads[5-2]:zero",
        """empty range `5-2`
  layer18.heads[5-2]:zero
                ^

hint: did you mean `2-5`?""",
    ),
    (
        "layer18.heads[1:zero",
        """`[` is never closed
  layer18.heads[1:zero
               ^

hint: close it with `]`""",
    ),
    (
        "layer18.mlp.heads[1]:zero",
        """the slot `mlp` has no heads
  layer18.mlp.heads[1]:zero
              ^

hint: heads are those of the slot `attn`""",
    ),
    (
        "layer18.attn.q_proj:zero",
        """expected `heads` or `kv_heads` behind the slot, got `q_proj`
  layer18.attn.q_proj:zero
               ^

hint: write `layer18.attn.heads[0-3]:mechanism`""",
    ),
    (
        "layer18.heads[1].attn:zero",
        """expected `:` and a mechanism after `layer18.heads[1]`, got `.attn`
  layer18.heads[1].attn:zero
                  ^

hint: write `target:mechanism`, such as `layer12:infini`""",
    ),
    (
        "layer18.heads[1]:dyt",
        """`dyt` cannot take some heads: what it gives is not the heads of the attention, one by one
  layer18.heads[1]:dyt
                   ^

hint: mechanisms that can: infini, nope, parallel, zero""",
    ),
    (
        "layer18.heads[1]:infini(update=delta)",
        """`infini` without update=linear cannot take some heads: what it gives is not the heads of the attention, \
one by one
  layer18.heads[1]:infini(update=delta)
                   ^

hint: mechanisms that can: infini, nope, parallel, zero""",
    ),
    (
        "layer18.heads[1]:parallel(dyt)",
        """`dyt` cannot take some heads: what it gives is not the heads of the attention, one by one
  layer18.heads[1]:parallel(dyt)
                            ^

hint: mechanisms that can: infini, nope, parallel, zero""",
    ),
    (
        "norms.heads[1]:zero",
        """`norms` takes no slot
  norms.heads[1]:zero
        ^

hint: write `norms:mechanism`""",
    ),
    (
        "layer18.heads[0-4]:infini; layer18.kv_heads[1]:zero",
        """layer 18 head 3 is replaced twice: by `infini` and `zero`
  layer18.heads[0-4]:infini; layer18.kv_heads[1]:zero
                                     ^

hint: one replacement a head""",
    ),
    (
        "layer18:infini; layer18.heads[1]:zero",
        """layer 18 `attn` is already changed by `infini`, and heads are those of the model's own attention
  layer18:infini; layer18.heads[1]:zero
                          ^

hint: put what takes all heads behind what takes some, or into the other heads""",
    ),
    (
        "layer18.heads[1]:nope; layer18:infini",
        """layer 18 `attn` is replaced twice: by `nope` and `infini`
  layer18.heads[1]:nope; layer18:infini
                         ^

hint: one replacement per slot; wrappers such as `parallel` may come on top""",
    ),
    (
        "layer18.block:zero; layer18.heads[1]:zero",
        """layer 18 `attn` lies inside `block`: replaced by `zero` and `zero`
  layer18.block:zero; layer18.heads[1]:zero
                      ^

hint: one replacement per slot; wrappers such as `parallel` may come on top""",
    ),
    (
        "layer18.q_proj:zero; layer18.heads[1]:zero",
        """layer 18 `q_proj` lies inside `attn`: replaced by `zero` and `zero`
  layer18.q_proj:zero; layer18.heads[1]:zero
                       ^

hint: one replacement per slot; wrappers such as `parallel` may come on top""",
    ),
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[text for text, _ in ERRORS])
def test_error(text, message):
    with pytest.raises(SpecError) as caught:
        placed(text)
    assert str(caught.value) == message
