"""Report, comparison and summary: what they say, and that nothing in them can act."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
import synthetic as s

from mismatch.errors import RunError, UsageError
from mismatch.report import quantity as q
from mismatch.report.page import Html, tag
from mismatch.report.words import columns, plan_lines
from mismatch.runs.folder import RunFolder, load_run
from mismatch.stages.reporting import write_html
from mismatch.stages.trace.report.comparison import compare, labels, together
from mismatch.stages.trace.report.words import summary, verdict, worst_sites

EVIL = '<script>alert("$x^$")</script>'

pytestmark = pytest.mark.pages


def make(path, table=None, swap="layer12:infini(segment=256)", findings=None, **manifest):
    folder = RunFolder.create(
        "smollm2", swap, {"swap": [swap]}, kind="trace", output=path, command=["mismatch"]
    )
    folder.write_plan(s.PLAN)
    folder.write_findings(s.FINDINGS if findings is None else findings)
    folder.write_table(s.synthetic(layers=4, swapped=(1,)) if table is None else table)
    folder.finish("done", **{"fingerprints": {"evaluation": "ab12"}, **manifest})
    return folder.path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def text(run_dir):
    return write_html(run_dir).read_text()


class Reader(HTMLParser):
    """The tags, the addresses and the words of a page; complains about unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words, self.open, self.ids = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        self.ids += [v for k, v in attributes if k == "id"]
        if name not in ("meta", "img"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_is_one_file_that_loads_nothing(text):
    page = Reader(text)
    assert page.tags.count("svg") == 4 + 2  # and two views of the heatmap
    inside = {a for a in page.addresses if a.startswith("#")}
    assert all(a.startswith("data:image/png;base64,") for a in set(page.addresses) - inside)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\([^#]|@import", text)
    assert "default-src 'none'" in text


def test_ids_are_used_once_and_what_is_referred_to_is_there(text):
    page = Reader(text)
    assert len(page.ids) == len(set(page.ids))
    wanted = {a[1:] for a in page.addresses if a.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= set(page.ids)


def test_the_page_runs_its_own_script_and_no_other(text):
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall('Content-Security-Policy" content="([^"]*)"', text)
    assert f"script-src 'sha256-{known}'" in policy
    assert not re.search(r"\son\w+=", text)


def test_the_verdict_comes_first_and_all_parts_are_there(text):
    order = ["The swap moves the output by", "What was replaced", "Findings", "Figures",
             "Worst sites", "Floors", "cannot see", "How to do it again", "Environment"]  # fmt: skip
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    words = " ".join(Reader(text).words)
    assert "0.0612" in words
    assert "[0.0575, 0.0649]" in words
    assert "mismatch explain infini" in words
    assert "model.layers.12.self_attn" in words
    for metric in ("cka_minibatch", "rel_l2"):
        assert s.DICTIONARY["metrics"][metric]["blind"].split(";")[0] in words


def test_text_from_outside_is_escaped(tmp_path):
    finding = {"severity": "high", "title": EVIL, "text": EVIL, "evidence": {}, "next": EVIL}
    table = s.synthetic(layers=3, swapped=(1,))
    path = make(
        tmp_path / "evil", table, EVIL, findings=[finding], documents={EVIL: EVIL}, error=[EVIL]
    )
    page = Reader(write_html(path).read_text())
    assert page.tags.count("script") == 1
    assert sum(EVIL in words for words in page.words) >= 7
    together = Reader(compare([path, path], tmp_path / "c.html").read_text())
    assert together.tags.count("script") == 1


def test_attributes_are_escaped():
    assert (
        tag("p", Html("<b>"), title='"><script>') == '<p title="&quot;&gt;&lt;script&gt;"><b></p>'
    )


def test_a_table_without_controls_floor_or_metrics_still_gives_a_report(tmp_path):
    table = s.synthetic(layers=4, swapped=(1,), controls=()).query(
        "student == 'swap' and metric == 'norm_ratio'"
    )
    page = write_html(make(tmp_path / "bare", table), tmp_path / "elsewhere.html").read_text()
    assert "The output shift was not measured." in page
    assert page.count("Not drawn: ") == 3
    assert not (tmp_path / "bare" / "report.html").exists()
    assert not (tmp_path / "bare" / "figures").exists()


def test_the_report_of_no_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no run in"):
        write_html(tmp_path)


def test_the_figures_of_a_run_are_written_with_their_numbers(run_dir, text):
    names = {p.name for p in (run_dir / "figures").iterdir()}
    plates = ("output_shift", "shift_heatmap", "depth_profile", "position")
    assert names == {f"{p}.{kind}" for p in plates for kind in ("png", "svg", "csv", "json")}
    for plate in plates:
        assert (run_dir / "figures" / f"{plate}.svg").read_bytes().startswith(b"<?xml")
    cells = pd.read_csv(run_dir / "figures" / "shift_heatmap.csv")
    assert set(cells["metric"]) == {"rel_l2", "cka_minibatch", "norm_ratio", "frechet", "lens_kl"}
    made = json.loads((run_dir / "figures" / "position.json").read_text())
    assert made["by"] == "mismatch.stages.trace.report.position_figure.by_position"
    assert made["run_id"] in text


def test_the_verdict_follows_the_interval_of_the_difference():
    table = s.synthetic(layers=4, swapped=(1,))
    assert verdict(table) == (
        "The swap moves the output by 0.0612 [0.0575, 0.0649] nats per token: "
        "worse than deleting the module (0.0537) and replacing it by its mean (0.0475)."
    )
    at = table["stat"] == "mean_minus_zero"
    table.loc[at, ["lo", "hi"]] = [-0.001, 0.01]
    assert "not told apart from deleting the module (0.0537), worse than replacing" in verdict(
        table
    )
    table.loc[at, ["lo", "hi"]] = [float("nan")] * 2
    assert "no interval of the difference to deleting the module (0.0537), worse than" in verdict(
        table
    )
    table.loc[at, ["lo", "hi"]] = [-0.02, -0.01]
    assert "better than deleting the module (0.0537)" in verdict(table)


def test_the_verdict_of_no_shift():
    assert verdict(s.identity()) == "The swap changes nothing: the output KL is exactly 0."
    assert "not more than the floor" in verdict(s.synthetic(layers=4, swapped=(1,), floor=1e6))
    assert "No control was run" in verdict(s.synthetic(layers=4, swapped=(1,), controls=()))


def test_the_worst_sites_are_the_largest_of_the_table():
    table = s.synthetic()
    worst = worst_sites(table)
    swap = table[(table["student"] == "swap") & (table["metric"] == "rel_l2")]
    swap = swap[swap["site"] != "resid_pre"]
    assert list(worst["rel_l2"]) == sorted(swap["value"], reverse=True)[:10]
    first = worst.iloc[0]
    mean = table[
        (table["student"] == "mean") & (table["metric"] == "rel_l2")
        & (table["layer"] == first["layer"]) & (table["site"] == first["site"])
    ]  # fmt: skip
    assert first["share_of_mean"] == pytest.approx(first["rel_l2"] / mean["value"].item())
    assert worst_sites(s.identity()).empty


def test_the_summary_is_aligned_and_ends_with_the_path(tmp_path):
    text = summary(s.synthetic(), s.PLAN, s.FINDINGS, tmp_path)
    lines = text.splitlines()
    assert lines[-1] == str(tmp_path)
    assert "layer 12 attn: LlamaAttention -> infini(segment=256, update=linear)" in text
    assert "inherited 442.4k, new 9, dropped 0" in text
    start = lines.index("output shift, nats per token; 95 % interval over documents") + 1
    block = lines[start : start + 7]
    assert len({len(row) for row in block}) == 1
    assert block[1].split() == ["swap", "0.0612", "[0.0575,", "0.0649]"]
    assert any(row.startswith("  swap - zero") and "+0.00750" in row for row in block)
    assert "  HIGH   The swap is no better than deleting the attention" in lines
    assert "\x1b" not in text


def test_columns_are_aligned():
    assert columns([["a", "1"], ["bbb", "22"]]) == "  a     1\n  bbb  22"


def test_the_plan_of_a_final_norm_has_no_layer():
    clause = dataclasses.replace(s.PLAN.clauses[0], layer=None, slot="final_norm", args={})
    plan = dataclasses.replace(s.PLAN, clauses=(clause,))
    assert plan_lines(plan)[0].startswith("final final_norm: LlamaAttention ->")


def test_runs_are_compared_on_one_page(tmp_path, run_dir):
    other = make(tmp_path / "two", s.synthetic(layers=4, swapped=(2,)), swap="layer5:zero")
    page = Reader(compare([run_dir, other], tmp_path / "c.html").read_text())
    assert page.tags.count("svg") == 5 + 2  # five metrics, the profile, the positions
    words = " ".join(page.words)
    assert "layer12:infini(segment=256)" in words
    assert "layer5:zero" in words


def test_runs_on_different_data_are_refused_unless_told(tmp_path, run_dir):
    def on(name, source, fingerprint):
        text = {"source": source, "windows": 8, "tokens": 8192, "fingerprint": fingerprint}
        facts = {"texts": text, "fingerprints": fingerprint}
        return make(tmp_path / name, **{key: {"evaluation": value} for key, value in facts.items()})

    one, other = on("one", "wiki", "ab12"), on("two", "sotu", "ffff")
    with pytest.raises(UsageError, match="saw different data") as caught:
        compare([one, other], tmp_path / "c.html")
    said = str(caught.value)
    assert f"{one}: wiki, 8,192 tokens in 8 windows (fingerprint ab12)" in said
    assert f"{other}: sotu, 8,192 tokens in 8 windows (fingerprint ffff)" in said
    assert not (tmp_path / "c.html").exists()
    with pytest.raises(UsageError, match="a trace that does not say on which text"):
        compare([run_dir, other])
    page = compare([run_dir, other], tmp_path / "c.html", any_data=True).read_text()
    assert "These runs saw different data" in page
    with pytest.raises(UsageError, match="1 run given"):
        compare([run_dir])


def test_runs_have_letters(tmp_path, run_dir):
    runs = [load_run(run_dir)] * 28
    assert labels(runs)[:2] == [f"{name} layer12:infini(segment=256)" for name in "AB"]
    assert labels(runs)[27] == "AB layer12:infini(segment=256)"
    assert set(together(runs[:2])["student"]) == {"A", "B", "floor"}
    other = load_run(make(tmp_path / "two", model="gpt2"))
    assert labels([runs[0], other])[1] == "B gpt2 layer12:infini(segment=256)"


@pytest.mark.slow
def test_a_page_of_a_deep_model_stays_small(tmp_path):
    """80 layers, all swapped, three controls, 13 metrics along them: not all of them get a view."""
    table = s.synthetic(80, swapped=tuple(range(80)), controls=("zero", "mean", "random"))
    along = table[table["metric"] == "rel_l2"]
    more = ("angle", "cosine", "gaussian_kl", "kurtosis", "massive", "mean_shift", "update_size")
    copies = [along.assign(metric=m, stat=q.quantity(m).stat) for m in more]
    path = make(tmp_path / "deep", pd.concat([table, *copies], ignore_index=True))
    assert write_html(path, tmp_path / "deep.html").stat().st_size < 1_500_000
