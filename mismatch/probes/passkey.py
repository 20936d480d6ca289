"""Can the model find one number in a long text? Passkey retrieval over length and depth.

Definition: prompts of exactly L tokens (task, filler, `The pass key is K.`, filler, question), K five random digits, at
a depth given as the share of the filler in front of it. Measured per cell of length and depth: `logprob`, the
teacher-forced log-probability of the key's digits, summed, and `exact`, the share of keys whose every digit is the
likeliest token (which is what greedy decoding would give). `logprob` sees a loss long before `exact` does. `logprob`
and `exact` without conditions are over all cells. Where the swap works in segments, also by the number of segment
borders between needle and question (`segments`): the score of a compressive memory falls with each compression, not
with depth. `logprob_absent`: the same question when the needle holds another key, at the shortest length: the
value of not finding it.
Unit: nats per key. Range: (-inf, 0]. Null: the teacher against itself reads exactly 0 in every `_minus_teacher`.
Chance: `logprob_absent`; a random model reads about -5 ln(vocabulary).
Source: Mohtashami and Jaggi, arXiv 2305.16300 (Landmark), prompt as there; measured on SmolLM2-135M-Instruct: -0.07
at 256 tokens, floor -15.4, and making layer 18 alone local takes it to -9.6; layers
12, 17 and 20, the others tried, cost .05, 1.11 and .24. Keys vary a lot: with 4 other prompts layer 18 gave -7.15.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject
from mismatch.probes.inputs import Prompts, passkeys
from mismatch.probes.retrieval_prompts import ask
from mismatch.runs.table import under

DIGITS = 5


class Passkey(Probe):
    headline = "logprob"
    unit = "nats per key"
    range = "(-inf, 0]"
    better = "higher"
    chance = "logprob_absent: what the model answers when the text holds another key"
    shows = "whether what was read once, far away, can still be retrieved"
    blind = (
        "text quality, on which it hardly depends; a swap of a layer that does not carry retrieval "
        "reads well whatever its memory does; the filler is easy, natural text is not"
    )
    source = "arXiv 2305.16300, section 4.2; log-probability in place of generation"
    needs = "tokenizer"
    by_batch = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        draw = setting.draw("passkey")
        numbers = draw.choice(9 * 10 ** (DIGITS - 1), 2 * setting.samples, replace=False)
        keys = [str(10 ** (DIGITS - 1) + n) for n in numbers]
        asked, others = keys[: setting.samples], keys[setting.samples :]
        self.cells: dict[tuple[int, float], Prompts] = {
            (length, depth): passkeys(setting, length, depth, asked, asked)
            for length in sorted(setting.lengths)
            for depth in sorted(setting.depths)
        }
        middle = sorted(setting.depths)[len(setting.depths) // 2]
        self.absent = passkeys(setting, min(setting.lengths), middle, asked, others)

    def run(self, subjects: Sequence[Subject]) -> Answers:
        found: dict[str, list[Measure]] = {s.name: [] for s in subjects}
        whole: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {s.name: [] for s in subjects}
        segment = next((s.segment for s in subjects if s.segment is not None), None)
        borders: dict[str, dict[int, list[np.ndarray]]] = {s.name: {} for s in subjects}
        for (length, depth), prompts in self.cells.items():
            given = {"length": length, "depth": depth}
            at = f"{prompts.needle[0]}-{prompts.needle[1]}"
            for name, replies in ask(subjects, prompts, self.setting).items():
                logprob, exact = replies.logprob, replies.exact
                found[name] += [
                    Measure.mean(under("logprob", **given), logprob, position=at),
                    Measure.mean(under("exact", **given), exact, position=at),
                ]
                whole[name].append((logprob, exact))
                if segment is not None:
                    crossed = prompts.borders(segment)
                    borders[name].setdefault(crossed, []).append(logprob)
        for name, cells in whole.items():
            logprob, exact = (np.stack(part, 1) for part in zip(*cells, strict=True))
            found[name] += [Measure.mean("logprob", logprob), Measure.mean("exact", exact)]
            found[name] += [
                Measure.mean(under("logprob", segments=count), np.stack(parts, 1))
                for count, parts in sorted(borders[name].items())
            ]
        for name, replies in ask(subjects, self.absent, self.setting).items():
            found[name].append(Measure.mean("logprob_absent", replies.logprob))
        return found
