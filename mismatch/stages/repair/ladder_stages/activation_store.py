"""Inputs and targets of the layers under repair: the teacher runs once, the layers train from disk.

    FOLDER/KEY/00007-layer12.attn.safetensors      x and y of batch 7: input and output of the teacher's module

A budget in bytes is kept: what does not fit is recomputed from the tokens, blocks 0..layer and no head, each time it is
asked for. The key holds model, text, dtype and windows and not the swap, so many candidates (mechanisms, options,
seeds) train on one stored pass. A shard is written whole or not at all; a pass that was cut off goes on where it
stopped. Several ranks share the pass by batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from mismatch.models.layout import Layout
from mismatch.runs.files import write_atomic_by_name
from mismatch.runs.ranks import ALONE, Ranks
from mismatch.stages.repair.ladder_stages.module_pair import Call, ModulePair, watch

GB = 1e9


@dataclass(frozen=True)
class Example:
    """One batch of one module: its input and the target of the module there, `batch pos d`, and how to call it."""

    x: Tensor
    y: Tensor
    call: Call


class Store:
    """What the teacher's modules were given and gave, batch by batch.

    Args:
        teacher: layout of the untouched model.
        modules: those whose inputs and targets are wanted.
        batches: int64 `batch pos` each, all of one shape.
        folder: where shards go; None keeps nothing on disk.
        budget: bytes on disk.
        dtype: of the shards.
        key: facts about model and text that the shards depend on.
        every: only each so many-th batch is run and gone through by `batches_of`.
        inputs: another model, whose stream the parts get as input (the student as repaired so far); the targets stay
            the teacher's. `key` must then say which student.
        ranks: who shares the pass; where one does not see the folder of another, it computes anew what is missing.
    """

    def __init__(
        self,
        teacher: Layout,
        modules: Sequence[ModulePair],
        batches: Sequence[Tensor],
        *,
        folder: Path | None = None,
        budget: float = 0.0,
        dtype: torch.dtype = torch.float32,
        key: dict[str, str] | None = None,
        inputs: Layout | None = None,
        every: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.teacher, self.batches, self.dtype = teacher, batches, dtype
        self.modules, self.inputs = tuple(modules), inputs
        self.chosen = range(0, len(batches), every)
        facts = {**(key or {}), "dtype": str(dtype), "shape": [list(b.shape) for b in batches[:1]]}
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = None if folder is None else folder / name
        tokens = sum(batches[index].numel() for index in self.chosen)
        # d_model in and out; a fused projection may be wider, and then the budget is kept by the file sizes.
        self.bytes_per_module = tokens * 2 * _width(teacher) * dtype.itemsize
        room = 0 if self.folder is None else int(budget // max(1, self.bytes_per_module))
        self.stored = self.modules[:room]
        self._calls: dict[str, Call] = {}

    @property
    def needed(self) -> int:
        """Bytes that all modules together want."""
        return self.bytes_per_module * len(self.modules)

    def fill(self, progress: Callable[[int], None] = lambda _n: None) -> int:
        """Run the teacher over every chosen batch that has no shard yet, once for all modules; the tokens that this
        rank ran. Each rank takes its share of the batches, and waits for the others."""
        ran = 0
        for at, index in enumerate(self.chosen):
            if not self.ranks.mine(at):
                continue
            ids = self.batches[index]
            missing = [p for p in self.stored if not self._shard(index, p).exists()]
            if missing:
                for part, (x, y) in zip(missing, self._run(missing, ids), strict=True):
                    tensors = {n: t.to(self.dtype).contiguous() for n, t in (("x", x), ("y", y))}
                    save = partial(safetensors.torch.save_file, tensors)
                    write_atomic_by_name(self._shard(index, part), save)
                ran += ids.numel()
            progress(ids.numel())
        self.ranks.everywhere(None)
        return ran

    def batch(self, part: ModulePair, index: int) -> Example:
        """Input and target of one module for one batch, on the model's device, float32 at least."""
        shard = self._shard(index, part) if part in self.stored else None
        if shard is None or not shard.exists():
            ids = self.batches[index]
            ((x, y),) = self._run([part], ids)
            return Example(_wide(x), _wide(y), self._calls[part.path])
        tensors = safetensors.torch.load(shard.read_bytes())
        device = next(part.teacher.parameters()).device
        return Example(
            _wide(tensors["x"].to(device)), _wide(tensors["y"].to(device)), self._call(part)
        )

    def batches_of(self, part: ModulePair) -> Iterator[Example]:
        """Every batch of a module that is chosen, in order."""
        for index in self.chosen:
            yield self.batch(part, index)

    def share_of(self, part: ModulePair) -> Iterator[Example]:
        """This rank's share of them."""
        for at, index in enumerate(self.chosen):
            if self.ranks.mine(at):
                yield self.batch(part, index)

    def _run(self, parts: Sequence[ModulePair], ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Input and output of each part, `batch pos d`."""
        paths, last = [part.path for part in parts], max(part.layer for part in parts)
        seen = watch(self.teacher, paths, ids, last=last)
        self._calls |= {path: seen[path][2] for path in paths}
        given = seen if self.inputs is None else watch(self.inputs, paths, ids, last=last)
        return [(given[path][0], seen[path][1]) for path in paths]

    def _call(self, part: ModulePair) -> Call:
        if (
            part.path not in self._calls
        ):  # shards of an earlier process: one row shows how it is called
            seen = watch(self.teacher, [part.path], self.batches[0], last=part.layer)
            self._calls[part.path] = seen[part.path][2]
        return self._calls[part.path]

    def _shard(self, index: int, part: ModulePair) -> Path:
        return self.folder / f"{index:05d}-{part.where}.safetensors"  # type: ignore[operator]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _width(layout: Layout) -> int:
    return layout.d_model
