"""The markup stripper: each rule on a small piece, and the dump reader on a small dump."""

from __future__ import annotations

import bz2
import io

import pytest

from mismatch.texts.demo import fetch, wikitext

PIECES = {
    "'''Anarchism''' is a ''political'' philosophy.": "Anarchism is a political philosophy.",
    "[[self-governance|self-governed]] [[society|societies]] and [[law]]": (
        "self-governed societies and law"
    ),
    'Central,<ref name="a">{{cite|x}} and [[b]]</ref> it is.<ref name="a"/>': "Central, it is.",
    "He was <!-- not --> born {{circa|1900}} in {{lang|fr|Paris}}{{fact}}.": (
        "He was born 1900 in Paris."
    ),
    "{{Infobox|a={{b|c}}\n|d=[[e|f]]}}\nText {{convert|5|km|mi}} long.": "Text 5 km long.",
    "{{quote|He came from [[Rome|the city]] {{small|alone}}.}}": ("He came from the city alone."),
    "[[File:a.jpg|thumb|A [[cat|small cat]] [above] sits]]\nA cat.": "A cat.",
    "[[Category:Cats]]\n[[de:Katze]]\nCats.": "Cats.",
    "See [http://example.org the page] or http://example.org/x now.": "See the page or now.",
    "{| class=x\n|-\n| {| \n| y\n|}\n|}\nAfter": "After",
    "== History ==\n* one\n# two\n: three": "History\n\none\n\ntwo\n\nthree",
    "Text\n== References ==\n{{reflist}}\n=== Web ===\nx\n== Legacy ==\nmore": (
        "Text\n\nLegacy\n\nmore"
    ),
    "A (; ) b ({{IPA|x}}; Greek) 5&nbsp;km &amp; H<sub>2</sub>O": "A b (Greek) 5 km & H2O",
    "The angle <math>\\frac{a}{b}</math> is small.": "The angle is small.",
    "__NOTOC__Plain.": "Plain.",
}


@pytest.mark.parametrize(("markup", "text"), PIECES.items())
def test_strip(markup, text):
    assert wikitext.strip(markup) == text


def page(number: int, text: str, ns: int = 0, extra: str = "") -> str:
    return (
        f"<page><title>T {number}</title><ns>{ns}</ns><id>{number}</id>{extra}"
        f"<revision><id>9</id><text>{text}</text></revision></page>"
    )


DUMP = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">'
    + page(1, "#REDIRECT [[X]]")
    + page(2, "moved", extra='<redirect title="X" />')
    + page(3, "a talk page", ns=1)
    + page(4, "An '''article'''. " * 40)
    + page(5, "A stub.")
    + "</mediawiki>"
)


def test_redirects_and_other_namespaces_are_left_out():
    found = list(wikitext.articles(io.BytesIO(DUMP.encode())))
    assert [number for number, _, _ in found] == [4, 5]
    assert found[0][1] == "T 4"


def test_a_dump_becomes_one_file_per_article_the_same_each_time(tmp_path):
    dump = tmp_path / "dump.bz2"
    dump.write_bytes(bz2.compress(DUMP.encode()))
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        out.mkdir()
        wikitext.wiki([dump], out)
    contents = [{p.name: p.read_bytes() for p in out.iterdir()} for out in outs]
    assert contents[0] == contents[1]
    assert list(contents[0]) == ["000004-t-4.txt"]  # the stub is too short
    assert contents[0]["000004-t-4.txt"].startswith(b"T 4\n\nAn article. An article.")


@pytest.mark.slow
def test_the_real_dump_leaves_no_markup():
    texts = [p.read_text("utf-8") for p in sorted(fetch.fetch("wiki").glob("*.txt"))]
    assert len(texts) == 105
    whole = "\n".join(texts)
    assert 2_500_000 < len(whole) < 3_000_000
    for mark in ("[[", "<ref", "'''", "&nbsp;", "#REDIRECT"):
        assert mark not in whole
    assert whole.count("{{") <= 2  # one footnote in `ASCII` prints every character there is
