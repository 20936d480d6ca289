"""Every site of every student beside the teacher's, on one batch (see `mismatch.forward.shared_prefix`).

```
teacher   block 0 .. block k-1 | block k .. block L-1  final         all of it, once
student                          block k .. block L-1  final         from the teacher's stream entering k
forced                           block k, block j, ...               each swapped block on the teacher's stream
```
The teacher's values of this batch, from block k on, live until every student was compared with them, and no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mismatch.forward import hooks
from mismatch.forward.shared_prefix import Stored, check_finite
from mismatch.forward.sites import Tap, tapped, taps
from mismatch.models.layout import Layout
from mismatch.runs.site_names import SITES


@dataclass(frozen=True)
class Runner:
    """What `stream` needs to know of a student: its layout, where it is not the teacher, and its name."""

    name: str
    layout: Layout
    first: int | None
    """The first block that is not the teacher's own; None when all of them are, `0` for a full run."""
    alone: tuple[int, ...] = ()
    """Blocks that are also run alone, on the teacher's stream."""
    whole_blocks: frozenset[int] = frozenset()
    front: bool = False
    """What stands in front of the blocks is not the teacher's own either."""
    crop: tuple[int, int] | None = None
    """Rows and tokens of the batch that run (for the floor: the same text in another shape); None is all."""

    @property
    def start(self) -> int:
        """The first block that is not the teacher's own."""
        return self.layout.n_layers if self.first is None else self.first


@dataclass(frozen=True)
class SitePair:
    """Teacher and student at one site of one batch."""

    student: str
    mode: str
    layer: int | None
    site: str
    teacher: Tensor
    value: Tensor


OnPair = Callable[[SitePair], None]


def stream(
    teacher: Layout,
    runners: Sequence[Runner],
    ids: Tensor,
    on_pair: OnPair,
    *,
    forced: bool = True,
    sites: Collection[str] = SITES,
    run: Callable[..., Tensor] = hooks.run,
) -> None:
    """Run one batch through the teacher and every student, and pass each pair to `on_pair` as it completes.

    Args:
        teacher: layout of the untouched model.
        runners: the students.
        ids: int64 `batch pos`.
        on_pair: called with each pair, sites in computation order, one student after the other.
        forced: also run each block of `alone` on the teacher's stream (for one that has it anyway, forced is free).
        sites: those to compare; no other is kept, but for the streams that a run needs.
        run: the backend.

    Raises:
        NumericsError: a value is NaN or infinite; names student, layer and site.
        RunError: a module changed a stored value in place, so that a later comparison would be wrong.
    """
    whole = [runner for runner in runners if runner.crop is None]
    begin = min((runner.start for runner in whole), default=teacher.n_layers)
    crops = [runner.crop for runner in runners if runner.crop is not None]
    kept: Stored[tuple[int | None, str]] = Stored()
    wanted = tapped(teacher, sites)
    entered = {at for runner in whole for at in (runner.start, *runner.alone)}

    def keep(tap: Tap, value: Tensor) -> None:
        check_finite(value, "teacher", _where(tap.layer, tap.site))
        if tap.layer < begin - 1:  # only a cropped runner needs it
            value = value[: crops[0][0], : crops[0][1]].clone()
        kept.keep((tap.layer, tap.site), value)

    with torch.no_grad():
        read = [
            tap
            for layer in range(teacher.n_layers)
            for tap in taps(teacher, layer)
            if (tap.site in wanted and layer >= (0 if crops else begin)) or tap.enters in entered
        ]
        kept.keep((None, "final"), run(teacher, ids, read, keep))
        for runner in runners:
            pairing = _Pairing(runner, kept, on_pair, wanted)
            if runner.first is None:
                pairing.only_final(teacher.n_layers - 1)
                continue
            pairing.free(ids, run)
            if forced:
                pairing.forced(ids, run)


class _Pairing:
    """One student's runs against the teacher's stored values."""

    def __init__(
        self,
        runner: Runner,
        kept: Stored[tuple[int | None, str]],
        on_pair: OnPair,
        sites: Collection[str],
    ) -> None:
        self.runner, self.kept, self.on_pair, self.sites = runner, kept, on_pair, sites

    def free(self, ids: Tensor, run: Callable[..., Tensor]) -> None:
        runner = self.runner
        ids, start = self._cropped(ids), runner.start
        wanted = [t for layer in range(start, runner.layout.n_layers) for t in self._taps(layer)]

        def pair(tap: Tap, value: Tensor) -> None:
            self._pair_up("free", tap.layer, tap.site, value)
            if tap.layer == self._on_teacher and tap.layer in runner.alone:
                self._pair_up("forced", tap.layer, tap.site, value)

        given = self._entering(start) if start > 0 else None
        final = run(runner.layout, ids, wanted, pair, start=start, stream=given)
        self._pair_up("free", None, "final", final)

    def forced(self, ids: Tensor, run: Callable[..., Tensor]) -> None:
        for layer in self.runner.alone:
            wanted = self._taps(layer)
            if layer == self._on_teacher or not wanted:
                continue

            def pair(tap: Tap, value: Tensor) -> None:
                self._pair_up("forced", tap.layer, tap.site, value)

            run(
                self.runner.layout,
                ids,
                wanted,
                pair,
                start=layer,
                stop=layer + 1,
                stream=self._entering(layer),
            )

    @property
    def _on_teacher(self) -> int | None:
        """The block that gets the teacher's stream in a free run."""
        return None if self.runner.front else self.runner.first

    def only_final(self, last: int) -> None:
        """No block differs: only the final norm runs again."""
        norm = self.runner.layout.final_norm
        self._pair_up("free", None, "final", norm(self.kept[last, "resid_post"]))

    def _entering(self, layer: int) -> Tensor:
        """The teacher's stream entering a block, as the block before it left it, or the embedding."""
        where = (0, "resid_pre") if layer == 0 else (layer - 1, "resid_post")
        return self._cropped(self.kept[where])

    def _cropped(self, x: Tensor) -> Tensor:
        crop = self.runner.crop
        return x if crop is None else x[: crop[0], : crop[1]]

    def _taps(self, layer: int) -> tuple[Tap, ...]:
        found = taps(self.runner.layout, layer, inner=layer not in self.runner.whole_blocks)
        return tuple(tap for tap in found if tap.site in self.sites)

    def _pair_up(self, mode: str, layer: int | None, site: str, value: Tensor) -> None:
        check_finite(value, self.runner.name, _where(layer, site))
        of = "" if layer is None else f" of layer {layer}"
        self.kept.check(
            (layer, site), f"the teacher's {site}{of} was changed in place after it was stored"
        )
        teacher = self._cropped(self.kept[layer, site])
        self.on_pair(SitePair(self.runner.name, mode, layer, site, teacher, value))


def _where(layer: int | None, site: str) -> str:
    return f"layer {layer}, {site}" if layer is not None else site
