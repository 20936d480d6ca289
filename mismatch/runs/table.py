"""The one long table: its columns, its order, its bytes, and the dictionary that explains it.

One number a row. The address of a number is every column but `value lo hi over n swapped`; no address
occurs twice. Rows are sorted and typed before they are written, so the same numbers give the same
bytes, in whatever order they were measured.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mismatch import registry
from mismatch.errors import RunError
from mismatch.runs.intervals import BLOCKS, DOCUMENTS, DOCUMENTS_NEEDED, FORMER, SAMPLES
from mismatch.runs.site_names import SITES

GROWTH = "growth"
"""A stat of `rel_l2`: its mean behind the last block over that behind the last swapped one, paired over tokens."""
MAIN, FLOOR, SWAP = "main", "floor", "swap"
"""Students that the table knows by name."""
SCHEMA_VERSION = 2
"""Goes up when a column, the plan, the manifest or a setting changes its name or its meaning."""

MOST_ROWS = 2_000_000
"""Rows of a table that is read; the largest run that was made has 60,000."""
MOST_LAYERS = 1023
"""Largest number of a layer or a head."""


@dataclass(frozen=True)
class Column:
    """One column: its name, its types in arrow and pandas, whether it may be empty, and its meaning."""

    name: str
    arrow: pa.DataType
    pandas: str
    nullable: bool
    doc: str


COLUMNS = (
    Column("run_id", pa.string(), "str", False, "model, swap and hash of the settings"),
    Column(
        "stage",
        pa.string(),
        "str",
        False,
        "surgery: after the swap; scan: one layer at a time; plan: a choice of layers; "
        "diagnose: one correction of the update at a time; repair: after a stage of the repair; "
        "train: after a step of the training",
    ),
    Column("step", pa.int64(), "int64", False, "training step of the stage; 0 for surgery"),
    Column(
        "mode",
        pa.string(),
        "str",
        False,
        "free: the student runs on its own; forced: each swapped layer gets the teacher's input",
    ),
    Column(
        "student",
        pa.string(),
        "str",
        False,
        "swap, the name of a control, or floor (the teacher against itself in another batch shape); "
        "of a probe also teacher, the untouched model itself; of a scan the mechanism",
    ),
    Column(
        "layer",
        pa.int16(),
        "Int16",
        True,
        "0-based; empty for final and logits; of a scan the swapped layer",
    ),
    Column("site", pa.string(), "str", False, "where it was measured: " + " ".join(SITES)),
    Column("head", pa.int16(), "Int16", True, "0-based; empty where a number is not of one head"),
    Column("position", pa.string(), "str", False, "all, or 0-based inclusive token range: 64-127"),
    Column("metric", pa.string(), "str", False, "metric or probe: see metrics in this dictionary"),
    Column(
        "stat",
        pa.string(),
        "str",
        False,
        "statistic of the metric; X_minus_C is the paired difference to the control C (or the "
        "teacher); X[a=1,b=2] was measured under these conditions",
    ),
    Column("value", pa.float64(), "float64", True, "in the unit of the metric; empty: not defined"),
    Column("lo", pa.float64(), "float64", True, "lower end of the 95 % interval; empty: none"),
    Column("hi", pa.float64(), "float64", True, "upper end of the 95 % interval; empty: none"),
    Column(
        "over",
        pa.string(),
        "str",
        False,
        f"what the interval is over: {DOCUMENTS}; {BLOCKS}, in a text of fewer than {DOCUMENTS_NEEDED} documents; "
        f"{SAMPLES} of a probe; empty: no interval, or a number that is exact",
    ),
    Column("n", pa.int64(), "int64", False, "tokens behind the number"),
    Column("swapped", pa.bool_(), "bool", False, "the layer holds a swapped module"),
)

ADDRESS = [c.name for c in COLUMNS if c.name not in ("value", "lo", "hi", "over", "n", "swapped")]
"""The columns that together name a number."""

_DEFAULTS = {
    "stage": "surgery",
    "step": 0,
    "layer": pd.NA,
    "head": pd.NA,
    "position": "all",
    "lo": float("nan"),
    "hi": float("nan"),
    "swapped": False,
}
_LAST = 2**15 - 1
"""The largest int16: no layer or head has this number."""

_FIRST_STUDENTS = {"swap": 0, "floor": 2}  # controls stand between them, by name


def position_start(position: str) -> int:
    """First token of a position bin: 64 for `64-127`, 0 for `0`, -1 for `all`.

    Raises:
        RunError: not a position.
    """
    if position == "all":
        return -1
    if not re.fullmatch(r"\d+(-\d+)?", position):
        raise RunError(
            f"the table has position `{position}`", hint="positions are `all`, `0` or `64-127`"
        )
    return int(position.partition("-")[0])


def under(stat: str, **given: float | str) -> str:
    """A statistic that was measured under conditions: `logprob[length=256,depth=0.1]`."""
    if not given:
        return stat
    pairs = (f"{k}={v}" if isinstance(v, str) else f"{k}={v:g}" for k, v in given.items())
    return f"{stat}[{','.join(pairs)}]"


def conditions(stat: str) -> tuple[str, dict[str, float | str]]:
    """The name and the conditions that `under` joined: `("logprob", {"length": 256.0, "depth": 0.1})`.

    A plain statistic has no conditions.
    """
    name, _, inside = stat.removesuffix("]").partition("[")
    found: dict[str, float | str] = {}
    for pair in filter(None, inside.split(",")):
        key, _, value = pair.partition("=")
        try:
            found[key] = float(value)
        except ValueError:
            found[key] = value
    return name, found


def as_table(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows in any order, with defaults left out -> the typed, sorted table.

    Raises:
        RunError: a column is missing or unknown, or two rows have the same address.
    """
    frame = rows.copy() if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    names = [c.name for c in COLUMNS]
    if frame.empty:
        frame = pd.DataFrame(columns=names)
    for name, default in _DEFAULTS.items():
        if name not in frame:
            frame[name] = default
        elif name not in ("layer", "head", "lo", "hi"):
            frame[name] = frame[name].where(frame[name].notna(), default)
    if "over" not in frame:
        frame["over"] = DOCUMENTS
    frame["over"] = frame["over"].where(frame["lo"].notna(), "").fillna("")
    missing = [n for n in names if n not in frame]
    unknown = [str(n) for n in frame if n not in names]
    if missing or unknown:
        raise RunError(
            f"these rows are no table: missing columns {missing}, unknown columns {unknown}",
            hint=f"the columns are {' '.join(names)}",
        )
    frame = frame[names].astype({c.name: c.pandas for c in COLUMNS})
    frame = frame.sort_values(ADDRESS, key=_rank, kind="stable", ignore_index=True)
    twice = frame.duplicated(ADDRESS)
    if twice.any():
        address = frame.loc[twice, ADDRESS].iloc[0].to_dict()
        raise RunError(f"the table has two numbers for one address: {address}")
    return frame


def _rank(column: pd.Series) -> pd.Series:
    """Sort keys: sites as computed, positions by token, the swap first and the floor last."""
    if column.name == "site":
        return column.map({s: i for i, s in enumerate(SITES)}).fillna(len(SITES))
    if column.name == "position":
        return column.map(position_start)
    if column.name == "student":
        return column.map(lambda s: f"{_FIRST_STUDENTS.get(s, 1)}{s}")
    if column.name in ("layer", "head"):
        return column.fillna(_LAST).astype("int64")  # empty: after the last layer
    return column


def to_parquet(table: pd.DataFrame) -> bytes:
    """The bytes of metrics.parquet. Same rows, same bytes; the dictionary of columns is inside."""
    schema = pa.schema(
        [pa.field(c.name, c.arrow, nullable=c.nullable, metadata={"doc": c.doc}) for c in COLUMNS]
    )
    arrow = pa.Table.from_pandas(as_table(table), schema=schema, preserve_index=False)
    about = {**(arrow.schema.metadata or {}), b"mismatch_schema": str(SCHEMA_VERSION).encode()}
    sink = io.BytesIO()
    pq.write_table(arrow.replace_schema_metadata(about), sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes) -> pd.DataFrame:
    """What `to_parquet` wrote.

    Raises:
        RunError: not a parquet file, of another schema, larger than any table, or with a layer or head that no model
            has.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        _check_schema(file)
        frame = file.read().to_pandas()
        table = as_table(frame if "over" in frame else frame.assign(over=FORMER))
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as cause:
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise RunError(f"metrics.parquet cannot be read: {reason:.300}") from cause
    for name in ("layer", "head"):
        if not table[name].dropna().between(0, MOST_LAYERS).all():
            raise RunError(f"metrics.parquet has a {name} outside 0..{MOST_LAYERS}")
    return table


def _check_schema(file: pq.ParquetFile) -> None:
    found = (file.schema_arrow.metadata or {}).get(b"mismatch_schema", b"none")
    if found != str(SCHEMA_VERSION).encode():
        raise RunError(
            f"metrics.parquet has schema {found.decode(errors='replace')}, this version reads schema {SCHEMA_VERSION}",
            hint="trace again, or read it with the version named in manifest.json",
        )
    for column in COLUMNS:
        at = file.schema_arrow.get_field_index(column.name)
        if at >= 0 and (kind := file.schema_arrow.field(at).type) != column.arrow:
            raise RunError(
                f"metrics.parquet: `{column.name}` must be {column.arrow}, got {kind!s:.80}"
            )
    if file.metadata.num_rows > MOST_ROWS:
        raise RunError(
            f"metrics.parquet has {file.metadata.num_rows:,} rows, more than {MOST_ROWS:,}"
        )


def dictionary(metrics: Iterable[str]) -> dict[str, Any]:
    """What the columns and the metrics (and probes) of a table mean, from their cards. JSON-able.

    It is written beside the table, so that a run explains itself wherever it is read.
    """
    cards = {name: registry.read_card(name) for name in sorted(set(metrics))}
    facts = {
        name: {"summary": card.summary, "text": card.text, **_plain(card.facts)}
        for name, card in cards.items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "columns": {c.name: {"type": str(c.arrow), "doc": c.doc} for c in COLUMNS},
        "metrics": facts,
    }


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(facts), default=str))
