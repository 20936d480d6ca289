"""Reports as a reader meets them: real runs of every stage on the toy, opened in a headless Chromium."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import browser as browsers
import pytest
from wonderland import documents, jsonl

import mismatch
from mismatch.report import style
from mismatch.runs.folder import load_run
from mismatch.runs.table import conditions

SWAP = "layer2:infini(segment=16)"
KINDS = ("trace", "probe", "scan", "plan", "diagnose", "repair")
MOST_BYTES = 1_500_000

pytestmark = [
    pytest.mark.pages,
    pytest.mark.skipif(
        browsers.find() is None, reason=f"no browser: none of {', '.join(browsers.NAMES)} is there"
    ),
    pytest.mark.timeout(300),  # the first test of a kind makes its run
]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, toy) -> Callable[[str], Path]:
    """The run folder of a kind, with its report.html; made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    texts = {"data": str(jsonl(folder / "held_out.jsonl", documents(8)))}
    more = str(jsonl(folder / "other.jsonl", documents(8, seed=1)))
    calibrated = {**texts, "calibration_data": more, "calibration_tokens": 256, "seq_len": 64}
    asked = {"samples": 4, "length": 111}
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "trace": (SWAP, {"tokens": 512, "controls": ("zero", "mean"), **calibrated}),
        "probe": (SWAP, {"lengths": ("111",), "probes": ("passkey", "induction"), "samples": 4, **calibrated}),
        "scan": ("infini(segment=16); nope", {"tokens": 256, **asked, **calibrated}),
        "plan": ("infini(segment=16)", {"layers": 2, "tokens": 256, "selection_tokens": 256, **asked, **calibrated}),
        "diagnose": (SWAP, {"tokens": 256, "fit_tokens": 512, **calibrated}),
        "repair": (SWAP, {"tokens": 256, "val_tokens": 128, "train_data": more, "train_tokens": 512, "seq_len": 64,
                          "self_generated": 0.0, "trace_tokens": 128, "stages": ("closed-form", "local"), "epochs": 1,
                          "max_minutes": None, **texts}),
    }  # fmt: skip

    @cache
    def made(kind: str) -> Path:
        subject, given = settings[kind]
        run = getattr(mismatch, kind)
        run((toy.model, toy.tokenizer), subject, output=str(folder / kind), **given)
        return folder / kind

    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = browsers.Browser(browsers.find(), tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


TABLES = """
Object.fromEntries([...document.querySelectorAll("table")].map((table) => {
  let at = table.closest(".scroll");
  while (at && at.tagName !== "H2") at = at.previousElementSibling ?? at.parentElement;
  const rows = [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent));
  return [at ? at.textContent : "", rows];
}).reverse())
"""
"""The rows of the first table below each heading, as a reader sees them."""

MARKS = "[...document.querySelectorAll('svg.figure [role=img]')]"


def hovered(browser, figure: str) -> list[str]:
    """What the tip shows at each mark of a figure, when the mouse is moved there."""
    found = []
    inside = (
        f"{MARKS}.filter((m) => m.closest('svg').querySelector('[id^=\"{figure}-\"]')"
        " && m.getClientRects().length)"
    )
    for at in range(browser.ask(f"{inside}.length")):
        x, y = browser.ask(
            f"(() => {{ const m = {inside}[{at}]; m.scrollIntoView({{block: 'center', inline: 'center'}});"
            "const r = m.getBoundingClientRect(); return [r.left + r.width / 2, r.top + r.height / 2] })()"
        )
        browser.move(0, 0)
        browser.move(x, y)
        found.append(browser.ask("document.querySelector('.tip').textContent"))
    return found


def numbers(text: str) -> dict[str, str]:
    """The lines of a tip below the first, by name."""
    return dict(line.split(": ", 1) for line in text.splitlines()[1:])


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_no_error_and_nothing_wider_than_the_window(kind, width, run_of, browser):
    page = run_of(kind) / "report.html"
    assert page.stat().st_size <= MOST_BYTES
    for dark in (False, True):
        browser.open(page, width, dark=dark)
        assert browser.ask("document.documentElement.scrollWidth") <= width
        light = (
            browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )
        assert light is not dark
        assert browser.ask(f"{MARKS}.length") > 0
        assert browser.errors == []


def test_trace_a_cell_reads_out_what_the_table_of_sites_has(run_of, browser):
    browser.open(run_of("trace") / "report.html")
    rows = browser.ask(TABLES)["Worst sites"]
    said = {
        text.splitlines()[0]: numbers(text)
        for text in hovered(browser, "shift_heatmap")
        if "rel_l2:" in text
    }
    assert len(rows) >= 4
    for layer, site, rel_l2, *_ in rows:
        swapped = ", swapped" if layer == "2" else ""
        found = said[f"swap, layer {layer}{swapped}, {site}"]
        assert found["rel_l2"].split(" [")[0] == rel_l2
        assert {"floor", "control zero", "control mean"} <= found.keys()


def test_trace_a_dot_reads_out_what_the_first_table_has(run_of, browser):
    browser.open(run_of("trace") / "report.html")
    rows = browser.ask(TABLES)[""]
    said = {text.splitlines()[0]: numbers(text) for text in hovered(browser, "output_shift")}
    for student, mean, band, tokens in rows:
        if student != "floor":
            assert (said[student]["kl"], said[student]["tokens"]) == (f"{mean} {band}", tokens)


def test_trace_points_of_the_curves_read_out_the_long_table(run_of, browser):
    browser.open(run_of("trace") / "report.html")
    table = load_run(run_of("trace")).table
    table = table[(table["mode"] == "free") & table["head"].isna()]
    for figure, column in (("depth_profile", "layer"), ("position", "position")):
        said = hovered(browser, figure)
        assert len(said) >= 6
        for text in said:
            student, place, *_ = re.split(", ", text.splitlines()[0])
            (metric, value), *_ = numbers(text).items()
            at = place.split(" ")[1].replace("\u2013", "-")
            rows = table[
                (table["student"] == student)
                & (table["metric"] == metric)
                & (table["stat"] == "mean")
            ]
            rows = rows[rows["site"] == ("resid_post" if column == "layer" else "logits")]
            row = rows[rows[column].astype(str) == at].iloc[0]
            assert value == style.interval(row["value"], row["lo"], row["hi"])


def test_probe_a_cell_reads_out_the_long_table(run_of, browser):
    browser.open(run_of("probe") / "report.html")
    table = load_run(run_of("probe")).table
    rows = table[table["metric"] == "passkey"]
    said = hovered(browser, "passkey")
    assert len(said) == rows["student"].nunique() * 3  # depths
    for text in said:
        student, tokens, depth = text.splitlines()[0].split(", ")
        for line, stat in (("share of keys found", "exact"), ("log-probability, nats", "logprob")):
            for row in rows[rows["student"] == student].itertuples():
                name, given = conditions(row.stat)
                if name == stat and f"depth {given.get('depth', -1):g}" == depth:
                    assert f"{given['length']:g} tokens" == tokens
                    assert numbers(text)[line] == style.interval(row.value, row.lo, row.hi)


def test_scan_a_cell_reads_out_what_the_table_of_layers_has(run_of, browser):
    browser.open(run_of("scan") / "report.html")
    rows = browser.ask(TABLES)["Every layer"]
    said = [(text.splitlines()[0], numbers(text)) for text in hovered(browser, "atlas")]
    shown = [(where, found.get("nats per token") or found["nats per key"]) for where, found in said]
    for mechanism, layer, *costs in rows:
        where = f"{mechanism.removesuffix(' (control)')}, layer {layer}"
        assert [cost for at, cost in shown if at == where] == [
            c for c in costs if c != "not applicable"
        ]
    assert all("control zero" in found for where, found in said if not where.startswith("zero"))


def test_plan_a_dot_reads_out_what_the_first_table_has(run_of, browser):
    browser.open(run_of("plan") / "report.html")
    rows = browser.ask(TABLES)[""]
    said = [
        (text.splitlines()[0], next(iter(numbers(text).values())))
        for text in hovered(browser, "plan")
    ]
    for name, column in (("sum of these", 1), ("together", 2), ("zero, together", 4)):
        assert [value for where, value in said if where == name] == [row[column] for row in rows]


def test_diagnose_a_bar_reads_out_what_the_table_of_corrections_has(run_of, browser):
    browser.open(run_of("diagnose") / "report.html")
    rows = browser.ask(TABLES)["Every correction"]
    said = {text.splitlines()[0]: numbers(text) for text in hovered(browser, "diagnosis")}
    for correction, _, share, band, kl in rows:
        words = f"{share} %, no effect" if band == "no effect" else f"{share} % {band}"
        found = said[correction]
        assert found["recovered"].replace(" [0, 0], ", ", ") == words
        assert found["KL left, nats per token"] == kl
        assert "KL of zero" in found


def test_repair_a_point_reads_out_what_the_table_of_stages_has(run_of, browser):
    browser.open(run_of("repair") / "report.html")
    rows = browser.ask(TABLES)[""]
    said = {
        text.splitlines()[0].removesuffix(", undone"): numbers(text)
        for text in hovered(browser, "repair")
    }
    assert len(rows) == len(said) == 3
    for stage, gap, kl, *_ in rows:
        assert said[stage]["KL left, nats per token"] == kl
        assert gap in ("-", said[stage]["gap closed"])
        assert "control zero" in said[stage]


def test_keys_go_from_mark_to_mark(run_of, browser):
    browser.open(run_of("trace") / "report.html")
    browser.ask(
        "document.querySelector('[id^=shift_heatmap-]').closest('svg').querySelector('[tabindex=\"0\"]').focus()"
    )
    where = "document.querySelector('.tip').textContent.split('\\n')[0]"
    assert browser.ask(where) == "swap, layer 0, resid_pre"
    for key, at in (("ArrowRight", "layer 1, resid_pre"), ("ArrowDown", "layer 1, attn_out"),
                    ("ArrowLeft", "layer 0, attn_out"), ("ArrowUp", "layer 0, resid_pre")):  # fmt: skip
        browser.press(key)
        assert browser.ask(where) == f"swap, {at}"
    browser.press("Escape")
    assert browser.ask("document.querySelector('.tip').hidden")
    stops = f"{MARKS}.filter((m) => m.tabIndex === 0).length"
    assert browser.ask(stops) == browser.ask(
        "document.querySelectorAll('svg.figure:has([role=img])').length"
    )


def test_a_finger_reads_out_the_nearest_mark(run_of, browser):
    browser.open(run_of("trace") / "report.html", 390)
    x, y = browser.ask(
        "(() => { const m = document.querySelector('[id^=\"output_shift-dot-swap\"] use');"
        "m.scrollIntoView({block: 'center', inline: 'center'});"
        "const r = m.getBoundingClientRect(); return [r.right + 6, r.bottom + 4] })()"
    )
    browser.tap(x, y)
    assert browser.ask("document.querySelector('.tip').textContent").startswith("swap\nkl: ")


def test_the_metric_is_chosen_beside_the_heatmap(run_of, browser):
    browser.open(run_of("trace") / "report.html")
    shown = (
        "[...document.querySelector('.choose').parentNode.querySelectorAll('svg')]"
        ".filter((s) => s.getClientRects().length).map((s) => s.getAttribute('aria-label'))"
    )
    assert browser.ask(shown) == ["Where the shift is: at a glance"]
    names = browser.ask(
        "[...document.querySelectorAll('.choose option')].map((o) => o.textContent)"
    )
    at = names.index("cosine (1 - cos)")
    browser.ask(
        f"(() => {{ const s = document.querySelector('.choose select'); s.selectedIndex = {at};"
        "s.dispatchEvent(new Event('change')) })()"
    )
    assert browser.ask(shown) == ["Where the shift is: cosine (1 - cos)"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_table_sorts_by_click_and_by_key(kind, run_of, browser):
    browser.open(run_of(kind) / "report.html")
    assert browser.ask(
        "[...document.querySelectorAll('th')].every((h) => h.textContent.trim() && h.querySelector('button')"
        " && h.getAttribute('aria-sort') === 'none')"
    )
    # Of the first table with numbers, the column that its first number is in.
    table, at = browser.ask(
        "(() => { const c = document.querySelector('td[data-by]');"
        "return [[...document.querySelectorAll('table')].indexOf(c.closest('table')), c.cellIndex] })()"
    )
    column = (
        f"(() => {{{{ const t = document.querySelectorAll('table')[{table}], head = t.tHead.rows[0].cells[{at}];"
        "const button = head.querySelector('button'); {act}; return [head.getAttribute('aria-sort'),"
        f"[...t.tBodies[0].rows].map((r) => r.cells[{at}].dataset.by ?? null)] }}}})()"
    )
    _, first = browser.ask(column.format(act="button.focus()"))
    known = [float(x) for x in first if x is not None]
    rest = [None] * (len(first) - len(known))
    seen = []
    for _ in range(3):
        browser.press("Enter")
        way, rows = browser.ask(column.format(act=""))
        values = [None if x is None else float(x) for x in rows]
        wanted = {"ascending": sorted(known), "descending": sorted(known, reverse=True)}
        assert rows == first if way == "none" else values == wanted[way] + rest
        seen.append(way)
    assert sorted(seen) == ["ascending", "descending", "none"]
    assert browser.ask(column.format(act="button.click()"))[0] == seen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_terminal_text_is_pasted(kind, run_of):
    text = (run_of(kind) / "report.html").read_text()
    for block in re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL):
        assert re.match(r"mismatch( |$)|pytest|.*-m pytest|/", block), (
            block
        )  # a command to copy, nothing else
        assert "\n" not in block
