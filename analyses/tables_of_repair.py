"""Tables of docs/results: what repairs reach."""

from __future__ import annotations

from table_text import interval, kl_of, read, table


def stages() -> str:
    """What `python analyses/repair_layer12.py` measured."""
    found = {(row["swap"], row["name"]): row for row in read("repair_layer12/stages.csv")}
    swaps = list(dict.fromkeys(swap for swap, _ in found))
    rows = []
    for stage in dict.fromkeys(name for _, name in found):
        cells = [f"`{stage}`"]
        for swap in swaps:
            row = found[swap, stage]
            cells += [
                interval({"value": row["kl"], "lo": row["lo"], "hi": row["hi"]}),
                f"{100 * float(row['of_plain']):.0f} %",
            ]
        rows.append(tuple(cells))
    names = [swap.partition(":")[2] for swap in swaps]
    head = [cell for name in names for cell in (f"`{name}`: KL left", "gap closed")]
    return table(("after", *head), rows)


def repair() -> str:
    """What `python analyses/repair_table.py` measured."""
    rows = []
    for row in read("repair_table/table.csv"):
        kl = [kl_of(row, student) for student in ("swap", "repaired", "zero", "linear")]
        closed = tuple(100 * float(row[name]) for name in ("gap_closed", "gap_lo", "gap_hi"))
        gap = "{:.0f} % [{:.0f}, {:.0f}]".format(*closed)
        rows.append((f"`{row['mechanism']}`", kl[0], kl[1], gap, *kl[2:], row["verdict"]))
    head = ("layer 12", "swapped", "repaired", "gap closed", "`zero`", "`linear`", "verdict")
    return table(head, rows)


def options() -> str:
    """What `python analyses/infini_options.py` measured."""
    rows = []
    for row in read("infini_options/table.csv"):
        closed = tuple(100 * float(row[name]) for name in ("closed", "closed_lo", "closed_hi"))
        gap = "{:.1f} % [{:.1f}, {:.1f}]".format(*closed)
        seconds = float(row["cpu_seconds"])
        cost = f"{seconds:.0f}" if seconds else ""
        kl = interval({"value": row["kl"], "lo": row["kl_lo"], "hi": row["kl_hi"]})
        rows.append((row["kind"], row["row"], kl, gap, cost))
    return table(("", "form", "KL left", "closed", "CPU seconds"), rows)


def initial() -> str:
    """What `python analyses/initial_values.py` measured."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in read("initial_values/small/table.csv"):
        closed = tuple(100 * float(row[name]) for name in ("closed", "closed_lo", "closed_hi"))
        cells = found.setdefault((row["mechanism"], row["arm"]), {})
        cells[row["when"]] = "{:.0f} % [{:.0f}, {:.0f}]".format(*closed)
    rows = [
        (mechanism, arm, cells.get("before", ""), cells.get("after", ""))
        for (mechanism, arm), cells in found.items()
        if arm != "zero"
    ]
    return table(("layer 12", "initial values", "closed form", "and the steps"), rows)


def minutes() -> str:
    """What `python analyses/repair_minutes.py` measured."""
    rows = []
    for row in read("repair_minutes/table.csv"):
        shares = [
            "{:.1f} % [{:.1f}, {:.1f}]".format(
                *(100 * float(row[f"of_{who}{end}"]) for end in ("", "_lo", "_hi"))
            )
            for who in ("zero", "linear", "swap")
        ]
        left = "{:.4f} [{:.4f}, {:.4f}]".format(
            *(float(row[f"repaired{end}"]) for end in ("", "_lo", "_hi"))
        )
        seconds = f"{float(row['cpu_seconds']):.0f}"
        rows.append((row["layer"], row["mechanism"], row["minutes"], left, *shares, seconds))
    head = (
        "layer",
        "mixer",
        "minutes",
        "KL left",
        "closed of `zero`",
        "of `linear`",
        "of the swap",
    )
    return table((*head, "CPU seconds"), rows)


def repair_first() -> str:
    """What `python analyses/repair_before_training.py` measured, at 512 tokens."""
    points: dict[tuple[str, str], dict[str, str]] = {}
    for row in read("repair_before_training/table.csv"):
        if row["length"] == "512":
            point = points.setdefault((row["arm"], row["tokens"]), {"steps": row["steps"]})
            point[row["reading"]] = interval(row, 2)
    rows = [
        (
            arm,
            f"{int(tokens):,}",
            *(point[name] for name in ("steps", "text", "passkey", "look-up")),
        )
        for (arm, tokens), point in points.items()
    ]
    head = ("form and way", "tokens", "steps", "text, a token", "passkey, a key")
    return table((*head, "look-up, a token"), rows)


def before_training() -> str:
    """What `python analyses/mechanism_table.py` measured."""
    rows = []
    for row in sorted(read("mechanism_table/mechanism_table.csv"), key=lambda r: float(r["kl"])):
        share = [float(row[name]) for name in ("share", "share_lo", "share_hi")]
        rows.append(
            (
                f"`{row['swap']}`",
                row["kind"],
                interval({**row, "value": row["kl"], "lo": row["kl_lo"], "hi": row["kl_hi"]}),
                "0" if max(share) < 0.0005 else "{:.2f} [{:.2f}, {:.2f}]".format(*share),
                f"`{row['of']}`",
            )
        )
    head = ("layer 12", "kind", "KL, nats per token", "share of the control's KL", "control")
    return table(head, rows)


def smaller_cache() -> str:
    """What `python analyses/smaller_cache.py` measured."""
    rows = []
    for row in read("smaller_cache/table.csv"):
        kl = [
            interval({"value": row[name], "lo": row[f"{name}_lo"], "hi": row[f"{name}_hi"]})
            for name in ("swapped", "closed")
        ]
        rows.append((row["layers"], row["name"], f"`{row['swap']}`", row["cache"], *kl))
    head = (
        *("layer", "", "swap", "cache, of the teacher's"),
        *("KL as swapped", "KL, output projection fitted"),
    )
    return table(head, rows)


def fresh() -> str:
    """Swaps that `python analyses/forecast_score.py` forecast, in layers that the record has not."""
    rows = []
    for row in read("forecast_score/fresh.csv"):
        forecast, lo, hi, measured = (
            100 * float(row[name]) for name in ("forecast", "lo", "hi", "measured")
        )
        inside = "yes" if row["inside"] == "True" else "no"
        said = f"{forecast:.0f} % [{lo:.0f}, {hi:.0f}]"
        rows.append((f"`{row['swap']}`", f"`{row['stage']}`", said, f"{measured:.0f} %", inside))
    return table(("swap", "after", "forecast", "measured", "inside the interval"), rows)
