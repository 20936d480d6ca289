"""A plain `torch.nn.Module` of the user's own, written without mismatch, as a mechanism.

    --swap "layer12.attn:my_package.my_module:MyAttention(heads=8)"

The class is built with the arguments of the swap, and with `config` (the transformers config of the
model) and `layer_idx` where its constructor has parameters of those names; then it takes the dtype and
device of the module that it replaces. It is called exactly as that module was called, and must return
the same structure: an attention the pair (output, weights or None), everything else the output alone.
Arguments and results that do not fit are errors with the expected and the actual ones.

A class attribute `slots = ("attn",)` is the slot when the swap names none. For generate() the module
gets the cache that its predecessor got, and may write its keys and values there; if it writes nothing,
only its tokens are counted, so that positions stay right.

Padding and rows of several texts: a module in an attention's or a block's place that takes none of
`attention_mask`, `past_key_values` and `token_facts` (`parts/token_facts.py`) by name cannot know of
them, so it is given the real tokens of each text alone. One that takes any of them is called with the
whole batch, and answers for it itself. For inherited tensors and for calibration write a subclass of
`Mechanism`.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Context, Mechanism, refuse_linear_attention, tensor_kind
from mismatch.mechanisms.parts.calling import cache_in, hidden_in
from mismatch.mechanisms.parts.linears import linear_layers, seed_of, width
from mismatch.mechanisms.parts.own_state import count_tokens
from mismatch.mechanisms.parts.text_by_text import each_alone
from mismatch.mechanisms.parts.token_facts import NAME, facts_in
from mismatch.models.made import reduced
from mismatch.registry import mechanisms

if TYPE_CHECKING:
    from mismatch.spec import Call

PAIRS = ("attn", "rope")  # slots whose module returns (output, attention weights)
CACHED = (*PAIRS, "block")  # slots whose module gets the cache
FILLED_IN = ("config", "layer_idx")
TOLD_BY = (
    "attention_mask",
    "past_key_values",
    NAME,
)  # who takes one of these asks for the whole batch


class Arguments:
    """The arguments of a user's class in the swap: passed to its constructor as they are."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def __repr__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.given.items())


class Foreign(Mechanism):
    """A user's module, and the checks at its border. `adapted` makes the class for one of theirs."""

    Config = Arguments
    identity = "not known: the user's own module"
    state = "what the module itself keeps in the cache that it gets"
    made: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return reduced(self, adapted, self.made)

    def __init__(self, original: nn.Module, config: Arguments, context: Context) -> None:
        """Raises:
        SurgeryError: the constructor does not take these arguments; a layer whose attention is a linear one.
        """
        super().__init__(original, config, context)
        refuse_linear_attention(
            original, context, ": it is called in another way, and its cache entry counts no tokens"
        )
        self.module = self._build(original)
        self._takes = frozenset(inspect.signature(self.module.forward).parameters)
        layer = linear_layers(original).get("")
        self._width = context.d_model if layer is None else width(layer)

    def notes(self) -> tuple[str, ...]:
        if self.context.slot not in CACHED:
            return ()
        return (
            "the module keeps its own state: one that mixes tokens and writes nothing to "
            "`past_key_values` generates rightly with use_cache=False only",
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, cache = hidden_in(args, kwargs), cache_in(kwargs, args)
        layer = self.context.layer
        if layer is None or self.context.slot not in CACHED:
            cache = None  # this slot counts no tokens
        # As numbers: a static cache counts in one tensor.
        before = 0 if cache is None else int(cache.get_seq_length(layer))
        out = self._run(x, args, kwargs)
        if cache is not None and int(cache.get_seq_length(layer)) == before:
            count_tokens(cache, layer, x)
        return out

    def _run(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module on this call; on each text alone, where there are several or pads that it cannot know of."""
        if self.context.slot in CACHED and not self._takes.intersection(TOLD_BY):
            facts = facts_in(args, kwargs)
            texts, real = facts.texts(x, cache_in(kwargs, args)), facts.real(x)
            if texts is None and real is not None:
                texts = real.long() - 1
            if texts is not None:
                return each_alone(self._called, args, kwargs, texts, pads=False)
        return self._called(*args, **kwargs)

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        if NAME not in self._takes:
            kwargs.pop(NAME, None)
        self._check_call(args, kwargs)
        out = self.module(*args, **kwargs)
        self._check_output(out, hidden_in(args, kwargs))
        return out

    def _build(self, original: nn.Module) -> nn.Module:
        context, signature = self.context, inspect.signature(self.made)
        offered = {"config": context.model_config, "layer_idx": context.layer}
        asked = {name: offered[name] for name in FILLED_IN if name in signature.parameters}
        given = asked | self.settings.given
        try:
            signature.bind(**given)
        except TypeError as error:
            raise SurgeryError(
                f"{context.where}: `{self.name}` does not take ({self.settings!r}): {error}",
                hint=f"its constructor is {self.made.__name__}{signature}; "
                f"{' and '.join(FILLED_IN)} are filled in",
            ) from error
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed_of(context, self.name))
            module = self.made(**given)
        return module.to(**tensor_kind(original, context))

    @property
    def name(self) -> str:
        """`package.module:Class`."""
        return f"{self.made.__module__}:{self.made.__qualname__}"

    def _check_call(self, args: tuple, kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(self.module.forward)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            call = ", ".join([*map(_described, args), *(f"{name}=..." for name in kwargs)])
            raise SurgeryError(
                f"{self.context.where}: `{self.name}` cannot be called as this slot is: {error}\n"
                f"  the slot is called with  ({call})\n"
                f"  its forward takes        {signature}",
                hint="name hidden_states first, and take what it does not use as **kwargs",
            ) from error

    def _check_output(self, out: Any, x: Tensor) -> None:
        pair, got = self.context.slot in PAIRS, out
        if pair:
            got = out[0] if isinstance(out, tuple) and len(out) == 2 else None
        shape = torch.Size((*x.shape[:-1], self._width))
        shaped = isinstance(got, Tensor) and got.shape == shape
        # Autocast changes the dtype of a module's output, and the host expects it.
        if shaped and (got.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)):
            return
        expected = _described(torch.empty(shape, dtype=x.dtype, device="meta"))
        raise SurgeryError(
            f"{self.context.where}: `{self.name}` returned {_described(out)}; the slot "
            f"`{self.context.slot}` needs "
            + (f"the pair ({expected}, attention weights or None)" if pair else expected),
            hint="return output, None" if pair and isinstance(out, Tensor) else None,
        )


def configured(call: Call) -> tuple[type[Mechanism], Any]:
    """The class of a mechanism, and its settings. A plain module class of the user's is adapted.

    Raises:
        SurgeryError: the class is no `torch.nn.Module`, or its Config does not take the arguments.
    """
    cls = mechanisms().get(call.name)
    if not issubclass(cls, nn.Module):
        raise SurgeryError(
            f"`{call.name}` is the class {cls.__name__}, which is no torch.nn.Module",
            hint="name a subclass of torch.nn.Module, or of mismatch.mechanisms.base.Mechanism",
        )
    if not issubclass(cls, Mechanism):
        theirs: Any = cls
        cls = adapted(theirs)
    try:
        return cls, cls.Config(**call.arguments())
    except (AttributeError, TypeError) as error:
        raise SurgeryError(
            f"the settings of `{call.name}` cannot be made of its arguments: {error}",
            hint="a Mechanism has a dataclass `Config` with a field for each argument",
        ) from error


@functools.cache
def adapted(made: type[nn.Module]) -> type[Foreign]:
    """The mechanism class of a user's module class."""
    return type(made.__name__, (Foreign,), {"made": made, "__doc__": made.__doc__})


def _described(value: Any) -> str:
    """`Tensor[2, 12, 24] float32`, `(Tensor[...] float32, None)`, or the name of a type."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    return "None" if value is None else type(value).__name__
