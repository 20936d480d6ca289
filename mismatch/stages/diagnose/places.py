"""The swapped places of a student, and the site where each is corrected.

Everything inside a sublayer (a norm, a projection, RoPE) acts through what that sublayer ADDS to the stream, so that is
what is corrected: `attn_out`, `mlp_out`, or the change of the whole stream where a block was replaced (`resid_post`).
Clauses that act through one update are one place.
"""

from __future__ import annotations

from dataclasses import dataclass

from mismatch.errors import SurgeryError
from mismatch.runs.plan import Replaced, SwapPlan
from mismatch.spec.heads import said

OF_MLP = ("mlp", "norm2", "norm2_post", "gate_proj", "up_proj", "down_proj")
SITES = ("attn_out", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Place:
    """One update that was changed.

    Attributes:
        layer: 0-based.
        site: `attn_out`, `mlp_out`, or `resid_post` for a block.
        mechanisms: what stands there, as in the swap.
        paths: of the replaced modules, from the model.
    """

    layer: int
    site: str
    mechanisms: tuple[str, ...]
    paths: tuple[str, ...]

    @property
    def key(self) -> str:
        """Names the place in a saved state."""
        return f"{self.layer}.{self.site}"


def places_of(plan: SwapPlan) -> tuple[Place, ...]:
    """The places of a swap in depth order.

    Raises:
        SurgeryError: nothing is swapped inside a block.
    """
    whole = {c.layer for c in plan.clauses if c.slot == "block"}
    found: dict[tuple[int, int], list] = {}
    for clause in plan.clauses:
        if clause.layer is None:
            continue
        site = "mlp_out" if clause.slot in OF_MLP else "attn_out"
        site = "resid_post" if clause.layer in whole else site
        found.setdefault((clause.layer, SITES.index(site)), []).append(clause)
    if not found:
        if not plan.clauses:
            raise SurgeryError(
                "nothing was swapped in this student, so there is no module to correct",
                hint="`mismatch trace` measures a fine-tune layer by layer",
            )
        names = ", ".join(f"`{c.mechanism}` at {c.slot}" for c in plan.clauses)
        raise SurgeryError(
            f"{names}: nothing to diagnose stands inside a block",
            hint="a diagnosis corrects what attention, an MLP or a block adds to the stream",
        )
    return tuple(
        Place(
            layer,
            SITES[at],
            tuple(_said(c) for c in clauses),
            tuple(c.path for c in clauses),
        )
        for (layer, at), clauses in sorted(found.items())
    )


def _said(clause: Replaced) -> str:
    inner = ", ".join(f"{name}={value}" for name, value in clause.args.items())
    call = f"{clause.mechanism}({inner})" if inner else clause.mechanism
    return f"{call} in {said(clause.heads)}" if clause.heads else call
