"""Does every probe read nothing where there is nothing to read?

    python analyses/probe_nulls.py                about 8 minutes of CPU, one thread
    python analyses/probe_nulls.py --probes needles,kv_lookup,copying     these alone; the rows of the others stay

Each probe is asked of SmolLM2 (`trained`), of the same model with what carries the answer put out of order (`shuffled`:
text permuted behind its first token, the first copy of repeated tokens permuted, the prompts of passkey, needles and
kv_lookup permuted up to their question), and of a model of the same architecture with random weights (`random`). A
layer swapped by `identity` must read exactly the teacher's own numbers (`identity_shift` = largest difference anywhere:
0). Where a control cannot say anything, its cell is empty and `why` says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

import mismatch
from mismatch.probes import PROBES, load_probe
from mismatch.probes.base import Probe, Setting, Subject, rows
from mismatch.stages.opening import Opened
from mismatch.stages.probe.config import ProbeConfig
from mismatch.stages.runner import stage_of

HERE = Path(__file__).resolve().parent.parent / "figures" / "probe_nulls"
IDENTITY = ".attn:identity"
ASKED = 16
"""Last tokens of a prompt in front of the key: they ask, and stay in order."""


@dataclass(frozen=True)
class Reading:
    """One number of a probe and what it should be where there is nothing.

    Attributes:
        probe, stat: of the table.
        chance: what knowing nothing reads: a number, or the stat that measures it.
        controls: those that can say something.
        why: what to know of the others, or of a control that does not read chance.
        of: whom it is read of: the teacher, or a swap that the probe is about.
        site: of the table; with a site other than logits it is that of the chosen layer.
    """

    probe: str
    stat: str
    chance: float | str
    controls: tuple[str, ...] = ("shuffled", "random")
    why: str = ""
    of: str = "teacher"
    site: str = "logits"


SEEN = (
    "the tokens of the copy are still there: a model that knows them without their order gains too"
)
MASK = "a causal mask writes position into any weights, so this is no evidence of use"
SHIFT = "reads 0 for every relative code, by design; an absolute code reads more (tests/probes/test_order.py)"
READINGS = (
    Reading("induction", "gain", 0.0, why=SEEN),
    Reading("induction", "nll_second", "nll_first", why=SEEN),
    Reading("heads", "best_induction", "1 / (i + 1)", site="attn_out"),
    Reading("heads", "best_previous", "1 / (i + 1)", ("random",), site="attn_out",
            why="such a head goes by place, whatever stands there: the order of the text is nothing to it"),
    Reading("copying", "nll_far", "nll_first", why=SEEN),
    Reading("passkey", "logprob", "logprob_absent"),
    Reading("needles", "logprob", "logprob_absent"),
    Reading("kv_lookup", "logprob", "logprob_absent"),
    Reading("position_decoding", "r2", "r2_shuffled", ("random",), site="resid_post",
            why=MASK + "; its own shuffled control is the chance"),
    Reading("position_decoding", "distance_r2", "distance_r2_shuffled", ("random",), site="resid_post",
            why=MASK + "; its own shuffled control is the chance"),
    Reading("order_sensitivity", "change[keep=1]", 0.0, ("random", "nope"), site="attn_out",
            why="the probe is a shuffle itself; what reads 0 is the same layer without RoPE (`nope`)"),
    Reading("generation", "agreed", 0.0, ("random",), of="swap",
            why="two models on one prompt: its order is nothing to their agreement"),
    Reading("shift_invariance", "kl[shift=1]", 0.0, ("random",), why=SHIFT),
    Reading("shuffle_sensitivity", "kl[near=16]", 0.0, ("random",),
            why="the probe is a shuffle itself"),
    Reading("rope_bands", "norm_share[band=4]", 0.25, ("random",), site="attn_out",
            why="norms of queries and keys hardly depend on the order of the text"),
    Reading("memory", "kl_change[without=memory]", 0.0, of="swap",
            why="of infini(segment=32); the order inside a segment is nothing to a sum of its keys"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=16, help="for the probes of one layer")
    parser.add_argument("--length", type=int, default=256, help="tokens of a passkey prompt")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens of a window of text")
    parser.add_argument("--probes", default=",".join(PROBES), help="which of them are asked")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = mismatch.load(args.model)
    config = ProbeConfig(
        model=args.model, swap=(f"layer{args.layer}{IDENTITY}",), seq_len=args.seq_len,
        lengths=(str(args.length),), depths=("0.1",),
    )  # fmt: skip
    opened = Opened(config, teacher=teacher)
    setting = stage_of("probe").prepare(opened).asked.setting
    asked = args.probes.split(",")
    found = nulls(teacher, setting, args.layer, asked)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "nulls.csv"
    if set(asked) < set(PROBES) and file.exists():
        others = pd.read_csv(file)
        found = pd.concat([others[~others["probe"].isin(asked)], found])
        order = found["probe"].map(list(PROBES).index)
        found = found.iloc[np.argsort(order, kind="stable")]
    found.to_csv(file, index=False)
    made = {**vars(args), "output": None, "versions": mismatch.versions()}
    (args.output / "nulls.json").write_text(json.dumps(made, indent=2) + "\n")
    print(found.to_string(index=False))


def nulls(
    teacher: mismatch.Teacher, setting: Setting, layer: int, names: Sequence[str] = tuple(PROBES)
) -> pd.DataFrame:
    """Every reading of `READINGS` of these probes in each of its cases, with intervals."""
    untrained = random_weights(teacher)
    every: list[dict[str, Any]] = []
    for name in names:
        mine = [reading for reading in READINGS if reading.probe == name]
        assert mine, f"{name} has no null"
        plain = load_probe(name)(setting)
        mixed = shuffled(name, setting)
        swap = ":infini(segment=32)" if name == "memory" else IDENTITY
        tables = {
            "identity": ask(plain, subjects(teacher, layer, IDENTITY)),
            "trained": ask(plain, subjects(teacher, layer, swap)),
            "random": ask(plain, subjects(untrained, layer, swap)),
        }
        if any("shuffled" in reading.controls for reading in mine):
            tables["shuffled"] = ask(mixed, subjects(teacher, layer, swap))
        if any("nope" in reading.controls for reading in mine):
            tables["nope"] = ask(plain, subjects(teacher, layer, ":nope"))
        if name == "generation":
            # The swap is the model itself, then another model of the same shape.
            tables["trained"] = tables["identity"]
            other = Subject("swap", untrained.layout, 0)
            tables["random"] = ask(plain, [Subject.teacher(teacher.layout), other])
        every += [row(reading, tables, setting, layer) for reading in mine]
    return pd.DataFrame(every)


def row(
    reading: Reading, tables: dict[str, pd.DataFrame], setting: Setting, layer: int
) -> dict[str, Any]:
    shifts = tables["identity"]
    shifts = shifts[shifts["stat"].str.contains("_minus_teacher")]["value"].dropna().abs()
    found: dict[str, Any] = {"probe": reading.probe, "stat": reading.stat}
    for case in ("trained", "shuffled", "random", "nope"):
        read = None
        if case == "trained" or case in reading.controls:
            who = "swap" if case == "nope" else reading.of
            read = value(tables[case], reading, reading.stat, who, layer)
        for part in ("value", "lo", "hi"):
            found[case if part == "value" else f"{case}_{part}"] = (
                np.nan if read is None else read[part]
            )
    chance = reading.chance
    if chance == "1 / (i + 1)":
        length = setting.text.shape[1] if "previous" in reading.stat else 2 * 64 + 1
        start = 1 if "previous" in reading.stat else length - 63
        chance = float(np.mean(1 / (np.arange(start, length) + 1)))
    elif isinstance(chance, str):
        chance = float(value(tables["trained"], reading, chance, reading.of, layer)["value"])
    return found | {
        "chance": chance,
        "identity_shift": float(shifts.max()) if len(shifts) else np.nan,
        "why": reading.why,
    }


def value(table: pd.DataFrame, reading: Reading, stat: str, who: str, layer: int) -> pd.Series:
    """The one row of a reading; of a layer's own numbers that of the chosen layer."""
    here = table[(table["student"] == who) & (table["stat"] == stat)]
    here = here[(here["site"] == reading.site) & here["head"].isna()]
    if here["layer"].notna().any():
        here = here[here["layer"] == layer]
    assert len(here) == 1, f"{reading.probe}: {stat} of {who} is there {len(here)} times"
    return here.iloc[0]


def ask(probe: Probe, asked: list[Subject]) -> pd.DataFrame:
    swapped = {subject.name: subject.swapped for subject in asked}
    return pd.DataFrame(rows("probe", probe.run(asked), swapped))


def subjects(teacher: mismatch.Teacher, layer: int, swap: str) -> list[Subject]:
    """The teacher; and a student, so that a layer's own numbers are read too."""
    student = mismatch.swap(teacher, f"layer{layer}{swap}")
    return [Subject.teacher(teacher.layout), Subject.of(student)]


def random_weights(teacher: mismatch.Teacher) -> mismatch.Teacher:
    """The same architecture as it is before any training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(teacher.model.config).eval()
    return mismatch.load((model, teacher.tokenizer))


def shuffled(name: str, setting: Setting) -> Probe:
    """The probe with what carries the answer put out of order."""
    draw = np.random.default_rng(0)
    text = setting.text.copy()
    for window in text:
        window[1:] = draw.permutation(window[1:])
    probe = load_probe(name)(replace(setting, text=text))
    for ids, part in _carriers(probe):
        for line in ids:
            line[part] = draw.permutation(line[part])
    return probe


def _carriers(probe: Probe) -> Iterator[tuple[np.ndarray, slice]]:
    """Ids that a probe made itself, and the part of them that is to be permuted."""
    if hasattr(probe, "half"):
        ids = getattr(probe, "twice" if hasattr(probe, "twice") else "ids")
        yield ids, slice(ids.shape[1] - 2 * probe.half, ids.shape[1] - probe.half)
    for half, (ids, start) in getattr(probe, "spans", {}).items():
        yield ids, slice(start, start + half)
    alone = [probe.prompts] if hasattr(probe, "prompts") else []
    for prompts in (*getattr(probe, "cells", {}).values(), *alone):
        first = int(prompts.scored.any(0).argmax())
        yield prompts.ids, slice(1, first - ASKED)


if __name__ == "__main__":
    main()
