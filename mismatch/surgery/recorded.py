"""What transformers records in a forward (`output_hidden_states`, `output_attentions`) where modules were replaced.

transformers finds the modules that it records by their class. A replaced block or attention has another one, so the
entry of its layer is missing, which moves all later ones to the front, or is that of the module inside it.
"""

from __future__ import annotations

import warnings

from torch import nn

from mismatch.mechanisms.base import Mechanism

RECORDS = {"output_hidden_states": ("block",), "output_attentions": ("block", "attn")}
"""What a caller may ask for, and the slots whose modules it is read from."""


def warn_of_records(decoder: nn.Module) -> None:
    """From now on warn where a record is asked for that replaced modules are not in."""
    if _look not in decoder._forward_pre_hooks.values():  # a copy of a student has it
        decoder.register_forward_pre_hook(_look, with_kwargs=True)


def _look(decoder: nn.Module, _args: tuple, kwargs: dict) -> None:
    for name, slots in RECORDS.items():
        wanted = kwargs.get(name)
        if wanted is None:
            wanted = getattr(decoder.config, name, False)
        places = [] if wanted is False else _replaced(decoder, slots)
        if places:
            warnings.warn(
                f"{name}: the entry of {', '.join(places)} is missing, so that later ones move to the front, or is "
                "that of the module inside. Read a layer by a hook on student.layout.blocks[layer], or by "
                "mismatch.trace",
                stacklevel=2,
            )


def _replaced(decoder: nn.Module, slots: tuple[str, ...]) -> list[str]:
    """Where mechanisms stand in these slots, in depth order."""
    contexts = [m.context for m in decoder.modules() if isinstance(m, Mechanism)]
    return list(dict.fromkeys(f"layer {c.layer} ({c.slot})" for c in contexts if c.slot in slots))
