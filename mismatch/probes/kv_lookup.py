"""Can the model look one pair up in a list? Key and value, with text in between.

Definition: N lines `The number of the NAME is VALUE.` (N = 12, VALUE five random digits), then held-out text up to L
tokens (L = 328), then one of the pairs asked for in the words of its line. Measured are `logprob`, the teacher-forced
log-probability of the value's tokens, and `exact`, the share of values whose every token is the likeliest.
`logprob_absent`: the same when the name that is asked for is not in the list: the value of not finding it.
Unit: nats per answer token. Range: (-inf, 0]. Null: the teacher against itself reads exactly 0 in every
`_minus_teacher`. Chance: `logprob_absent`; guessing one of ten digits reads -2.3.
Source: RULER's key-value needles, Hsieh et al., arXiv 2404.06654, as one list; measured on SmolLM2-135M-Instruct, where
every layer counts more here than for the passkey, whose one number in repeated filler is easily picked.
"""

from __future__ import annotations

from collections.abc import Sequence

from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject
from mismatch.probes.retrieval_prompts import ask, lookups
from mismatch.texts.wordings import EVALUATION


class KvLookup(Probe):
    headline = "logprob"
    unit = "nats per answer token"
    range = "(-inf, 0]"
    better = "higher"
    chance = "logprob_absent: the name that is asked for is not in the list"
    shows = "whether one of many like pairs can still be told from the others and read"
    blind = (
        "text quality; a small model reads lists badly itself, and what it cannot do cannot be lost: "
        "look at the teacher's own reading first"
    )
    source = "Hsieh et al., arXiv 2404.06654 (RULER); log-probability in place of generation"
    needs = "tokenizer, haystack"
    by_batch = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        pairs, length = setting.lookup_pairs, setting.lookup_length
        self.prompts, self.absent = (
            lookups(setting, EVALUATION, "kv_lookup", pairs=pairs, length=length, absent=absent)
            for absent in (False, True)
        )

    def run(self, subjects: Sequence[Subject]) -> Answers:
        found: dict[str, list[Measure]] = {s.name: [] for s in subjects}
        for name, replies in ask(subjects, self.prompts, self.setting).items():
            found[name] += [replies.per_token("logprob"), replies.found("exact")]
        for name, replies in ask(subjects, self.absent, self.setting).items():
            found[name].append(replies.per_token("logprob_absent"))
        return found
