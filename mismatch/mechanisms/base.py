"""The base classes of a mechanism, and what surgery passes to it.

A *mechanism* replaces one module of a pretrained model (attention, MLP, norm, block). It is called exactly as that
module was called and returns the same structure, so that the rest of the model is unaffected. In these files the
*original* is the module that is replaced. There are two kinds:

    Mechanism   a replacement: builds its own forward, and inherits what it can of the original. An inherited tensor IS
                the original's Parameter (the same object), never a copy; a new one takes its dtype and device. The
                original is the mechanism's to keep: surgery passes a private copy, which costs no memory
    Wrapper     keeps the original inside, calls it, and changes its input or its output

A mechanism file reads alone: equation, source, what is inherited / new / dropped, identity limit, state. Mechanism
files do not import one another; what they share is here and in `mismatch.mechanisms.parts`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.models.quantised import bits

CALIBRATION_TOKENS = 2048
"""Enough for a mean or a scale of each channel."""


@runtime_checkable
class Calibrator(Protocol):
    """Measures the original on calibration text, before a mechanism is built from the result."""

    def update(self, inputs: Tensor, outputs: Tensor, keep: Tensor) -> None:
        """Add one batch.

        Args:
            inputs, outputs: of the original, `batch pos d`.
            keep: bool `batch pos`, the bulk tokens (real, not position 0, not massive).
        """


@runtime_checkable
class Scored(Protocol):
    """A mechanism that may choose tokens by learned scores, which no gradient of its output reaches.

    The repair stage `scores` trains them. A wrapper passes both through.
    """

    def score_net(self) -> nn.Module | None:
        """The net: `... d_model` -> `... KV` logits; None where nothing is learned."""

    def score_targets(self, *args: Any, **kwargs: Any) -> Tensor:
        """What sigmoid(scores) of whole texts should be, `batch pos KV` in 0..1, NaN where it is not known; called as
        `forward` is, without a cache."""


@dataclass
class Context:
    """Where a mechanism is built.

    Attributes:
        layer: 0-based layer, None for modules outside the blocks (`final_norm`).
        slot: the slot's name, `attn`, `mlp`, `norm1` ...
        n_layers, d_model: of the model.
        model_config: the transformers config of the (text) model.
        family: the `mismatch.models.families.Family`, or None where it is not needed.
        seed: base of every random draw; draws also depend on layer and slot, never on build order.
        calibration: the calibrator after its pass, or None (always None on the meta device).
        build: `build(call, original) -> Mechanism` for a mechanism that nests another; from
            surgery.
        restoring: every tensor is read from a checkpoint afterwards, so what is measured or computed
            from the original may be a placeholder of the right shape.
        width: of what the module gives, for one that gives the heads of an attention; None: another.
    """

    layer: int | None
    slot: str
    n_layers: int
    d_model: int
    model_config: Any
    family: Any = None
    seed: int = 0
    calibration: Any = None
    build: Callable[[Any, nn.Module], Mechanism] | None = None
    restoring: bool = False
    width: int | None = None

    def __deepcopy__(self, memo: dict) -> Context:
        # A copied module keeps sharing the model's config.
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What a mechanism is built with is not part of it, and a function of surgery cannot be pickled.
        return vars(self) | {"build": None, "calibration": None}

    @property
    def where(self) -> str:
        """`layer12.attn`, or `final_norm`: for errors, and the seed of random draws."""
        return self.slot if self.layer is None else f"layer{self.layer}.{self.slot}"


class Mechanism(nn.Module):
    """A replacement for one module. Subclasses set the class attributes as literals: `explain` reads
    them by `ast`."""

    Config: ClassVar[type]
    slots: ClassVar[tuple[str, ...]]  # where it may go; the first is the default
    identity: ClassVar[str]  # the setting at which student == teacher, or "none: why"
    state: ClassVar[str]  # what generate() carries
    source: ClassVar[str]
    stacks: ClassVar[bool] = False  # True: may go on top of another mechanism in the same slot
    heads: ClassVar[bool | tuple[str, str]] = (
        False  # whether it can take some heads; see `mismatch.spec.heads`
    )
    merges: ClassVar[bool] = False  # True: it becomes a module of the model's own; see `merged`
    branch_names: tuple[str, ...] = ()  # paths whose outputs it adds up; see `branches`
    silent: frozenset[str] = frozenset()  # branches that are switched off at this moment
    used_heads: tuple[int, ...] | None = None  # query heads of which the output is used; None: all
    new_first: bool = False  # its new parameters can give what was replaced: `trains_new_first`

    def __init__(self, original: nn.Module, config: Any, context: Context) -> None:
        super().__init__()
        self.settings = config
        self.context = context

    @classmethod
    def calibrator(cls, config: Any) -> Calibrator | None:
        """What must be measured on the original before the mechanism is built; None = nothing."""
        return None

    @classmethod
    def calibration_tokens(cls, config: Any, d_model: int) -> int:
        """Tokens that are enough for its calibrator, where the user names no number."""
        return CALIBRATION_TOKENS

    def notes(self) -> tuple[str, ...]:
        """Sentences for the plan about this mechanism in this slot; empty when there is nothing to note."""
        return ()

    def state_bytes(self) -> int | None:
        """Bytes that `generate()` carries for one row when the state is as large as it gets, in the dtypes in which it
        is held: of `OwnState.rows`. None = it grows with the length, the host's KV cache holds it, or nobody counted.

        A mechanism that gives a number has a test that a cache holds just that after a long text.
        """
        return None

    def merged(self) -> nn.Module:
        """The module of the model's own class that computes the same, where it `merges`. This one is used up."""
        raise NotImplementedError

    def branches(self) -> dict[str, AbstractContextManager[None]]:
        """A context for each branch, by name, inside which the branch contributes nothing.

        For mechanisms that add up several paths (`infini`: memory and local; a hybrid: window and running sum). They
        name them in `branch_names` and let the paths in `silent` add exactly 0 in `forward`. The others keep their
        weight (no gate or denominator is renormalised), so that the output is the sum over branches of
        (whole - without the branch). Probes compute shares, knock-outs and query dependence from that alone.
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
        """The trained gate of a branch by the branch's name: one number a head, before the sigmoid."""
        return {}

    def restores(self) -> dict[str, AbstractContextManager[None]]:
        """A context for each thing that this mechanism removed and can restore for a while, by name:
        `first_token`, the attention sink."""
        return {}

    def extra_repr(self) -> str:
        return f"{self.context.where}, {self.settings}"


class Wrapper(Mechanism):
    """Keeps the original and calls it. Attributes it lacks are those of the original, as the model may read them."""

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


def scored_in(module: nn.Module) -> list[tuple[Scored, nn.Module]]:
    """The mechanisms in a module that choose by learned scores, and their nets: each once however many wrappers stand
    around it."""
    found: dict[int, tuple[Scored, nn.Module]] = {}
    for inner in module.modules():
        net = inner.score_net() if isinstance(inner, Scored) else None
        if net is not None:
            found[id(net)] = (inner, net)  # type: ignore[assignment]  # the innermost comes last
    return list(found.values())


def trains_new_first(module: nn.Module) -> bool:
    """Whether repair trains the new parameters in a module alone at first, and longest: where they can give what was
    replaced, inherited weights that had been bent to do without it would have to be bent back."""
    return any(isinstance(inner, Mechanism) and inner.new_first for inner in module.modules())


def innermost(module: nn.Module) -> nn.Module:
    """The module inside all wrappers: the model's own, or the replacement."""
    while isinstance(module, Wrapper):
        module = module.original
    return module


def has_linear_attention(original: nn.Module) -> bool:
    """Whether a model's own attention, or that of its block, is a linear one: a state in place of keys and values.

    Such modules of transformers take their cache as `cache_params`, and return no pair.
    """
    module = innermost(original)
    if isinstance(module, Mechanism):
        return False
    tried = (module, *(innermost(child) for child in module.children()))
    return any("cache_params" in inspect.signature(one.forward).parameters for one in tried)


def refuse_linear_attention(original: nn.Module, context: Context, why: str) -> None:
    """Refuse a layer whose attention is a linear one.

    Raises:
        SurgeryError: it is; `why` goes on after "the attention of this layer is linear".
    """
    if context.slot in ("attn", "rope", "block") and has_linear_attention(original):
        raise SurgeryError(
            f"{context.where}: the attention of this layer is linear{why}",
            hint="take a layer of full attention; controls, adapters, MLPs and norms go here, too",
        )


def tensor_kind(original: nn.Module, context: Context) -> dict[str, Any]:
    """`dtype` and `device` for new tensors: those of the original's first parameter that holds numbers.

    Where all of them are quantised, the dtype is that of the model.
    """
    device = torch.device("cpu")
    for parameter in original.parameters():
        device = parameter.device
        if parameter.is_floating_point() and not bits(parameter):
            return {"dtype": parameter.dtype, "device": device}
    dtype = getattr(context.model_config, "dtype", None) or torch.get_default_dtype()
    return {"dtype": dtype, "device": device}


def need_calibration(original: nn.Module, context: Context, name: str) -> Any:
    """The calibrator that surgery passes; None on the meta device and before a checkpoint is read,
    where placeholders are enough.

    Raises:
        SurgeryError: real weights, but no calibration.
    """
    meta = tensor_kind(original, context)["device"].type == "meta"
    if context.calibration is None and not context.restoring and not meta:
        raise SurgeryError(
            f"`{name}` at {context.where} is built from a calibration pass, and none was run",
            hint="build it through mismatch.swap or mismatch.trace, with calibration text",
        )
    return context.calibration
