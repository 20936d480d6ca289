"""The swap grammar: each error on its full text."""

from __future__ import annotations

import pytest
from placing import LLAMA, placed

from mismatch.errors import SpecError
from mismatch.spec import check, parse, resolve

ERRORS = [
    ("", "the swap is empty\n\nhint: write `target:mechanism`, such as `layer12:infini`"),
    (
        "layer12",
        """expected `:` and a mechanism after `layer12`, got the end
  layer12
         ^

hint: write `target:mechanism`, such as `layer12:infini`""",
    ),
    (
        "layer12:",
        """expected the name of a mechanism, got the end
  layer12:
          ^

hint: `mismatch list mechanisms` shows them""",
    ),
    (
        "layer12:zero;; layer3:zero",
        """a clause is empty
  layer12:zero;; layer3:zero
              ^

hint: write `target:mechanism`, such as `layer12:infini`""".replace("  ^", "   ^"),
    ),
    (
        "lyaer12:zero",
        """unknown target `lyaer12`
  lyaer12:zero
  ^

hint: did you mean `layer`? available: all, final_norm, layer, layers, norms""",
    ),
    (
        "12:zero",
        """unknown target `12`
  12:zero
  ^

hint: write a target, such as `layer12`""",
    ),
    (
        "layer-1:zero",
        """expected a layer number or `last`, got `-1`
  layer-1:zero
       ^

hint: layers count from 0; the last one is `last`, `-` makes a range""",
    ),
    (
        "layers[x]:zero",
        """expected a layer number or `last`, got `x`
  layers[x]:zero
         ^

hint: layers count from 0, as in `layer12`""",
    ),
    (
        "layer1:zero; layers15-8:zero",
        """empty range `15-8`
  layer1:zero; layers15-8:zero
                     ^

hint: did you mean `8-15`?""",
    ),
    (
        "layerslast-3:zero",
        """empty range `last-3`
  layerslast-3:zero
        ^

hint: did you mean `3-last`?""",
    ),
    (
        "layers0-8/0:zero",
        """the step of `0-8/0` must be at least 1
  layers0-8/0:zero
        ^""",
    ),
    (
        "layers[1,2:zero",
        """`[` is never closed
  layers[1,2:zero
        ^

hint: close it with `]`""",
    ),
    (
        "layers[1 2]:zero",
        """expected `,` or `]`, got `2`
  layers[1 2]:zero
           ^""",
    ),
    (
        "layer1.atn:zero",
        """unknown slot `atn`
  layer1.atn:zero
         ^

hint: did you mean `attn`? available: attn, block, down_proj, gate_proj, heads, k_proj, kv_heads, mlp, \
norm1, norm1_post, norm2, norm2_post, norms, o_proj, q_proj, rope, up_proj, v_proj""",
    ),
    (
        "norms.attn:dyt",
        """`norms` takes no slot
  norms.attn:dyt
        ^

hint: write `norms:mechanism`""",
    ),
    (
        "all.final_norm:dyt",
        """`final_norm` belongs to no layer
  all.final_norm:dyt
      ^

hint: write `final_norm:mechanism`""",
    ),
    (
        "layer1:zero layer2:zero",
        """expected `;` or the end, got `layer2`
  layer1:zero layer2:zero
              ^""",
    ),
    (
        "layer1:infini(segment=64",
        """`(` is never closed
  layer1:infini(segment=64
               ^

hint: close it with `)`""",
    ),
    (
        "layer1:infini(",
        """`(` is never closed
  layer1:infini(
               ^

hint: close it with `)`""",
    ),
    (
        "layer1:infini(segment=64 update=delta)",
        """expected `,` or `)`, got `update`
  layer1:infini(segment=64 update=delta)
                           ^""",
    ),
    (
        "layer1:infini(segment=)",
        """`segment` needs a value, got `)`
  layer1:infini(segment=)
                        ^

hint: quote other text: `segment="a b"`""",
    ),
    (
        'layer1:infini(note="abc)',
        """the quotes are never closed
  layer1:infini(note="abc)
                     ^""",
    ),
    (
        "layer1:infini(segment=64, 2)",
        """expected `name=value`, got `2`
  layer1:infini(segment=64, 2)
                            ^

hint: `mismatch explain infini` shows the names""",
    ),
    (
        "layer1:infini(64x)",
        """expected `name=value`, got `64x`
  layer1:infini(64x)
                ^

hint: `mismatch explain infini` shows the names""",
    ),
    (
        "layer1:infini(segment=64, delta)",
        """expected `name=value`, got `delta`
  layer1:infini(segment=64, delta)
                            ^

hint: a mechanism comes first""",
    ),
    (
        "layer1:infini(segment=1, segment=2)",
        """`infini` got `segment` twice
  layer1:infini(segment=1, segment=2)
                           ^""",
    ),
    # From here on the mechanisms' cards are asked.
    (
        "layer12:infni",
        """unknown mechanism `infni`
  layer12:infni
          ^

hint: did you mean `infini`? available: dyt, infini, nope, parallel, zero""",
    ),
    (
        "layer12:parallel(infni)",
        """unknown mechanism `infni`
  layer12:parallel(infni)
                   ^

hint: did you mean `infini`? available: dyt, infini, nope, parallel, zero""",
    ),
    (
        "layer12.attn:no_such.module:X",
        """the mechanism `no_such.module:X` cannot be used: there is no module `no_such.module`
  layer12.attn:no_such.module:X
               ^

hint: Python must be able to import it: install its package, or put its folder on PYTHONPATH""",
    ),
    (
        "layer1:infini(segmnt=64)",
        """`infini` has no argument `segmnt`
  layer1:infini(segmnt=64)
                ^

hint: did you mean `segment`? available: exact, gate_init, note, segment, update""",
    ),
    (
        "layer1:zero(a=1)",
        """`zero` has no argument `a`
  layer1:zero(a=1)
              ^

hint: `zero` takes no arguments""",
    ),
    (
        "layer1:infini(delta)",
        """`infini` takes named arguments only, got `delta`
  layer1:infini(delta)
                ^

hint: arguments: segment, update, gate_init, note, exact""",
    ),
    (
        "layer1:infini(segment=256.5)",
        """`segment` must be int >= 1, got 256.5
  layer1:infini(segment=256.5)
                        ^""",
    ),
    (
        "layer1:infini(segment=0)",
        """`segment` must be int >= 1, got 0
  layer1:infini(segment=0)
                        ^""",
    ),
    (
        "layer1:infini(segment=true)",
        """`segment` must be int >= 1, got true
  layer1:infini(segment=true)
                        ^""",
    ),
    (
        "layer1:infini(update=dleta)",
        """`update` must be one of linear, delta, got `dleta`
  layer1:infini(update=dleta)
                       ^

hint: did you mean `delta`? available: delta, linear""",
    ),
    (
        "layer1:infini(note=zero(x=1))",
        """`note` must be str or none, got `zero(x=1)`
  layer1:infini(note=zero(x=1))
                     ^""",
    ),
    (
        "layer1:parallel(alpha=0)",
        """`parallel` needs `inner`: a mechanism
  layer1:parallel(alpha=0)
         ^

hint: write `parallel(infini)`""",
    ),
    (
        "layer1:parallel(infini, inner=zero)",
        """`parallel` got `inner` twice
  layer1:parallel(infini, inner=zero)
                          ^""",
    ),
    (
        "layer1.mlp:infini",
        """`infini` cannot go into the slot `mlp`
  layer1.mlp:infini
         ^

hint: slots of `infini`: attn""",
    ),
    (
        "norms:infini",
        """`infini` cannot go into the slot `norms`
  norms:infini
  ^

hint: slots of `infini`: attn""",
    ),
    (
        "layer1:cards_of_test:Open(rate=1)",
        """`cards_of_test:Open` declares no slot
  layer1:cards_of_test:Open(rate=1)
         ^

hint: name one, as in `layer1.attn:cards_of_test:Open(rate=1)`""",
    ),
    # From here on the model is asked.
    (
        "layer40:infini",
        """layer 40 does not exist: the model has 30 layers (0-29)
  layer40:infini
       ^""",
    ),
    (
        "layers[3,28-30]:infini",
        """layer 30 does not exist: the model has 30 layers (0-29)
  layers[3,28-30]:infini
           ^""",
    ),
    (
        "layers[1-3,2]:infini",
        """layer 2 is named twice in `layers[1-3,2]`
  layers[1-3,2]:infini
             ^""",
    ),
    (
        "layer12:infini; layers10-14:zero",
        """layer 12 `attn` is replaced twice: by `infini` and `zero`
  layer12:infini; layers10-14:zero
                  ^

hint: one replacement per slot; wrappers such as `parallel` may come on top""",
    ),
    (
        "norms:dyt; final_norm:zero",
        """`final_norm` is replaced twice: by `dyt` and `zero`
  norms:dyt; final_norm:zero
             ^

hint: one replacement per slot; wrappers such as `parallel` may come on top""",
    ),
    (
        "layer1.q_proj:zero; layer1:infini",
        """layer 1 `q_proj` lies inside `attn`: replaced by `zero` and `infini`
  layer1.q_proj:zero; layer1:infini
                      ^

hint: one replacement per slot; wrappers such as `parallel` may come on top""",
    ),
    (
        "layer1.block:zero; layer1:infini",
        """layer 1 `attn` lies inside `block`: replaced by `zero` and `infini`
  layer1.block:zero; layer1:infini
                     ^

hint: one replacement per slot; wrappers such as `parallel` may come on top""",
    ),
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[text or "empty" for text, _ in ERRORS])
def test_error(text, message):
    with pytest.raises(SpecError) as caught:
        resolve(parse(text), 30, LLAMA, "llama")
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_a_slot_that_the_family_lacks():
    slots = ("norm1", "attn", "norm2", "mlp", "block", "final_norm")
    with pytest.raises(SpecError) as caught:
        placed("layer3:nope", 12, slots, "gpt2", lacks={"rope": "learned positions"})
    assert str(caught.value) == (
        "gpt2 has no slot `rope` (learned positions)\n"
        "  layer3:nope\n"
        "         ^\n\n"
        "hint: slots of gpt2: norm1, attn, norm2, mlp, block, final_norm"
    )
    with pytest.raises(SpecError, match=r"^gpt2 has no slot `q_proj`\n"):
        placed("layer3.q_proj:zero", 12, slots, "gpt2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer" + "9" * 5000 + ":zero", "a number of 5000 digits is too large"),
        ("layer0-9/" + "9" * 5000 + ":zero", "a number of 5000 digits is too large"),
        ("layer1:infini(segment=" + "9" * 5000 + ")", "a number of 5000 digits is too large"),
        ("layer1:infini(segment=1e30)", "`segment` must be int >= 1, got 1e+30"),
        ("layer1:parallel(infini, alpha=1e999)", "`alpha` must be float, finite and below 2^63, got inf"),
        ("layer1:" + "parallel(" * 300 + "infini" + ")" * 300, "more than 16 mechanisms inside one another"),
        ("layer1:zero;" * 100_000, "the swap has 1,199,999 characters, more than 50,000"),
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_a_text_that_is_too_much(text, message):
    with pytest.raises(SpecError) as caught:
        check(parse(text))
    assert str(caught.value).splitlines()[0] == message
