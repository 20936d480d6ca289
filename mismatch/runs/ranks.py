"""One process, or several that torchrun started: each takes its share of the work, rank 0 writes.

    torchrun --nproc-per-node 2 -m mismatch trace --model ... --swap ...

Rank r of w takes pieces r, r + w, r + 2w, ... of a list that is the same on every rank: batches of a trace and of a
probe, cells of a scan, corrections of a diagnosis, candidates of a plan, modules of a repair or rows of its batches.
What they found is joined in the order of the list, or added (gloo between CPUs, nccl between GPUs), so it depends on
how many ranks there were by the order of additions at most.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from mismatch.errors import RunError

PATIENCE = timedelta(days=1)
"""That a rank waits for the others: a share may take hours, and a rank that is gone is noticed at once."""


class RankGone(RunError):
    """Another rank stopped or died, and this one waited for it."""


class NoRoom(Exception):
    """A rank is out of memory: it hands this over in place of what it should have found."""


Piece = TypeVar("Piece")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Ranks:
    """Who this process is among how many."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    def mine(self, index: int) -> bool:
        """Whether piece `index` is this rank's."""
        return index % self.world == self.rank

    def from_first(self, value: Any) -> Any:
        """The first rank's value, on every rank. Values are pickled: they come from our own processes only."""
        if self.world == 1:
            return value
        box = [value]
        with self._waiting():
            distributed.broadcast_object_list(box, src=0)
        return box[0]

    def to_first(self, value: Any) -> list[Any] | None:
        """Every rank's value, in rank order, on the first rank; None elsewhere."""
        if self.world == 1:
            return [value]
        boxes: list[Any] | None = [None] * self.world if self.first else None
        with self._waiting():
            distributed.gather_object(value, boxes, dst=0)
        return boxes

    def everywhere(self, value: Found) -> list[Found]:
        """Every rank's value, in rank order, on every rank.

        Raises:
            NoRoom: on all ranks, where it is the value of one.
        """
        boxes: list[Any] = [value]
        if self.world > 1:
            boxes = [None] * self.world
            with self._waiting():
                distributed.all_gather_object(boxes, value)
        if any(isinstance(box, NoRoom) for box in boxes):
            raise NoRoom
        return boxes

    def shared(self, pieces: Sequence[Piece], run: Callable[[Piece], Found]) -> list[Found]:
        """`run` of every piece, in their order, on every rank; each rank runs its own.

        Args:
            pieces: the same on every rank.
            run: what it gives is sent to the other ranks.
        """
        parts = self.everywhere([run(one) for at, one in enumerate(pieces) if self.mine(at)])
        return [parts[at % self.world][at // self.world] for at in range(len(pieces))]

    def added(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a tensor that has one shape on all of them, on every rank."""
        if self.world == 1:
            return tensor
        whole = self._for_all(tensor)
        with self._waiting():
            distributed.all_reduce(whole)
        return whole.to(tensor.device)

    @torch.no_grad()
    def copied(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Write one rank's tensors over those of the others: as many, of the same shapes and dtypes."""
        if self.world == 1:
            return
        for tensor in tensors:
            whole = self._for_all(tensor)
            with self._waiting():
                distributed.broadcast(whole, src=source)
            if self.rank != source:
                tensor.copy_(whole)

    @staticmethod
    def _for_all(tensor: Tensor) -> Tensor:
        """A copy where the processes talk."""
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Of a rank that is gone the connection is closed.

        Raises:
            RankGone: it is.
        """
        try:
            yield
        except RuntimeError as error:
            raise RankGone(
                f"rank {self.rank} of {self.world} waited for the others, and one of them is gone",
                hint="its own message says why",
            ) from error

    def device(self, requested: str) -> str | None:
        """The device of this rank: its own GPU under torchrun, else the requested one (None = choose)."""
        if self.world > 1 and requested in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
        return None if requested == "auto" else requested


ALONE = Ranks()


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """Join the process group that torchrun set up, if any, for as long as the context lives.

    Args:
        device: where the models go; the processes talk over nccl only if that is a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        known = distributed.is_available() and distributed.is_initialized()
        yield Ranks(distributed.get_rank(), distributed.get_world_size()) if known else Ranks()
        return
    gpu = torch.cuda.is_available() and device.startswith(("auto", "cuda"))
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
