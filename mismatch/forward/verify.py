"""Prove a layout on the loaded model by running it, before any number is believed.

Names and shapes are not enough: a module can have the right name and no effect. So on a few tokens:
1. every site fires exactly once per forward, as `batch pos d_model`;
2. the sites add up: resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out, and one block's resid_post
   is the next one's resid_pre. Gemma4 adds an input of each layer behind the MLP and scales the sum: both are counted;
3. the head on the final states returns the model's own logits, bit for bit;
4. the suffix from the middle block, on the stored stream, returns the same final states, bit for bit;
5. a change of attn_out, of mlp_out and of resid_post moves the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from mismatch.errors import LayoutError
from mismatch.forward import hooks
from mismatch.forward.shared_prefix import check_finite
from mismatch.forward.sites import Tap, leaving, taps, tensor_of
from mismatch.models.layout import Layout

TOKENS = 8
ROUNDINGS = 16  # of the largest value, in the model's precision: sums of a few terms differ by less


def prove(layout: Layout) -> None:
    """Run the five checks above.

    Raises:
        LayoutError: names the check that failed, layer and site, with the numbers.
    """
    device = layout.embedding_device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, layout.vocab, (2, TOKENS), generator=generator).to(device)
    values: dict[tuple[int, str], Tensor] = {}
    extra: dict[int, Tensor] = {}

    def visit(tap: Tap, value: Tensor) -> None:
        if (tap.layer, tap.site) in values:
            raise _wrong(layout, tap.layer, tap.site, "fires more than once per forward")
        if value.shape != (*ids.shape, layout.d_model):
            wanted = (*ids.shape, layout.d_model)
            raise _wrong(
                layout, tap.layer, tap.site, f"has shape {tuple(value.shape)}, not {wanted}"
            )
        values[tap.layer, tap.site] = value

    every = [t for layer in range(layout.n_layers) for t in taps(layout, layer)]
    with torch.no_grad():
        with _adding(layout, extra):
            final = hooks.run(layout, ids, every, visit)
        for tap in every:
            if (tap.layer, tap.site) not in values:
                raise _wrong(layout, tap.layer, tap.site, "never fires")
        _adds_up(layout, values, extra)
        logits = layout.model(input_ids=ids, use_cache=False).logits
        if not torch.equal(layout.head(final), logits):
            raise LayoutError(
                f"the head of this {layout.family.name} model does more than its layout: "
                f"logits differ by {(layout.head(final) - logits).abs().max():.3g}"
            )
        middle = layout.n_layers // 2
        if middle > 0:
            again = hooks.run(
                layout, ids, (), visit, start=middle, stream=values[middle - 1, "resid_post"]
            )
            if not torch.equal(again, final):
                raise LayoutError(
                    f"running from block {middle} on the stored stream does not repeat the forward of this "
                    f"{layout.family.name} model (off by {(again - final).abs().max():.3g})"
                )
        for tap in taps(layout, middle):
            if tap.side == "out" and not _moves(layout, ids, tap, final):
                raise _wrong(
                    layout, tap.layer, tap.site, "can be changed without changing the output"
                )


@contextmanager
def _adding(layout: Layout, extra: dict[int, Tensor]) -> Iterator[None]:
    """Take what each block adds to the stream behind its MLP, where the family has such a module."""
    path = layout.family.also_adds
    with ExitStack() as stack:
        for layer, block in enumerate(layout.blocks):
            if path is None or not hasattr(block, path):
                continue

            def take(_module: nn.Module, _args: object, out: Tensor, layer: int = layer) -> None:
                extra[layer] = out

            stack.callback(block.get_submodule(path).register_forward_hook(take).remove)
        yield


def _adds_up(
    layout: Layout, values: dict[tuple[int, str], Tensor], extra: dict[int, Tensor]
) -> None:
    for layer in range(layout.n_layers):
        pre, attn, mlp, post = (
            values[layer, site] for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        if not layout.parallel and not _near(pre + attn, values[layer, "resid_mid"]):
            raise _wrong(layout, layer, "resid_mid", "is not resid_pre + attn_out")
        total = pre + attn + mlp
        if layer in extra:
            total = total + extra[layer]
        if layout.family.scale is not None:
            total = total * layout.blocks[layer].get_buffer(layout.family.scale)
        if not _near(total, post):
            raise _wrong(layout, layer, "resid_post", "is not resid_pre + attn_out + mlp_out")
        if layer > 0 and not torch.equal(pre.cpu(), values[layer - 1, "resid_post"].cpu()):
            raise _wrong(layout, layer, "resid_pre", "is not the output of the block before")


def _near(a: Tensor, b: Tensor) -> bool:
    bound = ROUNDINGS * torch.finfo(b.dtype).eps * float(b.abs().max())
    return float((a - b).abs().max()) <= bound


def _moves(layout: Layout, ids: Tensor, tap: Tap, final: Tensor) -> bool:
    def nudge(_module: object, _args: object, out: object) -> object:
        value = tensor_of(out)
        changed = value + value.abs().mean() * torch.sign(value)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    handle = tap.module(layout).register_forward_hook(nudge)
    try:
        return not torch.equal(
            layout.decoder(input_ids=ids, use_cache=False).last_hidden_state, final
        )
    finally:
        handle.remove()


def _wrong(layout: Layout, layer: int, site: str, what: str) -> LayoutError:
    return LayoutError(
        f"layout `{layout.family.name}` does not fit this {type(layout.model).__name__}: "
        f"{site} of layer {layer} {what}",
        hint="was the model changed before? `mismatch` needs the untouched model",
    )


def prove_student(teacher: Layout, student: Layout, first: int | None) -> None:
    """Prove on a few tokens that nothing in front of the swap changed, so that the prefix may be shared.

    The student runs whole; every site before block `first` must be bit-equal to the teacher's, and its suffix from the
    stored stream must be bit-equal to its own whole run. A student without such a prefix only runs: this finds a
    mechanism that cannot be called, or whose output does not fit its slot.

    Raises:
        LayoutError: a site before the swap differs.
        NumericsError: the student's final states are NaN or infinite.
        SurgeryError: as the mechanism raises it.
    """
    ids = _few(teacher)
    if moved := first_moved(teacher, student, first or 0):
        raise _wrong(
            student,
            moved.layer,
            moved.site,
            f"changed, although the first swap is at layer {first}",
        )
    streams: list[Tensor] = []
    before = [leaving(first - 1)] if first else []
    with torch.no_grad():
        whole = hooks.run(student, ids, before, lambda _tap, value: streams.append(value))
        if not first:
            return
        suffix = hooks.run(student, ids, start=first, stream=streams[0])
        if not torch.equal(suffix, whole):
            check_finite(whole, "student", "final states")
            raise LayoutError(
                f"the swapped model run from block {first} differs from its whole run by "
                f"{(suffix - whole).abs().max():.3g}: a mechanism carries state from one call to the next"
            )


@torch.no_grad()
def first_moved(teacher: Layout, student: Layout, first: int) -> Tap | None:
    """The first site in front of block `first` that reads another value in the student, on a few tokens.

    None: all are bit-equal, so the blocks there may be run once for both.
    """
    wanted = [tap for layer in range(first) for tap in taps(teacher, layer)]
    if not wanted:
        return None
    ids = _few(teacher)
    ours: dict[Tap, Tensor] = {}
    theirs: dict[Tap, Tensor] = {}
    hooks.run(teacher, ids, wanted, ours.__setitem__, stop=first)
    hooks.run(student, ids, wanted, theirs.__setitem__, stop=first)
    return next((tap for tap in wanted if not torch.equal(ours[tap], theirs[tap])), None)


def _few(teacher: Layout) -> Tensor:
    """Token ids, `1 pos`."""
    ids = torch.randint(0, teacher.vocab, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return ids.to(teacher.embedding_device)
