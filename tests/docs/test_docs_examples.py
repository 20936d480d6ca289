"""What the pages tell a reader to type is understood: commands, swaps, and the code of the guides."""

from __future__ import annotations

import re
import sys
import types

import pytest
from docs_pages import blocks, command_lines

import mismatch
from mismatch import spec
from mismatch.cli import main, parser
from mismatch.registry import mechanisms, metrics, stages

SWAP = re.compile(r"^\| `((?:layer|norms|all)[^`]+)` \|", re.M)


def test_every_command_is_understood(written):
    lines = [(page, words) for page, text in written.items() for words in command_lines(text)]
    assert len(lines) > 12
    for page, words in lines:
        try:
            parser.read(words)
        except mismatch.errors.MismatchError as error:
            pytest.fail(f"{page}: mismatch {' '.join(words)}: {error}")


def test_every_swap_of_the_table_is_valid(written):
    found = SWAP.findall(written["docs/guides/swap-text.md"])
    assert len(found) >= 6
    assert all(spec.check(spec.parse(text)).clauses for text in found)


def test_python_of_the_pages_compiles(written):
    for page, text in written.items():
        for code in blocks(text, "python"):
            compile(code, page, "exec")


def module_of(page: str, monkeypatch: pytest.MonkeyPatch, name: str) -> types.ModuleType:
    """The first Python block of a guide as a module of its own."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(blocks(page, "python")[0], name, "exec"), vars(module))
    return module


def test_the_mechanism_of_the_guide_works(written, monkeypatch, toy_folder):
    made = module_of(written["docs/guides/adding-a-mechanism.md"], monkeypatch, "guide_mechanism")
    mechanisms().add("half", made.Half)
    options = {"tokens": 256, "seq_len": 64, "controls": (), "metrics": ("kl",)}
    for swap, same in (("layer2:half(factor=1)", True), ("layer2:half", False)):
        table = mismatch.trace(toy_folder, swap=swap, **options).table
        kl = table.query("student == 'swap' and stat == 'mean' and position == 'all'").value.item()
        assert (kl == 0) is same


def test_the_metric_of_the_guide_works(written, monkeypatch, toy_folder):
    made = module_of(written["docs/guides/adding-a-metric.md"], monkeypatch, "guide_metric")
    metrics().add("max_change", made.MaxChange)
    table = mismatch.trace(
        toy_folder,
        swap="layer2.attn:zero",
        tokens=256,
        seq_len=64,
        controls=(),
        metrics=("max_change",),
    ).table
    found = table.query("student == 'swap' and mode == 'free' and site == 'resid_post'")
    assert found[found.layer < 2].value.eq(0).all()
    assert found[found.layer >= 2].value.gt(0).all()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_student_of_the_guide_is_measured(written, monkeypatch, toy_folder, tmp_path, capsys):
    """Every command and every block of the page, in its order."""
    monkeypatch.chdir(tmp_path)
    page = written["docs/guides/trained-elsewhere.md"]
    made, *more = blocks(page, "python")
    names: dict = {}
    exec(made, names)
    for words in command_lines(page):
        assert parser.read(words) and main([*words, "--quiet"]) == 0, words
    for code in more:
        exec(code, names)
    assert "layer 1 changed most: mlp_out" in capsys.readouterr().out


@pytest.mark.pages
def test_the_stage_of_the_guide_works(written, monkeypatch, toy_folder, tmp_path, capsys):
    (tmp_path / "guide_stage.py").write_text(
        blocks(written["docs/guides/adding-a-stage.md"], "python")[0], encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stages().add("perplexity", "guide_stage:Perplexity")
    made = mismatch.perplexity(toy_folder, "layer2.attn:zero", tokens=256, seq_len=64)
    flags = ["--tokens", "256", "--seq-len", "64", "--output", str(tmp_path / "run")]
    swap = ["--model", str(toy_folder), "--swap", "layer2.attn:zero"]
    assert main(["perplexity", *swap, *flags]) == 0
    assert made.summary() in capsys.readouterr().out
    for name in ("manifest.json", "report.html", "figures/perplexity.csv"):
        assert (tmp_path / "run" / name).is_file()
