"""What a replacement inherited, what is new in it and what it dropped: read off the tensors, not declared."""

from __future__ import annotations

from torch import nn

from mismatch.mechanisms.base import Mechanism
from mismatch.mechanisms.parts.some_heads import SomeHeads
from mismatch.models import quantised
from mismatch.runs.plan import Replaced
from mismatch.spec import Placement


def audited(placement: Placement, path: str, original: nn.Module, new: Mechanism) -> Replaced:
    """Work out inherited, new and dropped parameters from the identity of the tensors."""
    made, host, state = new, original, type(new).state
    if isinstance(new, SomeHeads):
        made, state = new.newest, new.state_beside()
    before, old = {id(p) for p in original.parameters()}, {}
    if isinstance(original, SomeHeads):
        assert original.original is not None
        host = original.original
    for name, p in original.named_parameters():
        # What is new in other heads is not what was replaced.
        if host is original or not name.startswith("parts."):
            old[id(p)] = (name, quantised.values(p))
    now = {id(p): (name, quantised.values(p)) for name, p in new.named_parameters()}
    return Replaced(
        layer=placement.layer,
        slot=placement.slot,
        path=path,
        mechanism=placement.call.name,
        args=placement.call.printable(),
        old=type(host).__name__,
        new=type(made).__name__,
        inherited=dict(old[i] for i in old if i in now),
        new_parameters=dict(now[i] for i in now if i not in before),
        dropped=dict(old[i] for i in old if i not in now),
        identity=type(made).identity,
        state=state,
        notes=tuple(new.notes()),
        heads=placement.heads,
        state_bytes=new.state_bytes(),
    )
