"""Files that are broken or made to harm, and what reads each of them. For `malformed_inputs.py`.

python analyses/spoilt_files.py     the kinds
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import yaml
from spoilt_inputs import KINDS, NASTY, SPECS, Case, kind

import mismatch


@kind("config.json")
def model_config(case: Case) -> None:
    model = case.copy("model")
    case.spoil_json(model / "config.json")
    if case.draw.random() < 0.7:
        case.command("check", "--swap", SPECS[0], *case.base.words, "--model", str(model))
    else:
        mismatch.load(model)


@kind("tokenizer")
def tokenizer(case: Case) -> None:
    model = case.copy("model")
    file = case.draw.choice(sorted(model.glob("tokenizer*.json")))
    case.spoil_json(file)
    mismatch.trace(
        model, "layer1:zero", data=str(case.base.text), tokens=64, seq_len=32, controls=()
    )


@kind("safetensors")
def weights(case: Case) -> None:
    model = case.copy("model")
    file = model / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if case.draw.random() < 0.3:
        case.write(file, case.spoil_bytes(data))
    else:
        spoilt = json.dumps(case.spoil(json.loads(header))).encode()
        size = case.draw.choice((len(spoilt), len(spoilt), len(spoilt), 2**63, 0, len(spoilt) + 9))
        case.write(file, size.to_bytes(8, "little") + spoilt + rest)
    mismatch.load(model)


@kind("index.json")
def index(case: Case) -> None:
    model = case.copy("sharded")
    case.spoil_json(model / "model.safetensors.index.json")
    mismatch.load(model)


@kind("checkpoint")
def checkpoint(case: Case) -> None:
    saved = case.copy("checkpoint")
    config = json.loads((saved / "config.json").read_bytes())
    if case.draw.random() < 0.7:
        config["mismatch"] = case.spoil(config["mismatch"])
        case.write(saved / "config.json", json.dumps(config))
    else:
        case.spoil_json(saved / "config.json")
    mismatch.load(saved)


@kind("weights that give inf")
def flipped(case: Case) -> None:
    model = case.copy("model")
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    value = case.draw.choice(
        (b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f")
    )  # inf, NaN, 3e38
    for _ in range(case.draw.choice((1, 20))):
        at = 8 + length + 4 * case.draw.randrange((len(data) - 8 - length) // 4)
        data[at : at + 4] = value
    case.write(file, bytes(data))
    verb = case.draw.choice(("trace", "scan", "probe", "diagnose", "plan", "repair"))
    words = {"scan": ("--swap", "nope"), "plan": ("--mechanism", "nope", "--layers", "1")}.get(
        verb, ("--swap", "layer1:zero")
    )
    small = (
        "--model",
        str(model),
        "--data",
        str(case.base.text),
        "--device",
        "cpu",
        "-q",
        "--output",
        str(case.folder / "out"),
    )
    case.command(
        verb,
        *words,
        *small,
        *("--seq-len", "32", "--config", str(case.write(case.folder / "c.yaml", SHORT[verb]))),
    )


SHORT = {
    "trace": "tokens: 64\ncontrols: none",
    "scan": "tokens: 64\ncontrols: none\namong: '0,1'\ntasks: text",
    "probe": "samples: 2\nlengths: 64\nprobes: passkey",
    "diagnose": "fit_tokens: 512\ntokens: 128\ncontrols: none",
    "plan": "tokens: 64\nselection_tokens: 64\namong: '0,1'",
    "repair": "tokens: 64\ntrain_tokens: 256\nval_tokens: 64\ntrace_tokens: 0\nstages: local\n"
    "epochs: 1\ncontrols: none\nself_generated: 0",
}
"""Settings of a small run of each command."""


@kind("run folder")
def run_folder(case: Case) -> None:
    run = case.copy(case.draw.choice(("run", "scan")))
    name = case.draw.choice(
        (
            "manifest.json",
            "manifest.json",
            "plan.json",
            "findings.json",
            "metrics.json",
            "config.yaml",
        )
    )
    if name == "config.yaml":
        case.write(run / name, yaml.safe_dump(case.spoil(yaml.safe_load((run / name).read_text()))))
    else:
        case.spoil_json(run / name)
    read_run(case, run)


@kind("metrics.parquet")
def parquet(case: Case) -> None:
    run = case.copy(case.draw.choice(("run", "scan")))
    file, draw = run / "metrics.parquet", case.draw
    if draw.random() < 0.3:
        case.write(file, case.spoil_bytes(file.read_bytes()))
    else:
        table = pq.read_table(file)
        name = draw.choice(table.column_names)
        at = table.column_names.index(name)
        if draw.random() < 0.3:
            table = table.drop_columns([name])
        else:
            plain = [v for v in NASTY if not isinstance(v, (list, dict))]
            other = draw.choice(
                (
                    [draw.choice(plain)] * len(table),
                    draw.choices(range(40_000), k=len(table)),
                    ["x:y"] * len(table),
                )
            )
            with contextlib.suppress(pa.ArrowException, OverflowError):
                kept = draw.random() < 0.7
                array = pa.array(other, table.schema.field(name).type if kept else None)
                table = table.set_column(at, table.schema.field(name) if kept else name, array)
        written = case.folder / "other.parquet"
        with contextlib.suppress(pa.ArrowException):  # no such table can be written
            pq.write_table(table, written)
            written.replace(file)
    read_run(case, run)


def read_run(case: Case, run: Path) -> None:
    """Hand a run folder to one of what reads it."""
    ways: tuple[Callable[[], Any], ...] = (
        lambda: case.command("report", str(run), "--output", str(case.folder / "page.html")),
        lambda: case.command(
            "compare", str(run), str(case.base.folder / "run"), "--output", str(case.folder / "page.html")
        ),
        lambda: case.command("diagnose", str(run), "--device", "cpu", "-q", "--output", "/dev/null/x"),
        lambda: case.command("trace", "--resume", str(run), "-q"),
        lambda: case.command("plan", "--mechanism", "nope; mlp:zero", "--layers", "1", "--scan", str(run), "--output",
                             "/dev/null/x",
                             "--among", "0,1", *case.base.words),
        lambda: [mismatch.load_run(run), mismatch.load_run(run).table, mismatch.load_run(run).plan],
    )  # fmt: skip
    case.draw.choices(ways, (1, 1, 2, 2, 2, 8))[0]()  # pages take seconds


@kind("text")
def text(case: Case) -> None:
    file, draw = case.folder / draw_name(case.draw), case.draw
    data = (
        case.base.text.read_bytes()[:20_000],
        b'{"text": "a b c"}\n' * 99,
        json.dumps({"text": NASTY[3]}).encode(),
    )
    harm = (
        b"\xff\xfe" + "a b".encode("utf-16-le") * 99,
        b"\x00" * 9999,
        b"[" * 99_999,
        b'{"text": 3}\n',
        b'{"text": "a"',
        b"",
    )
    case.write(file, draw.choice((*harm, case.spoil_bytes(draw.choice(data)))))
    where = draw.choice((file, file, file.parent, "x" * 5000, "a" * 300 + ".txt", "\udcff.txt"))
    case.command("check", "--swap", "layer1:zero", *case.base.words, "--data", str(where))


def draw_name(draw: random.Random) -> str:
    return draw.choice(("a.txt", "a.jsonl", "a.json", "a.TXT", "a", ".txt"))


@kind("rows")
def rows(case: Case) -> None:
    """Text in columns, compressed, as a chat, or as token ids."""
    draw = case.draw
    table = pa.table({"text": ["word of many words " * 9] * 60, "n": list(range(60))})
    if draw.random() < 0.5:
        name, cells = draw.choice(table.column_names), [draw.choice(NASTY) for _ in range(60)]
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeError):
            table = table.set_column(0, name, pa.array(cells))
    way = draw.choice((".parquet", ".csv", ".jsonl.gz", ".txt.zst", ".npy", ".bin", ".jsonl"))
    file = case.folder / f"a{way}"
    if way == ".parquet":
        pq.write_table(table, file)
    elif way == ".csv":
        with contextlib.suppress(pa.ArrowException):  # no list in a cell
            pyarrow.csv.write_csv(table, file)
    elif way == ".npy":
        numbers: list[Any] = draw.choice(
            ([0, 1, 2] * 999, [-1] * 99, [2**40] * 99, [0.5] * 99, [[]], ["a"])
        )
        np.save(file, np.array(numbers), allow_pickle=False)
    else:
        chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d " * 50}]
        lines = [json.dumps(case.spoil({"messages": chat})) for _ in range(60)]
        data = "\n".join(lines).encode()
        case.write(file, gzip.compress(data) if way.endswith(".gz") else data)
    if not file.exists() or draw.random() < 0.3:
        case.write(file, case.spoil_bytes(file.read_bytes() if file.exists() else b"text"))
    field = (
        ("--text-field", draw.choice(("text", "n", "messages", "x", "")))
        if draw.random() < 0.3
        else ()
    )
    case.command("check", "--swap", "layer1:zero", *case.base.words, "--data", str(file), *field)


@kind("layer lists")
def layer_lists(case: Case) -> None:
    """What `compare --ranking` reads."""
    lists = {"model": "model", "layers": 4, "replaced": {"one": [0, 1]}, "kept": {"two": [3]}}
    file, data = case.folder / "lists.yaml", yaml.safe_dump(case.spoil(lists))
    if case.draw.random() < 0.2:
        data = case.draw.choice(("", "- 1", "model", "layers: [", "null", "\x00", "a: " * 90))
    case.write(file, data)
    run = str(case.base.folder / "scan")
    case.command("compare", run, "--ranking", str(file))


@kind("documents of a run")
def documents_of_a_run(case: Case) -> None:
    """What `--selected-by` and `plan --scan` read: which documents an earlier run chose on."""
    run = case.copy(case.draw.choice(("run", "scan")))
    manifest = json.loads((run / "manifest.json").read_bytes())
    chosen = {"run": "before", "digests": ["0" * 16]}
    texts = {"texts": manifest["texts"], "chosen_on": chosen}
    key = case.draw.choice(list(texts))
    case.write(run / "manifest.json", json.dumps(manifest | texts | {key: case.spoil(texts[key])}))
    case.command(
        *("check", "--swap", SPECS[0], *case.base.words, "--selected-by", str(run)),
    )


@kind("settings of the Trainer")
def trainer_settings(case: Case) -> None:
    draw = case.draw
    names = (
        *("learning_rate", "max_steps", "num_train_epochs", "optim", "lr_scheduler_type", "fsdp"),
        *("warmup_steps", "weight_decay", "save_steps", "eval_strategy", "deepspeed", "report_to"),
        *("gradient_accumulation_steps", "bf16", "adam_beta1", "max_grad_norm", "logging_steps"),
        *("accelerator_config", "lr_scheduler_kwargs", "optim_args", "dataloader_num_workers"),
    )
    name = draw.choice((*names, *names, str(case.nasty())))
    value = draw.choice((str(case.nasty()), "-1", "0", "x", "", "nan", "{", "{}", "1e30", "True"))
    if name == "max_steps" or (name == "num_train_epochs" and value.startswith("1e3")):
        value = "-7"  # a million steps are no fault
    case.command(
        *case.base.training, "--trainer", f"{name}={value}", "--output", str(case.folder / "out")
    )


@kind("stopped run")
def stopped(case: Case) -> None:
    """What `--resume` goes on from: a trace with its sums, and a training with the Trainer's own checkpoint."""
    verb = case.draw.choice(("trace", "train"))
    run = case.copy(case.base.stopped[verb].name)
    file = case.draw.choice(sorted(each for each in run.rglob("*") if each.is_file()))
    if file.suffix == ".json" and case.draw.random() < 0.7:
        case.spoil_json(file)
    else:
        case.write(file, case.spoil_bytes(file.read_bytes()))
    case.command(verb, "--resume", str(run), "-q")


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("\n".join(KINDS))


if __name__ == "__main__":
    main()
