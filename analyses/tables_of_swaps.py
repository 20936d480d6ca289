"""Tables of docs/results: what swaps do, which layers carry what, which are chosen, and what intervals cover."""

from __future__ import annotations

from table_text import interval, read, table

LOST = {"value": "lost", "lo": "lost lo", "hi": "lost hi"}


def layer12() -> str:
    """What `python analyses/layer12.py` measured."""
    found = {(row["swap"], row["metric"]): row for row in read("layer12/layer12.csv")}
    rows = []
    for swap in dict.fromkeys(swap for swap, _ in found):
        pairs = [(swap, name) for name in ("kl", "nll")]
        cells = [interval(found[pair]) if pair in found else "" for pair in pairs]
        rows.append((f"`{swap}`", *cells))
    head = ("layer 12, attention", "KL, nats per token", "NLL difference, nats per token")
    return table(head, rows)


def carriers() -> str:
    """What `python analyses/scan_atlas.py` found: the worst layer of each mechanism, on copying and on retrieval."""
    units = {"induction": "nats a token", "passkey": "nats a key"}
    rows = []
    for row in read("scan_atlas/carriers.csv"):
        if row["task"] not in units or row["mechanism"] == "zero":
            continue
        lost, lo, hi = (float(row[name]) for name in ("nats", "lo", "hi"))
        rows.append(
            (
                row["task"],
                f"`{row['mechanism']}`",
                row["layer"],
                f"{lost:.1f} [{lo:.1f}, {hi:.1f}] {units[row['task']]}",
                f"{float(row['next_nats']):.2f} (layer {row['next_layer']})",
                f"{float(row['text_kl_there']):.4f}",
                f"{row['text_rank_there']} of {row['layers']}",
            )
        )
    head = (
        "task",
        "mechanism",
        "worst layer",
        "loses there",
        "next worst",
        "KL of text",
        "rank on text",
    )
    return table(head, rows)


def plans() -> str:
    """What `python analyses/plan_layers.py` measured. A choice that two plans made is shown once."""
    words = {"4": "4 layers", "8": "8 layers", "8_keep_retrieval": "8 layers, retrieval kept"}
    chosen: dict[str, list[str]] = {}
    for name in words:
        chosen.setdefault(read(f"plan_layers/{name}.csv")[0]["swap"], []).append(name)
    rows = []
    for swap, names in chosen.items():
        found = {(row["task"], row["kind"]): row for row in read(f"plan_layers/{names[0]}.csv")}
        said = "; ".join(words[name] for name in names)
        for task in dict.fromkeys(task for task, _ in found):
            cells = [interval(found[task, kind], 3) for kind in ("predicted", "measured", "zero")]
            rows.append((said, f"`{swap}`", task, *cells))
    return table(("plan", "swap", "task", "predicted", "measured together", "`zero` there"), rows)


def selectors() -> str:
    """What `python analyses/selector_study.py --ranks` read off a scan of SmolLM2."""
    rows = []
    for row in read("selectors/sliding_window_window_64__sinks_1/sets.csv"):
        others = [name for name in ("kl", "answer_nll", "halo", "even") if name != row["score"]]
        shared = (
            f"{name} {int(float(row[f'shared with {name}']))} (p {float(row[f'p {name}']):.2f})"
            for name in others
        )
        rows.append(
            (
                *(row["layers"], f"`{row['score']}`", row["set"].replace(" ", ", ")),
                f"{100 * float(row['same']):.0f} %",
                f"{float(row['kept']):.1f}",
                ", ".join(shared),
            )
        )
    head = (
        *("of 30", "score", "layers chosen", "the same set in", "kept on average"),
        "shared with the set of (chance of as many)",
    )
    return table(head, rows)


TASKS = {
    "text": "text, KL",
    "induction": "copying",
    "needles": "needles",
    "kv_lookup": "look-ups",
}


def selected(mechanism: str) -> str:
    """What `python analyses/selector_study.py` measured of the sets of one mechanism together."""
    rows = [
        (row["layers"], f"`{row['score']}`", *(_lost(row, task) for task in TASKS))
        for row in read("selectors/table.csv")
        if row["mechanism"].startswith(mechanism)
    ]
    return table(("of 30", "score", *TASKS.values()), rows)


def selected_repaired() -> str:
    """What `python analyses/selectors_repaired.py` measured before and after the repair."""
    rows = {
        (r["mechanism"], r["layers"], r["score"], r["state"]): r
        for r in read("selectors/repaired.csv")
    }
    return table(
        ("mechanism", "of 30", "score", *TASKS.values()),
        (
            (
                *(f"`{mechanism.partition('(')[0]}`", layers, f"`{score}`"),
                *(
                    f"{round(float(rows[mechanism, layers, score, 'swapped'][f'{task} lost']), 3) + 0.0:.3f} to "
                    + _lost(row, task)
                    for task in TASKS
                ),
            )
            for (mechanism, layers, score, state), row in rows.items()
            if state == "repaired"
        ),
    )


def _lost(row: dict[str, str], task: str) -> str:
    return interval({end: row[f"{task} {at}"] for end, at in LOST.items()}, 3)


def coverage() -> str:
    """What `python analyses/interval_coverage.py` counted: percent, mean over its numbers and the least of them."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in read("interval_coverage/coverage.csv"):
        what = row["over"] if "blocks" in row["over"] else f"documents, {row['lengths']}"
        methods = found.setdefault((what, row["units"]), {})
        methods.setdefault(row["method"], []).append(100 * float(row["covers"]))
    rows = [
        (
            what,
            units,
            *(_percent(methods.get(name)) for name in ("ours", "percentile", "independent")),
        )
        for (what, units), methods in found.items()
    ]
    head = (
        *("intervals over", "how many", "as `mismatch` makes them"),
        *("percentile bootstrap", "windows as if independent"),
    )
    return table(head, rows)


def _percent(covers: list[float] | None) -> str:
    return "" if covers is None else f"{sum(covers) / len(covers):.1f} % ({min(covers):.1f})"
