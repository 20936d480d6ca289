"""What does each mechanism cost beside the part it replaces: parameters, time, and what a running text carries?

    python analyses/mechanism_costs.py              about 5 minutes of CPU; timings want a quiet machine
    python analyses/mechanism_costs.py --no-time    counts only; the timings in the file stay

One layer of the shapes of SmolLM2-135M (d_model 576, 9 heads over 3 kv heads of 64, MLP 1536) with random weights,
float32, one text, default arguments. Counts do not depend on the weights, nor does time: CPU seconds of 1024 tokens on
one thread, mechanism and part in turn, the median of their ratios.

| column | what it is |
|---|---|
| `part` | what is replaced: the default slot |
| `new`, `dropped` | parameters that are new, and of the original that nothing uses any more |
| `forward`, `both` | time of the mechanism over that of the part: forward; forward and backward |
| `state_1024`, `state_2048` | bytes in the layer's cache entry after so many tokens, without the counts of tokens |
| `state_most` | the largest of these two and the bytes after 2047 tokens, when an open segment is nearly full |
| `families` | which can have it, by building it on the meta device |

Writes figures/mechanism_table/costs.csv, and mismatch/mechanisms/state_bytes.csv, which `mismatch explain` reads.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, logging
from transformers.cache_utils import CacheLayerMixin

from mismatch.errors import MismatchError
from mismatch.forward.calibrate import calibrate
from mismatch.models.families import FAMILIES
from mismatch.models.layout import Layout
from mismatch.registry import mechanisms
from mismatch.spec import parse, resolve
from mismatch.surgery.operate import Student, calibrators, operate

TOKENS = 1024
ROOT = Path(__file__).resolve().parent.parent
COSTS = ROOT / "figures" / "mechanism_table" / "costs.csv"
STATE = ROOT / "mismatch" / "mechanisms" / "state_bytes.csv"
GIVEN = {
    "gqa": "gqa(groups=1)",
    "mla": "mla(rank=128)",
    "parallel": "parallel(infini)",
    "partial_rope": "partial_rope(fraction=0.5)",
    "yarn": "yarn(factor=4)",
}
"""What cannot go without an argument."""
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 256, "max_position_embeddings": 8192, "rope_theta": 100000.0,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
MODEL_TYPE = {"gemma3": "gemma3_text"}
ATTENTION = {"gemma2": "eager"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="of timing, after one that does not count"
    )
    parser.add_argument("--only", nargs="*", help="these mechanisms; the others stay as they are")
    parser.add_argument("--no-time", action="store_true", help="counts only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows = {row["mechanism"]: row for row in read(COSTS)} if COSTS.exists() else {}
    for name in args.only or mechanisms().names():
        row = counts(name) | {"families": " ".join(families(name))}
        if args.no_time:
            row |= {key: rows[name][key] for key in ("forward", "both")}
        else:
            row |= times(name, args.rounds)
        rows[name] = row
        print(row, flush=True)
        # What is done is kept, should the rest be stopped.
        known = [rows[name] for name in mechanisms().names() if name in rows]
        write(COSTS, known)
        states = ("mechanism", "swap", "state_1024", "state_2048", "state_most")
        write(STATE, [{key: row[key] for key in states} for row in known])


def counts(name: str) -> dict[str, Any]:
    """Parameters and bytes of state."""
    student = operated(model("llama", SMOLLM2), text(name))
    replaced = student.plan.clauses[0]
    first, before, second = state_bytes(student)
    return {
        "mechanism": name, "swap": GIVEN.get(name, name), "part": replaced.slot,
        "new": sum(replaced.new_parameters.values()), "dropped": sum(replaced.dropped.values()),
        "state_1024": first, "state_2048": second, "state_most": max(first, before, second),
    }  # fmt: skip


@torch.no_grad()
def state_bytes(student: Student) -> tuple[int, int, int]:
    """Bytes in the cache entry after 1024, 2047 and 2048 tokens of one text.

    A part outside of attention keeps what the attention beside it keeps, which is none of its own: 0.
    """
    if student.plan.clauses[0].slot not in ("attn", "rope", "block"):
        return 0, 0, 0
    cache, found = DynamicCache(config=student.model.config), []
    for more in (TOKENS, TOKENS - 1, 1):
        student.model(ids(more), past_key_values=cache, use_cache=True)
        # The memory behind a tensor: a view of something larger would keep all of it.
        found.append(sum(t.untyped_storage().nbytes() for t in tensors(cache.layers[0])))
    return found[0], found[1], found[2]


def tensors(entry: Any) -> Iterator[Tensor]:
    """Every tensor that a cache entry holds, also inside the entries of a pair; counts of tokens left out."""
    for key, value in vars(entry).items():
        if isinstance(value, Tensor) and key != "seen":
            yield value
        elif isinstance(value, dict):
            yield from (t for t in value.values() if isinstance(t, Tensor))
        elif isinstance(value, list):
            yield from chain.from_iterable(
                tensors(one) for one in value if isinstance(one, CacheLayerMixin)
            )
        elif isinstance(value, CacheLayerMixin):
            yield from tensors(value)


def times(name: str, rounds: int) -> dict[str, float]:
    """CPU time over that of the part it replaces, forward alone and with the backward pass."""
    base = model("llama", SMOLLM2)
    student = operated(base, text(name))
    path = student.plan.clauses[0].path
    given: dict[str, Any] = {}

    def keep(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        given.update(args=args, kwargs=kwargs)

    handle = base.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        base(ids(TOKENS), use_cache=False)
    handle.remove()
    parts = (student.model.get_submodule(path), base.get_submodule(path))
    found: dict[str, list[float]] = {"forward": [], "both": []}
    for index in range(rounds + 1):
        for key, run in (("forward", forward), ("both", both)):
            new, old = (seconds(lambda: run(part, **given)) for part in parts)  # noqa: B023
            if index:
                found[key].append(new / old)
    return {key: round(statistics.median(ratios), 2) for key, ratios in found.items()}


def seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.no_grad()
def forward(part: nn.Module, args: tuple, kwargs: dict) -> None:
    part(*args, **kwargs)


def both(part: nn.Module, args: tuple, kwargs: dict) -> None:
    """Gradients to the input and to every weight of the part."""
    args = tuple(a.detach().requires_grad_() for a in args)
    if "hidden_states" in kwargs:
        kwargs = kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}
    out = part(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    if out.requires_grad:  # a constant has no way back
        out.sum().backward()


def families(name: str) -> list[str]:
    """The families in which it can be built, in some layer, without weights."""
    found = []
    for family in FAMILIES:
        with torch.device("meta"):
            empty = model(family.name, TINY)
        for layer in range(TINY["num_hidden_layers"]):
            try:
                operated(empty, text(name, layer))
            except MismatchError:
                continue
            found.append(family.name)
            break
    return found


def text(name: str, layer: int = 0) -> str:
    return f"layer{layer}:{GIVEN.get(name, name)}"


def model(family: str, shapes: dict[str, Any]) -> nn.Module:
    """Random weights, float32, in eval mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(MODEL_TYPE.get(family, family), **shapes)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=ATTENTION.get(family, "sdpa")
    ).eval()


def operated(base: Any, swap: str) -> Student:
    """The student; what wants calibration gets random tokens, whatever they are."""
    layout = Layout.of(base)
    family = layout.family
    parsed = parse(swap)
    places = resolve(parsed, layout.n_layers, family.slot_names(), family.name, family.lacks)
    meta = next(base.parameters()).device.type == "meta"
    wanted = {} if meta else calibrators(places)
    if wanted:
        calibrate(layout, wanted, [ids(TOKENS, seed=9)])
    return operate(layout, places, spec=str(parsed), calibrations=wanted)


def ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 250, (1, length), generator=torch.Generator().manual_seed(seed))


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
