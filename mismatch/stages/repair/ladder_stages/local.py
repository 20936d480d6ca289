"""The stage `local`: the layer alone is trained to give what the teacher's layer gives, on the teacher's inputs.

Teacher-forced layerwise distillation (LoLCATs arXiv 2410.10254, MOHAWK arXiv 2408.10189 stage 2): inputs and targets
come from the store, only the module runs, no model around it. The loss is the relative error of `weighing`. New
parameters begin; what was inherited for values and output joins next, queries and keys last; gates and decays have
their own group and rate throughout. Where the new parameters can give what was replaced (`Mechanism.new_first`) they
train alone here, at twice the rate: nothing inherited has to give way to what they have not learned yet.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from mismatch.mechanisms.base import scored_in, trains_new_first
from mismatch.stages.repair.ladder_stages.activation_store import Store
from mismatch.stages.repair.ladder_stages.loss import Loss, relative_error
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair
from mismatch.stages.repair.ladder_stages.training import Group

VALUES_JOIN, QUERIES_JOIN = 0.1, 0.2  # shares of the steps
NEVER = 1.0
NEW_RATE = 2.0  # of the rate of weights, where nothing else trains
GATES = ("gate", "alpha", "decay", "mix", "A_log", "dt_bias")
"""Last names of parameters that gate, scale or forget: few numbers, which have far to go."""
QUERIES = ("q_proj", "k_proj", "q_norm", "k_norm")


def groups(part: ModulePair, fresh: Iterable[str], rate: float, gate_rate: float) -> list[Group]:
    """What trains in a part, and when it joins.

    Args:
        part: owns its tensors.
        fresh: names of the parameters that the teacher did not have.
        rate, gate_rate: the highest learning rates.
    """
    fresh = set(fresh)
    # What chooses has no gradient here; the stage `scores` trains it.
    choosing = {id(p) for _, net in scored_in(part.student) for p in net.parameters()}
    kinds: dict[str, dict[str, nn.Parameter]] = {
        "gates": {},
        "new": {},
        "values": {},
        "queries": {},
    }
    for name, parameter in part.student.named_parameters():
        if id(parameter) in choosing:
            continue
        pieces = name.split(".")
        if pieces[-1] in GATES:
            kind = "gates"
        elif name in fresh:
            kind = "new"
        else:
            kind = "queries" if any(piece in QUERIES for piece in pieces) else "values"
        kinds[kind][f"{part.where}.{name}"] = parameter
    values, queries = VALUES_JOIN, QUERIES_JOIN
    if trains_new_first(part.student):
        values = queries = NEVER
    elif not (kinds["gates"] or kinds["new"]):  # with nothing new there is nothing to wait for
        values = queries = 0.0
    new_rate = NEW_RATE * rate if values == NEVER else rate
    return [
        Group("gates", kinds["gates"], gate_rate),
        Group("new", kinds["new"], new_rate),
        Group("values", kinds["values"], rate, values),
        Group("queries", kinds["queries"], rate, queries),
    ]


class LocalLoss(Loss):
    """Relative error of one part on the teacher's inputs.

    Args:
        part: what learns.
        store, held: its inputs and targets on training and validation text.
    """

    def __init__(self, part: ModulePair, store: Store, held: Store) -> None:
        super().__init__(store, held)
        self.part = part

    def of(self, store: Store, index: int, rows: int, mine: slice) -> Tensor:
        example = store.batch(self.part, index)
        output = example.call(self.part.student, example.x[:rows][mine])
        return relative_error(output, example.y[:rows], mine)
