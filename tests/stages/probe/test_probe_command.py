"""`mismatch probe` and `mismatch.probe` from end to end on the toy; what is refused, and when."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from asking import Letters
from random_models import build
from wonderland import command, documents, jsonl

import mismatch
import mismatch.cli.parser
from mismatch import cli, config, registry
from mismatch.errors import ConfigError, DataError, ModelError, OutputError, UsageError
from mismatch.models import load as models
from mismatch.probes import PROBES
from mismatch.runs import folder as run
from mismatch.runs import table
from mismatch.runs.table import conditions
from mismatch.stages import runner
from mismatch.stages.probe.config import ProbeConfig
from mismatch.stages.probe.passkey_figure import passkey, passkey_data
from mismatch.stages.probe.words import headlines

SHORT = [name for name in PROBES if name not in ("passkey", "needles", "kv_lookup")]
"""The toy's context of 128 tokens has no room for prompts of the others."""


@pytest.fixture
def words(tmp_path, toy_folder):
    text = jsonl(tmp_path / "text.jsonl", documents(12))
    return [
        *("probe", "--model", str(toy_folder), "--device", "cpu", "--quiet", "--data", str(text)),
        *("--swap", "layer2:infini(segment=16)", "--seq-len", "64", "--samples", "3"),
    ]


@pytest.mark.pages
def test_a_run_folder_like_that_of_a_trace(words, tmp_path, capsys):
    folder = tmp_path / "run"
    more = ["--probes", ",".join(SHORT), "--output", str(folder)]
    assert cli.main([*words, *more]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(str(folder))
    for name in SHORT:
        assert f"\n{name}: {registry.probes().card(name).facts['headline']}, " in out
    assert "swap, without memory" in out and "not applicable" in out
    made = run.load_run(folder)
    assert made.manifest["status"] == "done" and made.manifest["kind"] == "probe"
    assert set(made.table["metric"]) == set(SHORT) == set(made.dictionary["metrics"])
    assert set(made.table["student"]) == {"teacher", "swap", "zero"}
    assert made.table.loc[made.table["student"] == "swap", "swapped"].any()
    assert set(made.table.loc[made.table["swapped"], "layer"]) == {2}
    page = (folder / "report.html").read_text()
    assert "Answers to the probes" in page and "mismatch probe --config" in page
    assert "not applicable" in page
    again = tmp_path / "again"
    assert (
        cli.main(["probe", "--config", str(folder / "config.yaml"), "--output", str(again), "-q"])
        == 0
    )
    assert (again / "metrics.parquet").read_bytes() == (folder / "metrics.parquet").read_bytes()
    with pytest.raises(OutputError, match="exists and is not empty"):
        runner.command(
            "probe", config.load(ProbeConfig, folder / "config.yaml", {"output": str(folder)})
        )
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "r.html")]) == 0


def test_json(words, capsys, tmp_path):
    more = ["--probes", "induction", "--json", "--output", str(tmp_path / "r")]
    assert cli.main([*words, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == str(tmp_path / "r")
    assert {row["student"] for row in found["probes"]} == {"swap", "zero"}
    row = found["probes"][0]
    assert row["metric"] == "induction" and row["difference"] == pytest.approx(
        row["value"] - row["teacher"]
    )


def passed(tmp_path, **more):
    """A run of passkeys on a tiny model with a tokenizer of letters."""
    given = {
        "probes": ("passkey",),
        "lengths": ("400", "440"),
        "depths": ("0", "0.5"),
        "samples": 2,
    }
    return mismatch.probe(
        (build("llama"), Letters()), swap="layer1:infini(segment=64)", **(given | more)
    )


@pytest.mark.pages
def test_passkey_in_python_and_its_picture(tmp_path):
    result = passed(tmp_path, output=str(tmp_path / "run"))
    data = passkey_data(result.table)
    assert list(data["student"].unique()) == ["teacher", "swap", "zero"]
    assert (
        len(data) == 3 * 4 and set(data["length"]) == {400, 440} and set(data["depth"]) == {0, 0.5}
    )
    rows = result.table[result.table["stat"] == "logprob[length=440,depth=0.5]"].set_index(
        "student"
    )
    cell = data[(data["length"] == 440) & (data["depth"] == 0.5)].set_index("student")
    assert (cell["logprob"] == rows["value"].loc[cell.index]).all()
    figure = passkey(result.table, plan=result.plan)
    assert len(figure.axes) == 4  # three students and the scale
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert len(texts) == 4
    for kind in ("png", "svg", "csv", "json"):
        assert (tmp_path / "run" / "figures" / f"passkey.{kind}").stat().st_size > 0
    assert "Segments of 64 tokens" in (tmp_path / "run" / "figures" / "passkey.svg").read_text()
    assert "segments=" in " ".join(result.table["stat"])
    assert "passkey: logprob, nats per key" in result.summary()


def test_what_was_not_asked_is_grey():
    frame = pd.DataFrame(
        [
            {"run_id": "r", "student": s, "metric": "passkey", "stat": f"{k}[length={n},depth=0]",
             "value": 0.5, "lo": 0.4, "hi": 0.6, "n": 5, "site": "logits", "mode": "free"}
            for s, n in (("teacher", 100), ("teacher", 200), ("swap", 100))
            for k in ("exact", "logprob")
        ]
    )  # fmt: skip
    figure = passkey(table.as_table(frame))
    hatched = [[p.get_hatch() for p in axis.patches] for axis in figure.axes[:2]]
    assert hatched == [[None, None], [None, "////"]]
    with pytest.raises(UsageError, match="the table has no passkey probe"):
        passkey(table.as_table(frame[:0]))


def test_headlines(toy):
    result = mismatch.probe(
        (toy.model, toy.tokenizer),
        swap="layer2:nope",
        probes=["order_sensitivity", "memory"],
        data=documents(16),
        seq_len=80,
        samples=16,
    )
    assert result.run_dir is None
    found = headlines(result.table)
    swap = found[(found["student"] == "swap") & (found["metric"] == "order_sensitivity")]
    assert [conditions(stat)[1]["keep"] for stat in swap["stat"]] == [1, 16, 64]  # by number
    assert (swap["value"] < 1e-5).all() and (swap["teacher"] > 1e-3).all()
    assert (swap["difference"] < 0).all() and (swap["difference_hi"] < 0).all()
    zero = found[(found["student"] == "zero") & (found["metric"] == "order_sensitivity")]
    assert not zero["applies"].any()
    assert "order_sensitivity" in result._repr_html_()


def test_a_student_that_is_there_already(toy):
    teacher = mismatch.load((toy.model, toy.tokenizer))
    student = mismatch.swap(teacher, "layer2:nope")
    given = {"probes": ("induction",), "samples": 3, "seq_len": 64}
    mine = mismatch.probe(teacher, student, **given)
    other = mismatch.probe(teacher, swap="layer2:nope", **given)
    assert mine.table.equals(other.table)
    with pytest.raises(UsageError, match="there is no swap"):
        mismatch.probe(teacher, **given)
    stranger = mismatch.load((build("llama"), Letters()))
    with pytest.raises(
        ModelError, match=r"not of the teacher's shape[\s\S]*made from this teacher"
    ):
        mismatch.probe(stranger, student, **given)


def test_text_is_read_only_when_a_probe_needs_it(toy):
    given = {"swap": "layer2:nope", "data": "no/such/text.txt", "samples": 2, "seq_len": 64}
    teacher = (toy.model, toy.tokenizer)
    assert len(mismatch.probe(teacher, probes=("induction",), **given).table)
    with pytest.raises(DataError, match=r"no/such/text\.txt"):
        mismatch.probe(teacher, probes=("heads",), **given)


@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        (["--seq-len", "161"], UsageError, "--seq-len 161 is longer than the context of .*: 128 tokens"),
        (
            ["--probes", "passkey", "--lengths", "256"],
            UsageError,
            r"a passkey prompt of 256 tokens is longer than the context of .*: 128 tokens"
            r"\n\nhint: take shorter --lengths",
        ),
        (["--probes", "passkey", "--lengths", "100"], UsageError, "passkey prompt of 100 tokens has no room"),
        (["--samples", "1"], ConfigError, "`--samples` must be int >= 2, got 1"),
        (["--probes", "indcution"], ConfigError, r"unknown probe `indcution`\n\nhint: did you mean `induction`"),
        (["--probes", "heads,heads"], ConfigError, "the probe `heads` is named twice"),
        (["--probes", "none"], ConfigError, "`probes` is empty"),
        (["--lengths", "a,256"], ConfigError, "`lengths` must be whole numbers >= 1, got `a`"),
        (["--depths", "0.5,1.5"], ConfigError, "`depths` must be numbers in 0..1, got `1.5`"),
        (["--depths", "0.5,0.5"], ConfigError, "`depths` names a value twice: 0.5, 0.5"),
        (["--swap", "layer9:nope"], UsageError, "layer"),
    ],
)  # fmt: skip
def test_refused_before_weights_are_loaded(words, monkeypatch, more, error, text):
    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models, "load", loaded)
    args = cli.parser.read([*words, *more])
    with pytest.raises(error, match=text):
        args.handler(args)


def test_too_few_documents(words, tmp_path, monkeypatch):
    few = jsonl(tmp_path / "few.jsonl", documents(2))
    args = cli.parser.read([*words, "--data", str(few), "--probes", "position_decoding"])
    with pytest.raises(UsageError, match=r"at least 4 documents, .* there are 2"):
        args.handler(args)


def test_a_failed_run_says_so(words, tmp_path, monkeypatch):
    from mismatch.probes.induction import Induction

    def broken(self, subjects):
        raise UsageError("no")

    monkeypatch.setattr(Induction, "run", broken)
    args = cli.parser.read([*words, "--probes", "induction", "--output", str(tmp_path / "r")])
    with pytest.raises(UsageError, match="no"):
        args.handler(args)
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", "no")
    assert "failed: no" in (tmp_path / "r" / "log.txt").read_text()


@pytest.mark.pages
def test_a_trace_with_probes_behind_it(toy, tmp_path):
    given = {"swap": "layer2:nope", "data": documents(4), "controls": (), "metrics": ("kl",)}
    sizes = {"tokens": 256, "seq_len": 64, "batch_size": 2}
    teacher = mismatch.load((toy.model, toy.tokenizer))
    plain = mismatch.trace(teacher, **given, **sizes)
    asked = ["induction", "order_sensitivity"]
    both = mismatch.trace(teacher, **given, **sizes, probes=asked)
    assert set(both.table["metric"]) == {"kl", *asked}
    mine = both.table[~both.table["metric"].isin(asked)].drop(columns="run_id")
    alone = plain.table.drop(columns="run_id")
    assert mine.reset_index(drop=True).equals(alone)  # the trace's own numbers do not know of it
    assert "\ninduction: nll_second, nats per token" in both.summary()
    assert "induction" not in plain.summary()
    page = both.to_html(tmp_path / "report.html").read_text()
    assert "Answers to the probes" in page and "Worst sites" in page


def test_probes_behind_a_trace_fit_into_the_context(tmp_path, toy_folder):
    words = command(tmp_path, toy_folder, "--probes", "passkey", "--output", str(tmp_path / "run"))
    assert cli.main(words) == 0
    table = mismatch.load_run(tmp_path / "run").table
    assert set(
        table[table["metric"] == "passkey"]["stat"].str.extract(r"length=(\d+)")[0].dropna()
    ) == {"128"}
