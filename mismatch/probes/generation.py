"""How long does the student write what the teacher writes? Greedy continuations of text.

Definition: the first 32 tokens of each window as a prompt, 48 tokens written by taking the likeliest each time, with
the cache, by every model on its own. `agreed` = tokens until the first that differs from the teacher's; `same` = share
of positions with the teacher's token; `kl_there` = KL(teacher || student) where they part, on the common text before,
and `rank_there` = how many tokens the teacher holds likelier than the one that the student chose (means over prompts
that part); `repeats` = share of 4-grams of a continuation that it has written before.
Unit: tokens. Range: [0, 48]. Null: the teacher against itself agrees to the end: 48, and parts nowhere.
Chance: 0: a random model parts at the first token.
Source: measured as in speculative decoding (Leviathan et al., arXiv 2211.17192: agreement of a draft with its target);
repeats: Welleck et al., arXiv 1908.04319.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from mismatch.errors import UsageError
from mismatch.forward.head import log_probs
from mismatch.forward.hooks import on_device
from mismatch.forward.shared_prefix import finals
from mismatch.metrics.sums.logits import kl_float64
from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject

PROMPT = 32
NEW = 48
GRAM = 4


class Generation(Probe):
    headline = "agreed"
    unit = "tokens"
    range = "[0, 48]"
    better = "higher"
    chance = "0: a random model parts at once"
    tells = "how soon a small error becomes another text, and whether the student falls into a loop"
    blind = (
        "quality: after parting both may be right, and where the teacher is undecided any change "
        "parts them (rank_there 1, kl_there small)"
    )
    source = "arXiv 2211.17192; arXiv 1908.04319"
    needs = "text"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        found = setting.windows("generation")
        if found.shape[1] < PROMPT:
            raise UsageError(
                f"generation needs prompts of {PROMPT} tokens, and windows have {found.shape[1]}",
                hint=f"take --seq-len {PROMPT} or more",
            )
        setting.fits(PROMPT + NEW, "a continued prompt", "leave the probe `generation` out")
        self.ids = found[:, :PROMPT]

    def run(self, subjects: Sequence[Subject]) -> Answers:
        parts: dict[str, list[dict[str, np.ndarray]]] = {s.name: [] for s in subjects}
        with torch.no_grad():
            for at in range(0, len(self.ids), self.setting.batch_size):
                ids = on_device(subjects[0].layout, self.ids[at : at + self.setting.batch_size])
                written = {subject.name: greedy(subject, ids) for subject in subjects}
                ours = written[subjects[0].name]
                common = torch.cat([ids, ours], 1)
                teacher: Tensor | None = None
                for subject, final in finals(subjects, common):
                    said = log_probs(subject.layout, final[:, PROMPT - 1 : -1])
                    teacher = said if teacher is None else teacher
                    theirs = written[subject.name]
                    parts[subject.name].append(_compared(ours, theirs, teacher, said))
        answers: dict[str, list[Measure]] = {}
        for name, found in parts.items():
            joined = {stat: np.concatenate([part[stat] for part in found]) for stat in found[0]}
            parted = joined.pop("parted")
            answers[name] = [
                Measure.mean(stat, joined.pop(stat), NEW) for stat in ("agreed", "same", "repeats")
            ]
            count = int(parted.sum())
            for stat, values in joined.items():  # of the prompts that part
                answers[name].append(
                    Measure(stat, values * parted, parted, count) if count else Measure.absent(stat)
                )
        return answers


def greedy(subject: Subject, ids: Tensor) -> Tensor:
    """The likeliest continuation, `batch NEW`, token by token through the cache. An end token does not stop it: all
    models then write the same number."""
    model, cache = subject.layout.model, DynamicCache(config=subject.layout.config)
    new, given = [], ids
    for _ in range(NEW):
        logits = model(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1]
        given = logits.argmax(-1, keepdim=True)
        new.append(given)
    return torch.cat(new, 1)


def _compared(
    ours: Tensor, theirs: Tensor, teacher: Tensor, student: Tensor
) -> dict[str, np.ndarray]:
    """Numbers per prompt.

    Args:
        ours, theirs: what teacher and student wrote, int64 `batch NEW`.
        teacher, student: log-probabilities on the teacher's text, `batch NEW vocab`.
    """
    same = ours == theirs
    agreed = same.long().cumprod(1).sum(1)
    parted = agreed < ours.shape[1]
    at = agreed.clamp(max=ours.shape[1] - 1)
    rows = torch.arange(len(ours), device=ours.device)
    rows_t, at_t = rows.to(teacher.device), at.to(teacher.device)
    said = teacher[rows_t, at_t]
    apart = kl_float64(said, student[rows.to(student.device), at.to(student.device)])
    chosen = said.gather(1, theirs[rows, at].to(said.device)[:, None])
    rank = (said > chosen).sum(1)
    grams = theirs.unfold(1, GRAM, 1)
    repeats = [1 - len({tuple(g) for g in row}) / len(row) for row in grams.tolist()]
    return {
        "agreed": agreed.cpu().numpy(),
        "same": same.double().mean(1).cpu().numpy(),
        "repeats": np.array(repeats),
        "kl_there": apart.double().cpu().numpy(),
        "rank_there": rank.double().cpu().numpy(),
        "parted": parted.double().cpu().numpy(),
    }
