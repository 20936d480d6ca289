"""Pages of mechanisms, metrics and probes, from their cards: nothing is imported to make them but the registry."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Callable
from pathlib import Path

import md_text

from mismatch.models.families import FAMILIES
from mismatch.registry import Registry, mechanisms, metrics, probes
from mismatch.registry.card import REQUIRED, Card
from mismatch.registry.explain import state_bytes

COUNTED = Path(__file__).resolve().parents[2] / "figures" / "mechanism_table" / "costs.csv"

FACTS = {
    "slots": "goes into (first: default)",
    "identity": "equals the teacher when",
    "state": "state",
    "heads": "can take some heads (a pair: with this argument)",
    "stacks": "may stand on another mechanism",
    "merges": "merges into the model's own matrices",
    "headline": "headline",
    "unit": "unit",
    "range": "range",
    "better": "nearer to the teacher is",
    "null": "reads at equality",
    "chance": "a model that cannot",
    "shows": "shows",
    "blind": "cannot see",
    "invariant": "does not change under",
    "source": "source",
    "branch_names": "branches",
    "at": "measured at",
    "mask": "tokens used",
    "stats": "statistics",
    "needs": "input",
}
"""Facts of a card, in words and in this order; the others follow under their own names."""


def card_pages(registry: Registry) -> dict[str, str]:
    """Path -> page: the list of one kind, and a page for each name."""
    folder = f"{registry.kind}s"
    made = {f"{folder}/index.md": list_page(registry)}
    for name in registry.names():
        made[f"{folder}/{name}.md"] = card_page(registry, registry.card(name))
    return made


def linked(folder: str = "", own: str = "") -> Callable[[str], str]:
    """Makes a link of code that is the name of a card.

    Args:
        folder: of the page that is written, such as `metrics`; "" is the top.
        own: the name of that page, which is not linked.
    """

    def link(code: str) -> str:
        name = code.strip("`")
        for registry in (mechanisms(), metrics(), probes()):
            home = f"{registry.kind}s"
            if name != own and name in registry and folder in ("", home):
                return f"[{code}]({'' if folder else f'{home}/'}{name}.md)"
        return code

    return link


def card_page(registry: Registry, card: Card) -> str:
    """One mechanism, metric or probe: its own text, its arguments, its facts."""
    link = linked(f"{registry.kind}s", card.name)
    first, _, rest = card.text.partition("\n")
    what = first.removeprefix(f"{card.name}: ")
    out = [f"# {card.name}", md_text.inline(what[:1].upper() + what[1:], link)]
    if registry.kind == "mechanism":
        out.append(f'```bash\nmismatch check --model smollm2 --swap "{example(card)}"\n```')
    if registry.kind == "probe":
        swap = "layer16:nope"
        out.append(
            f'```bash\nmismatch probe --model smollm2 --swap "{swap}" --probes {card.name}\n```'
        )
    out.append(md_text.prose(rest, link))
    if card.args:
        rows = [
            (
                f"`{arg.name}`",
                md_text.inline(arg.allowed),
                "required" if arg.default is REQUIRED else f"`{str(arg.default).lower()}`",
                md_text.inline(arg.doc, link),
            )
            for arg in card.args
        ]
        head = ("argument", "value", "default", "meaning")
        out.append("## Arguments\n\n" + md_text.table(head, rows))
    known = [key for key in (*FACTS, *card.facts) if key in card.facts]
    rows = [
        (FACTS.get(key, key), md_text.inline(_fact(card.facts[key]), link))
        for key in dict.fromkeys(known)
    ]
    if registry.kind == "mechanism" and (counted := state_bytes(card.name)) is not None:
        rows.append(("state in bytes", counted))
    out.append("## Facts\n\n" + md_text.table(("fact", "value"), rows))
    return "\n\n".join(out)


def example(card: Card) -> str:
    """A swap with this mechanism in its default slot."""
    slot = card.facts["slots"][0]
    needed = any(arg.default is REQUIRED for arg in card.args)
    call = f"{card.name}(infini)" if needed else card.name
    return f"layer12.{slot}:{call}"


def list_page(registry: Registry) -> str:
    """All cards of one kind, one line each."""
    title, text, head, row = {
        "mechanism": (
            "Mechanisms",
            "What can go into a slot. What each costs, and what it does to a layer of a real model before any "
            "training: [mechanisms, measured](../../results/mechanisms.md).",
            (
                *("mechanism", "what it is", "source", "slots (first: default)"),
                *("equals the teacher when", "families"),
            ),
            mechanism_row,
        ),
        "metric": (
            "Metrics",
            "What is measured at a site. How to read a metric beside its null, its floor and its controls: "
            "[reading a report](../../guides/reading-a-report.md).",
            ("metric", "question", "unit", "at equality", "cannot see"),
            metric_row,
        ),
        "probe": (
            "Probes",
            "Inputs made to ask one question that ordinary text does not ask. Each answer stands beside those "
            "of the teacher and of the controls on the same inputs.",
            ("probe", "question", "headline", "a model that cannot", "cannot see"),
            probe_row,
        ),
    }[registry.kind]
    rows = [row(registry.card(name)) for name in registry.names()]
    tree = md_text.toctree(*registry.names(), hidden=True)
    return f"# {title}\n\n{text}\n\n{md_text.table(head, rows)}\n\n{tree}"


def mechanism_row(card: Card) -> tuple[str, ...]:
    """Name, what it is, source, slots, identity limit, families."""
    slots, limit = card.facts["slots"], card.facts["identity"]
    has = _families().get(card.name)
    lacks = [family.name for family in FAMILIES if has is not None and family.name not in has]
    what = (card.summary.partition(": ")[2] or card.summary).rstrip(".")
    source = re.split(
        r"; |, (?=section|eq|table|sections|initial|algorithm)", card.facts["source"]
    )[0]
    return (
        f"[`{card.name}`]({card.name}.md)",
        md_text.inline(what),
        md_text.inline(source),
        ", ".join(slots[:3]) + (", ..." if len(slots) > 3 else ""),
        "never" if limit.startswith("none: ") else md_text.inline(limit),
        "not counted" if has is None else f"all but {', '.join(lacks)}" if lacks else "all",
    )


def metric_row(card: Card) -> tuple[str, ...]:
    """Name, question, unit, what it reads at equality, what it cannot see."""
    question = (card.summary.partition(": ")[2] or card.summary).rstrip(".")
    null = ", ".join(f"{stat} {value:g}" for stat, value in card.facts["null"].items())
    words = (question, card.facts["unit"], null, card.facts["blind"])
    return (f"[`{card.name}`]({card.name}.md)", *map(md_text.inline, words))


def probe_row(card: Card) -> tuple[str, ...]:
    """Name, question, headline, what a model that cannot reads, what it cannot see."""
    facts = card.facts
    question = card.summary.partition("?")[0] + "?"
    words = (question, f"`{facts['headline']}`, {facts['unit']}", facts["chance"], facts["blind"])
    return (f"[`{card.name}`]({card.name}.md)", *map(md_text.inline, words))


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@functools.cache
def _families() -> dict[str, list[str]]:
    """Mechanism -> families that it was built in, as `analyses/mechanism_costs.py` counted."""
    with open(COUNTED, newline="") as file:
        return {row["mechanism"]: row["families"].split() for row in csv.DictReader(file)}
