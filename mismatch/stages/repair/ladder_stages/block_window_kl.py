"""The stages `block`, `window` and `end-to-end`: what the blocks behind make of the repaired layer.

All run the student from its first block that is not the teacher's own, on the teacher's stream entering it, with
gradients; the blocks in front never run twice. From block 0 on the student runs whole, behind its own embedding.

    block, window  the student's stream behind the block, or some blocks further, is matched to the teacher's: the
                   relative error of what was ADDED since the swap, so that what is the same in both does not hide it
    end-to-end     KL(teacher || student) of the logits, in nats per token. No cross-entropy: it pulls the student to
                   the training text instead of to the teacher (Puzzle, arXiv 2411.19146, section 4)
"""

from __future__ import annotations

from torch import Tensor

from mismatch.forward import hooks, sites
from mismatch.forward.head import mean_kl
from mismatch.models.layout import Layout
from mismatch.stages.repair.ladder_stages.activation_store import Store
from mismatch.stages.repair.ladder_stages.loss import Loss, relative_error
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair


def block(layout: Layout, layer: int) -> ModulePair:
    """A block as a module of the store: the stream that enters and the one that leaves."""
    path = layout.slot_path(layer, "block")
    module = layout.model.get_submodule(path)
    return ModulePair(layer, "block", path, module, module)


def final(layout: Layout) -> ModulePair:
    """The final norm as a module of the store: what goes into the head."""
    path = layout.slot_path(None, "final_norm")
    module = layout.model.get_submodule(path)
    return ModulePair(layout.n_layers - 1, "final_norm", path, module, module)


class WindowLoss(Loss):
    """Relative error of the stream behind block `last`.

    Args:
        student: layout of the student.
        store, held: of training and validation text, with the modules `entering` and `leaving`.
        entering, leaving: blocks; the `x` of one enters the first swapped block, the `y` of the other is the target.
    """

    def __init__(
        self, student: Layout, store: Store, held: Store, entering: ModulePair, leaving: ModulePair
    ) -> None:
        super().__init__(store, held)
        self.student, self.entering, self.leaving = student, entering, leaving

    def of(self, store: Store, index: int, rows: int, mine: slice) -> Tensor:
        stream = store.batch(self.entering, index).x[:rows]
        target = store.batch(self.leaving, index).y[:rows]
        first, last = self.entering.layer, self.leaving.layer
        found: dict[str, Tensor] = {}
        hooks.run(
            self.student,
            store.batches[index][:rows][mine],
            [sites.leaving(last)],
            lambda _tap, value: found.__setitem__("stream", value),
            start=first,
            stop=last + 1,
            stream=stream[mine] if first else None,
        )
        return relative_error(found["stream"] - stream[mine], target - stream, mine)


class EndToEndLoss(Loss):
    """KL(teacher || student) of the logits, nats per token.

    Args:
        teacher, student: layouts.
        store, held: of training and validation text, with the modules `entering` and `leaving`.
        entering: block that the student starts from; its `x` is the stream.
        leaving: the final norm; its `y` is what the teacher's head gets.
    """

    def __init__(
        self,
        teacher: Layout,
        student: Layout,
        store: Store,
        held: Store,
        entering: ModulePair,
        leaving: ModulePair,
    ) -> None:
        super().__init__(store, held)
        self.teacher, self.student = teacher, student
        self.entering, self.leaving = entering, leaving

    def of(self, store: Store, index: int, rows: int, mine: slice) -> Tensor:
        stream = store.batch(self.entering, index).x[:rows][mine]
        reference = store.batch(self.leaving, index).y[:rows]
        ids, start = store.batches[index][:rows][mine], self.entering.layer
        states = hooks.run(self.student, ids, start=start, stream=stream if start else None)
        own = reference[mine].flatten(0, 1)
        kl = mean_kl(self.teacher, own, self.student, states.flatten(0, 1))
        return kl * (len(ids) / len(reference))
