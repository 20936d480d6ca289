"""Text for whole runs on the toy: made here, so that nothing is fetched but the model."""

from __future__ import annotations

import json
import random
from pathlib import Path

_TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank and of having nothing to do "
    "once or twice she had peeped into the book but it had no pictures or conversations in it said the Cat "
    "what is the use thought the Rabbit without going down a large hole under the hedge in the garden of the Queen"
)


def documents(count: int, words: int = 400, seed: int = 0) -> list[str]:
    """`count` different texts."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(_TEXT.split(), k=words)) + "." for _ in range(count)]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def command(
    folder: Path, model: Path, *more: str, swap: str = "layer2:infini(segment=16)"
) -> list[str]:
    """A `mismatch trace` of 12 windows in 6 batches, with its texts written into `folder`."""
    held_out = jsonl(folder / "held_out.jsonl", documents(6))
    calibration = jsonl(folder / "calibration.jsonl", documents(3, seed=1))
    return [
        *("trace", "--model", str(model), "--swap", swap, "--device", "cpu", "--quiet"),
        *(
            "--data",
            str(held_out),
            "--calibration-data",
            str(calibration),
            "--calibration-tokens",
            "256",
        ),
        *("--tokens", "768", "--seq-len", "64", "--batch-size", "2", *more),
    ]
