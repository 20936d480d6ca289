"""What layers are chosen by: the table of scores. What they cost is in forwards of the whole model, L layers."""

from __future__ import annotations

from dataclasses import dataclass

ANSWERS = ("passkey", "needles", "kv_lookup")
"""Tasks whose scored tokens are the answer to a question."""


@dataclass(frozen=True)
class ScoreKind:
    """One score.

    Attributes:
        what: the price of replacing a layer.
        unit: of the price.
        source: who published it.
        forwards: what it costs.
        scanned: it is read from a scan of layers replaced one at a time.
        answers: it needs a model that can answer.
        halves: it is learnt from each half of the prompts, and what they share says how sure it is.
    """

    what: str
    unit: str
    source: str
    forwards: str
    scanned: bool = True
    answers: bool = False
    halves: bool = False


SCORES = {
    "kl": ScoreKind(
        "KL of the output on text when this layer alone is replaced",
        "nats per token",
        "replace one: the usual sensitivity scan",
        "(L + 1) / 2 on text",
    ),
    "answer_nll": ScoreKind(
        "rise of the NLL of answer tokens when this layer alone is replaced: the mean over passkey, needles and "
        "kv_lookup, of those that the model can do",
        "nats per answer token",
        "NLL-guided selection, arXiv 2606.27791",
        "(L + 1) / 2 on prompts",
        answers=True,
    ),
    "restore_one": ScoreKind(
        "KL that is regained when all layers of --among are replaced and this one alone is given back",
        "nats per token",
        "KL-guided selection (GA-S2, fla-org/hybrid-distillation), without its training",
        "(L + 1) / 2 + 1 on text",
        scanned=False,
    ),
    "gates": ScoreKind(
        "share of the layer's own module that answers need, when all layers of --among may close at a price",
        "a share",
        "FlashMorph, arXiv 2606.30562, in 256 steps",
        "256 of both modules, forward and backward, on prompts",
        scanned=False,
        answers=True,
        halves=True,
    ),
    "halo": ScoreKind(
        "(answer_nll above that of the least layer) / (kl above that of the least layer)",
        "a ratio",
        "HALO, arXiv 2601.22156, in nats and without its cap",
        "(L + 1) / 2 on text and on prompts",
        answers=True,
    ),
    "even": ScoreKind("replaced layers are evenly spaced", "", "baseline", "0", scanned=False),
    "random": ScoreKind("replaced layers are drawn", "", "baseline", "0", scanned=False),
}
