"""Which score should choose the layers: does any beat even spacing, and how sure is any ranking?

    mismatch scan --model smollm2 --swap "sliding_window(64, 1)" --tasks text,needles,kv_lookup --controls none \\
        --tokens 2048 --seq-len 256 --samples 8 --length 328 --calibration-tokens 2048     13 minutes of CPU
    python analyses/selectors.py --scan RUN --layers 8 15    4 minutes once, then 5 a number of layers
    python analyses/selectors.py --draw                      table and figure of what is there

Every score chooses from one scan (replace-one KL on text, rise of the NLL of answers to needles and look-ups, HALO's
ratio), from giving one layer back (`restore_one`, no repair in between), or without looking (evenly spaced, three
draws at random). Each set is then replaced together, all on the same other documents and other keys, so scores are
compared by paired differences to even spacing. How sure each choice is comes from drawing documents and prompts again.
Nothing is repaired. Restored layers and rows are kept as JSON and not made twice. Writes figures/selectors/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import mismatch
from mismatch.runs.folder import Run
from mismatch.stages.opening import Opened
from mismatch.stages.plan.choose import choose
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.plan.measured import cells_of
from mismatch.stages.plan.numbers import Numbers, at_random, spaced
from mismatch.stages.plan.restore import restored
from mismatch.stages.plan.scores import ANSWERS
from mismatch.stages.plan.stage import Plan, Prepared
from mismatch.stages.plan.ways import sure
from mismatch.stages.scan.batches import measure
from mismatch.stages.scan.reliability import Overlap, Reliability
from mismatch.stages.scan.stage import sweep_of
from mismatch.stages.scan.unit_sums import UnitSums
from mismatch.stages.scan.words import done

HERE = Path(__file__).resolve().parent.parent / "figures" / "selectors"
TASKS = {
    "text": "text KL, nats per token",
    "induction": "copying, nats per token lost",
    "needles": "needles, nats per answer token lost",
    "kv_lookup": "look-up, nats per answer token lost",
}
CHOSEN = ("kl", "answer_nll", "restore_one", "halo")
SCORES = (*CHOSEN, "even", "random 0", "random 1", "random 2")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, help="run folder of a finished scan of one mechanism")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 15], help="to replace")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    if not args.draw:
        if args.scan is None:
            parser.error("--scan RUN, or --draw")
        scan = mismatch.load_run(args.scan)
        teacher = mismatch.load(scan.manifest["model"], device="cpu")
        for layers in args.layers:
            row(teacher, scan, layers, args.output)
    frame = table(args.output)
    frame.to_csv(args.output / "table.csv", index=False)
    figure(frame).savefig(args.output / "selectors.png", dpi=200)
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


def row(teacher: Any, scan: Run, layers: int, output: Path) -> None:
    """All scores at one number of layers: sets, how sure they are, and what each costs together."""
    (column,) = scan.plan.columns
    folder = output / "".join(c if c.isalnum() else "_" for c in column.name).strip("_")
    path = folder / f"{layers}.json"
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    opened = Opened(config_of(scan, column.name, layers), teacher=teacher)
    opened.fit()
    prepared = Plan("plan").prepare(opened)
    config = opened.config
    able = [task for task in done(scan.table, scan.plan) if task in ANSWERS]
    if not able:
        raise SystemExit("error: the model can answer none of the prompts of this scan")
    scanned = Numbers.of(scan.plan, [column.name], range(scan.plan.n_layers), able)
    back = given_back(teacher, config, prepared, folder / "restore_one.json")
    numbers = {score: back if score == "restore_one" else scanned for score in CHOSEN}
    sets: dict[str, tuple[int, ...]] = {}
    reliable: dict[str, Reliability | None] = {}
    for score, of in numbers.items():
        prices = of.scores(of.costs(), score)
        sets[score] = tuple(s.layer for s in choose(prices, layers))
        by = dataclasses.replace(config, score=score, scan=None)
        reliable[score] = sure(by, of, prices, sets[score], {})
    there = sorted({layer for _, layer in scanned.cells.values()})
    sets["even"] = spaced(there, layers)
    sets |= {f"random {seed}": at_random(there, layers, seed) for seed in range(3)}
    found = {
        "mechanism": column.name,
        "layers": layers,
        "n_layers": scan.plan.n_layers,
        "answers": able,
        "sets": sets,
        "reliability": {name: one and dataclasses.asdict(one) for name, one in reliable.items()},
        "costs": together(teacher, config, prepared, sets),
        "versions": mismatch.versions(),
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


def config_of(scan: Run, mechanism: str, layers: int) -> PlanConfig:
    """A plan from the scan, on as much text and as many prompts as it had."""
    same = ("model", "data", "seq_len", "samples", "length", "batch_size", "tokens", "seed")
    return PlanConfig(
        **{name: scan.config[name] for name in same},
        calibration_tokens=scan.config["calibration_tokens"],
        selection_tokens=scan.config["tokens"],
        mechanism=mechanism,
        layers=layers,
        scan=str(scan.path),
        controls=(),
    )


def given_back(teacher: Any, config: PlanConfig, prepared: Prepared, path: Path) -> Numbers:
    """What each layer regains when all are replaced; kept in a file."""
    cells = prepared.cells.cells
    if not path.exists():
        (task,) = (task for task in prepared.cells.tasks if task.name == "text")
        sweep = sweep_of(teacher, config, cells, prepared.cells.calibration)
        units = restored(sweep, cells, task, config)
        path.write_text(json.dumps(dataclasses.asdict(units)) + "\n")
    read = json.loads(path.read_text())
    units = UnitSums(
        read["over"], tuple(read["counts"]), {k: tuple(v) for k, v in read["sums"].items()}
    )
    places = {cell.key: (cell.name, cell.layer) for cell in cells if cell.layer is not None}
    return Numbers(places, {"text": units})


def together(
    teacher: Any, config: PlanConfig, prepared: Prepared, sets: dict[str, tuple[int, ...]]
) -> list[dict[str, Any]]:
    """What each set costs, on other documents and keys than chose it, and what more than even spacing, paired."""
    cells = {
        name: dataclasses.replace(
            cells_of(config, {str(config.templates[0]): layers}, teacher.layout)[0], name=name
        )
        for name, layers in sets.items()
    }
    every = sorted(cells.values(), key=lambda cell: cell.first)
    asked = tuple(task for task in prepared.tasks if task.name in TASKS)
    sweep = sweep_of(teacher, config, every, prepared.cells.calibration)
    sums = measure(sweep, every, asked, batch_tokens=config.batch_size * config.seq_len)
    rows = []
    for task in asked:
        for name, cell in cells.items():
            lost = sums.damage(cell, task)
            more = sums.minus_total(cell, [cells["even"]], task)
            rows.append(
                {
                    "task": task.name,
                    "score": name,
                    **{f"lost{end}": getattr(lost, at) for end, at in ENDS.items()},
                    **{f"more{end}": getattr(more, at) for end, at in ENDS.items()},
                }
            )
    return rows


ENDS = {"": "value", " lo": "lo", " hi": "hi"}


def rows_of(output: Path) -> list[dict[str, Any]]:
    """What was measured, by mechanism and number of layers."""
    paths = sorted(path for path in output.glob("*/*.json") if path.stem.isdigit())
    found = [json.loads(path.read_text()) for path in paths]
    return sorted(found, key=lambda one: (one["mechanism"], one["layers"]))


def table(output: Path) -> pd.DataFrame:
    """One line a mechanism, number of layers and score."""
    lines = []
    for one in rows_of(output):
        for name, chosen in one["sets"].items():
            known = one["reliability"].get(name)
            line: dict[str, Any] = {
                "mechanism": one["mechanism"],
                "layers": one["layers"],
                "score": name,
                "set": " ".join(map(str, chosen)),
                "same set": math.nan if known is None else known["same"],
                "kept": math.nan if known is None else known["kept"],
            }
            for other in CHOSEN:
                shared = Overlap.between(chosen, one["sets"][other], one["n_layers"])
                line |= {f"shared with {other}": shared.shared, f"p {other}": shared.p}
            for cost in one["costs"]:
                if cost["score"] == name:
                    numbers = {k: v for k, v in cost.items() if k not in ("task", "score")}
                    line |= {f"{cost['task']} {k}": v for k, v in numbers.items()}
            lines.append(line)
    return pd.DataFrame(lines)


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#333333", *["#b0b0b0"] * 3)


def figure(frame: pd.DataFrame) -> Figure:
    """What each score's set costs together, a row a mechanism and number of layers, a panel a task."""
    groups = list(frame.groupby(["mechanism", "layers"], sort=False))
    made = Figure(figsize=(11, 0.7 + 2.3 * len(groups)), layout="constrained")
    axes = made.subplots(len(groups), len(TASKS), squeeze=False, sharey=True)
    places = range(len(SCORES))
    for line, ((mechanism, layers), rows) in zip(axes, groups, strict=True):
        rows = rows.set_index("score").loc[list(SCORES)]
        for axis, (task, title) in zip(line, TASKS.items(), strict=True):
            value, lo, hi = (rows[f"{task} lost{end}"] for end in ENDS)
            for at, colour in zip(places, COLOURS, strict=True):
                band = [[value.iloc[at] - lo.iloc[at]], [hi.iloc[at] - value.iloc[at]]]
                axis.errorbar(
                    value.iloc[at], at, xerr=band, fmt="o", markersize=4, color=colour, lw=1.2
                )
            axis.axvline(value["even"], color="#999999", lw=0.8, ls=":")
            axis.axvline(0, color="#cccccc", lw=0.6, zorder=0)
            axis.set_title(title, fontsize=7.5)
            axis.tick_params(labelsize=7)
            axis.set_yticks(places, SCORES)
            axis.set_ylim(len(SCORES) - 0.5, -0.5)
        line[0].set_ylabel(f"{mechanism}\n{layers} layers", fontsize=7.5)
    made.suptitle(
        "SmolLM2-135M: layers chosen by each score, replaced together; 95 % intervals", fontsize=9
    )
    return made


if __name__ == "__main__":
    main()
