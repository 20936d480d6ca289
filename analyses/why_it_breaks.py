"""Why do three swaps of one layer break SmolLM2? One thing corrected at a time.

    python analyses/why_it_breaks.py              about 10 minutes of CPU, one thread; a swap that is written down
                                                  already is not run again

`infini(segment=64)` at layer 12 and at layer 18, which carries the passkey, and RoPE removed at layer 16, which needs
it to copy. The probes `passkey` and `induction` are asked first, and what they say is put beside the shares, as
`mismatch diagnose RUN` does. Writes figures/why_it_breaks/<swap>.{png,csv,json}, the last with verdict and findings.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import mismatch
from mismatch.report import style

SWAPS = {
    "infini12": "layer12:infini(segment=64)",
    "infini18": "layer18:infini(segment=64)",
    "nope16": "layer16:nope",
}
PROBES: dict[str, Any] = {"probes": ("passkey", "induction"), "samples": 8, "controls": ()}
HERE = Path(__file__).resolve().parent.parent / "figures" / "why_it_breaks"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    teacher = mismatch.load("smollm2")
    for name, swap in SWAPS.items():
        if not (args.output / f"{name}.json").exists():
            diagnose(teacher, swap, args.output / name)
        print(json.loads((args.output / f"{name}.json").read_text())["summary"], "\n")


def diagnose(teacher: mismatch.Teacher, swap: str, to: Path) -> None:
    """The probes, then the diagnosis beside them, written down."""
    with tempfile.TemporaryDirectory(prefix="mismatch-") as folder:
        asked = Path(folder) / "probes"
        mismatch.probe(teacher, swap=swap, output=str(asked), **PROBES)
        result = mismatch.diagnose(teacher, swap, earlier_run=str(asked))
    to.with_suffix(".png").write_bytes(style.to_bytes(result.figure(), "png"))
    result.shares.to_csv(to.with_suffix(".csv"), index=False)
    made = {
        "swap": swap, "verdict": result.verdict, "summary": result.summary(),
        "findings": [finding.as_dict() for finding in result.findings],
        "seconds": result.run.manifest["seconds"], "versions": mismatch.versions(),
    }  # fmt: skip
    to.with_suffix(".json").write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
