"""What generalises, and what was one model alone? The same questions to every trained model at hand.

    python analyses/three_models.py scan MODEL       about 10 minutes of CPU for smollm2 and gemma3-270m, one thread
    python analyses/three_models.py window MODEL     of these, only the window with the first token kept
    python analyses/three_models.py repair MODEL     about 5 minutes of CPU
    python analyses/three_models.py asked MODEL      about 2 minutes of CPU
    python analyses/three_models.py tokens MODEL     seconds
    python analyses/three_models.py draw             the table and the figure, from what was kept

Models: smollm2 (Llama, 30 layers), gemma3-270m (Gemma 3, 18 layers, five of six with a window of 512; fetched by
whoever accepts its terms) and glassllm, a toy trained on one author (Llama, 4 layers, context 128). Two of them are
dequantised 4-bit models, so this is about those, not about the families.

`scan` puts infini, nope and a window with and without the first token into every layer, one at a time, beside deleting
the attention (`zero`), on text and on a passkey. `repair` closes what Infini-attention opens at one layer with the two
cheap stages, and asks the behaviour before and after. `asked` puts passkey and induction to the same layer, swapped,
and diagnoses it. `tokens` looks for massive tokens in the teacher, by the rule
that a trace leaves them out by.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import mismatch
from mismatch.forward.sites import massive
from mismatch.stages.scan.words import can_do

LAYER = {"smollm2": 12, "gemma3-270m": 8, "glassllm": 2}
"""Models, and the layer that is repaired."""
SHORT = {
    "glassllm": {"segment": 16, "seq_len": 64, "length": 120, "tokens": 768, "train_tokens": 8192},
}
"""Where a context of 128 asks for less."""
USUAL = {"segment": 64, "seq_len": 192, "length": 256, "tokens": 768, "train_tokens": 16384}
SAMPLES = 4
HERE = Path(__file__).resolve().parent.parent / "figures" / "three_models"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("scan", "window", "repair", "asked", "tokens", "draw"))
    parser.add_argument("model", nargs="?", choices=tuple(LAYER), help="for all but draw")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.part == "draw":
        draw(args.output)
        return
    if args.model is None:
        parser.error("name a model")
    torch.set_num_threads(1)
    teacher = mismatch.load(args.model)
    parts = {"scan": scanned, "repair": repaired, "asked": asked, "tokens": tokens}
    name = "scan" if args.part == "window" else args.part
    place = args.output / f"{name}-{args.model}"
    if args.part == "window":
        rows, made = windowed(args.model, teacher, place)
    else:
        rows, made = parts[args.part](args.model, teacher)
    rows.to_csv(place.with_suffix(".csv"), index=False, float_format="%.6g", lineterminator="\n")
    made |= {"versions": mismatch.versions()}
    place.with_suffix(".json").write_text(json.dumps(made, indent=2) + "\n")
    print(rows.to_string(index=False))


def sizes(model: str) -> dict[str, int]:
    return SHORT.get(model, USUAL)


def scanned(
    model: str, teacher: Any, mechanisms: tuple[str, ...] | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Every cell."""
    size = sizes(model)
    wide = size["segment"]
    every = (
        f"infini(segment={wide})",
        "nope",
        f"sliding_window({wide})",
        f"sliding_window({wide}, 1)",
    )
    swap = "; ".join(mechanisms or every)
    settings: dict[str, Any] = {name: size[name] for name in ("tokens", "seq_len", "length")}
    found = mismatch.scan(
        teacher, swap, tasks=("text", "passkey"), samples=SAMPLES, batch_size=4, progress=True, **settings
    )  # fmt: skip
    cells = found.cells[["task", "student", "layer", "value", "lo", "hi", "kind"]]
    return cells, {
        "settings": settings,
        "swap": swap,
        "finds_the_passkey": bool(can_do(found.table, "passkey", found.plan)),
    }


def windowed(model: str, teacher: Any, place: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A scan that was kept, with the window that keeps the first token measured again."""
    kept, facts = (
        pd.read_csv(place.with_suffix(".csv")),
        json.loads(place.with_suffix(".json").read_text()),
    )
    fresh, made = scanned(model, teacher, (f"sliding_window({sizes(model)['segment']}, 1)",))
    fresh = fresh[fresh.student.map(kind_of) == "window+1"]
    columns = ["task", "student", "layer"]
    others = kept[kept.student.map(kind_of) != "window+1"]
    rows = pd.concat([others, fresh]).sort_values(columns, kind="stable")
    return rows, made | {name: facts[name] for name in ("swap", "finds_the_passkey")}


def asked(model: str, teacher: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Passkey and induction beside the teacher, and what a diagnosis recovers, of one layer."""
    size = sizes(model)
    swap = f"layer{LAYER[model]}:infini(segment={size['segment']})"
    done = mismatch.probe(
        teacher, swap, probes=("passkey", "induction"), lengths=(str(size["length"]),), depths=("0.1", "0.5"),
        samples=8, seq_len=min(64, size["seq_len"]), progress=True,
    )  # fmt: skip
    heads, rows = done.headlines, []
    for row in heads[~heads["stat"].str.contains("[", regex=False)].itertuples():
        if row.student == "swap":
            rows.append((row.metric, "teacher", row.teacher, np.nan, np.nan))
        rows.append((row.metric, row.student, row.value, row.lo, row.hi))
        rows.append(
            (
                f"{row.metric} - teacher",
                row.student,
                row.difference,
                row.difference_lo,
                row.difference_hi,
            )
        )
    found = mismatch.diagnose(
        teacher, swap, tokens=1536, fit_tokens=2048, seq_len=size["seq_len"], heads=1, progress=True
    )
    shares = found.shares
    rows += [
        (f"recovered: {row.panel}", row.name, row.share, row.lo, row.hi)
        for row in shares.itertuples(name="Share", index=False)
    ]
    columns = ["reading", "student", "value", "lo", "hi"]
    made = {"swap": swap, "settings": size, "verdict": found.verdict, "leading": found.leading}
    return pd.DataFrame(rows, columns=columns), made


@torch.no_grad()
def tokens(model: str, teacher: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Of the stream behind every block but the last: share of massive tokens, and how far norms stand out."""
    text = mismatch.read_documents("wiki")
    length = min(256, teacher.layout.config.max_position_embeddings)
    cut = mismatch.windows(text, teacher.tokenizer, length, 8 * length, 0)
    ids, rows = torch.from_numpy(cut.ids), []
    states = teacher.model(ids, output_hidden_states=True).hidden_states[1:-1]
    for layer, h in enumerate(states):
        hit, norm = massive(h, torch.ones_like(ids, dtype=torch.bool)), h.norm(dim=-1)
        times = norm / norm.median(1, keepdim=True).values
        shares = [part.double().mean().item() for part in (hit[:, 0], hit[:, 1:])]
        rows.append((layer, *shares, times[:, 0].mean().item(), times[:, 1:].max().item()))
    columns = [
        "layer",
        "first_massive",
        "others_massive",
        "first_times_median",
        "others_times_median",
    ]
    return pd.DataFrame(rows, columns=columns), {"windows": len(ids), "length": length}


def repaired(model: str, teacher: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    """KL and behaviour before and after the cheap stages of a repair, without and with the first token kept."""
    size, rows, made = sizes(model), [], {}
    for sinks in (0, 1):
        swap = f"layer{LAYER[model]}:infini(segment={size['segment']}, sinks={sinks})"
        done = mismatch.repair(
            teacher, swap, stages=("closed-form", "local"), seq_len=min(256, 2 * size["seq_len"]), tokens=4096,
            train_tokens=size["train_tokens"], self_generated=0.0, val_tokens=1024, trace_tokens=0, epochs=4,
            max_minutes=None, controls=("zero",), probes=("generation",), progress=True,
        )  # fmt: skip
        plan = done.plan
        for name in ("zero", "swap", "repaired"):
            one = plan.students[name]
            rows.append((swap, name, "kl", *one.kl))
            if name == "repaired":
                rows.append((swap, name, "gap_closed", *one.gap_closed))
        mine = done.table[(done.table.metric == "generation") & (done.table.stat == "agreed")]
        for row in mine.itertuples():
            who = (
                row.student
                if row.student == "teacher"
                else {"surgery": "swap"}.get(row.stage, "repaired")
            )
            rows.append((swap, who, "agreed", row.value, row.lo, row.hi))
        made[swap] = done.summary()
    columns = ["swap", "student", "reading", "value", "lo", "hi"]
    return pd.DataFrame(rows, columns=columns), {"settings": size, "summary": made}


def summary(folder: Path) -> pd.DataFrame:
    """One row a question, one column a model."""
    rows: dict[str, dict[str, str]] = {}
    for model in LAYER:
        place = folder / f"scan-{model}.csv"
        if not place.exists():
            continue
        cells = pd.read_csv(place)
        facts = json.loads(place.with_suffix(".json").read_text())
        found = pd.read_csv(folder / f"tokens-{model}.csv")
        rows[model] = (
            answers(cells, facts, found)
            | mended(folder / f"repair-{model}.csv")
            | asked_of(folder / f"asked-{model}.csv")
        )
    return pd.DataFrame(rows)


def answers(cells: pd.DataFrame, facts: dict[str, Any], norms: pd.DataFrame) -> dict[str, str]:
    """What a scan says of a model, in words and numbers."""
    real = cells[cells.kind != "missing"]
    text = real[real.task == "text"].pivot(index="layer", columns="student", values="value")
    plain, kept = window_names(text.columns)
    worst = norms.loc[norms.others_massive.idxmax()]
    order = text.median().sort_values()
    said = {
        "order of mechanisms, median KL over layers": " < ".join(
            f"{n} {v:.3g}" for n, v in order.items()
        ),
        "median share of `zero`, infini": f"{(text[infini(text.columns)] / text['zero']).median():.2f}",
        "median share of `zero`, nope": f"{(text['nope'] / text['zero']).median():.2f}",
        "the first token: window without over with it": f"{(text[plain] / text[kept]).median():.1f} times",
        "worst layer on text, infini": str(text[infini(text.columns)].idxmax()),
        "massive tokens: first token in blocks; others at most": (
            f"{(norms.first_massive > 0.5).sum()} of {len(norms)}; {worst.others_massive:.2%}"
        ),
        "norm over the window's median: first token, others at most": (
            f"{norms.first_times_median.max():.0f}, {norms.others_times_median.max():.0f}"
        ),
    }
    where = "layer that loses the passkey, window with the first token"
    said[where] = "the teacher does not find it"
    asked = real[real.task == "passkey"]
    if facts["finds_the_passkey"]:
        lost = asked.pivot(index="layer", columns="student", values="value")[kept].nlargest(2)
        said[where] = (
            f"{lost.index[0]} ({lost.iloc[0]:.2f} nats; next {lost.index[1]}: {lost.iloc[1]:.2f})"
        )
    return said


def window_names(names: Any) -> tuple[str, str]:
    """The windows without and with the first token."""
    found = sorted((name for name in names if name.startswith("sliding_window")), key=len)
    return found[0], found[1]


def infini(names: Any) -> str:
    return next(name for name in names if name.startswith("infini"))


def mended(place: Path) -> dict[str, str]:
    """What a repair says of a model."""
    if not place.exists():
        return {}
    found, said = pd.read_csv(place), {}
    for swap, mine in found.groupby("swap", sort=False):
        at = mine.set_index(["student", "reading"])
        kind = "with the first token" if "sinks=1" in swap else "as published"
        kl = {name: at.loc[(name, "kl"), "value"] for name in ("swap", "repaired", "zero")}
        gap = at.loc[("repaired", "gap_closed")]
        said[f"repair, {kind}: KL"] = (
            f"{kl['swap']:.3g} -> {kl['repaired']:.3g} of {kl['zero']:.3g} (zero)"
        )
        said[f"repair, {kind}: gap closed"] = f"{gap.value:.0%} [{gap.lo:.0%}, {gap.hi:.0%}]"
        if ("swap", "agreed") in at.index:
            said[f"repair, {kind}: tokens generated alike"] = (
                f"{at.loc[('swap', 'agreed'), 'value']:.1f} -> {at.loc[('repaired', 'agreed'), 'value']:.1f} of 48"
            )
    return said


def asked_of(place: Path) -> dict[str, str]:
    """What probes and a diagnosis say of one layer of a model."""
    if not place.exists():
        return {}
    found = pd.read_csv(place)
    facts = json.loads(place.with_suffix(".json").read_text())
    at = found.set_index(["reading", "student"])
    said = {"layer of repair, probes and diagnosis": str(facts["swap"].partition(":")[0])}
    for metric, what in (("passkey", "log-probability"), ("induction", "loss of the second half")):
        one = {name: at.loc[(metric, name), "value"] for name in ("teacher", "swap", "zero")}
        gap = at.loc[(f"{metric} - teacher", "swap")]
        said[f"{metric} of that layer, {what}, nats"] = (
            f"teacher {one['teacher']:.3g}, swap {one['swap']:.3g} ({gap.value:+.2f} [{gap.lo:.2f}, {gap.hi:.2f}]), "
            f"zero {one['zero']:.3g}"
        )
    causes = at.loc["recovered: cause", "value"]
    said["diagnosis: share of each cause"] = ", ".join(
        f"{name} {causes[name]:.0%}"
        for name in ("distribution", "position", "premise", "unexplained")
    )
    best = found[
        found.reading.isin(["recovered: distribution", "recovered: position", "recovered: premise"])
    ]
    best = best.loc[best.value.idxmax()]
    said["diagnosis: what recovers most"] = (
        f"{best.student} {best.value:.0%} [{best.lo:.0%}, {best.hi:.0%}]"
    )
    return said


def draw(folder: Path) -> None:
    """The table as csv and markdown, and a figure: KL over depth of every mechanism, a panel a model."""
    table = summary(folder)
    table.to_csv(folder / "three_models.csv", lineterminator="\n")
    models = list(table.columns)
    figure = Figure(figsize=(4 * len(models), 3.4), layout="constrained")
    for ax, model in zip(np.atleast_1d(figure.subplots(1, len(models))), models, strict=True):
        cells = pd.read_csv(folder / f"scan-{model}.csv")
        text = cells[(cells.task == "text") & (cells.kind != "missing")]
        depth = range(
            int(text.layer.max()) + 1
        )  # a mechanism that some layers cannot hold has gaps
        for start, label, colour in LINES:
            mine = text[text.student.map(lambda name, start=start: kind_of(name) == start)]
            kl = mine.set_index("layer").value.reindex(depth)
            dashed = "--" if start == "zero" else "-"
            ax.plot(depth, kl, dashed, marker=".", color=colour, label=label, linewidth=1.3)
        ax.set(yscale="log", xlabel="layer", title=model)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("KL to the teacher, nats per token")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(LINES), frameon=False)
    figure.savefig(folder / "three_models.png", dpi=200)
    print(table.to_string())


def kind_of(name: str) -> str:
    """Of a cell: `infini`, `nope`, `zero`, `window`, or `window+1` with the first token."""
    if name.startswith("sliding_window"):
        return "window+1" if "sinks=1" in name else "window"
    return name.partition("(")[0]


LINES = (
    ("infini", "Infini-attention", "#0072b2"),
    ("nope", "no RoPE", "#d55e00"),
    ("window", "window", "#009e73"),
    ("window+1", "window and first token", "#cc79a7"),
    ("zero", "attention deleted", "black"),
)
"""Kind of a cell, its name and colour in the figure."""


if __name__ == "__main__":
    main()
