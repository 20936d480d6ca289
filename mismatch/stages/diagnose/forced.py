"""One batch: what the teacher adds at each place, what the student adds there on the very same input, and how a
student runs with that changed.

Forced: the student's block gets the teacher's stream; a swapped MLP also gets the teacher's attention in front of it,
so that its input is the teacher's own whatever else is swapped. No other block of the student runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mismatch.errors import LayoutError
from mismatch.forward import hooks
from mismatch.forward.sites import leaving, massive, taps
from mismatch.mechanisms.parts.calling import first_of, hidden_in, with_first
from mismatch.models.layout import Layout
from mismatch.models.offloaded import value_of
from mismatch.stages.diagnose.fits import Known
from mismatch.stages.diagnose.places import Place
from mismatch.surgery.compared import same


@dataclass
class Side:
    """The teacher at one place, for one batch.

    Attributes:
        stream: `batch pos d`, entering the block.
        onto: `batch pos d`, what the update is added to.
        update: `batch pos d`.
        attention: `batch pos d`, what attention adds in front of a swapped MLP; else None.
        heads: `batch pos heads*d_head`, what enters the output projection; None where no head can be restored.
        bare: `batch pos d`, the update without rotary embedding; None where that makes no sense.
    """

    stream: Tensor
    onto: Tensor
    update: Tensor
    attention: Tensor | None = None
    heads: Tensor | None = None
    bare: Tensor | None = None

    @cached_property
    def known(self) -> Known:
        """What corrections may ask. Massive is a token whose stream or whose update is huge."""
        every = torch.ones(self.onto.shape[:2], dtype=torch.bool, device=self.onto.device)
        huge = massive(self.onto, every) | massive(self.update, every)
        return Known(self.update, self.bare, huge)


def teacher_sides(
    teacher: Layout,
    places: Sequence[Place],
    ids: Tensor,
    *,
    whole: bool = False,
    behind: int | None = None,
    entering: int = 0,
) -> tuple[dict[Place, Side], Tensor, dict[int, Tensor]]:
    """Run the teacher once.

    Args:
        teacher: layout.
        places: where to look.
        ids: int64 `batch pos`.
        whole: run to the end.
        behind: also keep the stream leaving every block from this one on.
        entering: also keep the stream that enters this block.

    Returns:
        The sides; the final states, `batch pos d` (without meaning unless `whole`); the streams by layer.
    """
    last = max(place.layer for place in places)
    seen: dict[tuple[int, str], Tensor] = {}
    wanted = [tap for layer in sorted({p.layer for p in places}) for tap in taps(teacher, layer)]
    if behind is not None:
        there = set(wanted)
        rest = (leaving(layer) for layer in range(behind, teacher.n_layers))
        wanted += [tap for tap in rest if tap not in there]
    if entering > 0 and leaving(entering - 1) not in wanted:
        wanted.append(leaving(entering - 1))
    inputs: dict[Place, Tensor] = {}
    with ExitStack() as stack:
        for place in places:
            if (module := _projection(teacher, place)) is not None:
                stack.enter_context(_taking_input(module, inputs, place))
        final = hooks.run(
            teacher,
            ids,
            wanted,
            lambda tap, value: seen.__setitem__((tap.layer, tap.site), value),
            stop=None if whole else last + 1,
        )
    sides = {}
    for place in places:
        mine = {site: value for (layer, site), value in seen.items() if layer == place.layer}
        onto, update = _update(place.site, mine)
        attention = mine["attn_out"] if place.site == "mlp_out" else None
        sides[place] = Side(mine["resid_pre"], onto, update, attention, inputs.get(place))
    streams = {layer: value for (layer, site), value in seen.items() if site == "resid_post"}
    return sides, final, streams


@torch.no_grad()
def forced(student: Layout, place: Place, ids: Tensor, side: Side) -> Tensor:
    """What a student adds at a place, on the teacher's input: `batch pos d`."""
    layer = place.layer
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        if (attention := side.attention) is not None:
            stack.enter_context(
                changed(student, Place(layer, "attn_out", (), ()), lambda _s: attention)
            )
        hooks.run(
            student,
            ids,
            taps(student, layer, inner=place.site != "resid_post"),
            lambda tap, value: seen.__setitem__(tap.site, value),
            start=layer,
            stop=layer + 1,
            stream=side.stream,
        )
    return _update(place.site, seen)[1].to(side.update)


@contextmanager
def changed(student: Layout, place: Place, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Whatever the student adds at a place, `batch pos d`, is `change` of it."""
    block = student.blocks[place.layer]
    whole = place.site == "resid_post"
    module = block if whole else block.get_submodule(student.site_path(place.layer, place.site))

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        value = first_of(out)
        if whole:
            entering = hidden_in(args, kwargs)
            return with_first(out, entering + change(value - entering).to(value))
        return with_first(out, change(value).to(value))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def head_given(
    student: Layout, place: Place, head: int, count: int, heads: Tensor
) -> Iterator[None]:
    """The teacher's slice of one head goes into the student's output projection."""
    module = _projection(student, place)
    assert module is not None  # heads are counted where there is one
    width = heads.shape[-1] // count
    part = slice(head * width, (head + 1) * width)

    def restored(_module: nn.Module, args: tuple) -> tuple:
        z = args[0].clone()
        z[..., part] = heads[..., part].reshape(*z.shape[:-1], width)
        return (z, *args[1:])

    handle = module.register_forward_pre_hook(restored)
    try:
        yield
    finally:
        handle.remove()


def heads_shared(teacher: Layout, student: Layout, place: Place) -> int:
    """Heads that can be restored one by one; 0 where student and teacher do not share the output projection."""
    theirs, ours = _projection(teacher, place), _projection(student, place)
    if theirs is None or not isinstance(getattr(ours, "weight", None), Tensor):
        return 0
    assert ours is not None
    if not same(value_of(ours, "weight"), value_of(theirs, "weight")):
        return 0
    return int(teacher.config.num_attention_heads)


def _projection(layout: Layout, place: Place) -> nn.Module | None:
    if place.site != "attn_out" or "o_proj" not in layout.family.slots:
        return None
    try:
        return layout.model.get_submodule(layout.slot_path(place.layer, "o_proj"))
    except (AttributeError, LayoutError):  # a linear attention has none
        return None


@contextmanager
def _taking_input(module: nn.Module, kept: dict[Place, Tensor], place: Place) -> Iterator[None]:
    def take(_module: nn.Module, args: tuple) -> None:
        kept[place] = args[0]

    handle = module.register_forward_pre_hook(take)
    try:
        yield
    finally:
        handle.remove()


def _update(site: str, seen: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The stream that an update is added to, and the update."""
    before = seen["resid_pre"]
    if site == "resid_post":
        return before, seen["resid_post"] - before
    if site == "mlp_out":
        return seen.get("resid_mid", before), first_of(seen["mlp_out"])
    return before, first_of(seen["attn_out"])
