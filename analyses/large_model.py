"""Models that do not fit: does a run need the memory that it says, and what does offloading do?

    python analyses/large_model.py                        SmolLM2, and random Llamas of 0.5 and 1.5 billion parameters
    python analyses/large_model.py --sizes 0.5B           one of them; what others wrote stays
    python analyses/large_model.py --sizes tiny --cap 0.75 --output OUT    whether it runs, in a minute

A random model is written in bfloat16, in shards, into a temporary folder, and removed. Each row is a process of its own
with one thread: `load` reads the weights; `trace` compares one swapped layer with its teacher; `scan` tries a few
layers. Of the largest, a trace runs once under a cap of its address space for data (`RLIMIT_DATA`), with all blocks but
the first two on disk without the cap and under it, and of `resid_post` alone so and under it. Peak is the largest
resident memory; own is without pages of mapped files, which the system can take back, read every 20 ms from /proc where
there is one. CPU seconds are user and system. Up to 8 GB of memory and 4 GB of disk.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file

import mismatch

HERE = Path(__file__).resolve().parent.parent / "figures" / "large_model"
FIELDS = ("model", "parameters", "file_gb", "dtype", "run", "cap_gb", "outcome", "told_gb", "peak_gb", "own_gb",
          "told_over_peak", "peak_over_file", "cpu_seconds")  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "0.5B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 27,
             "num_attention_heads": 16, "num_key_value_heads": 4},
    "1.5B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 23,
             "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
CAPPED = ("tiny", "1.5B")
VOCABULARY = "smollm2"  # whose tokenizer the random models have
WORDS = 49152
SHARD = 5e8  # bytes of a file
TOLD = re.compile(r"memory +about ([\d.]+) GB")
LOAD = "import sys, mismatch; mismatch.load(sys.argv[1], dtype=sys.argv[2], device='cpu')"
IMPORTS = "import mismatch; mismatch.load"


class Done(NamedTuple):
    """A command that ended: peak and own memory in bytes, CPU seconds, exit code, what it said on stderr."""

    peak: int
    own: int
    seconds: float
    code: int
    said: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="smollm2,0.5B,1.5B", help="of smollm2, tiny, 0.5B, 1.5B")
    parser.add_argument("--swap", default="layer3:infini(segment=64)", help="what the trace swaps")
    parser.add_argument("--mechanism", default="sliding_window(64, 1)", help="what the scan tries")
    parser.add_argument("--among", default="1-3", help="the layers of the scan")
    parser.add_argument("--tokens", default="256", help="evaluation tokens")
    parser.add_argument("--seq-len", default="256", help="tokens per window")
    parser.add_argument("--cap", type=float, default=4.0, help="GB, for rows of 1.5B")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the table")
    args = parser.parse_args()
    sizes = args.sizes.split(",")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "table.csv"
    rows = [row for row in _known(path) if row["model"] not in sizes]
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, size)
            if size == "smollm2":
                folder = mismatch.fetch("smollm2")
            else:
                write_model(size, folder)
            rows += measured(size, folder, args, capped=size in CAPPED)
            for row in [row for row in rows if row["model"] == size]:
                print(
                    "  ".join(f"{key} {row[key]}" for key in FIELDS if row[key] != ""), flush=True
                )
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def write_model(size: str, folder: Path) -> None:
    """A Llama with random weights in bfloat16, shard by shard: no more than one of them is in memory."""
    config = transformers.LlamaConfig(
        **SIZES[size], vocab_size=WORDS, max_position_embeddings=2048, tie_word_embeddings=True,
        dtype="bfloat16", bos_token_id=1, eos_token_id=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    words = mismatch.fetch(VOCABULARY)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(words / name, folder)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    draws = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    names = [name for name in shapes if name != "lm_head.weight"]  # it is the embedding
    for name in names:
        new = torch.ones(shapes[name].shape, dtype=torch.bfloat16)
        shard[name] = new if new.ndim == 1 else new.normal_(std=0.02, generator=draws)
        if sum(one.nbytes for one in shard.values()) > SHARD or name == names[-1]:
            file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard = {}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def measured(
    size: str, folder: Path, args: argparse.Namespace, *, capped: bool
) -> list[dict[str, Any]]:
    """The rows of one model."""
    dtype = "float32" if size == "smollm2" else "bfloat16"
    on_file = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    layers = transformers.AutoConfig.from_pretrained(folder).num_hidden_layers
    about = {
        "model": size, "dtype": dtype, "file_gb": f"{on_file / 1e9:.2f}",
        "parameters": f"{on_file / (4 if dtype == 'float32' else 2) / 1e9:.2f}e9",
    }  # fmt: skip
    shared = ("--model", str(folder), "--dtype", dtype, "--device", "cpu", "--tokens", args.tokens,
              "--seq-len", args.seq_len)  # fmt: skip
    trace = ("trace", "--swap", args.swap, *shared)
    scan = ("scan", "--swap", args.mechanism, "--among", args.among, "--tasks", "text", *shared)
    offload = ("--device", "auto", "--device-map", json.dumps(_places(layers)))
    began = _run([sys.executable, "-c", IMPORTS])
    done = _run([sys.executable, "-c", LOAD, str(folder), dtype])
    over = f"{(done.peak - began.peak) / on_file:.2f}"
    found = [_row(about, "load", done) | {"peak_over_file": over}]
    runs: list[tuple[str, tuple[str, ...], float]] = [("trace", trace, 0), ("scan", scan, 0)]
    if capped:
        moved = (*trace, *offload)
        runs += [("trace", trace, args.cap)]
        runs += [("trace, offloaded", moved, cap) for cap in (0, args.cap)]
        one_site = (*moved, "--sites", "resid_post")
        runs += [("trace of the stream, offloaded", one_site, args.cap)]
    for name, words, cap in runs:
        with tempfile.TemporaryDirectory() as place:
            line = [sys.executable, "-m", "mismatch", *words, "--output", str(Path(place, "run"))]
            done = _run(line, cap)
        row: dict[str, Any] = _row(about, name, done) | {"cap_gb": cap or ""}
        if done.code != 0:
            error = re.search(r"error: (.*)", done.said)
            why = error[1][:60] if error else f"ended by {done.code}"
            row |= {"outcome": why, "peak_gb": "", "own_gb": ""}
        if (told := TOLD.search(done.said)) is not None:
            row["told_gb"] = told[1]
            row["told_over_peak"] = "" if done.code else f"{float(told[1]) * 1e9 / done.peak:.2f}"
        found.append(row)
    return found


def _row(about: dict[str, str], run: str, done: Done) -> dict[str, Any]:
    return dict.fromkeys(FIELDS, "") | about | {
        "run": run, "outcome": "done", "peak_gb": f"{done.peak / 1e9:.2f}",
        "own_gb": f"{done.own / 1e9:.2f}" if done.own else "", "cpu_seconds": f"{done.seconds:.0f}",
    }  # fmt: skip


def _places(layers: int) -> dict[str, str]:
    """All blocks but the first two on disk."""
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    blocks = {f"model.layers.{at}": "cpu" if at < 2 else "disk" for at in range(layers)}
    return {**dict.fromkeys(rest, "cpu"), **blocks}


def _run(line: list[str], cap: float = 0) -> Done:
    """A command with one thread."""

    def limited() -> None:
        if cap:
            resource.setrlimit(resource.RLIMIT_DATA, (int(cap * 1e9), int(cap * 1e9)))

    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=said, preexec_fn=limited,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        own = 0
        while True:
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            own = max(own, _own(process.pid))
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        words = said.read()
    unit = 1 if sys.platform == "darwin" else 1024
    return Done(
        used.ru_maxrss * unit, own, used.ru_utime + used.ru_stime, process.returncode, words
    )


def _own(pid: int) -> int:
    """Resident bytes that are no pages of a file; 0 where /proc does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _known(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


if __name__ == "__main__":
    main()
