"""What every mechanism is, and what surgery hands to it.

A *mechanism* takes the place of one part of a pretrained model (attention, MLP, norm, block). It is
called exactly as that part was called and returns the same structure, so that the rest of the model
does not notice. There are two kinds:

    Mechanism   a replacement: builds its own forward, and inherits what it can of the original. An
                inherited tensor IS the original's Parameter (the same object), never a copy; a new
                one takes its dtype and device
    Wrapper     keeps the original inside, calls it, and changes what goes in or what comes out

A mechanism file reads alone: equation, source, what is inherited / new / dropped, identity limit,
state. Mechanism files do not import one another; what they share is here, in `calling.py`,
`projections.py`, `own_state.py` and `segments.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError


class Host:
    """What a part must know of the running forward and its caller does not say: the padding.

    Surgery owns one Host per student and sets `mask` in a forward pre-hook on the decoder.
    Llama-like models hand an unpadded batch no mask at all, and a padded batch a 4-D mask from
    which the padding cannot be read back.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._real: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """The 2-D attention mask of the running forward, `batch total`, 1 = real token; None = no
        padding."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        if mask is not None and mask.ndim != 2:
            raise SurgeryError(
                f"the model was called with a {mask.ndim}-D attention mask {tuple(mask.shape)}; "
                "swapped parts read padding from a 2-D mask [batch, tokens]",
                hint="pass the tokenizer's attention_mask",
            )
        self._mask = mask
        # One look at the values per forward, not one per layer: `all()` waits for the device.
        self._real = None if mask is None or bool(mask.all()) else mask.bool()

    def full(self) -> Tensor | None:
        """Bool `batch total` over cached and new tokens, True = real; None when every token is
        real."""
        return self._real

    def padding(self, query_len: int) -> Tensor | None:
        """Bool `batch query_len` over the new tokens, True = real token; None when every token is
        real."""
        return None if self._real is None else self._real[:, -query_len:]


@runtime_checkable
class Calibrator(Protocol):
    """Measures the ORIGINAL part on calibration text before a mechanism is built from what it
    measured."""

    def update(self, inputs: Tensor, outputs: Tensor, keep: Tensor) -> None:
        """Take one batch: `inputs`, `outputs` of the part, `batch pos d`; `keep` bool `batch pos`,
        the bulk tokens (real, not position 0, not massive)."""


@dataclass
class Context:
    """Where a mechanism is built.

    Attributes:
        layer: 0-based layer, None for parts outside the blocks (`final_norm`).
        slot: the slot's name, `attn`, `mlp`, `norm1` ...
        n_layers, d_model: of the model.
        model_config: the transformers config of the (text) model.
        family: the `mismatch.models.layout.Family`, or None where nobody asked for it.
        host: what the running forward tells (padding).
        seed: base of every random draw; draws also depend on layer and slot, never on build order.
        calibration: the calibrator after its pass, or None (always None on the meta device).
        build: `build(call, original) -> Mechanism` for a mechanism that nests another; from
            surgery.
        restoring: every tensor comes out of a checkpoint afterwards, so placeholders of the right
            shape will do for what is measured or computed from the original.
    """

    layer: int | None
    slot: str
    n_layers: int
    d_model: int
    model_config: Any
    host: Host
    family: Any = None
    seed: int = 0
    calibration: Any = None
    build: Callable[[Any, nn.Module], Mechanism] | None = None
    restoring: bool = False

    def __deepcopy__(self, memo: dict) -> Context:
        # A copied module goes on sharing the live Host and the model's config.
        return self

    @property
    def where(self) -> str:
        """`layer12.attn`, or `final_norm`: the place in words for errors."""
        return self.slot if self.layer is None else f"layer{self.layer}.{self.slot}"


class Mechanism(nn.Module):
    """A replacement for one part. Subclasses set the class attributes as literals: `explain` reads
    them by `ast`."""

    Config: ClassVar[type]
    slots: ClassVar[tuple[str, ...]]  # where it may go; the first is the default
    identity: ClassVar[str]  # the setting at which student == teacher, or "none: why"
    state: ClassVar[str]  # what generate() carries
    source: ClassVar[str]
    stacks: ClassVar[bool] = False  # True: may go on top of another mechanism in the same place
    branch_names: tuple[str, ...] = ()  # parts whose outputs it adds up; see `branches`
    silent: frozenset[str] = frozenset()  # branches that are taken out at this moment

    def __init__(self, original: nn.Module, config: Any, context: Context) -> None:
        super().__init__()
        self.settings = config
        self.context = context

    @classmethod
    def calibrator(cls, config: Any) -> Calibrator | None:
        """What must be measured on the original before the mechanism is built; None = nothing."""
        return None

    def notes(self) -> tuple[str, ...]:
        """What a reader of the plan must know about this mechanism in this place; no line =
        nothing."""
        return ()

    def branches(self) -> dict[str, AbstractContextManager[None]]:
        """A context for each branch, by name, inside which the branch contributes nothing.

        For mechanisms that add up several paths (`infini`: memory and local; a hybrid: window and running sum). They
        name them in `branch_names` and let the paths in `silent` add exactly 0 in `forward`. What remains keeps its
        weight (no gate or denominator is renormalised), so that the output is the sum over branches of what each
        takes away: (whole - without it). Probes read shares, knock-outs and query dependence from that alone.
        """
        return {name: self._silenced(name) for name in self.branch_names}

    @contextmanager
    def _silenced(self, name: str) -> Iterator[None]:
        before, self.silent = self.silent, self.silent | {name}
        try:
            yield
        finally:
            self.silent = before

    def gates(self) -> dict[str, nn.Parameter]:
        """Trained numbers that weigh a branch, one a head, before their sigmoid, by the branch's name."""
        return {}

    def restores(self) -> dict[str, AbstractContextManager[None]]:
        """A context for each thing that this mechanism took away and can give back for a moment, by name:
        `first_token`, the attention sink."""
        return {}

    def extra_repr(self) -> str:
        return f"{self.context.where}, {self.settings}"


class Wrapper(Mechanism):
    """Keeps the original and calls it. Unknown attributes are looked up on the original, as the
    host may do."""

    def __init__(self, original: nn.Module, config: Any, context: Context) -> None:
        super().__init__(original, config, context)
        self.original = original

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def innermost(module: nn.Module) -> nn.Module:
    """What is left when every wrapper is taken off: the host's own module, or the replacement."""
    while isinstance(module, Wrapper):
        module = module.original
    return module


def tensor_kind(original: nn.Module) -> dict[str, Any]:
    """`dtype` and `device` for new tensors: those of the original's first floating-point
    parameter."""
    for parameter in original.parameters():
        if parameter.is_floating_point():
            return {"dtype": parameter.dtype, "device": parameter.device}
    return {"dtype": torch.get_default_dtype(), "device": torch.device("cpu")}


def need_calibration(original: nn.Module, context: Context, name: str) -> Any:
    """The calibrator handed in by surgery; None on the meta device and before a checkpoint is read,
    where placeholders will do.

    Raises:
        SurgeryError: real weights, but no calibration.
    """
    meta = tensor_kind(original)["device"].type == "meta"
    if context.calibration is None and not context.restoring and not meta:
        raise SurgeryError(
            f"`{name}` at {context.where} is built from a calibration pass, and none was run",
            hint="build it through mismatch.swap or mismatch.trace, with calibration text",
        )
    return context.calibration
