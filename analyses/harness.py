"""What does lm-evaluation-harness read from a checkpoint, beside the model that it was made of?

    python analyses/harness.py RUN/checkpoint                      beside smollm2; about 20 minutes of CPU
    python analyses/harness.py RUN/checkpoint --tasks passkey      one task

Plain transformers loads both, as `lm_eval --model hf --model_args pretrained=...,trust_remote_code=True` does. Three
tasks that need no hub, each in the form of a known one:

| task | form of | what |
|---|---|---|
| `perplexity` | WikiText: rolling log-likelihood | word perplexity of 16 articles of `wiki`, 300 words each |
| `last_word` | LAMBADA: greedy accuracy, perplexity | the word behind 100 passages of `wiki`; it came before |
| `passkey` | Landmark attention: generated, exact match | a key of five digits in 300 words that repeat, 32 prompts |

No prompt is one of the probes of `mismatch`. It needs a package that `make` does not install:
`.venv/bin/python -m pip install -c constraints.txt lm-eval`. Writes figures/harness/table.csv.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mismatch.texts.demo.fetch import fetch

HERE = Path(__file__).resolve().parent.parent / "figures" / "harness"
SIZES = {"perplexity": (16, 300), "last_word": (100, 200), "passkey": (32, 300)}
"""Of each task, how many documents, and how many words has each."""
FILLER = ("The river runs.", "The bread is warm.", "A cat sleeps.", "We come home by night.")
FORMS: dict[str, dict[str, Any]] = {
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": " {{word}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "passkey": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{word}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "exact_match", "ignore_punctuation": True}],
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a folder that mismatch saved")
    parser.add_argument("--base", type=Path, help="the model it was made of; by default smollm2")
    parser.add_argument("--tasks", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--limit", type=int, help="documents of a task: a look, not a claim")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the result")
    args = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("needs lm-eval: .venv/bin/python -m pip install -c constraints.txt lm-eval")
    lines = []
    for name, folder in (("original", args.base or fetch("smollm2")), ("swap", args.checkpoint)):
        for task in args.tasks:
            began = time.process_time()
            found = evaluated(folder, task, args.limit)
            seconds = time.process_time() - began
            lines += [
                {"model": name, "task": task, **line, "cpu_seconds": seconds} for line in found
            ]
            print(json.dumps(lines[-len(found) :]), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(lines)
    frame.to_csv(args.output / "table.csv", index=False)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


def evaluated(folder: Path, task: str, limit: int | None) -> list[dict[str, Any]]:
    """One line a metric: its name, value and standard error as the harness gives them, and documents."""
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(
        pretrained=str(folder),
        trust_remote_code=True,
        device="cpu",
        dtype=torch.float32,
        batch_size=1,
    )
    rows = list(DOCUMENTS[task](*SIZES[task]))
    config = {
        "task": task,
        "test_split": "test",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "metadata": {"version": 1},
        **FORMS[task],
    }
    found = lm_eval.simple_evaluate(
        model, tasks=[config], task_manager=TaskManager(), limit=limit, log_samples=False
    )["results"][task]
    return [
        {
            "metric": metric.partition(",")[0],
            "value": value,
            "standard_error": error if isinstance(error, float) else None,
            "documents": min(len(rows), limit or len(rows)),
        }
        for metric, value in found.items()
        if isinstance(value, float) and "_stderr" not in metric
        for error in [found.get(metric.replace(",", "_stderr,"))]
    ]


def articles(number: int, words: int) -> Iterator[dict[str, str]]:
    """The first words of articles that have as many."""
    for found in islice(_long(words), number):
        yield {"text": " ".join(found[:words])}


def passages(number: int, words: int) -> Iterator[dict[str, str]]:
    """Text, and the word that follows it: one of six letters or more that came before, far from the end."""
    for found in _long(words):
        each = start = 0  # four of an article at most
        while number and each < 4 and start + words < len(found):
            passage, word = found[start : start + words], found[start + words]
            if len(word) > 5 and word.isalpha() and word in passage[: words // 2]:
                yield {"text": " ".join(passage), "word": word}
                each, number, start = each + 1, number - 1, start + words
            start += 1


def keys(number: int, words: int) -> Iterator[dict[str, str]]:
    """Prompts with a key of five digits, at any depth."""
    draw = random.Random(5)
    for _ in range(number):
        key = str(draw.randrange(10_000, 100_000))
        lines = [line for line, _ in zip(cycle(FILLER), range(words * 4 // 15), strict=False)]
        lines.insert(draw.randrange(len(lines)), f"The secret number is {key}. Remember {key}.")
        question = "What is the secret number? The secret number is"
        yield {
            "text": f"A secret number is hidden in this text. {' '.join(lines)} {question}",
            "word": f" {key}",
        }


def _long(words: int) -> Iterator[list[str]]:
    """The words of each article of `wiki` that has more."""
    for path in sorted(fetch("wiki").glob("*.txt")):
        found = path.read_text(encoding="utf-8").split()
        if len(found) > words:
            yield found


DOCUMENTS = {"perplexity": articles, "last_word": passages, "passkey": keys}

if __name__ == "__main__":
    main()
