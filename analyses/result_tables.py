"""Write the tables of docs/results: `python analyses/result_tables.py`. A test asks that they are up to date.

Each number is read from `figures/`, where an analysis put it. Tables of what the code knows by itself (mechanisms,
metrics, probes, flags) are made by `docs/generate.py` when the site is built.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
FIGURES = ROOT / "figures"

Row = Mapping[str, str]


def layer12() -> str:
    """What `python analyses/layer12.py` measured."""
    found = {(row["swap"], row["metric"]): row for row in _read("layer12/layer12.csv")}
    rows = []
    for swap in dict.fromkeys(swap for swap, _ in found):
        pairs = [(swap, name) for name in ("kl", "nll")]
        cells = [_interval(found[pair]) if pair in found else "" for pair in pairs]
        rows.append((f"`{swap}`", *cells))
    head = ("layer 12, attention", "KL, nats per token", "NLL difference, nats per token")
    return _table(head, rows)


def before_training() -> str:
    """What `python analyses/mechanism_table.py` measured."""
    rows = []
    for row in sorted(_read("mechanism_table/mechanism_table.csv"), key=lambda r: float(r["kl"])):
        share = [float(row[name]) for name in ("share", "share_lo", "share_hi")]
        rows.append(
            (
                f"`{row['swap']}`",
                row["kind"],
                _interval({**row, "value": row["kl"], "lo": row["kl_lo"], "hi": row["kl_hi"]}),
                "0" if max(share) < 0.0005 else "{:.2f} [{:.2f}, {:.2f}]".format(*share),
                f"`{row['of']}`",
            )
        )
    head = ("layer 12", "kind", "KL, nats per token", "share of the control's KL", "control")
    return _table(head, rows)


def costs() -> str:
    """What `python analyses/mechanism_costs.py` counted and timed."""
    rows = []
    for row in _read("mechanism_table/costs.csv"):
        first, second, most = (int(row[f"state_{when}"]) for when in ("1024", "2048", "most"))
        peak = "" if most == max(first, second) else f", at most {most:,} between"
        state = (f"{first:,}", f"{second:,}{peak}")
        times = (f"{float(row['forward']):.2f}", f"{float(row['both']):.2f}")
        rows.append((f"`{row['swap']}`", row["part"], f"{int(row['new']):,}", *times, *state))
    head = (
        *("mechanism", "slot", "new parameters", "forward", "with backward"),
        *("state, 1024 tokens", "state, 2048 tokens"),
    )
    return _table(head, rows)


def carriers() -> str:
    """What `python analyses/scan_atlas.py` found: the worst layer of each mechanism, on copying and on retrieval."""
    units = {"induction": "nats a token", "passkey": "nats a key"}
    rows = []
    for row in _read("scan_atlas/carriers.csv"):
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
    return _table(head, rows)


def plans() -> str:
    """What `python analyses/plan_layers.py` measured. A choice that two plans made is shown once."""
    words = {"4": "4 layers", "8": "8 layers", "8_keep_retrieval": "8 layers, retrieval kept"}
    chosen: dict[str, list[str]] = {}
    for name in words:
        chosen.setdefault(_read(f"plan_layers/{name}.csv")[0]["swap"], []).append(name)
    rows = []
    for swap, names in chosen.items():
        found = {(row["task"], row["kind"]): row for row in _read(f"plan_layers/{names[0]}.csv")}
        said = "; ".join(words[name] for name in names)
        for task in dict.fromkeys(task for task, _ in found):
            cells = [_interval(found[task, kind], 3) for kind in ("predicted", "measured", "zero")]
            rows.append((said, f"`{swap}`", task, *cells))
    return _table(("plan", "swap", "task", "predicted", "measured together", "`zero` there"), rows)


def selectors() -> str:
    """What `python analyses/selector_study.py --ranks` read off a scan of SmolLM2."""
    rows = []
    for row in _read("selectors/sliding_window_window_64__sinks_1/sets.csv"):
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
    return _table(head, rows)


def selected() -> str:
    """What `python analyses/selector_study.py` measured of the sets together."""
    tasks = {
        "text": "text, KL",
        "induction": "copying",
        "needles": "needles",
        "kv_lookup": "look-ups",
    }
    rows = [
        (
            *(row["layers"], f"`{row['score']}`"),
            *(
                _interval({end: row[f"{task} {at}"] for end, at in LOST.items()}, 3)
                for task in tasks
            ),
        )
        for row in _read("selectors/table.csv")
    ]
    return _table(("of 30", "score", *tasks.values()), rows)


LOST = {"value": "lost", "lo": "lost lo", "hi": "lost hi"}


def scan_cost() -> str:
    """What `python analyses/benchmark_scan.py` timed."""
    words = {
        "forward": "one forward of the teacher",
        "scan": "`mismatch scan`, 3 of 10 predictions scored, the default",
        "scan, all scored": "`mismatch scan --scored 1`",
        "naive": "teacher and student whole, layer by layer",
    }
    found = {row["way"]: row for row in _read("benchmark_scan/cost.csv")}
    rows = [
        (said, f"{float(found[way]['cpu_seconds']):.1f}", f"{float(found[way]['forwards']):.1f}")
        for way, said in words.items()
    ]
    return _table(("30 layers, one mechanism", "CPU seconds", "forwards"), rows)


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
        for row in _read("large_model/table.csv")
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
    return _table(names, rows)


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
        for row in _read("benchmark_trace/time.csv")
    ]
    return _table(("way", "CPU seconds", "times the bound"), rows)


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
        for row in _read("benchmark_trace/shares.csv")
    ]
    whole = sum(float(row["of_models"]) for row in _read("benchmark_trace/shares.csv"))
    rows.append(("the whole", "", f"{whole:.3f}"))
    return _table(("8k tokens", "CPU seconds", "times the models"), rows)


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
    for row in _read("benchmark_repair/cost.csv"):
        if row["way"] in times:
            times[row["way"]].append(float(row["cpu_ms_per_token"]))
    rows = [(words[way], f"{median(found):.3f}", str(len(found))) for way, found in times.items()]
    return _table(("what", "CPU milliseconds per token", "rounds"), rows)


def stages() -> str:
    """What `python analyses/repair_layer12.py` measured."""
    found = {(row["swap"], row["name"]): row for row in _read("repair_layer12/stages.csv")}
    swaps = list(dict.fromkeys(swap for swap, _ in found))
    rows = []
    for stage in dict.fromkeys(name for _, name in found):
        cells = [f"`{stage}`"]
        for swap in swaps:
            row = found[swap, stage]
            cells += [
                _interval({"value": row["kl"], "lo": row["lo"], "hi": row["hi"]}),
                f"{100 * float(row['of_plain']):.0f} %",
            ]
        rows.append(tuple(cells))
    names = [swap.partition(":")[2] for swap in swaps]
    head = [cell for name in names for cell in (f"`{name}`: KL left", "gap closed")]
    return _table(("after", *head), rows)


def repair() -> str:
    """What `python analyses/repair_table.py` measured."""
    rows = []
    for row in _read("repair_table/table.csv"):
        kl = [_kl(row, student) for student in ("swap", "repaired", "zero", "linear")]
        closed = tuple(100 * float(row[name]) for name in ("gap_closed", "gap_lo", "gap_hi"))
        gap = "{:.0f} % [{:.0f}, {:.0f}]".format(*closed)
        rows.append((f"`{row['mechanism']}`", kl[0], kl[1], gap, *kl[2:], row["verdict"]))
    head = ("layer 12", "swapped", "repaired", "gap closed", "`zero`", "`linear`", "verdict")
    return _table(head, rows)


def options() -> str:
    """What `python analyses/infini_options.py` measured."""
    rows = []
    for row in _read("infini_options/table.csv"):
        closed = tuple(100 * float(row[name]) for name in ("closed", "closed_lo", "closed_hi"))
        gap = "{:.1f} % [{:.1f}, {:.1f}]".format(*closed)
        seconds = float(row["cpu_seconds"])
        cost = f"{seconds:.0f}" if seconds else ""
        kl = _interval({"value": row["kl"], "lo": row["kl_lo"], "hi": row["kl_hi"]})
        rows.append((row["kind"], row["row"], kl, gap, cost))
    return _table(("", "form", "KL left", "closed", "CPU seconds"), rows)


def initial() -> str:
    """What `python analyses/initial_values.py` measured."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in _read("initial_values/small/table.csv"):
        closed = tuple(100 * float(row[name]) for name in ("closed", "closed_lo", "closed_hi"))
        cells = found.setdefault((row["mechanism"], row["arm"]), {})
        cells[row["when"]] = "{:.0f} % [{:.0f}, {:.0f}]".format(*closed)
    rows = [
        (mechanism, arm, cells.get("before", ""), cells.get("after", ""))
        for (mechanism, arm), cells in found.items()
        if arm != "zero"
    ]
    return _table(("layer 12", "initial values", "closed form", "and the steps"), rows)


def minutes() -> str:
    """What `python analyses/repair_minutes.py` measured."""
    rows = []
    for row in _read("repair_minutes/table.csv"):
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
    return _table((*head, "CPU seconds"), rows)


def bounded(layers: str, length: str) -> str:
    """What `python analyses/bounded_state.py` measured at one length."""
    readings = ("passkey", "needles", "look-up", "copy160")
    rows = []
    for row in _read(f"bounded_state/{layers}/table.csv"):
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
    return _table(head, rows)


def repair_first() -> str:
    """What `python analyses/repair_before_training.py` measured, at 512 tokens."""
    points: dict[tuple[str, str], dict[str, str]] = {}
    for row in _read("repair_before_training/table.csv"):
        if row["length"] == "512":
            point = points.setdefault((row["arm"], row["tokens"]), {"steps": row["steps"]})
            point[row["reading"]] = _interval(row, 2)
    rows = [
        (
            arm,
            f"{int(tokens):,}",
            *(point[name] for name in ("steps", "text", "passkey", "look-up")),
        )
        for (arm, tokens), point in points.items()
    ]
    head = ("form and way", "tokens", "steps", "text, a token", "passkey, a key")
    return _table((*head, "look-up, a token"), rows)


def harness() -> str:
    """What `python analyses/harness.py` read from a checkpoint."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in _read("harness/table.csv"):
        error = f" ± {float(row['standard_error']):.2f}" if row["standard_error"] else ""
        line = cells.setdefault((row["task"], row["metric"]), {"documents": row["documents"]})
        line[row["model"]] = f"{float(row['value']):.2f}{error}"
    rows = [
        (task, metric.replace("_", " "), line["documents"], line["original"], line["swap"])
        for (task, metric), line in cells.items()
    ]
    return _table(("task", "reading", "documents", "original", "swapped"), rows)


def smaller_cache() -> str:
    """What `python analyses/smaller_cache.py` measured."""
    rows = []
    for row in _read("smaller_cache/table.csv"):
        kl = [
            _interval({"value": row[name], "lo": row[f"{name}_lo"], "hi": row[f"{name}_hi"]})
            for name in ("swapped", "closed")
        ]
        rows.append((row["layers"], row["name"], f"`{row['swap']}`", row["cache"], *kl))
    head = (
        *("layer", "", "swap", "cache, of the teacher's"),
        *("KL as swapped", "KL, output projection fitted"),
    )
    return _table(head, rows)


def _read_off(row: Row, name: str, digits: int) -> str:
    if not row[f"{name} lo"]:
        return f"{float(row[name]):.{digits}f}, no interval"
    ends = {"value": row[name], "lo": row[f"{name} lo"], "hi": row[f"{name} hi"]}
    return _interval(ends, digits)


def fresh() -> str:
    """Swaps that `python analyses/forecast_score.py` forecast, in layers that the record has not."""
    rows = []
    for row in _read("forecast_score/fresh.csv"):
        forecast, lo, hi, measured = (
            100 * float(row[name]) for name in ("forecast", "lo", "hi", "measured")
        )
        inside = "yes" if row["inside"] == "True" else "no"
        said = f"{forecast:.0f} % [{lo:.0f}, {hi:.0f}]"
        rows.append((f"`{row['swap']}`", f"`{row['stage']}`", said, f"{measured:.0f} %", inside))
    return _table(("swap", "after", "forecast", "measured", "inside the interval"), rows)


def coverage() -> str:
    """What `python analyses/interval_coverage.py` counted: percent, mean over its numbers and the least of them."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in _read("interval_coverage/coverage.csv"):
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
    return _table(head, rows)


def _percent(covers: list[float] | None) -> str:
    return "" if covers is None else f"{sum(covers) / len(covers):.1f} % ({min(covers):.1f})"


TABLES: dict[str, Callable[[], str]] = {
    "coverage": coverage,
    "layer12": layer12,
    "before": before_training,
    "costs": costs,
    "carriers": carriers,
    "plans": plans,
    "selectors": selectors,
    "selected": selected,
    "scan cost": scan_cost,
    "large model": large_model,
    "trace cost": trace_cost,
    "trace shares": trace_shares,
    "repair cost": repair_cost,
    "stages": stages,
    "repair": repair,
    "options": options,
    "smaller cache": smaller_cache,
    "initial": initial,
    "minutes": minutes,
    "repair first": repair_first,
    "harness": harness,
    "bounded all": partial(bounded, "all", "512"),
    "bounded all, long": partial(bounded, "all", "2048"),
    "bounded 18": partial(bounded, "18", "512"),
    "bounded 18, long": partial(bounded, "18", "2048"),
    "bounded gemma": partial(bounded, "gemma", "512"),
    "forecast": fresh,
}


def _renewed(table: Callable[[], str], found: re.Match[str]) -> str:
    return f"{found[1]}\n{table()}\n\n{found[2]}"


def filled(text: str) -> str:
    """The text of a page with every generated table renewed."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(
            pattern,
            partial(_renewed, table),
            text,
            flags=re.S,
        )
    return text


def _read(name: str) -> list[dict[str, str]]:
    with open(FIGURES / name, newline="") as file:
        return [*csv.DictReader(file)]


def _interval(row: Row, digits: int = 4) -> str:
    value, lo, hi = (float(row[name]) for name in ("value", "lo", "hi"))
    if value == lo == hi == 0:
        return "0"
    if abs(value) < 0.5 * 10**-digits:
        return f"{value:.0e}"  # rounding: an interval would say no more
    # Adding 0 makes 0.0000 of what would read -0.0000.
    value, lo, hi = (round(x, digits) + 0.0 for x in (value, lo, hi))
    return f"{value:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]"


def _kl(row: Row, student: str) -> str:
    names = zip(("value", "lo", "hi"), ("", "_lo", "_hi"), strict=True)
    return _interval({name: row[f"{student}{end}"] for name, end in names})


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[*head], *([*row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for page in sorted(RESULTS.glob("*.md")):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
