"""What can go into a slot. One mechanism = one file here and one line below.

The targets are strings, so that knowing a name imports nothing (see `mismatch.registry`).
"""

MECHANISMS = {
    # The ones that are asked about.
    "dyt": "mismatch.mechanisms.dyt:DyT",
    "infini": "mismatch.mechanisms.infini:Infini",
    "nope": "mismatch.mechanisms.nope:NoPE",
    "sliding_window": "mismatch.mechanisms.sliding_window:SlidingWindow",
    # The controls, which bound the scale.
    "identity": "mismatch.mechanisms.identity:Identity",
    "mean": "mismatch.mechanisms.mean:Mean",
    "random": "mismatch.mechanisms.random:Random",
    "skip": "mismatch.mechanisms.skip:Skip",
    "zero": "mismatch.mechanisms.zero:Zero",
    # Around another mechanism.
    "parallel": "mismatch.mechanisms.parallel:Parallel",
}
