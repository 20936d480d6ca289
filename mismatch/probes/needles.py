"""Can the model find one of several sentences in real text? Needles over length and depth.

Definition: held-out text of L tokens with three sentences `One of the special magic numbers for TWO-WORDS is: VALUE.`
hidden in it, VALUE seven random digits; one of them is asked for, and stands at a depth given as the share of the text
in front of it; the others stand anywhere. Measured per cell of length and depth are `logprob`, the teacher-forced
log-probability of the value's tokens, and `exact`, the share of values whose every token is the likeliest; without
conditions over all cells. `logprob_absent`: the same when the sentence that is asked for is not in the text, at the
shortest length: the value of not finding it.
Unit: nats per answer token. Range: (-inf, 0]. Null: the teacher against itself reads exactly 0 in every
`_minus_teacher`. Chance: `logprob_absent`; guessing one of ten digits reads -2.3.
Source: RULER, Hsieh et al., arXiv 2404.06654 (multi-key needles); its haystack is essays, here it is the evaluation
text of the run, or the filler of the passkey where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject
from mismatch.probes.inputs import Prompts
from mismatch.probes.retrieval_prompts import Replies, ask, needles
from mismatch.runs.table import under
from mismatch.texts.wordings import EVALUATION


class Needles(Probe):
    headline = "logprob"
    unit = "nats per answer token"
    range = "(-inf, 0]"
    better = "higher"
    chance = "logprob_absent: the sentence that is asked for is not in the text"
    shows = "whether a fact in ordinary text, among others like it, can still be retrieved"
    blind = (
        "text quality; facts that must be put together from several places; a wording that was trained "
        "on is easier than one that was not"
    )
    source = "Hsieh et al., arXiv 2404.06654 (RULER); log-probability in place of generation"
    needs = "tokenizer, haystack"
    by_batch = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.cells: dict[tuple[int, float], Prompts] = {
            (length, depth): needles(setting, EVALUATION, "needles", length=length, depth=depth)
            for length in sorted(setting.lengths)
            for depth in sorted(setting.depths)
        }
        middle = sorted(setting.depths)[len(setting.depths) // 2]
        self.absent = needles(
            setting, EVALUATION, "needles", length=min(setting.lengths), depth=middle, absent=True
        )

    def run(self, subjects: Sequence[Subject]) -> Answers:
        found: dict[str, list[Measure]] = {s.name: [] for s in subjects}
        whole: dict[str, list[Replies]] = {s.name: [] for s in subjects}
        for (length, depth), prompts in self.cells.items():
            given = {"length": length, "depth": depth}
            at = f"{prompts.needle[0]}-{prompts.needle[1]}"
            for name, replies in ask(subjects, prompts, self.setting).items():
                found[name] += [
                    replies.per_token(under("logprob", **given), position=at),
                    replies.found(under("exact", **given), position=at),
                ]
                whole[name].append(replies)
        for name, cells in whole.items():
            joined = Replies.joined(cells)
            found[name] += [joined.per_token("logprob"), joined.found("exact")]
        for name, replies in ask(subjects, self.absent, self.setting).items():
            found[name].append(replies.per_token("logprob_absent"))
        return found
