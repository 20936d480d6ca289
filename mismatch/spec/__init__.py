"""The swap grammar: text in, clauses and placements out. No torch.

    spec      = clause (";" clause)*                       --swap may also be repeated
    clause    = target ["." slot] ["." heads] ":" mechanism
    target    = ("layer" | "layers") ranges | "all" | "norms" | "final_norm"
    heads     = ("heads" | "kv_heads") ranges              of a layer's attention; a kv head is its group of query heads
    ranges    = range ("," range)*  or the same in "[ ]"   brackets are optional: some shells expand them
    range     = i | i "-" i ["/" step]     i = number | "last"       0-based, both ends included
    mechanism = name ["(" argument ("," argument)* ")"]
    name      = a registered name, or "package.module:Class"
    argument  = key "=" value. Before those, a mechanism and numbers need no key: parallel(infini(segment=64), alpha=0),
                sliding_window(64, 1)
    value     = number | true | false | none | word | "quoted" | "[" word ("," word)* "]" | mechanism with "( )"

| text | meaning |
|---|---|
| `layer12:infini` | the slot is the mechanism's own (`attn`) |
| `layers[8-15].attn:sliding_window(window=256, sinks=4)` | 8 layers |
| `layers0-last/2:infini; layer3.mlp:zero` | every second layer, and one MLP |
| `norms:dyt` | `norm1` and `norm2` of all layers, and `final_norm` |
| `layers[4-7].norms:dyt` | all norms of four layers |
| `layer18.heads[0-5,8]:infini` | seven query heads; the others keep the attention |
| `layer18.kv_heads[2]:zero; layer18.heads[0]:nope` | the query heads of kv head 2, and another head |
| `layer12:parallel(infini, alpha=0)` | attention stays, and infini is added to it |

`parse` knows the grammar only. `check` also knows the mechanisms, by their cards. `resolve` also knows the
model: how many layers and heads, which slots. A clause that fits only in part is an error, never a smaller swap.
`format(parse(text))` is canonical, and names the run.
"""

from mismatch.spec.clauses import Call, Clause, Range, Spec, Target, Value
from mismatch.spec.grammar import parse
from mismatch.spec.heads import Heads
from mismatch.spec.lists import Template, layers, parse_layers, templates
from mismatch.spec.placement import Placement, check, explicit, format, resolve

__all__ = [
    "Call",
    "Clause",
    "Heads",
    "Placement",
    "Range",
    "Spec",
    "Target",
    "Template",
    "Value",
    "check",
    "explicit",
    "format",
    "layers",
    "parse",
    "parse_layers",
    "resolve",
    "templates",
]
