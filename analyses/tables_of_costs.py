"""Tables of docs/results: what traces, scans, repairs and mechanisms cost."""

from __future__ import annotations

from statistics import median

from table_text import read, table


def costs() -> str:
    """What `python analyses/mechanism_costs.py` counted and timed."""
    rows = []
    for row in read("mechanism_table/costs.csv"):
        first, second, most = (int(row[f"state_{when}"]) for when in ("1024", "2048", "most"))
        peak = "" if most == max(first, second) else f", at most {most:,} between"
        state = (f"{first:,}", f"{second:,}{peak}")
        times = (f"{float(row['forward']):.2f}", f"{float(row['both']):.2f}")
        rows.append((f"`{row['swap']}`", row["part"], f"{int(row['new']):,}", *times, *state))
    head = (
        *("mechanism", "slot", "new parameters", "forward", "with backward"),
        *("state, 1024 tokens", "state, 2048 tokens"),
    )
    return table(head, rows)


def scan_cost() -> str:
    """What `python analyses/benchmark_scan.py` timed."""
    words = {
        "forward": "one forward of the teacher",
        "scan": "`mismatch scan`, 3 of 10 predictions scored, the default",
        "scan, all scored": "`mismatch scan --scored 1`",
        "naive": "teacher and student whole, layer by layer",
    }
    found = {row["way"]: row for row in read("benchmark_scan/cost.csv")}
    rows = [
        (said, f"{float(found[way]['cpu_seconds']):.1f}", f"{float(found[way]['forwards']):.1f}")
        for way, said in words.items()
    ]
    return table(("30 layers, one mechanism", "CPU seconds", "forwards"), rows)


def large_model() -> str:
    """What `python analyses/large_model.py` measured."""
    rows = [
        (
            f"{row['model']}, {row['dtype']}",
            row["file_gb"],
            row["run"] + (f", at most {row['cap_gb']} GB" if row["cap_gb"] else ""),
            row["told_gb"],
            row["peak_gb"] or "refused",
            row["own_gb"],
            row["told_over_peak"] or (row["peak_over_file"] and f"{row['peak_over_file']} x file"),
            row["cpu_seconds"],
        )
        for row in read("large_model/table.csv")
    ]
    names = (
        "model",
        "file, GB",
        "run",
        "said, GB",
        "peak, GB",
        "own, GB",
        "said / peak",
        "CPU seconds",
    )
    return table(names, rows)


def ranks() -> str:
    """What `python analyses/benchmark_ranks.py` measured."""
    by_command: dict[str, list[dict[str, str]]] = {}
    for row in read("benchmark_ranks/ranks.csv"):
        by_command.setdefault(row["command"], []).append(row)
    rows = []
    for command, found in by_command.items():
        cpu, wall = (
            " / ".join(f"{float(row[name]):.0f}" for row in found)
            for name in ("cpu_seconds", "wall_seconds")
        )
        worst = max(float(row["worst"]) for row in found)
        weights = [float(row["weights"]) for row in found if row["weights"]]
        off = _small(max(weights)) if weights else ""
        rows.append((command, cpu, wall, found[0]["rows"], _small(worst), off))
    head = (
        *("command", "CPU seconds by 1 / 2 / 3 ranks", "wall seconds", "rows"),
        *("largest difference of a value", "of a weight"),
    )
    return table(head, rows)


def _small(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def trace_cost() -> str:
    """What `python analyses/benchmark_trace.py time` timed."""
    words = {
        "bound": "the model work that cannot be avoided",
        "mismatch": "`mismatch trace`",
        "plain": "the four models whole, measuring nothing",
        "nnsight + pytorch-cka": "activations of the swap alone stored by nnsight, then pytorch-cka",
    }
    rows = [
        (
            words[row["way"]],
            f"{float(row['cpu_seconds']):.0f}",
            f"{float(row['ratio_to_bound']):.2f}",
        )
        for row in read("benchmark_trace/time.csv")
    ]
    return table(("way", "CPU seconds", "times the bound"), rows)


def trace_shares() -> str:
    """What `python analyses/benchmark_trace.py shares` booked."""
    words = {
        "models": "blocks and heads of the four models",
        "metrics": "metrics: log-softmax, divergences, sums over tokens",
        "calibration": "the pass that sets the control `mean`",
        "floor": "the floor: the first window once more",
        "table": "intervals, rows, findings, summary",
        "rest": "texts, plan, proofs",
    }
    rows = [
        (words[row["share"]], f"{float(row['cpu_seconds']):.1f}", f"{float(row['of_models']):.3f}")
        for row in read("benchmark_trace/shares.csv")
    ]
    whole = sum(float(row["of_models"]) for row in read("benchmark_trace/shares.csv"))
    rows.append(("the whole", "", f"{whole:.3f}"))
    return table(("8k tokens", "CPU seconds", "times the models"), rows)


def repair_cost() -> str:
    """What `python analyses/benchmark_repair.py` timed: the median over its rounds."""
    words = {
        "layer": "the layer alone, forward and backward",
        "step": "a step of the stage `local`",
        "store": "the teacher up to the layer, once",
        "write": "a token sampled from the teacher, once",
        "field": "the usual step: a full forward of the teacher",
    }
    times: dict[str, list[float]] = {way: [] for way in words}
    for row in read("benchmark_repair/cost.csv"):
        if row["way"] in times:
            times[row["way"]].append(float(row["cpu_ms_per_token"]))
    rows = [(words[way], f"{median(found):.3f}", str(len(found))) for way, found in times.items()]
    return table(("what", "CPU milliseconds per token", "rounds"), rows)
