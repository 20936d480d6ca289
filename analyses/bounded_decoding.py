"""All attention layers with a bounded state: what does the cache hold while 16,384 tokens go through it?

    python analyses/bounded_decoding.py     10 minutes of CPU, one thread

SmolLM2, every layer replaced as in `bounded_state.py`, 96 slots in every kv head, keys and values in float32; the nets
are as they are built, for what they choose changes no size. Text of `wiki` goes in by 64 tokens, the last 512 one by
one. Counted is the memory of all tensors that the cache holds. Writes figures/bounded_state/all/decoded.csv.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import mismatch

SWAP = "kv_slots(segment=32, slots=96, rest=mean)"
FILE = Path(__file__).resolve().parent.parent / "figures" / "bounded_state" / "all" / "decoded.csv"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FILE, help="file of the result")
    args = parser.parse_args()
    frame = decoded(mismatch.load("smollm2"), 16_384, 512)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.output, index=False, float_format="%.4g")
    print(frame.to_string(index=False))


@torch.no_grad()
def decoded(teacher: Any, tokens: int, one_by_one: int) -> pd.DataFrame:
    """What the cache of an all-layers swap holds while so many tokens go through it, the last ones one by one."""
    student = mismatch.swap(teacher, f"all:{SWAP}")
    text = mismatch.windows(mismatch.read_documents("wiki"), teacher.tokenizer, 1024, tokens, 0)
    ids = torch.from_numpy(text.ids.reshape(1, -1)[:, :tokens])
    cache, at, lines = None, 0, []
    while at < tokens:
        step = 1 if at >= tokens - one_by_one else 64
        started = time.process_time()
        out = student.model(
            ids[:, at : at + step], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache, at = out.past_key_values, at + step
        lines.append(
            {
                "tokens": at,
                "bytes": held(cache),
                "cpu_ms_per_token": 1000 * (time.process_time() - started) / step,
            }
        )
    kept = pd.DataFrame(lines)
    return kept[(kept.tokens % 1024 == 0) | (kept.index >= len(kept) - 32)]


def held(cache: Any) -> int:
    """Bytes of all tensors in a cache."""
    seen: dict[int, int] = {}
    visited: set[int] = set()

    def walk(value: Any) -> None:
        if id(value) in visited:
            return
        visited.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                walk(inner)
        elif hasattr(value, "__dict__"):
            walk(vars(value))

    walk(cache)
    return sum(seen.values())


if __name__ == "__main__":
    main()
