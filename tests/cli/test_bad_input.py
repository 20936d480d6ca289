"""Bad input through the command line: the whole text, the exit code, nothing written, no weights loaded in vain."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from wonderland import documents, jsonl

from mismatch import cli
from mismatch.texts.demo import fetch

SWAP = "layer1:zero"


@pytest.fixture
def text(tmp_path):
    return jsonl(tmp_path / "text.jsonl", documents(4))


@pytest.fixture
def say(tmp_path, monkeypatch, capsys, toy_folder, text):
    """Run `mismatch trace` with a swap and settings; gives exit code and stderr, and asks that nothing was written."""
    monkeypatch.chdir(tmp_path)

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    def run(*more, swap=SWAP, model=toy_folder, data=text, loads=False, verb="trace"):
        words = [verb, "--model", str(model), "--data", str(data), "--swap", swap]
        words += [
            "--device",
            "cpu",
            "-q",
            "--controls",
            "none",
            "--tokens",
            "256",
            "--seq-len",
            "64",
        ]
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            if not loads:
                # Where the weights of every model come through.
                patch.setattr("mismatch.models.load._model", load)
            code = cli.main([*words, *map(str, more)])
        out, err = capsys.readouterr()
        assert out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return code, err

    return run


SPECS = [
    (
        "layer1infini",
        "expected `:` and a mechanism after `layer1`, got `infini`\n  layer1infini\n        ^\n\n"
        "hint: write `target:mechanism`, such as `layer12:infini`\n",
    ),
    (
        "layer9:zero",
        "layer 9 does not exist: the model has 4 layers (0-3)\n  layer9:zero\n       ^",
    ),
    (
        "layers2-5:zero",
        "layer 5 does not exist: the model has 4 layers (0-3)\n  layers2-5:zero\n        ^",
    ),
    (
        "layer1:infni",
        "unknown mechanism `infni`\n  layer1:infni\n         ^\n\nhint: did you mean `infini`?",
    ),
    (
        "layer1:infini(segmnt=4)",
        "`infini` has no argument `segmnt`\n  layer1:infini(segmnt=4)\n                ^\n\n"
        "hint: did you mean `segment`?",
    ),
    (
        "layer1:infini(segment=0)",
        "`segment` must be int >= 1, got 0\n  layer1:infini(segment=0)\n                        ^",
    ),
    (
        "layer1.norm1_post:zero",
        "llama has no slot `norm1_post`\n  layer1.norm1_post:zero\n         ^\n\nhint: slots of llama: ",
    ),
    (
        "layer1:zero; layer1:infini",
        "layer 1 `attn` is replaced twice: by `zero` and `infini`\n",
    ),
]


@pytest.mark.parametrize("verb", ["trace", "check"])
@pytest.mark.parametrize("swap, text_", SPECS, ids=[s for s, _ in SPECS])
def test_swap(capsys, monkeypatch, tmp_path, toy_folder, verb, swap, text_):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mismatch.models.load._model", None)
    words = [verb, "--model", str(toy_folder), "--swap", swap, "--seq-len", "64"]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {text_}")
    assert list(tmp_path.iterdir()) == []


def test_slot_that_the_family_lacks(say, tmp_path, tiny):
    tiny("gpt2").config.save_pretrained(tmp_path / "gpt2")
    code, err = say(model=tmp_path / "gpt2", swap="layer1.q_proj:identity")
    assert code == 2
    assert err == (
        "error: gpt2 has no slot `q_proj` (query, key and value are one fused projection)\n"
        "  layer1.q_proj:identity\n         ^\n\n"
        "hint: slots of gpt2: norm1, attn, norm2, mlp, o_proj, block, final_norm\n"
    )


@pytest.mark.parametrize(
    "more, text_",
    [
        (("--tokens", "0"), "`--tokens` must be int >= 1, got 0"),
        (("--tokens", "many"), "`--tokens` must be int >= 1, got `many`"),
        (("--batch-size", "-1"), "`--batch-size` must be int >= 1, got -1"),
        (
            ("--tokens", "32"),
            "--tokens 32 is less than one window of --seq-len 64\n\n"
            "hint: take --tokens 64 or more, or a smaller --seq-len",
        ),
        (
            ("--seq-len", "4096"),
            "--seq-len 4096 is longer than the context of {model}: 128 tokens\n\nhint: take --seq-len 128 or less",
        ),
        (("--metrics", "kkl"), "unknown metric `kkl`\n\nhint: did you mean `kl`?"),
        (("--controls", "zro"), "unknown mechanism `zro`\n\nhint: did you mean `zero`?"),
        (
            ("--output", "a", "--run-name", "b"),
            "`output` (a) and `run_name` (b) both name the run folder\n\nhint: give one of them",
        ),
        (("--config", "no.yaml"), "cannot read no.yaml: No such file or directory"),
        (
            ("--resume", "no_run"),
            "cannot read no_run/config.yaml: No such file or directory",
        ),
        (
            ("--calibration-data", "no_text", "--controls", "mean"),
            "no text no_text: neither a file or folder nor one of ",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_settings(say, toy_folder, more, text_):
    code, err = say(*more)
    assert code == 2
    assert err.startswith("error: " + text_.format(model=toy_folder))


def test_model_that_is_not_there(say, tmp_path, monkeypatch):
    assert say(model="./nothing") == (
        2,
        "error: no model folder ./nothing\n\n"
        "hint: a folder, a hub id such as `owner/name`, or one to fetch: smollm2, glassllm, gemma3-270m\n",
    )
    code, err = say(model="smolm2")
    assert (code, err) == (
        2,
        "error: no model is called 'smolm2'\n\nhint: did you mean `smollm2`?\n",
    )
    monkeypatch.setenv("MISMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "find", lambda name: None)
    code, err = say(model="smollm2")
    assert code == 2
    assert err.startswith("error: the model smollm2 is not here yet: neither in ")
    assert "\n\nhint: mismatch fetch smollm2   (" in err
    code, err = say(data="wiki")
    assert code == 2
    assert err.startswith("error: the text wiki is not here yet: neither in ")
    assert "\n\nhint: mismatch fetch wiki   (" in err


def test_model_folders_that_are_refused(say, model_folder):
    folder = model_folder()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[:-1000])
    assert say(model=folder) == (
        2,
        f"error: {weights} is truncated: {len(whole) - 1000:,} bytes, its header requires {len(whole):,}\n\n"
        "hint: get the file again\n",
    )
    weights.write_bytes(whole[:20])
    code, err = say(model=folder)
    assert code == 2
    assert err.startswith(f"error: {weights} is truncated or not safetensors: 20 bytes")
    weights.unlink()
    assert say(model=folder) == (
        2,
        f"error: {folder} has a config but no weights: neither model.safetensors nor "
        "model.safetensors.index.json\n\n"
        "hint: was the download cut off, or are they Git LFS files that were not pulled?\n",
    )
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert say(model=folder) == (
        2,
        f"error: {folder} holds its weights only as pickle (pytorch_model.bin), which is refused: a pickle can run "
        "code when it is read\n\nhint: convert it to safetensors, or, when you trust where it comes from, "
        "--allow-pickle (in Python: allow_pickle=True)\n",
    )
    config = json.loads((folder / "config.json").read_text())
    own = config | {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(own))
    assert say(model=folder) == (
        2,
        f"error: {folder}: model_type 'mine' is not one of transformers' own; the folder would have to run its own "
        "code (mine.Model), which is off\n\nhint: read that code first, then --trust-remote-code "
        "(in Python: trust_remote_code=True)\n",
    )
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    code, err = say(model=folder)
    assert code == 2
    assert err.startswith("error: model family `mamba` is not known: no layout names its blocks")
    (folder / "config.json").write_text("{")
    code, err = say(model=folder)
    assert code == 2
    assert err.startswith(f"error: {folder / 'config.json'} is not valid JSON")
    (folder / "config.json").unlink()
    code, err = say(model=folder)
    assert code == 2
    assert err.startswith(
        f"error: {folder} has no config.json, so it is not a transformers model folder"
    )


def test_texts_that_are_refused(say, tmp_path):
    """Before the weights, also those that only the tokenizer finds too short."""
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert say(data=empty) == (2, f"error: {empty} holds no text\n\nhint: is it the right file?\n")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9 au lait".encode("latin-1"))
    assert say(data=latin) == (
        2,
        f"error: {latin} is not UTF-8: byte 3 is 0xe9\n\n"
        "hint: convert it: iconv -f LATIN1 -t UTF-8 latin.txt (if that is what it is)\n",
    )
    short = tmp_path / "short.txt"
    short.write_text("Alice was tired.")
    code, err = say(data=short)
    assert code == 2
    assert err.startswith(
        f"error: {short}: no document fills a window of --seq-len 64; the longest has "
    )
    assert "\n\nhint: take --seq-len " in err
    code, err = say(data="./no/such.txt")
    assert code == 2
    assert err.startswith(
        "error: no text ./no/such.txt: neither a file or folder nor one of sotu, wiki"
    )
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": 3}\n')
    assert say(data=broken) == (
        2,
        f"error: {broken}, line 2, `text` is a int: neither text, nor messages, nor token ids\n\n"
        "hint: text is a string, a chat a list of messages, token ids a list of whole numbers\n",
    )


def test_text_in_both(say, tmp_path, text):
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text().splitlines()[0] + "\n")
    code, err = say("--calibration-data", other, "--controls", "mean")
    assert code == 2
    assert err.startswith(f"error: calibration ({other}) and evaluation ({text}) share 1 document")


def test_output_that_is_there(say, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    assert say("--output", taken) == (
        2,
        f"error: the folder {taken} exists and is not empty\n\n"
        "hint: give --output another path, or go on with its run by --resume, or replace its run by --overwrite\n",
    )
    code, err = say("--output", taken, "--overwrite")
    assert code == 2
    assert err == (
        f"error: {taken} is not a run folder and is not overwritten: it holds thesis.tex\n\n"
        "hint: give --output another path\n"
    )
    assert (taken / "thesis.tex").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("x")
    code, err = say("--output", file)
    assert (code, err) == (
        2,
        f"error: {file} is a file, not a folder\n\nhint: give --output another path\n",
    )


def test_device_that_is_not_there(say):
    code, err = say("--device", "cuda:7")
    assert code == 2
    assert err.startswith("error: device cuda:7 cannot be used: ")


def test_wheel_with_the_wrong_hash(tmp_path, monkeypatch, capsys):
    """What arrives is not what was pinned: nothing gets into the cache. (With the real pip: tests/texts/demo.)"""
    cache = tmp_path / "cache"
    monkeypatch.setenv("MISMATCH_CACHE", str(cache))
    monkeypatch.setattr("mismatch.texts.demo.fetch.installed", lambda name: None)

    def arrives(command, package):
        (Path(command[-1]) / "glassllm-1-py3-none-any.whl").write_bytes(b"something else")

    monkeypatch.setattr("mismatch.texts.demo.wheel._run", arrives)
    assert cli.main(["fetch", "glassllm", "-q"]) == 1
    out, err = capsys.readouterr()
    digest = hashlib.sha256(b"something else").hexdigest()
    assert out == ""
    assert err == (
        f"error: glassllm: glassllm-1-py3-none-any.whl has sha256 {digest}, pinned is "
        f"{fetch.SOURCES['glassllm'].wheel_sha256}\n\nhint: the file was changed on its way here; nothing was kept\n"
    )
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_no_room_for_the_folder_itself(say, tmp_path, monkeypatch, toy_folder):
    closed = tmp_path / "closed"
    closed.mkdir()

    def mkdir(self, *args, **kwargs):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    code, err = say("--output", closed / "run", loads=True)
    assert code == 1
    assert err == (
        f"error: could not make the folder {closed / 'run'}: Permission denied\n\n"
        "hint: no permission; give --output a folder that you may write\n"
    )


@pytest.mark.pages
def test_token_text_is_escaped(toy_folder, tmp_path, capsys):
    """Names and settings of a run come from outside; in its report they are text."""
    name = "<script>alert(1)</script>"
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"text": f"{name} {t}"}) + "\n" for t in documents(3)))
    folder = tmp_path / "<img src=x onerror=alert(2)>"
    folder.mkdir()
    moved = folder / "text.jsonl"
    moved.write_text(data.read_text())
    words = [
        "trace",
        "--model",
        str(toy_folder),
        "--data",
        str(moved),
        "--swap",
        SWAP,
        "-q",
        "--device",
        "cpu",
    ]
    words += [
        "--controls",
        "none",
        "--tokens",
        "256",
        "--seq-len",
        "64",
        "--output",
        str(tmp_path / "run"),
    ]
    assert cli.main(words) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
