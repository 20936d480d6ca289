"""A table like that of a real trace: 30 layers, a swap at 12, a shift that decays behind it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mismatch.runs.plan import Replaced, SwapPlan
from mismatch.runs.site_names import SITES
from mismatch.runs.table import as_table, dictionary

DICTIONARY = dictionary(["rel_l2", "cka_minibatch", "norm_ratio", "frechet", "lens_kl", "kl"])

BINS = ["0", "1-3", "4-15", "16-63", "64-127", "128-255", "256-511", "512-1023"]
SIZE = {"swap": 1.0, "zero": 0.85, "mean": 0.7, "random": 9.0, "floor": 3e-6}
KL = {"swap": 0.0612, "zero": 0.0537, "mean": 0.0475, "random": 3.58, "floor": 2.1e-7}
PLAN = SwapPlan(
    spec="layer12:infini(segment=256)",
    clauses=(
        Replaced(
            layer=12,
            slot="attn",
            path="model.layers.12.self_attn",
            mechanism="infini",
            args={"segment": 256, "update": "linear"},
            old="LlamaAttention",
            new="Infini",
            inherited={"q_proj.weight": 331776, "k_proj.weight": 110592},
            new_parameters={"gate": 9},
            dropped={},
            identity="gate -> -inf and segment >= seq_len",
            state="memory",
            notes=("first_segment=blend halves the first segment",),
        ),
    ),
)
FINDINGS = [
    {
        "severity": "high",
        "title": "The swap is no better than deleting the attention",
        "text": "KL 0.0612 against 0.0537 with the attention removed.",
        "evidence": {"swap": 0.0612, "zero": 0.0537},
        "next": "mismatch explain infini",
    },
    {
        "severity": "low",
        "title": "The norm of attn_out falls to a third",
        "text": "Distribution mismatch.",
        "evidence": {},
        "next": None,
    },
]


def synthetic(
    layers: int = 30,
    swapped: tuple[int, ...] = (12,),
    controls: tuple[str, ...] = ("zero", "mean"),
    floor: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows: list[dict] = []
    first = swapped[0]

    def add(student, layer, site, metric, value, rel=0.06, stat="mean", position="all", n=8192):
        rows.append(
            {
                "run_id": "smollm2_layer12-infini_a1b2c3",
                "mode": "free",
                "student": student,
                "layer": layer,
                "site": site,
                "position": position,
                "metric": metric,
                "stat": stat,
                "value": value,
                "lo": value - abs(value) * rel,
                "hi": value + abs(value) * rel,
                "n": n,
                "swapped": layer is not pd.NA and layer in swapped,
            }
        )

    for student in ("swap", *controls, "floor"):
        size = SIZE[student] * (floor if student == "floor" else 1)
        for layer in range(layers):
            for order, site in enumerate(SITES[:5]):
                after = student == "floor" or (layer, order) >= (first, 1)
                bump = 2.2 if layer == first and site == "attn_out" else 1.0
                part = 0.55 if site in ("attn_out", "mlp_out") else 0.3
                decay = 0.25 + 0.75 * np.exp(-(layer - first) / 5) if after else 0
                shift = after * size * part * bump * decay * np.exp(0.15 * rng.standard_normal())
                if student == "floor":
                    shift = 3e-6 * floor * (0.5 + 0.5 * rng.random())
                add(student, layer, site, "rel_l2", shift)
                add(student, layer, site, "cka_minibatch", 0.3 * shift**2, stat="shift")
                add(student, layer, site, "norm_ratio", 0.4 * shift * order - shift)
                if site not in ("attn_out", "mlp_out"):
                    add(student, layer, site, "frechet", 0.1 * shift**2, stat="value")
                if site == "resid_post":
                    add(student, layer, site, "lens_kl", KL[student] * (shift / size) * 4, rel=0.1)
        add(student, pd.NA, "logits", "kl", KL[student] * (floor if student == "floor" else 1))
        for i, position in enumerate(BINS):
            grow = 0.02 if i == 0 else 0.5 + 0.18 * i + 0.1 * rng.standard_normal()
            add(student, pd.NA, "logits", "kl", KL[student] * grow, 0.15, position=position, n=200)
    for control in controls:
        difference = KL["swap"] - KL[control]
        rows.append(
            {
                **rows[-1],
                "n": 8192,
                "student": "swap",
                "layer": pd.NA,
                "position": "all",
                "stat": f"mean_minus_{control}",
                "value": difference,
                "lo": difference - 0.004,
                "hi": difference + 0.004,
            }
        )
    return as_table(rows)


def identity(layers: int = 6) -> pd.DataFrame:
    """Nothing moved: every shift is exactly at its null."""
    table = synthetic(layers, swapped=(2,))
    table[["value", "lo", "hi"]] = 0.0
    return table
