"""The inputs of the probes, made before a model is there, and the rows of their answers.

What cannot be asked (a prompt longer than the context, a key that does not tokenise, too little text) is refused here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mismatch import registry
from mismatch.config import SwapConfig, fields
from mismatch.probes import PROBES, load_probe
from mismatch.probes.base import Probe, Setting, Subject, rows
from mismatch.probes.inputs import plain_tokens
from mismatch.runs.batch_size import BatchSize
from mismatch.stages.opening import Opened
from mismatch.stages.probe.config import ProbeConfig
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher
from mismatch.texts.windows import Windows, prefix_ids

LENGTH = 256
"""Tokens of the passkey prompts behind a trace, or the model's context."""
LIGHT = 4
"""Samples of the probes behind a trace: inputs that take seconds, not minutes."""


@dataclass(frozen=True)
class Questions:
    """What will be asked: what the probes share, the probes by name in the order in which they run, and how many
    sequences run together."""

    setting: Setting
    probes: dict[str, Probe]
    batch: BatchSize


def chosen(config: ProbeConfig) -> tuple[str, ...]:
    """The probes to run, in the order of the table; those of other packages behind them."""
    names = config.probes or registry.probes().names()
    order = list(PROBES)
    return tuple(sorted(names, key=lambda n: order.index(n) if n in order else len(order)))


def needs_text(config: ProbeConfig) -> bool:
    """Whether a probe among those chosen reads evaluation text, or hides something in it."""
    cards = (registry.probes().card(name) for name in chosen(config))
    return any({"text", "haystack"} & {*card.facts["needs"].split(", ")} for card in cards)


def questions(config: ProbeConfig, opened: Opened[Any], cut: Windows | None) -> Questions:
    """Make the inputs of every probe.

    Args:
        config: the settings of the probes.
        opened: of the command that asks: its tokenizer and the model's config.
        cut: windows of evaluation text; None when no probe needs any.

    Raises:
        MismatchError: what cannot be asked.
    """
    tokenizer, model_config = opened.tokenizer, opened.model_config
    setting = Setting(
        words=plain_tokens(model_config.vocab_size, tokenizer),
        text=np.zeros((0, config.seq_len), np.int64) if cut is None else cut.ids,
        docs=np.zeros(0, np.int64) if cut is None else cut.doc,
        offset=None if cut is None else cut.offset,
        tokenizer=tokenizer,
        opening=() if tokenizer is None else prefix_ids(tokenizer),
        bos=getattr(tokenizer, "bos_token_id", None),
        context=getattr(model_config, "max_position_embeddings", None),
        model=config.model,
        samples=config.samples,
        batch_size=config.batch_size,
        lengths=config.prompt_lengths,
        depths=config.prompt_depths,
        lookup_pairs=config.lookup_pairs,
        lookup_length=config.lookup_length,
        travel=None
        if config.planned_gate_lr is None
        else config.planned_gate_lr * config.planned_gate_steps / 2,
        seed=config.seed,
        ranks=opened.ranks,
    )
    made = {name: load_probe(name)(setting) for name in chosen(config)}
    own = config is opened.config
    return Questions(setting, made, opened.batch if own else opened.batch.beside(config.batch_size))


def light(config: Any, probes: Sequence[str], **settings: Any) -> ProbeConfig:
    """Settings of probes that another command asks beside its own work.

    Args:
        config: of that command.
        probes: to ask.
        settings: of the probes, in place of the usual ones.
    """
    shared = {name: getattr(config, name) for name in fields(SwapConfig)}
    usual = fields(ProbeConfig)["seq_len"].default
    shared |= {
        "output": None,
        "run_name": None,
        "seq_len": max(min(config.seq_len, usual), 32),
    }
    return ProbeConfig(**shared | settings, probes=tuple(probes))


def questions_behind(opened: Opened[Any]) -> Questions | None:
    """What a trace, or a look of a training, asks behind its own measurements (`probes`); None: nothing.

    Raises:
        MismatchError: what cannot be asked.
    """
    if not opened.config.probes:
        return None
    context = getattr(opened.model_config, "max_position_embeddings", None) or LENGTH
    lengths = (str(min(LENGTH, context)),)
    # batch_size: prompts are much shorter than the windows of a trace.
    own = light(opened.config, opened.config.probes, samples=LIGHT, lengths=lengths, batch_size=4)
    held_out = opened.texts["evaluation"].documents
    cut = (
        opened.cut("evaluation of probes", held_out, own.tokens, seq_len=own.seq_len)
        if needs_text(own)
        else None
    )
    return questions(own, opened, cut)


class Answers(NamedTuple):
    """What the probes found.

    Attributes:
        rows: of the table, without run id.
        seconds: that each probe took.
        warnings: sentences for the report.
    """

    rows: list[dict[str, Any]]
    seconds: dict[str, float]
    warnings: tuple[str, ...]


def answers(
    asked: Questions, teacher: Teacher, students: Sequence[Student], progress: bool = False
) -> Answers:
    """Run the probes. Several ranks share the work, and all of them get the answers."""
    subjects = [Subject.teacher(teacher.layout), *map(Subject.of, students)]
    swapped = {subject.name: subject.swapped for subject in subjects}
    ranks, probes = asked.setting.ranks, asked.probes
    # Together first: those that share their batches wait for each other.
    together = [name for name, probe in probes.items() if probe.by_batch]
    whole = [name for name in probes if name not in together]
    own = [name for at, name in enumerate(whole) if ranks.mine(at)]
    with tqdm(file=sys.stderr, disable=None if progress else True) as bar:

        def ask(names: Sequence[str], size: int) -> dict[str, Answers]:
            bar.reset(len(together) + len(own))
            bar.update(len(found))
            return {name: answer(name, size) for name in names}

        def answer(name: str, size: int) -> Answers:
            bar.set_description(name)
            begun = time.monotonic()
            probe = probes[name]
            probe.setting = replace(probe.setting, batch_size=size)
            units = asked.setting.units if probe.needs == "text" else None
            answered = rows(name, probe.run(subjects), swapped, units)
            bar.update()
            seconds = {name: round(time.monotonic() - begun, 1)}
            return Answers(answered, seconds, probe.warnings())

        found: dict[str, Answers] = {}
        for name in together:
            found |= asked.batch.run(partial(ask, [name]), f"in the probe {name}")
        found |= asked.batch.run(partial(ask, own), f"in the probes {', '.join(whole)}")
    for other in ranks.everywhere({name: found[name] for name in own}):
        found |= other
    return Answers(
        [row for name in probes for row in found[name].rows],
        {name: found[name].seconds[name] for name in probes},
        tuple(text for name in probes for text in found[name].warnings),
    )
