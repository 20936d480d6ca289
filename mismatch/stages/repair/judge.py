"""What the ladder is judged on after each stage: text, and a few prompts in which something must be retrieved.

Text alone keeps stages that lose retrieval, for it hardly asks for what stands far back. So next to the evaluation
text stand needles and look-ups in the wordings of `SELECTION` (`mismatch.texts.wordings`), hidden in validation text.
They decide what is kept, so they are not what is reported: the probes before and after have other wordings, names and
text. Only prompts that the teacher itself answers (at most `ANSWERED` nats a token; guessing a digit costs 2.3) are
asked, and with fewer than `LEAST` of them retrieval is not judged.

    undone     the KL on text got worse, or the NLL of the answers did beyond its interval, paired over prompts

The teacher runs once; of each prompt the stream entering the first swapped block is kept. The ranks that share the
text share the prompts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mismatch.errors import UsageError
from mismatch.forward.head import scores
from mismatch.forward.heldout import Evaluated, HeldOut
from mismatch.forward.hooks import on_device
from mismatch.forward.shared_prefix import Stored, run_prefix, run_suffix
from mismatch.metrics.sums.per_document import PerDocument
from mismatch.models.layout import Layout
from mismatch.probes.base import Setting
from mismatch.probes.inputs import Prompts
from mismatch.probes.retrieval_prompts import LIST_LENGTH, lookups, needles
from mismatch.runs.intervals import SAMPLES
from mismatch.stages.opening import Opened
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.ladder_stages.stage_result import StageResult
from mismatch.texts.windows import Windows, prefix_ids
from mismatch.texts.wordings import SELECTION

EACH = 8
"""Needles, and look-ups."""
LENGTH = 512
"""Tokens of a needle's prompt; more where the local part of the swap holds a quarter of them, at most `seq_len`."""
DEPTHS = (0.1, 0.5)
"""Where the needle stands, in halves of the prompts."""
ANSWERED = 1.0
LEAST = 6
BATCH = 4
"""Prompts per forward."""


@dataclass(frozen=True)
class Selection:
    """Prompts of the judge; none, and why, where this model cannot be asked."""

    prompts: tuple[Prompts, ...] = ()
    why_not: str = ""


def selection(opened: Opened[RepairConfig], validation: Windows, reach: int) -> Selection:
    """The prompts of the judge, made before there are weights.

    Args:
        opened: its command.
        validation: windows in which the needles are hidden.
        reach: tokens that the local part of the swap holds.
    """
    config, tokenizer = opened.config, opened.tokenizer
    setting = Setting(
        words=np.zeros(0, np.int64),
        text=validation.ids,
        tokenizer=tokenizer,
        opening=prefix_ids(tokenizer),
        context=getattr(opened.model_config, "max_position_embeddings", None),
        model=config.model,
        seed=config.seed,
    )
    length = min(config.seq_len, max(LENGTH, 4 * reach))
    try:
        hidden = [
            needles(
                replace(setting, seed=config.seed + at), SELECTION, "needles",
                length=length, depth=depth, samples=EACH // len(DEPTHS),
            )
            for at, depth in enumerate(DEPTHS)
        ]  # fmt: skip
        listed = lookups(
            setting, SELECTION, "kv_lookup",
            length=min(config.seq_len, LIST_LENGTH), samples=EACH,
        )  # fmt: skip
    except UsageError as refused:
        return Selection(why_not=refused.message)
    return Selection((*hidden, listed))


@dataclass(frozen=True)
class Judged(Evaluated):
    """A student on the evaluation text and on the prompts.

    Attributes:
        answers: NLL of the answers' tokens, by prompt; None: retrieval is not judged.
        lost: the same minus the teacher's.
    """

    answers: PerDocument | None = None
    lost: PerDocument | None = None

    def worse_than(self, best: Judged) -> str | None:
        """Why a student is undone for one that was better; None: it is kept."""
        if self.kl.total > best.kl.total:
            return "the held-out KL got worse"
        if self.answers is not None and best.answers is not None:
            more = (self.answers - best.answers).mean()
            if more.lo > 0:
                return (
                    f"retrieval got worse by {more.value:.2f} [{more.lo:.2f}, {more.hi:.2f}] nats per "
                    "token of the answers"
                )
        return None

    def into(self, stage: StageResult, swapped: Evaluated) -> None:
        """Write the readings into a stage; `swapped` is the student before the first one."""
        stage.kl, stage.lo, stage.hi = self.kl.mean()[:3]
        stage.nll = self.nll.mean().value
        stage.gap_closed, stage.gap_lo, stage.gap_hi = self.kl.gap_closed(swapped.kl)[:3]
        if self.lost is not None:
            read = self.lost.mean()
            stage.retrieval, stage.retrieval_lo, stage.retrieval_hi = read[:3]
            stage.answers = read.n


@dataclass(frozen=True)
class _Batch:
    """Prompts that the teacher answers, and its stream entering the first swapped block."""

    ids: Tensor
    scored: Tensor
    streams: Stored[int]


class Judge:
    """Evaluates students on text and prompts.

    Args:
        held_out: evaluation text, with the teacher's side.
        asked: prompts; the teacher answers them here, once.

    Attributes:
        note: what is judged, in one sentence.
    """

    def __init__(self, held_out: HeldOut, asked: Selection) -> None:
        self.held_out, self.first = held_out, held_out.first
        self.batches: dict[int, _Batch] = {}
        """Of this rank, by number; those with a prompt that the teacher answers."""
        self.count = 0  # of the batches of all ranks
        self.note = f"the ladder is judged on text alone: {asked.why_not}"
        if not asked.prompts:
            return
        parts = [batch for some in asked.prompts for batch in some.batches(BATCH)]

        def answered(number: int) -> tuple[np.ndarray, np.ndarray]:
            batch, nll, counts = self._answered(parts[number])
            if len(nll):
                self.batches[number] = batch
            return nll, counts

        told = held_out.ranks.shared(range(len(parts)), answered)
        nll, tokens = zip(*told, strict=True)
        known, whole = sum(map(len, nll)), sum(len(part.ids) for part in parts)
        if known < LEAST:
            self.note += f"the teacher answers {known} of {whole} prompts of retrieval"
            return
        self.count = len(parts)
        self.tokens = np.concatenate(tokens)
        self.teacher = self._of(nll)
        self.note = (
            f"each stage is judged on text and on {known} prompts of retrieval that the teacher answers, of {whole}, "
            f"at {self.teacher.mean().value:.2f} nats per token"
        )

    def evaluate(self, student: Layout) -> Judged:
        """Text and prompts.

        Raises:
            RunError: the student changed the teacher's stream in place.
        """
        text = self.held_out.evaluate(student)
        if not self.count:
            return Judged(text.kl, text.nll)
        found = self.held_out.ranks.shared(range(self.count), lambda at: self._nll(student, at))
        answers = self._of(found)
        return Judged(text.kl, text.nll, answers, answers - self.teacher)

    def _of(self, parts: Sequence[np.ndarray]) -> PerDocument:
        return PerDocument(np.concatenate(parts), self.tokens, SAMPLES)

    @torch.no_grad()
    def _answered(self, part: Prompts) -> tuple[_Batch, np.ndarray, np.ndarray]:
        """Of some prompts those that the teacher answers, with their NLL and tokens."""
        teacher = self.held_out.teacher
        ids = on_device(teacher, part.ids)
        scored = torch.from_numpy(part.scored).to(ids.device)
        final, streams = run_prefix(teacher, ids, [self.first])
        nll = -scores(teacher, final, ids, scored)[0].sum(1).numpy()
        counts = part.scored.sum(1)
        known = torch.from_numpy(nll <= ANSWERED * counts)
        kept: Stored[int] = Stored()
        for key, value in streams.items():
            kept.keep(key, value[known.to(value.device)])
        at = known.to(ids.device)
        return _Batch(ids[at], scored[at], kept), nll[known.numpy()], counts[known.numpy()]

    @torch.no_grad()
    def _nll(self, student: Layout, number: int) -> np.ndarray:
        batch = self.batches.get(number)
        if batch is None:
            return np.zeros(0)
        final = run_suffix(student, batch.ids, self.first, batch.streams, "the student")
        return -scores(student, final, batch.ids, batch.scored)[0].sum(1).numpy()
