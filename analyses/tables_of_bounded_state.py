"""Tables of docs/results: attention with a bounded state."""

from __future__ import annotations

from table_text import Row, interval, read, table


def bounded(layers: str, length: str) -> str:
    """What `python analyses/bounded_state.py` measured at one length."""
    readings = ("passkey", "needles", "look-up", "copy160")
    rows = []
    for row in read(f"bounded_state/{layers}/table.csv"):
        if row["length"] != length:
            continue
        shown = [name for name in ("KL", *readings) if row[name]]
        cells = {name: _read_off(row, name, 4 if name == "KL" else 2) for name in shown}
        state = f"{float(row['kB']):,.0f}" if row["kB"] else "grows"
        seconds = float(row["cpu_seconds"])
        rows.append(
            (
                row["row"],
                state,
                *(cells.get(name, "") for name in ("KL", *readings)),
                f"{seconds:.0f}" if seconds else "",
            )
        )
    head = (
        *("attention", "state, kB", "text KL", "passkey, a key", "needles, a token"),
        *("look-up, a token", "copy of 160, a token", "CPU seconds"),
    )
    return table(head, rows)


def _read_off(row: Row, name: str, digits: int) -> str:
    if not row[f"{name} lo"]:
        return f"{float(row[name]):.{digits}f}, no interval"
    ends = {"value": row[name], "lo": row[f"{name} lo"], "hi": row[f"{name} hi"]}
    return interval(ends, digits)


def harness(data: str) -> str:
    """What `python analyses/harness.py` read from a checkpoint."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in read(f"harness/{data}.csv"):
        error = f" ± {float(row['standard_error']):.2f}" if row["standard_error"] else ""
        line = cells.setdefault((row["task"], row["metric"]), {"documents": row["documents"]})
        line[row["model"]] = f"{float(row['value']):.2f}{error}"
    rows = [
        (task, metric.replace("_", " "), line["documents"], line["original"], line["swap"])
        for (task, metric), line in cells.items()
    ]
    return table(("task", "reading", "documents", "original", "swapped"), rows)
