"""Which layer of a real model carries what? Found by a scan that is told nothing.

    python analyses/scan_atlas.py                 about 25 minutes of CPU, one thread
    python analyses/scan_atlas.py --run RUN       draw again from a finished run folder

Infini-attention, attention without RoPE, a window with and without the first token, and no attention at all (`zero`)
in each of SmolLM2's 30 layers, one layer at a time, each asked three things: ordinary text, a second copy of random
tokens, a passkey. `carriers.csv` holds what follows from the table, for every mechanism and question: the layer that
costs most, the next one, whether the first carries it alone (three times the next, half a nat at least), and what
ordinary text says of that layer; and how far text puts the layers in the same order (Spearman). No layer is named here.
Expected, from single measurements: RoPE carries induction in one layer and text does not show it; one layer's reach
carries the passkey.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import mismatch
from mismatch.stages.scan.words import can_do, carrier, scan_verdict

SWAP = "infini(segment=64); nope; sliding_window(64); sliding_window(64, 1)"
SIZES: dict[str, Any] = {
    "tokens": 1536, "seq_len": 192, "samples": 8, "length": 256, "batch_size": 8,
    "tasks": ("text", "induction", "passkey"),
}  # fmt: skip
HERE = Path(__file__).resolve().parent.parent / "figures" / "scan_atlas"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished scan to draw, instead of a new one")
    parser.add_argument("--model", default="smollm2", help="what to scan")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.run is None:
        scanned = mismatch.scan(args.model, SWAP, run_name="scan_atlas", progress=True, **SIZES)
    else:
        scanned = mismatch.Scanned(mismatch.load_run(args.run))
    write(scanned, args.output)


def write(scanned: mismatch.Scanned, folder: Path) -> None:
    """Picture, cells, carriers, and how they were made."""
    folder.mkdir(parents=True, exist_ok=True)
    scanned.atlas().savefig(folder / "atlas.png", dpi=200)
    scanned.cells.to_csv(folder / "cells.csv", index=False)
    found = carriers(scanned)
    found.to_csv(folder / "carriers.csv", index=False)
    said = scanned.summary()
    (folder / "summary.txt").write_text(said + "\n")
    manifest = scanned.run.manifest
    made = {
        name: manifest.get(name)
        for name in ("model", "swap", "seed", "texts", "seconds", "work", "versions")
    }
    made |= {
        "tasks": asdict(scanned.plan)["tasks"],
        "verdict": scan_verdict(scanned.table, scanned.plan),
        "drawn_with": mismatch.versions(),
    }
    (folder / "atlas.json").write_text(json.dumps(made, indent=2) + "\n")
    print(said)
    print(found.to_string(index=False))
    print(made["verdict"])


def carriers(scanned: mismatch.Scanned) -> pd.DataFrame:
    """For each question and mechanism the two worst layers, and what text says of the first."""
    cells = scanned.cells
    cells = cells[cells["kind"] != "missing"]
    text = cells[cells["task"] == "text"].set_index(["student", "layer"])["value"]
    rows = []
    for (task, name), mine in cells.groupby(["task", "student"], sort=False):
        worst, second = mine.nlargest(2, "value").itertuples()
        on_text = text[name].rank(ascending=False)[worst.layer]
        # A distance adds up over many layers; what is lost of an answer can hang on one.
        alone = task != "text" and can_do(scanned.table, task, scanned.plan)
        rows.append(
            {
                "task": task,
                "mechanism": name,
                "layer": worst.layer,
                "nats": worst.value,
                "lo": worst.lo,
                "hi": worst.hi,
                "next_layer": second.layer,
                "next_nats": second.value,
                "carried_by_one": alone and carrier(mine) is not None,
                "text_kl_there": text[name, worst.layer],
                "text_rank_there": int(on_text),
                "spearman_with_text": mine.set_index("layer")["value"].corr(
                    text[name], method="spearman"
                ),
                "layers": len(mine),
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
