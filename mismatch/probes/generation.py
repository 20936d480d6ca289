"""How long does the student generate the same text as the teacher? Greedy continuations of text.

Definition: the first 32 tokens of each window as a prompt, 48 tokens generated greedily (the likeliest each time), with
the cache, by every model on its own. `agreed` = tokens until the first that differs from the teacher's; `same` = share
of positions with the teacher's token; `kl_there` = KL(teacher || student) where they first differ, on the common text
before, and `rank_there` = how many tokens the teacher holds likelier than the student's choice (means over prompts that
differ); `repeats` = share of 4-grams of a continuation that occur earlier in it.
Unit: tokens. Range: [0, 48]. Null: the teacher against itself agrees to the end: 48, and differs nowhere.
Chance: 0: a random model differs at the first token.
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

PROMPT = 32  # tokens
NEW = 48  # tokens generated
GRAM = 4  # length of the sequences that `repeats` counts


class Generation(Probe):
    headline = "agreed"
    unit = "tokens"
    range = "[0, 48]"
    better = "higher"
    chance = "0: a random model differs at once"
    shows = "how soon a small error becomes another text, and whether the student falls into a loop"
    blind = (
        "quality: after the first difference both may be right, and where the teacher is undecided any "
        "change makes one (rank_there 1, kl_there small)"
    )
    source = "arXiv 2211.17192; arXiv 1908.04319"
    needs = "text"
    by_batch = True

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
        def one(part: slice) -> dict[tuple[str, str], np.ndarray]:
            read: dict[tuple[str, str], np.ndarray] = {}
            ids = on_device(subjects[0].layout, self.ids[part])
            generated = {subject.name: greedy(subject, ids) for subject in subjects}
            ours = generated[subjects[0].name]
            teacher: Tensor | None = None
            for subject, final in finals(subjects, torch.cat([ids, ours], 1)):
                logp = log_probs(subject.layout, final[:, PROMPT - 1 : -1])
                teacher = logp if teacher is None else teacher
                apart = _compared(ours, generated[subject.name], teacher, logp)
                read |= {(subject.name, stat): values for stat, values in apart.items()}
            return read

        with torch.no_grad():
            found = self.setting.by_batch(len(self.ids), one)
        answers: dict[str, list[Measure]] = {}
        for subject in subjects:
            joined = {
                stat: values for (name, stat), values in found.items() if name == subject.name
            }
            differs = joined.pop("differs")
            answers[subject.name] = [
                Measure.mean(stat, joined.pop(stat), NEW) for stat in ("agreed", "same", "repeats")
            ]
            count = int(differs.sum())
            for stat, values in joined.items():  # of the prompts that differ
                answers[subject.name].append(
                    Measure(stat, values * differs, differs, count)
                    if count
                    else Measure.absent(stat)
                )
        return answers


def greedy(subject: Subject, ids: Tensor) -> Tensor:
    """The likeliest continuation, `batch NEW`, token by token through the cache. An end token does not stop it: all
    models then generate the same number."""
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
        ours, theirs: tokens generated by teacher and student, int64 `batch NEW`.
        teacher, student: log-probabilities on the teacher's text, `batch NEW vocab`.
    """
    same = ours == theirs
    agreed = same.long().cumprod(1).sum(1)
    differs = agreed < ours.shape[1]
    at = agreed.clamp(max=ours.shape[1] - 1)
    rows = torch.arange(len(ours), device=ours.device)
    rows_t, at_t = rows.to(teacher.device), at.to(teacher.device)
    logp = teacher[rows_t, at_t]
    apart = kl_float64(logp, student[rows.to(student.device), at.to(student.device)])
    chosen = logp.gather(1, theirs[rows, at].to(logp.device)[:, None])
    rank = (logp > chosen).sum(1)
    grams = theirs.unfold(1, GRAM, 1)
    repeats = [1 - len({tuple(g) for g in row}) / len(row) for row in grams.tolist()]
    return {
        "agreed": agreed.cpu().numpy(),
        "same": same.double().mean(1).cpu().numpy(),
        "repeats": np.array(repeats),
        "kl_there": apart.double().cpu().numpy(),
        "rank_there": rank.double().cpu().numpy(),
        "differs": differs.double().cpu().numpy(),
    }
