"""What does `mismatch repair`, with its defaults, make of a recurrent mixer in a few minutes of one core?

    python analyses/repair_minutes.py      goes on where it was stopped; about two hours of CPU
    python analyses/repair_minutes.py --only rwkv --layers 12 --minutes 3

Attention of one layer of SmolLM2 is replaced by a mixer with a state, and repaired with `--max-minutes`; nothing else
is set for the training but windows of 512 tokens. It trains on `sotu` and is evaluated on 8 documents of `wiki`, on
which neither steps nor the sharing of the time were chosen. The clock of the minutes is the CPU time of one core here,
so that a busy machine gets nearly as far as an idle one. Counted is the share closed of the KL of the attention deleted
(`zero`), of the best linear map of one token (`linear`), and of the swap as it was made, which can be worse than no
attention. CPU seconds are those of the whole command behind the loading of the model, evaluation included, which the
minutes do not count. Writes figures/repair_minutes/.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch

import mismatch

MECHANISMS = {
    "gated_deltanet": "gated_deltanet",
    "mamba2, norm before": "mamba2(norm=before)",
    "rwkv": "rwkv",
}
LAYERS = (12, 18)
MINUTES = (3, 10)
HERE = Path(__file__).resolve().parent.parent / "figures" / "repair_minutes"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=MECHANISMS, nargs="*", help="these mechanisms")
    parser.add_argument("--layers", type=int, choices=LAYERS, nargs="*", help="these layers")
    parser.add_argument("--minutes", type=int, choices=MINUTES, nargs="*", help="these budgets")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = [
        (minutes, layer, name)
        for minutes in args.minutes or MINUTES
        for layer in args.layers or LAYERS
        for name in args.only or MECHANISMS
    ]
    for row in rows:
        if not (file := _file(args.output, *row)).exists():
            print(*row, flush=True)
            file.write_text(json.dumps(repaired(*row), indent=1) + "\n")
    frame = table(args.output)
    frame.to_csv(args.output / "table.csv", index=False)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


def repaired(minutes: int, layer: int, name: str) -> dict[str, Any]:
    """One row."""
    teacher = mismatch.load("smollm2")
    began = time.process_time()
    with mock.patch.object(time, "monotonic", time.process_time):
        result = mismatch.repair(
            teacher,
            f"layer{layer}:{MECHANISMS[name]}",
            max_minutes=float(minutes),
            tokens=4096,
            seq_len=512,
            controls=("zero", "linear"),
            probes=(),
            trace_tokens=0,
            progress=True,
        )
    plan = result.plan
    return {
        "spec": plan.spec,
        "cpu_seconds": time.process_time() - began,
        "students": {
            who: {"kl": list(one.kl), "repaired_closes": list(one.repaired_closes)}
            for who, one in plan.students.items()
        },
        "stages": [(s.name, s.kl, s.kept, s.steps, s.seconds) for s in plan.stages],
        "notes": list(plan.notes),
        "threads": torch.get_num_threads(),
        "versions": mismatch.versions(),
    }


def table(folder: Path) -> pd.DataFrame:
    """A row per mechanism, layer and minutes."""
    rows = []
    for layer in LAYERS:
        for name in MECHANISMS:
            for minutes in MINUTES:
                if not (file := _file(folder, minutes, layer, name)).exists():
                    continue
                made = json.loads(file.read_text())
                students = made["students"]
                row: dict[str, Any] = {"layer": layer, "mechanism": name, "minutes": minutes}
                for who in ("zero", "linear", "swap", "repaired"):
                    row |= dict(
                        zip((who, f"{who}_lo", f"{who}_hi"), students[who]["kl"], strict=True)
                    )
                for who in ("zero", "linear", "swap"):
                    names = (f"of_{who}", f"of_{who}_lo", f"of_{who}_hi")
                    row |= dict(zip(names, students[who]["repaired_closes"], strict=True))
                row["cpu_seconds"] = made["cpu_seconds"]
                rows.append(row)
    return pd.DataFrame(rows)


def _file(folder: Path, minutes: int, layer: int, name: str) -> Path:
    words = "_".join("".join(c if c.isalnum() else " " for c in name).split())
    return folder / f"layer{layer}-{words}-{minutes}min.json"


if __name__ == "__main__":
    main()
