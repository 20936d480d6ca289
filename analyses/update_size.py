"""Deep models expect small corrections: does the size of an update say what its loss will cost?

    python analyses/update_size.py                about 8 minutes of CPU, one thread
    python analyses/update_size.py --run RUN      the same from a finished scan

Before anything is replaced, four numbers of every layer's attention, MLP and whole block in the teacher: `size`, the
median over tokens of ||update|| / ||stream it is added to||; `turn`, the mean of 1 - cos(stream before, behind), by
which ShortGPT (arXiv 2403.03853) picks layers; `fisher`, half the mean square of d log p(y) / d scale of the update, y
drawn from the model's own prediction: the quadratic guess at the KL of taking the update away, all layers from one
pass; and the `layer` number, which knows nothing. After: the KL of deleting that part (zero, skip), of Infini-attention
in its place, and what deleted attention costs copying and the passkey; attention's damage is that of `scan_atlas.py`,
on the same text. Spearman over layers, 95 % intervals by resampling layers; n = 30: at random |r| stays below .36.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

import mismatch
from mismatch.report import style

SIZES: dict[str, Any] = {"tokens": 1536, "seq_len": 192, "batch_size": 8}
"""Those of scan_atlas.py: the same text."""
CASES = {
    ("attn", "zero", "text"): "attention deleted",
    ("attn", "infini(segment=64)", "text"): "Infini-attention",
    ("mlp", "mlp:zero", "text"): "MLP deleted",
    ("block", "skip", "text"): "block skipped",
    ("attn", "zero", "induction"): "attention deleted: copying",
    ("attn", "zero", "passkey"): "attention deleted: passkey",
}
UNITS = (*["KL, nats per token"] * 4, "lost, nats per token", "lost, nats per key")
PREDICTORS = ("size", "turn", "fisher", "layer")
DRAWS = 8
"""Times that labels are drawn from the teacher's prediction."""
FIGURES = Path(__file__).resolve().parent.parent / "figures"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished scan of `mlp:zero; skip`")
    parser.add_argument("--output", type=Path, default=FIGURES / "update_size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = mismatch.load("smollm2")
    ids = mismatch.windows(
        mismatch.read_documents("wiki"), teacher.tokenizer, SIZES["seq_len"], SIZES["tokens"]
    )
    before = measured(teacher, torch.from_numpy(ids.ids))
    if args.run is not None:
        scanned = mismatch.Scanned(mismatch.load_run(args.run))
    else:
        scanned = mismatch.scan(
            teacher, "mlp:zero; skip", tasks=("text",), controls=(), run_name="update_size",
            progress=True, **SIZES,
        )  # fmt: skip
    damage = pd.concat([pd.read_csv(FIGURES / "scan_atlas" / "cells.csv"), scanned.cells])
    args.output.mkdir(parents=True, exist_ok=True)
    scanned.cells.to_csv(args.output / "cells.csv", index=False)
    found = beside(before, damage)
    said = correlations(found)
    made = {"model": "smollm2", **SIZES, "draws": DRAWS, "correlations": said.to_dict("records")}
    made |= {"verdict": verdict(said), "versions": mismatch.versions()}
    picture = style.to_bytes(draw(found, said), "png")
    (args.output / "update_size.png").write_bytes(picture)
    found.to_csv(args.output / "update_size.csv", index=False)
    (args.output / "update_size.json").write_text(json.dumps(made, indent=2) + "\n")
    print(said.to_string(index=False))
    print(made["verdict"])


def measured(teacher: mismatch.Teacher, ids: Tensor) -> pd.DataFrame:
    """part, layer, size, turn, fisher of the teacher on ids `windows pos`; position 0 takes part in fisher alone."""
    layout = teacher.layout
    sums: dict[tuple[str, int], list[list[float]]] = {}
    generator = torch.Generator().manual_seed(0)
    wanted = [tap for layer in range(layout.n_layers) for tap in mismatch.taps(layout, layer)]
    start = layout.model.get_input_embeddings().register_forward_hook(
        lambda _module, _args, out: out.requires_grad_()
    )
    for row in ids:
        seen: dict[tuple[str, int], Tensor] = {}
        final = mismatch.run_tapped(
            layout,
            row[None],
            wanted,
            partial(_keep, seen),
        )
        log_p = layout.model.get_output_embeddings()(final).log_softmax(-1)[0]
        slopes: dict[tuple[str, int], list[float]] = {}
        sites = [key for key in seen if key[0] in ("attn_out", "mlp_out", "resid_post")]
        for _ in range(DRAWS):
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            score = log_p.gather(-1, drawn).sum()
            grads = torch.autograd.grad(score, [seen[key] for key in sites], retain_graph=True)
            for (site, layer), grad in zip(sites, grads, strict=True):
                part, (_, update) = PARTS[site], _step(seen, site, layer)
                slopes.setdefault((part, layer), []).append(float((grad * update).sum()))
        for site, layer in sites:
            stream, update = (x.detach()[0, 1:].double() for x in _step(seen, site, layer))
            size = update.norm(dim=-1) / stream.norm(dim=-1)
            turn = 1 - torch.cosine_similarity(stream, stream + update, dim=-1)
            key = (PARTS[site], layer)
            fisher = float(0.5 * np.mean(np.square(slopes[key])) / len(row))
            sums.setdefault(key, []).append([float(size.median()), float(turn.mean()), fisher])
    start.remove()
    rows = [(*key, *np.mean(values, axis=0)) for key, values in sums.items()]
    return pd.DataFrame(rows, columns=["part", "layer", "size", "turn", "fisher"])


PARTS = {"attn_out": "attn", "mlp_out": "mlp", "resid_post": "block"}


def _step(seen: dict[tuple[str, int], Tensor], site: str, layer: int) -> tuple[Tensor, Tensor]:
    """The stream in front of an update, and the update."""
    before = seen["resid_mid" if site == "mlp_out" else "resid_pre", layer]
    after = seen[site, layer]
    return before, (after - before if site == "resid_post" else after).detach()


def beside(before: pd.DataFrame, damage: pd.DataFrame) -> pd.DataFrame:
    """Every case's damage by layer, beside what was known of the part before."""
    parts = []
    for (part, swap, task), words in CASES.items():
        mine = damage[(damage["student"] == swap) & (damage["task"] == task)]
        known = before[before["part"] == part]
        both = known.merge(mine[["layer", "value", "lo", "hi"]], on="layer")
        parts.append(both.assign(case=words))
    return pd.concat(parts, ignore_index=True).rename(columns={"value": "damage"})


def correlations(found: pd.DataFrame) -> pd.DataFrame:
    """case, predictor, spearman, lo, hi; and the same less `size`'s, on the same resampled layers."""
    rows = []
    for case, mine in found.groupby("case", sort=False):
        known = {name: mine[name].to_numpy() for name in PREDICTORS}
        draws = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
        hurt = mine["damage"].to_numpy()
        sampled = {name: spearman(x[draws], hurt[draws]) for name, x in known.items()}
        for name, x in known.items():
            row = {"case": case, "predictor": name, "layers": len(mine)}
            row["spearman"] = spearman(x[None], hurt[None])[0]
            row["lo"], row["hi"] = np.nanquantile(sampled[name], [0.025, 0.975])
            more = sampled[name] - sampled["size"]
            row["more_lo"], row["more_hi"] = np.nanquantile(more, [0.025, 0.975])
            rows.append(row)
    return pd.DataFrame(rows)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's r of each row of two matrices `rows layers`; nan where all of a row is one number."""
    x, y = (stats.rankdata(part, axis=1) - (part.shape[1] + 1) / 2 for part in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def verdict(said: pd.DataFrame) -> str:
    """Holds where the whole interval of `size` is above 0; and whether another number does better."""
    size = said[said["predictor"] == "size"].set_index("case")
    yes = [c for c in size.index if size["lo"][c] > 0]
    word = (
        "holds" if len(yes) == len(size) else "does not hold" if not yes else "depends on the part"
    )
    each = "; ".join(f"{c} {r.spearman:.2f} [{r.lo:.2f}, {r.hi:.2f}]" for c, r in size.iterrows())
    better = said[said["more_lo"] > 0]
    others = ", ".join(
        f"{r.predictor} for {r.case} ({r.spearman:.2f})" for r in better.itertuples()
    )
    return (
        f"Update size predicts damage over layers: {word}. Spearman of size: {each}. "
        f"Better than size beyond its interval: {others or 'none'}."
    )


@style.styled
def draw(found: pd.DataFrame, said: pd.DataFrame) -> Figure:
    """Damage against size, a panel a case, layers numbered; the best other predictor in words."""
    figure = style.new_figure(style.WIDTH, 4.6)
    axes = figure.subplots(2, 3).flat
    for ax, (case, mine) in zip(axes, found.groupby("case", sort=False), strict=True):
        scores = said[said["case"] == case].set_index("predictor")
        error = [mine["damage"] - mine["lo"], mine["hi"] - mine["damage"]]
        ax.errorbar(mine["size"], mine["damage"], error, fmt="none", ecolor="#c8c8c8", lw=0.8)
        drawn = ax.scatter(
            mine["size"], mine["damage"], c=mine["layer"], s=13, cmap="viridis", zorder=3
        )
        for row in mine.nlargest(8, "damage").itertuples():
            ax.annotate(
                str(row.layer), (row.size, row.damage), xytext=(2.5, 2), textcoords="offset points",
                fontsize=5, color=style.FAINT,
            )  # fmt: skip
        ax.set(xscale="log", xticks=[0.1, 0.3, 1])
        if mine["damage"].min() > 0:
            ax.set_yscale("log")
        else:
            ax.set_yscale("symlog", linthresh=0.1)
            ax.set_yticks([-0.1, 0, 0.1, 1, 10])
        style.plain_log(ax.xaxis, ax.yaxis)
        size, guess = scores.loc["size"], scores.loc["fisher"]
        score = (
            f"size {size.spearman:.2f} [{size.lo:.2f}, {size.hi:.2f}], fisher {guess.spearman:.2f}"
        )
        ax.set_title(f"{case}\n{score}", fontsize=6.8)
    for ax in figure.axes[3:]:
        ax.set_xlabel("||update|| / ||stream||, median")
    for ax, unit in zip(figure.axes, UNITS, strict=True):
        ax.set_ylabel(unit)
    figure.colorbar(drawn, ax=figure.axes, label="layer", shrink=0.5, aspect=30, pad=0.01)
    style.frame(
        figure,
        "Does an update's size say what losing it costs? (smollm2, one layer at a time)",
        "Above the panels: Spearman's r over 30 layers of size and damage, 95 % over resampled layers (at random |r| "
        "< 0.36), and of fisher, the quadratic guess at the KL from the teacher alone. Bars: 95 % over documents; "
        "numbers: layers.",
    )
    return figure


def _keep(seen: dict[tuple[str, int], Tensor], tap: Any, x: Tensor) -> None:
    seen[tap.site, tap.layer] = x


if __name__ == "__main__":
    main()
