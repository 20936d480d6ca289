"""A diagnosis as rows of the long table, stage `diagnose`. No torch.

kl   mean                     free     of the swap and of each control
kl   mean[correction=C]       free     of the swap, corrected (or `causes=A+B`)
kl   recovered[correction=C]  free     share of the KL that it recovers; recovered[causes=A+B]
kl   share[cause=C]           free     Shapley share; C = unexplained: the remainder
rel_l2   squared, squared[correction=C]    forced   squared error of the update, 1 = as far as an update of zero
rel_l2   behind               free     of the stream leaving each block from the last place on
update_size   teacher, student    forced   median ratio of the update to the stream it is added to (no log)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mismatch.runs.table import SWAP, under
from mismatch.stages.diagnose.numbers import Found, Kl, Share


def rows_of(found: Found) -> list[dict[str, Any]]:
    """Rows without run id."""
    return [{"over": found.over, **row} for row in _rows(found)]


def _rows(found: Found) -> Iterator[dict[str, Any]]:
    yield _row("kl", "mean", found.damage)
    yield _row("nll", "shift", found.nll)
    for name, kl in found.controls.items():
        yield _row("kl", "mean", kl, student=name)
    for one in found.corrections:
        said = {"layer": one.layer, "head": one.head}
        yield _row("kl", under("mean", correction=one.name), one.kl, **said)
        yield _row("kl", under("recovered", correction=one.name), one.share, **said)
    for names, share in found.joint.items():
        yield _row("kl", under("recovered", causes=names), share)
    for name, share in found.causes.items():
        yield _row("kl", under("share", cause=name), share)
    if found.unexplained is not None:
        yield _row("kl", under("share", cause="unexplained"), found.unexplained)
    for place in found.places:
        at = {"layer": place["layer"], "site": place["site"], "mode": "forced", "swapped": True}
        yield _row("rel_l2", "squared", place["forced_error"], **at)
        for name, error in place["corrected_error"].items():
            yield _row("rel_l2", under("squared", correction=name), error, **at)
        for head, share in enumerate(place["head_errors"]):
            yield _row("rel_l2", "recovered_by_head", share, head=head, **at)
        yield _row("update_size", "teacher", place["update_to_stream"], **at)
        yield _row("update_size", "student", place["update_to_stream_student"], **at)
    for layer, error in zip(
        found.behind.get("layers", ()), found.behind.get("errors", ()), strict=True
    ):
        yield _row("rel_l2", "behind", error, layer=layer, site="resid_post")


def _row(metric: str, stat: str, value: Kl | Share | float, **address: Any) -> dict[str, Any]:
    number = {"value": value} if isinstance(value, float) else vars(value)
    return {
        "stage": "diagnose",
        "mode": "free",
        "student": SWAP,
        "site": "logits",
        "metric": metric,
        "stat": stat,
        "n": 0,
        **address,
        **number,
    }
