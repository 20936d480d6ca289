"""The config: strict, precedence flags > file > defaults, and one fingerprint for one set of numbers."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path

import numpy as np
import pytest
import yaml

from mismatch import config
from mismatch.config import fields, load
from mismatch.errors import ConfigError, SpecError, UsageError
from mismatch.stages.probe.config import ProbeConfig
from mismatch.stages.trace.config import TraceConfig

SWAP = ["layer12:zero"]


def made(**changes):
    return TraceConfig(**{"model": "m", "swap": SWAP, **changes})


def written(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return file


def test_the_fields_as_read_from_the_source_are_the_fields():
    assert list(fields(TraceConfig)) == [field.name for field in dataclasses.fields(TraceConfig)]
    hints = typing.get_type_hints(TraceConfig)
    for field in dataclasses.fields(TraceConfig):
        arg = fields(TraceConfig)[field.name]
        assert arg.doc, f"{field.name} has no text, and so no help"
        assert arg.optional == (type(None) in typing.get_args(hints[field.name]))
        if field.default is not dataclasses.MISSING:
            assert arg.default == field.default
            assert arg.accept(field.default) == field.default


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("tokens: 4k", "tokens", 4000),
        ("tokens: 1M", "tokens", 1_000_000),
        ("tokens: '128'", "tokens", 128),
        ("tokens: 1e3", "tokens", 1000),
        ("seq_len: 064", "seq_len", 64),  # YAML 1.1 reads 52
        ("controls: zero", "controls", ("zero",)),
        ("model: 3", "model", "3"),
        ("data: ~/texts", "data", str(Path.home() / "texts")),
        ("output: ~/run", "output", str(Path.home() / "run")),
    ],
)
def test_yaml_is_taken_as_it_is_meant(tmp_path, text, name, value):
    given = {"swap": SWAP} | ({} if name == "model" else {"model": "m"})
    assert getattr(load(TraceConfig, written(tmp_path, text), given), name) == value


def test_numbers_and_lists_of_yaml_for_other_commands(tmp_path):
    text = "lengths: [256, 1024]\nplanned_gate_lr: 1e-3\n"
    got = load(ProbeConfig, written(tmp_path, text), {"model": "m", "swap": SWAP})
    assert (got.lengths, got.planned_gate_lr) == (("256", "1024"), 1e-3)


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"tokens": np.int64(64)}, "tokens", 64),
        ({"tokens": np.array(64)}, "tokens", 64),
        ({"tokens": 1e3}, "tokens", 1000),
        ({"tokens": "4k"}, "tokens", 4000),
        ({"model": Path("a")}, "model", "a"),
        ({"output": Path("~/a")}, "output", str(Path.home() / "a")),
        ({"controls": "zero"}, "controls", ("zero",)),
        ({"controls": "zero,mean"}, "controls", ("zero", "mean")),
        ({"controls": (name for name in ["zero"])}, "controls", ("zero",)),
        ({"metrics": np.array(["kl", "cka"])}, "metrics", ("kl", "cka")),
        ({"swap": "layer1:zero; layer2:zero"}, "swap", ("layer1:zero; layer2:zero",)),
    ],
)
def test_values_of_python_are_taken_as_they_are_meant(given, name, value):
    found = getattr(made(**given), name)
    assert found == value and type(found) is type(value)


def test_ranges_and_numpy_numbers_are_words():
    probe = ProbeConfig(model="m", swap=SWAP, lengths=range(64, 192, 64), depths=np.array([0.5]))
    assert (probe.lengths, probe.depths) == (("64", "128"), ("0.5",))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": True}, "`tokens` must be int >= 1, got True"),
        ({"tokens": 10**5000}, "`tokens` must be int >= 1, finite and below 2^63, got a number of more "
         "than 4,300 digits"),
        ({"controls": 1.5}, "unknown mechanism `1.5`"),
        ({"model": "a\0b"}, "`model` must be text in Unicode without control characters, got 'a\\x00b'"),
        ({"data": "\udcff.txt"}, "`data` must be text in Unicode without control characters, got '\\udcff.txt'"),
        ({"data": "~nobody_of_this_name/x"}, "`data` names the home folder of nobody: ~nobody_of_this_name/x"),
        ({"run_name": "../x"}, "`run_name` must be the name of a folder under runs/, got `../x`\n\n"
         "hint: `output` takes a path"),
        ({"run_name": ".."}, "`run_name` must be the name of a folder under runs/, got `..`\n\n"
         "hint: `output` takes a path"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_a_sentence(given, message):
    with pytest.raises(ConfigError) as caught:
        made(**given)
    assert str(caught.value).split("\n\nhint: avail")[0].split("\n\nhint: did")[0] == message


HARMFUL = [
    "a: &a [x, x]\nb: [*a, *a]",
    "- " * 300 + "x",
    "a: " + "[" * 300 + "]" * 300,
    "a: !!python/object/apply:os.system [ls]",
    "a: !!int x",
    "a: !!timestamp 2026-99-99",
    "? [a]\n: b",
    "? {a: b}\n: b",
    "\x00",
    "a: b: c",
    "%YAML 9.9\n---\na: 1",
    "a" * 300_000,
]


@pytest.mark.parametrize("text", HARMFUL, ids=lambda text: text[:12])
def test_yaml_that_is_made_to_harm(tmp_path, text):
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load(TraceConfig, written(tmp_path, text), {"model": "m", "swap": SWAP})


def test_a_file_that_never_ends_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe is not an ordinary file"):
        load(TraceConfig, tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is not an ordinary file"):
        load(TraceConfig, tmp_path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("swap: layer1.attn:planted.parts:Evil", "planted.parts:Evil"),
        ('swap: ["layer1:parallel(planted.parts:Evil())"]', "planted.parts:Evil"),
        ("controls: [planted.parts:Evil]", "planted.parts:Evil"),
        ("metrics: planted.parts:Evil", "planted.parts:Evil"),
        ("probes: planted.parts:Evil", "planted.parts:Evil"),
    ],
)
def test_a_file_runs_no_code(tmp_path, planted, text, name):
    file, field = written(tmp_path, text), text.partition(":")[0]
    given = {"model": "m", "swap": None if field == "swap" else SWAP}
    with pytest.raises(ConfigError) as caught:
        load(TraceConfig, file, given)
    assert str(caught.value) == (
        f"`{field}` in {file} names `{name}`, a class that is not mismatch's own; importing it runs its code, which is "
        "off\n\nhint: read that code first, then --trust-remote-code (in Python: trust_remote_code=True)"
    )
    assert not planted.exists()
    trusted = load(TraceConfig, file, {**given, "trust_remote_code": True})
    assert name in str(getattr(trusted, field))
    if field != "swap":  # what the user types himself is his own
        typed = load(TraceConfig, file, {**given, field: "zero" if field == "controls" else name})
        assert getattr(typed, field)


@pytest.mark.parametrize("name", ["trust_remote_code", "allow_pickle"])
def test_a_file_cannot_allow_code(tmp_path, name):
    file = written(tmp_path, f"{name}: true")
    with pytest.raises(ConfigError) as caught:
        load(TraceConfig, file, {"model": "m", "swap": SWAP})
    flag = name.replace("_", "-")
    assert str(caught.value) == (
        f"`{name}` in {file} asks to run what comes with a model; a file cannot allow that\n\n"
        f"hint: look at the model first, then --{flag} (in Python: {name}=True)"
    )
    assert getattr(load(TraceConfig, file, {"model": "m", "swap": SWAP, name: True}), name)
    assert name not in made(**{name: True}).settings()


def test_precedence(tmp_path):
    file = written(tmp_path, "model: a\nswap: 'layer1:zero'\ntokens: 100\nseq_len: 64\n")
    flags = {
        "tokens": "200",
        "model": None,
        "controls": "none",
        "metrics": "kl, cka",
        "device_map": "none",
    }
    got = load(TraceConfig, file, flags)
    assert (got.model, got.tokens, got.seq_len, got.batch_size) == ("a", 200, 64, 1)
    assert (got.controls, got.metrics, got.device_map) == ((), ("kl", "cka"), None)
    assert load(TraceConfig, None, {"model": "a", "swap": SWAP}).controls == ("zero", "mean")


@pytest.mark.parametrize("changes", [{}, {"swap": ["layer1:zero", "norms:dyt"], "controls": ()}])
def test_yaml_there_and_back(tmp_path, changes):
    before = made(**changes)
    assert load(TraceConfig, written(tmp_path, before.to_yaml())) == before
    assert list(yaml.safe_load(before.to_yaml())) == list(fields(TraceConfig))


@pytest.mark.parametrize(
    "text",
    [
        "swap: 'layer12:zero; layer3:zero'",
        "swap: ['layer12:zero; layer3:zero']",
        "swap: ['layer12:zero', 'layer3:zero']",
        "swap: {layer12: zero, layer3: zero}",  # what YAML makes of unquoted text
        "swap:\n- layer12: zero\n- layer3:zero",
    ],
)
def test_forms_of_a_swap_in_yaml(tmp_path, text):
    got = load(TraceConfig, written(tmp_path, f"model: m\n{text}\n"))
    assert [str(clause) for clause in got.swap_spec.clauses] == ["layer12:zero", "layer3:zero"]


def test_lists_in_yaml_may_be_words(tmp_path):
    got = load(
        TraceConfig,
        written(tmp_path, "model: m\nswap: layer1:zero\ncontrols: none\nmetrics: kl,cka\n"),
    )
    assert (got.controls, got.metrics) == ((), ("kl", "cka"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tokns: 5",
            "unknown key `tokns` in FILE\n\nhint: did you mean `tokens`? available: "
            + ", ".join(sorted(fields(TraceConfig))),
        ),
        ("tokens: 1.5", "`tokens` in FILE must be int >= 1, got `1.5`"),
        ("tokens: true", "`tokens` in FILE must be int >= 1, got True"),
        ("tokens: [5]", "`tokens` in FILE must be int >= 1, got ['5']"),
        (
            "seed: 18446744073709551616",
            "`seed` in FILE must be int >= 0, finite and below 2^63, got 18446744073709551616",
        ),
        ("tokens: 0", "`tokens` in FILE must be int >= 1, got 0"),
        ("tokens:", "`tokens` in FILE must be int >= 1, got None"),
        ("model: true", "`model` in FILE must be str, got True"),
        (
            "dtype: float23",
            "`dtype` in FILE must be one of float32, bfloat16, float16, auto, got `float23`\n\n"
            "hint: did you mean `float32`? available: auto, bfloat16, float16, float32",
        ),
        ("controls: {zero: 1}", "`controls` in FILE must be a list of words, got {'zero': '1'}"),
        (
            "swap: [[12]]",
            "`swap` in FILE must be text, got ['12']\n\nhint: write `swap: [\"layer12:infini\"]`",
        ),
        ("seed: 1\nseed: 2", "FILE is not YAML, line 2: `seed` is there twice"),
        (
            "a: [",
            "FILE is not YAML, line 1: expected the node content, but found '<stream end>'",
        ),
        (
            "- a",
            "the config FILE must be a list of `key: value`, got list\n\n"
            "hint: see the config.yaml of any run folder",
        ),
    ],
)
def test_a_wrong_file(tmp_path, text, message):
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(TraceConfig, file, {"model": "m", "swap": SWAP})
    assert str(caught.value).replace(str(file), "FILE") == message
    assert caught.value.exit_code == 2


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(TraceConfig, tmp_path / "no.yaml")
    assert str(caught.value) == f"cannot read {tmp_path}/no.yaml: No such file or directory"
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ConfigError) as caught:
        load(TraceConfig, tmp_path / "bytes.yaml")
    assert str(caught.value) == f"{tmp_path}/bytes.yaml is not UTF-8 text: byte 7"


NO_SWAP = (
    'there is no swap\n\nhint: give one, such as --swap "layer12:infini", or a student that was trained elsewhere, '
    "--student"
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tokens": "0"}, "`--tokens` must be int >= 1, got 0"),
        ({"tokens": "many"}, "`--tokens` must be int >= 1, got `many`"),
        ({"seq_len": "1"}, "`--seq-len` must be int >= 2, got 1"),
        ({"swap": None}, NO_SWAP),
        ({"swap": []}, NO_SWAP),
        (
            {"student": "elsewhere/student"},
            "`swap` (layer12:zero) and `student` (elsewhere/student) both say what is compared with the model\n\n"
            "hint: give one of them; a checkpoint knows its own swap",
        ),
        ({"model": None}, "there is no model\n\nhint: give one, such as --model smollm2"),
        (
            {"output": "a", "run_name": "b"},
            "`output` (a) and `run_name` (b) both name the run folder\n\nhint: give one of them",
        ),
        ({"controls": "zero,zero"}, "the mechanism `zero` is named twice"),
        ({"metrics": ""}, "unknown metric ``"),
        ({"model": ""}, "`--model` is empty"),
        ({"selected_by": ""}, "`--selected-by` is empty"),
        ({"output": ""}, "`--output` is empty"),
    ],
)
def test_a_wrong_flag(flags, message):
    with pytest.raises(ConfigError) as caught:
        load(TraceConfig, None, {"model": "m", "swap": SWAP, **flags})
    assert str(caught.value).split("\n\nhint: available")[0] == message


def test_names_are_checked_before_anything_is_loaded():
    with pytest.raises(SpecError, match=r"^unknown mechanism `zro`\n  layer12:zro\n"):
        made(swap=["layer12:zro"])
    with pytest.raises(
        ConfigError, match=r"^unknown mechanism `zro`\n\nhint: did you mean `zero`\?"
    ):
        made(controls=("zro",))
    with pytest.raises(ConfigError, match=r"^unknown metric `ckaa`\n\nhint: did you mean `cka`\?"):
        made(metrics=("ckaa",))
    with pytest.raises(ConfigError, match=r"^`metrics` is empty"):
        made(metrics=())
    with pytest.raises(UsageError, match=r"^`batch_size` must be int >= 1, got 0$"):
        made(batch_size=0)


def test_lists_become_tuples_so_that_a_config_cannot_change():
    got = made(controls=["zero"])
    assert got.controls == ("zero",)
    assert hash(got)
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.tokens = 3


def test_fingerprint():
    one = made()
    assert one.fingerprint() == made().fingerprint()
    assert len(one.fingerprint()) == 16
    # Another spelling of the same swap, another place, another exit code: the same numbers.
    same = made(swap=["layers12-12 : zero()"], output="x", fail_on="high")
    assert same.fingerprint() == one.fingerprint()
    other = {
        "model": "n",
        "swap": ["layer13:zero"],
        "revision": "x",
        "dtype": "bfloat16",
        "device": "cpu",
        "device_map": "auto",
        "data": "x",
        "text_field": "x",
        "calibration_tokens": 5,
        "calibration_data": "x",
        "controls": (),
        "metrics": ("kl",),
        "sites": ("logits",),
        "probes": ("induction",),
        "backend": "nnsight",
        "selected_by": "x",
    }
    assert made(swap=(), student="a").fingerprint() != made(swap=(), student="b").fingerprint()
    for name, arg in fields(TraceConfig).items():
        if name in (*config.ELSEWHERE, "student"):
            continue
        value = other.get(name, not arg.default if arg.type == "bool" else None)
        value = arg.default + 1 if value is None else value
        assert made(**{name: value}).fingerprint() != one.fingerprint(), name


def test_folder():
    assert made().folder is None
    assert str(made(output="a/b").folder) == "a/b"
    assert str(made(run_name="b").folder) == "runs/b"
