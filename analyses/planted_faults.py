"""Does a diagnosis name the fault that was planted?

    python analyses/planted_faults.py             about 8 minutes of CPU, one thread; a fault that is written down
                                                  already is not planted again

Attention of layer 12 of SmolLM2 keeps its weights, and its output is spoilt in one known way: doubled, rotated,
shifted, delayed by one token, wrong at the first token, every token of a size of its own, one head gone.
`mismatch.diagnose` is told nothing. Writes figures/planted_faults/faults.{png,json} and a csv a fault: what each
correction returns of it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

import mismatch
from mismatch.mechanisms.base import Context, Wrapper
from mismatch.mechanisms.parts.calling import first_of, with_first
from mismatch.registry import mechanisms
from mismatch.report import style

FAULTS = {
    "scaled": ("doubled", "scale"),
    "shifted": ("mean shifted", "mean"),
    "rotated": ("rotated", "linear"),
    "delayed": ("one token late", "delay"),
    "first": ("first token wrong", "first"),
    "sizes": ("sizes by token", "size"),
    "head": ("one head gone", "head 1"),
}
"""In words, and the correction that must lead."""
CORRECTIONS = (
    *("scale", "mean", "affine", "linear"),
    *("delay", "position", "rope"),
    *("size", "first", "massive"),
    "head 1",
)
LAYER = 12
BY = 10.0
"""Length of the shift; a usual update there has length 21 (median over tokens)."""
SIZES: dict[str, Any] = {"fit_tokens": 4608, "tokens": 1536, "controls": ()}
HERE = Path(__file__).resolve().parent.parent / "figures" / "planted_faults"


@dataclass(frozen=True)
class FaultConfig:
    """Which fault."""

    kind: str = "same"
    """Its name."""
    by: float = 5.0
    """Length of the vector that `shifted` adds."""


class Fault(Wrapper):
    """The original with one thing wrong."""

    Config = FaultConfig
    slots = ("attn",)
    identity = "kind=same"
    state = "the original's"
    source = "planted_faults.py"

    def __init__(self, original: Any, config: FaultConfig, context: Context) -> None:
        super().__init__(original, config, context)
        draw = torch.Generator().manual_seed(0)
        d = context.d_model
        self.turn = torch.linalg.qr(torch.randn(d, d, generator=draw))[0]
        self.shift = torch.randn(d, generator=draw)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.settings.kind == "head":
            return self._without_head(args, kwargs)
        out = self.original(*args, **kwargs)
        return with_first(out, self._spoilt(first_of(out)))

    def _spoilt(self, y: torch.Tensor) -> torch.Tensor:
        usual = y[:, 1:].norm(dim=-1, keepdim=True).mean(1, keepdim=True)
        unit = self.shift / self.shift.norm()
        match self.settings.kind:
            case "scaled":
                return 2 * y
            case "rotated":
                return y @ self.turn
            case "shifted":
                return y + self.settings.by * unit
            case "delayed":
                return torch.cat([y[:, :1], y[:, :-1]], 1)
            case "first":
                return torch.cat([y[:, :1] + 20 * usual * unit, y[:, 1:]], 1)
            case "sizes":  # every token a size of its own, none of them twice
                at = torch.arange(y.shape[1])
                return y * torch.exp(torch.sin(12.9898 * at) * 2)[:, None]
        return y

    def _without_head(self, args: tuple, kwargs: dict) -> Any:
        original: Any = self.original
        width = original.o_proj.in_features // original.config.num_attention_heads

        def drop(_module: Any, given: tuple) -> tuple:
            z = given[0].clone()
            z[..., width : 2 * width] = 0
            return (z,)

        handle = original.o_proj.register_forward_pre_hook(drop, prepend=True)
        try:
            return self.original(*args, **kwargs)
        finally:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    plant()
    teacher = mismatch.load("smollm2")
    for kind in FAULTS:
        kept = args.output / f"{kind}.csv"
        if not kept.exists():
            swap = f"layer{LAYER}:fault(kind={kind}, by={BY})"
            heads = 3 if kind == "head" else 0
            result = mismatch.diagnose(teacher, swap, heads=heads, **SIZES)
            print(result.summary(), "\n")
            rows = result.shares.assign(fault=kind, damage=result.found.damage.value)
            rows.to_csv(kept, index=False)
    frame = pd.concat([pd.read_csv(args.output / f"{kind}.csv") for kind in FAULTS])
    made = {"named": named(frame), "versions": mismatch.versions()}
    (args.output / "faults.json").write_text(json.dumps(made, indent=2) + "\n")
    (args.output / "faults.png").write_bytes(style.to_bytes(draw(frame), "png"))
    print(json.dumps(made["named"], indent=2))


def plant() -> None:
    """Make `fault` a mechanism."""
    mechanisms().add("fault", Fault)


def named(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """By fault: its damage, the correction that leads, its share and interval, and whether it is the planted one."""
    found = {}
    for kind, (_, wanted) in FAULTS.items():
        mine = frame[frame["fault"] == kind]
        lead = mine[mine["leading"]].iloc[0] if mine["leading"].any() else None
        found[kind] = {"damage": float(mine["damage"].iloc[0]), "leading": None, "right": False}
        if lead is not None:
            numbers = {name: float(lead[name]) for name in ("share", "lo", "hi")}
            found[kind] |= {"leading": lead["name"], "right": lead["name"] == wanted, **numbers}
    return found


@style.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Faults down, corrections across; what each returns, in per cent; bold: the one that is named."""
    shown = frame[(frame["panel"] != "cause") & frame["name"].isin(CORRECTIONS)]
    shares = shown.pivot_table(index="fault", columns="name", values="share")
    shares = shares.reindex(index=list(FAULTS), columns=list(CORRECTIONS))
    picture = Figure(figsize=(style.WIDTH, 3.4), layout="constrained")
    ax = picture.subplots()
    ax.set_facecolor(style.MISSING)
    drawn = ax.pcolormesh(
        shares.to_numpy(), cmap=style.SIGNED_MAP, vmin=-1, vmax=1, edgecolors="white", lw=1
    )
    leads = set(zip(*(shown.loc[shown["leading"], c] for c in ("fault", "name")), strict=True))
    for y, kind in enumerate(FAULTS):
        for x, name in enumerate(CORRECTIONS):
            value = shares.loc[kind, name]
            if pd.isna(value):
                continue
            shown_as = "< -100" if value < -1 else f"{round(100 * value)}"
            ax.text(
                x + 0.5, y + 0.5, shown_as, fontsize=7,
                ha="center", va="center", color="white" if abs(value) > 0.6 else style.INK,
                fontweight="bold" if (kind, name) in leads else "normal",
            )  # fmt: skip
    ax.set_xticks([x + 0.5 for x in range(len(CORRECTIONS))], CORRECTIONS, rotation=35, ha="right")
    ax.set_yticks([y + 0.5 for y in range(len(FAULTS))], [words for words, _ in FAULTS.values()])
    ax.invert_yaxis()
    ax.set_xlabel("what is corrected")
    ax.set_title(
        f"Faults planted at layer {LAYER}: what each correction returns of the KL, %; bold: named as leading",
        loc="left", fontsize=9,
    )  # fmt: skip
    picture.colorbar(drawn, ax=ax, label="share recovered")
    return picture


if __name__ == "__main__":
    main()
