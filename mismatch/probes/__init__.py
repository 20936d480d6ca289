"""The probes: inputs made to ask one question, the same for teacher, student and controls.

A metric compares two models on ordinary text, and ordinary text hides losses: RoPE removed from layer 16 of SmolLM2
costs 0.1 nats there, and 7 nats on the second copy of repeated random tokens. The table holds strings, so listing and
explaining probes imports neither them nor torch. To add one: write its file, add its line here; the contract test
then runs over it.
"""

from __future__ import annotations

from typing import Any

PROBES = {
    "induction": "mismatch.probes.induction:Induction",
    "copying": "mismatch.probes.copying:Copying",
    "memory": "mismatch.probes.memory:Memory",
    "order_sensitivity": "mismatch.probes.order_sensitivity:OrderSensitivity",
    "generation": "mismatch.probes.generation:Generation",
    "heads": "mismatch.probes.heads:Heads",
    "passkey": "mismatch.probes.passkey:Passkey",
    "needles": "mismatch.probes.needles:Needles",
    "kv_lookup": "mismatch.probes.kv_lookup:KvLookup",
    "position_decoding": "mismatch.probes.position_decoding:PositionDecoding",
    "rope_bands": "mismatch.probes.rope_bands:RopeBands",
    "shift_invariance": "mismatch.probes.shift_invariance:ShiftInvariance",
    "shuffle_sensitivity": "mismatch.probes.shuffle_sensitivity:ShuffleSensitivity",
}


def load_probe(name: str) -> Any:
    """The class of a probe, of the table or registered by another package (imports torch).

    Raises:
        UsageError: no probe has this name.
    """
    from mismatch.registry import probes

    return probes().get(name)
