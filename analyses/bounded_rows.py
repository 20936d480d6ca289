"""The rows of `bounded_state.py`: which swap, with how many bytes, trained how.

python analyses/bounded_rows.py     their names
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One swap.

    Attributes:
        mechanism: the text.
        kilobytes: budget to share out; None: as the swap says.
        trained: whether scores are trained.
        stages: that train.
        seed: of the repair.
        long: also read at 2048 tokens.
        window: tokens of a training window.
        places: what is replaced, as in a swap; empty: the layers of the table.
        group: of the figure.
    """

    mechanism: str
    kilobytes: float | None = None
    trained: bool = True
    stages: tuple[str, ...] = ("scores", "slots")
    seed: int = 0
    long: bool = False
    window: int = 512
    places: tuple[str, ...] = ()
    group: str = "shared"


def chosen_by(score: str, slots: str, rest: str) -> Row:
    """A control of the choice: as many slots, other tokens."""
    segment = 16 if slots.startswith("[") else 32
    settings = f"segment={segment}, slots={slots}, slot_score={score}{rest}, kv_dtype=float16"
    return Row(f"kv_slots({settings})", trained=False, group="control")


REST = ", rest=mean"
OTHERS = {
    "infini(segment=64)": Row("infini(segment=64)", trained=False, group="other"),
    "sliding_window(64, 1)": Row(
        "sliding_window(window=64, sinks=1)", trained=False, group="other"
    ),
    "local only": Row("kv_slots(segment=32, slots=0)", trained=False, group="other"),
}
SHARED = "kv_slots(segment=32, rest=mean, kv_dtype=float16)"
NARROW = "kv_slots(segment=16, rest=mean, kv_dtype=float16)"
EIGHT, EIGHT_NARROW = (each.replace("float16", "mxint8") for each in (SHARED, NARROW))
"""In 8 bits a number."""
WIDE, WIDE_NARROW = (each.replace(", kv_dtype=float16", "") for each in (SHARED, NARROW))
"""Keys and values as the model makes them, in float32."""
PLACES = {"all": ("all",), "18": ("layer18",), "gemma": ("layer11",)}
MODELS = {"gemma": "gemma3-270m"}
"""Which model a table is of; smollm2 where nothing is said."""
GLOBAL = ("layer5", "layer11", "layer17")
"""The layers of Gemma-3-270M without a window."""
ROWS = {
    "gemma": {
        "shared, 160 kB": Row(SHARED, 160),
        "sliding_window(64, 1)": OTHERS["sliding_window(64, 1)"],
        "infini(segment=64)": OTHERS["infini(segment=64)"],
        "three global layers, shared, 500 kB": Row(SHARED, 500, places=GLOBAL),
        "three global layers, sliding_window(64, 1)": Row(
            "sliding_window(window=64, sinks=1)", trained=False, group="other", places=GLOBAL
        ),
    },
    "all": {
        "shared, 8 MB": Row(SHARED, 8000, long=True),
        "shared, 8 MB, seed 1": Row(SHARED, 8000, seed=1),
        "shared, 8 MB, seed 2": Row(SHARED, 8000, seed=2),
        "shared, 10 MB, windows of 2048": Row(SHARED, 10000, long=True, window=2048),
        "shared, 10 MB, windows of 2048, seed 1": Row(
            SHARED, 10000, seed=1, long=True, window=2048
        ),
        "shared, 10 MB, windows of 2048, seed 2": Row(
            SHARED, 10000, seed=2, long=True, window=2048
        ),
        "shared, 6 MB": Row(SHARED, 6000),
        "shared, 4 MB": Row(SHARED, 4000),
        "shared, 3 MB": Row(SHARED, 3000),
        "shared, 4.5 MB of mxint8": Row(EIGHT, 4500),
        "shared, 3 MB of mxint8": Row(EIGHT, 3000),
        "shared, 3 MB of mxint8, seed 1": Row(EIGHT, 3000, seed=1),
        "shared, 3 MB of mxint8, seed 2": Row(EIGHT, 3000, seed=2),
        "shared, 6 MB of mxint8, windows of 2048": Row(EIGHT, 6000, long=True, window=2048),
        **OTHERS,
        "shared, 8 MB of float32": Row(WIDE, 8000),
        "alike, 96 slots": Row(SHARED, group="alike"),
        "alike, 96 slots of float32": Row(WIDE, long=True, group="alike"),
        "random, 96 slots": chosen_by("random", "96", REST),
        "value norm, 96 slots": chosen_by("value_norm", "96", REST),
        "short key, 96 slots": chosen_by("short_key", "96", REST),
        "first, 96 slots": chosen_by("first", "96", REST),
    },
    "18": {
        "shared, 100 kB": Row(NARROW, 100, long=True),
        "shared, 100 kB, seed 1": Row(NARROW, 100, seed=1),
        "shared, 100 kB, seed 2": Row(NARROW, 100, seed=2),
        "shared, 100 kB, windows of 2048": Row(NARROW, 100, long=True, window=2048),
        "shared, 60 kB": Row(NARROW, 60),
        "shared, 60 kB of mxint8": Row(EIGHT_NARROW, 60),
        "shared, 150 kB of float32": Row(WIDE_NARROW, 150),
        "shared, 100 kB of float32": Row(WIDE_NARROW, 100, long=True),
        "shared, 100 kB of float32, segments of 8": Row(
            WIDE_NARROW.replace("segment=16", "segment=8"), 100
        ),
        "shared, 150 kB of float32, segments of 32": Row(WIDE, 150, long=True),
        **OTHERS,
        "infini(segment=64, sinks=1)": Row(
            "infini(segment=64, sinks=1)", trained=False, group="other"
        ),
        "infini in the other kv heads": Row(
            "infini(segment=64, overlap=1, normalizer=shared, feature_map=hedgehog, memory_position=far)",
            places=("layer18.kv_heads[0,1]",),
            stages=("closed-form", "local"),
            group="other",
        ),
        "without rest": Row(NARROW.replace(", rest=mean", ""), 100),
        "without the segment before": Row(SHARED.replace("rest", "overlap=0, rest"), 100),
        "without the first token": Row(NARROW.replace("rest", "sinks=0, rest"), 100),
        "192 slots of kv head 2": Row(
            NARROW.replace("rest", "slots=[0, 0, 192], rest"), group="alike"
        ),
        **{
            f"{score}, as many slots": chosen_by(score, "[48, 32, 192]", REST)
            for score in ("random", "value_norm", "key_norm", "short_key", "recent", "first")
        },
    },
}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for table, named in ROWS.items():
        print(table, *named, sep="\n    ")


if __name__ == "__main__":
    main()
