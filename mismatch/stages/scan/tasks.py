"""What each cell of a scan is asked: ids, and which predictions on them are scored.

| task | ids | scored predictions | interval over |
|---|---|---|---|
| `text` | windows of held-out text | a seeded share of all | document, or block of windows |
| `induction` | random tokens, twice (`mismatch.probes.induction`) | the second copy | sequence |
| `passkey` | a key hidden in filler, asked for (`mismatch.probes.passkey`) | the key's digits | prompt |
| `needles` | sentences in held-out text, one asked for (`mismatch.probes.needles`) | the value's digits | prompt |
| `kv_lookup` | a list of pairs, one asked for (`mismatch.probes.kv_lookup`) | the value's digits | prompt |

All are one thing: a number per scored prediction, so one pass serves them. Text is read as KL, the others as what the
right token lost: on them it is known what the right token is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mismatch.errors import UsageError
from mismatch.metrics.sums.per_document import Units
from mismatch.probes.base import Setting
from mismatch.probes.inputs import Prompts, passkeys, plain_tokens, repeated
from mismatch.probes.retrieval_prompts import lookups, needles
from mismatch.runs.intervals import SAMPLES
from mismatch.stages.scan.config import TASKS, SweepConfig
from mismatch.texts.windows import Windows, prefix_ids
from mismatch.texts.wordings import EVALUATION

DIGITS = 5
"""Of a passkey, as in `mismatch.probes.passkey`."""


@dataclass(frozen=True)
class Task:
    """Sequences of one length.

    Attributes:
        name: one of `TASKS`.
        ids: int64 `rows pos`.
        asked: bool `rows pos`: the prediction made AT this position (of the next token) is scored.
        docs: int64 `rows`: the unit of each row; intervals are over them.
        reading: how the table calls the log-loss of the right tokens; "" for text.
        summed: it is summed over the predictions of a row (nats per key), not averaged (nats per token).
        chance: the log-loss of a model that knows nothing: all tokens alike, or all digits where only they can
            follow; None: text, of which that is not asked.
        units: what `docs` numbers.
    """

    name: str
    ids: np.ndarray
    asked: np.ndarray
    docs: np.ndarray
    reading: str = ""
    summed: bool = False
    chance: float | None = None
    units: str = SAMPLES

    @property
    def n_docs(self) -> int:
        return int(self.docs.max()) + 1

    @property
    def rows_of(self) -> np.ndarray:
        """Rows of each document."""
        return np.bincount(self.docs, minlength=self.n_docs)

    def batches(self, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """ids, asked and docs of at most so many tokens at a time, but of one row at least."""
        size = max(1, tokens // self.ids.shape[1])
        for start in range(0, len(self.ids), size):
            part = slice(start, start + size)
            yield self.ids[part], self.asked[part], self.docs[part]


def text_task(cut: Windows, share: float = 1.0, seed: int = 0) -> Task:
    """Held-out text.

    Args:
        cut: its windows.
        share: of the predictions that are scored; which ones depends on seed and window alone.
        seed: of the draw.
    """
    drawn = [
        torch.rand(cut.seq_len, generator=torch.Generator().manual_seed(1_000_003 * seed + number))
        for number in range(len(cut))
    ]
    asked = (torch.stack(drawn).numpy() < share) & cut.scored
    units = Units.by(cut.doc, cut.offset)
    return Task("text", cut.ids, asked, units.of, units=units.over)


def tasks(
    config: SweepConfig,
    names: tuple[str, ...] | None,
    cut: Windows | None,
    tokenizer: Any,
    model_config: Any,
) -> tuple[tuple[Task, ...], dict[str, str]]:
    """What is asked of every cell, and what this model cannot be asked with the reason.

    Args:
        config: the settings.
        names: of the tasks; None: all that the model can be asked.
        cut: held-out windows; None when text is not asked for.
        tokenizer: of the model.
        model_config: transformers' own.

    Raises:
        UsageError: a task that was named cannot be asked.
    """
    setting = _setting(config, cut, tokenizer, model_config)
    made: list[Task] = []
    left_out: dict[str, str] = {}
    for name in names or TASKS:
        try:
            made.append(_task(name, config, cut, setting))
        except UsageError as error:
            if names is not None or name == "text":
                raise
            left_out[name] = error.message
    return tuple(made), left_out


def _task(name: str, config: SweepConfig, cut: Windows | None, setting: Setting) -> Task:
    if name == "text":
        assert cut is not None  # text is cut where it is asked for
        return text_task(cut, config.scored, config.seed)
    if name == "induction":
        ids, start, half = repeated(setting, config.samples)
        asked = np.zeros(ids.shape, dtype=bool)
        # The first token of the second copy cannot be known; what stands last predicts nothing that is here.
        asked[:, start + half : -1] = True
        chance = math.log(len(setting.words))
        return Task("induction", ids, asked, np.arange(len(ids)), "nll_second", chance=chance)
    if config.length > (setting.context or config.length):
        what = "passkey prompt" if name == "passkey" else f"prompt of {name}"
        raise UsageError(
            f"a {what} of {config.length} tokens is longer than the context of "
            f"{setting.model}: {setting.context} tokens",
            hint="take a shorter --length, or leave the task out: --tasks text,induction",
        )
    if name != "passkey":
        return _looked_up(name, config, setting)
    # The keys of the probe of that name, which draws as many again for its floor.
    numbers = setting.draw("passkey").choice(
        9 * 10 ** (DIGITS - 1), 2 * config.samples, replace=False
    )
    keys = [str(10 ** (DIGITS - 1) + n) for n in numbers[: config.samples]]
    try:
        prompts = passkeys(setting, config.length, config.depth, keys, keys)
    except UsageError as error:
        hint = (error.hint or "").replace("--lengths", "--length").replace("probe", "task")
        raise UsageError(error.message, hint=hint or None) from error
    asked = _asked(prompts)
    chance = float(asked.sum() / len(asked)) * math.log(len(setting.words))
    return Task("passkey", prompts.ids, asked, np.arange(len(keys)), "logprob", True, chance)


def _looked_up(name: str, config: SweepConfig, setting: Setting) -> Task:
    """The prompts of the probes `needles` and `kv_lookup`, nats per answer token."""
    try:
        if name == "needles":
            prompts = needles(setting, EVALUATION, name, length=config.length, depth=config.depth)
        else:
            prompts = lookups(setting, EVALUATION, name, length=config.length)
    except UsageError as error:
        raise UsageError(
            error.message,
            hint="take another --length, or leave the task out: --tasks text,induction",
        ) from error
    # What knows nothing of the text still knows that a digit follows.
    return Task(
        name, prompts.ids, _asked(prompts), np.arange(len(prompts.ids)), "logprob",
        chance=math.log(10),
    )  # fmt: skip


def _asked(prompts: Prompts) -> np.ndarray:
    """Where the predictions of the scored tokens are made."""
    return np.roll(prompts.scored, -1, axis=1)


def _setting(
    config: SweepConfig, cut: Windows | None, tokenizer: Any, model_config: Any
) -> Setting:
    """What the probes' own inputs are made from."""
    return Setting(
        words=plain_tokens(model_config.vocab_size, tokenizer),
        text=np.zeros((0, config.seq_len), np.int64) if cut is None else cut.ids,
        docs=np.zeros(0, np.int64),
        tokenizer=tokenizer,
        opening=() if tokenizer is None else prefix_ids(tokenizer),
        bos=getattr(tokenizer, "bos_token_id", None),
        context=getattr(model_config, "max_position_embeddings", None),
        model=config.model,
        samples=config.samples,
        seed=config.seed,
    )
