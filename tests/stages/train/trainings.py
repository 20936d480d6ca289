"""Small trainings of the toy: their settings, in Python and as a command, and accelerate's FSDP2 without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wonderland import documents, jsonl

SWAP = "layer2:infini(segment=16)"
SETTINGS: dict[str, Any] = {
    "data": documents(12),
    "train_data": documents(8, seed=1),
    "tokens": 256,
    "val_tokens": 128,
    "train_tokens": 512,
    "seq_len": 64,
    "batch_size": 2,
    "eval_every": 4,
    "controls": (),
}
STEPS = ["max_steps=8", "learning_rate=1e-3", "logging_steps=4"]


def words(folder: Path, model: Path, *more: str) -> list[str]:
    """The same as a command, with its texts written into `folder`."""
    held_out = jsonl(folder / "held_out.jsonl", SETTINGS["data"])
    train = jsonl(folder / "train.jsonl", SETTINGS["train_data"])
    return [
        *("train", "--model", str(model), "--swap", SWAP, "--device", "cpu", "--quiet"),
        *("--data", str(held_out), "--train-data", str(train), "--controls", "none"),
        *("--tokens", "256", "--val-tokens", "128", "--train-tokens", "512", "--seq-len", "64"),
        *("--eval-every", "4", *(word for step in STEPS for word in ("--trainer", step)), *more),
    ]


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What `accelerate launch` makes of its config file."""

ON_CPU = """
import accelerate.state
from accelerate.utils import DistributedType
real = accelerate.state.AcceleratorState.__init__
def sharded(self, *args, fsdp_plugin=None, **options):
    real(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
accelerate.state.AcceleratorState.__init__ = sharded
import transformers
train = transformers.Trainer.train
def told(self, *args, **options):
    done = train(self, *args, **options)
    print("sharded:", type(self.model).__name__)
    return done
transformers.Trainer.train = told
"""
"""accelerate shards only between accelerators; torch does it on CPUs too. It says what class the model had."""
