"""What do a trace, a scan and a repair cost on a GPU, beside plain forwards?

    python analyses/benchmark_gpu.py             a Llama-shaped 8B of random weights, bfloat16: minutes, and 40 GB
    python analyses/benchmark_gpu.py --small     a tiny one, on whatever device there is: whether it runs

The model is made on the device, and its text is random ids of the toy's tokenizer, in documents of one window: what is
measured is time and memory, and nothing of what the model says. Each line is a process of its own, its second run.

| line | what |
|---|---|
| `forwards` | the model over the text, final states alone, nothing measured |
| `trace` | `mismatch.trace` of one attention layer by Infini-attention, in the middle, with no control |
| `trace, 1M tokens` | the same over a million tokens: memory must not grow |
| `scan` | `mismatch.scan` of every layer, a third of the predictions scored |
| `local` | `mismatch.repair`, stage `local`: sampling none, the teacher's pass and all steps included |

Tokens a second are of the text once; of a scan too, which runs every layer over it. Writes figures/benchmark_gpu/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mismatch
from mismatch.runs.environment import peak_memory

HERE = Path(__file__).resolve().parent.parent / "figures" / "benchmark_gpu"
WINDOW = 2048
EIGHT = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 8192,
}  # fmt: skip
TOKENS = {
    "forwards": 131_072,
    "trace": 131_072,
    "trace, 1M tokens": 1_048_576,
    "scan": 32_768,
    "local": 65_536,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="a tiny model and an eighth of a window"
    )
    parser.add_argument("--only", choices=TOKENS, nargs="*", help="these lines")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of a forward")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the result")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        (name,) = args.only
        print(json.dumps(measured(name, args)))
        return
    if not args.small and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --small runs anywhere, and measures nothing")
    lines = []
    for name in args.only or TOKENS:
        words = ["--here", "--only", name, "--batch-size", str(args.batch_size)]
        words += ["--small"] * args.small
        done = subprocess.run(
            [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
        )
        lines.append(json.loads(done.stdout.splitlines()[-1]))
        print(lines[-1], flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(lines).to_csv(args.output / "table.csv", index=False)


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and peak memory of one line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    window = WINDOW // 8 if args.small else WINDOW
    tokens = 4 * window if args.small else TOKENS[name]
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(**(SMALL if args.small else EIGHT), dtype=torch.bfloat16)
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    weights = peak_memory()
    teacher = mismatch.load((model, mismatch.load("glassllm", device="cpu").tokenizer))
    run = LINES[name]
    run(teacher, window, args.batch_size, window * args.batch_size)  # does not count
    began = time.perf_counter()
    run(teacher, window, args.batch_size, tokens)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "line": name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "weights_GB": weights / 1e9,
        "peak_GB": peak_memory() / 1e9,
    }


def documents(teacher: Any, window: int, tokens: int, seed: int) -> list[list[int]]:
    """Random token ids, a window each."""
    draw = np.random.default_rng(seed)
    vocab = len(teacher.tokenizer)
    return draw.integers(3, vocab, (tokens // window, window)).tolist()


@torch.no_grad()
def forwards(teacher: Any, window: int, batch: int, tokens: int) -> None:
    ids = torch.tensor(documents(teacher, window, tokens, 0))
    for part in ids.split(batch):
        teacher.model.model(part.to(teacher.model.device), use_cache=False)


def measuring(teacher: Any, window: int, batch: int, tokens: int) -> dict[str, Any]:
    """Settings of a trace and of a scan: text, batches, no control."""
    return {
        "data": documents(teacher, window, tokens, 0),
        "calibration_data": documents(teacher, window, window, 2),
        "calibration_tokens": window,
        "tokens": tokens,
        "seq_len": window,
        "batch_size": batch,
        "controls": (),
    }


def trace(teacher: Any, window: int, batch: int, tokens: int) -> None:
    layer = teacher.model.config.num_hidden_layers // 2
    swap = f"layer{layer}:infini(segment=64)"
    mismatch.trace(teacher, swap=swap, **measuring(teacher, window, batch, tokens))


def scan(teacher: Any, window: int, batch: int, tokens: int) -> None:
    same = measuring(teacher, window, batch, tokens)
    mismatch.scan(teacher, "infini(segment=64)", tasks=("text",), **same)


def local(teacher: Any, window: int, batch: int, tokens: int) -> None:
    layer = teacher.model.config.num_hidden_layers // 2
    held_out = documents(teacher, window, 4 * window, 1)
    mismatch.repair(
        teacher,
        f"layer{layer}:infini(segment=64)",
        stages=("local",),
        train_data=documents(teacher, window, tokens, 0),
        train_tokens=tokens,
        data=held_out,
        tokens=2 * window,
        val_tokens=window,
        seq_len=window,
        batch_size=batch,
        epochs=1,
        max_minutes=None,
        self_generated=0.0,
        retrieval_text=0.0,
        controls=(),
        probes=(),
        trace_tokens=0,
    )


LINES: dict[str, Callable[..., None]] = {
    "forwards": forwards,
    "trace": trace,
    "trace, 1M tokens": trace,
    "scan": scan,
    "local": local,
}

if __name__ == "__main__":
    main()
