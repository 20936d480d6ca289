"""Repairs of swaps that the record of the forecast has not seen: what `mismatch repair` forecast, and what came.

    python analyses/forecast_fresh.py               about 6 minutes of CPU, one thread; goes on where it was stopped

Layers between those of the record; mechanisms that it does not hold, and one that it holds, with another argument. As
many tokens as in the record, on the same texts. A forecast is never made anew: each repair is kept as it was forecast
and scored, in figures/forecast_score/fresh/. Writes fresh.csv there.
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
from mismatch.runs.files import json_text

SWAPS = (
    "layer8:mamba2",
    "layer20:infini(segment=64)",
    "layer16:sliding_window(window=32, sinks=1)",
    "layer4:partial_rope(fraction=0.25)",
)
SETTINGS = {
    "train_tokens": 8192, "self_generated": 0.0, "tokens": 2048, "val_tokens": 1024, "seq_len": 512, "epochs": 3,
    "max_minutes": None, "trace_tokens": 0, "probes": (), "controls": ("zero",),
    "stages": ("closed-form", "local", "block"),
}  # fmt: skip
HERE = Path(__file__).resolve().parent.parent / "figures" / "forecast_score" / "fresh"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    missing = [swap for swap in SWAPS if not _file(output, swap).exists()]
    teacher = mismatch.load("smollm2") if missing else None
    for swap in missing:
        plan = asdict(mismatch.repair(teacher, swap, progress=True, **SETTINGS).plan)
        kept = {"swap": swap, "forecast": plan["forecast"], "stages": plan["stages"]}
        _file(output, swap).write_text(json_text(kept))
    report(output)


def report(output: Path) -> None:
    """The repairs that are there, as a table."""
    files = [_file(output, swap) for swap in SWAPS]
    repairs = [json.loads(file.read_text()) for file in files if file.exists()]
    for one in repairs:
        if one["forecast"]["why_not"]:
            print(f"{one['swap']}: no forecast, {one['forecast']['why_not']}")
    frame = table(repairs)
    if frame.empty:
        raise SystemExit("no swap got a forecast: nothing to score")
    frame.to_csv(output / "fresh.csv", index=False)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    inside, off = frame["inside"].mean(), (frame["forecast"] - frame["measured"]).abs().mean()
    print(
        f"{len(frame)} forecasts: {100 * inside:.0f} % inside, off by {100 * off:.0f} points on average"
    )


def _file(folder: Path, swap: str) -> Path:
    return folder / f"{swap.partition('(')[0].replace(':', '-')}.json"


def table(repairs: list[dict[str, Any]]) -> pd.DataFrame:
    """swap, stage, forecast, lo, hi, measured, inside; a swap that was refused has no row."""
    rows = []
    for one in repairs:
        for stage, told in one["forecast"]["stages"].items():
            numbers = {"lo": told["lo"], "hi": told["hi"], "measured": told["measured"]}
            rows.append(
                {"swap": one["swap"], "stage": stage, "forecast": told["value"], **numbers,
                 "inside": told["lo"] <= told["measured"] <= told["hi"]}
            )  # fmt: skip
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
