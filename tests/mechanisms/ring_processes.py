"""What each of several processes does in test_ring.py: its run of one text, results into a file.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python ring_processes.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed

from mismatch.errors import SurgeryError
from mismatch.mechanisms.parts.blockwise import Reads, ring_attention

LENGTHS = {2: (9, 14), 3: (9, 4, 10)}  # runs of one text, by number of processes
SHAPES = {  # H, KV, softcap, window, block
    "plain": (4, 4, None, None, 256),
    "grouped": (4, 2, None, None, 5),
    "one kv head, capped": (4, 1, 2.0, None, 3),
    "window": (4, 2, None, 6, 4),
    "window of one": (2, 2, None, 1, 4),
}
MODELS = ("llama", "gemma2", "gpt2", "phi3", "gpt_neox")
TEXT = 23


def run(length_of: tuple[int, ...], rank: int) -> slice:
    """This rank's part of the text."""
    return slice(sum(length_of[:rank]), sum(length_of[: rank + 1]))


def tensors(shape: str) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, of the whole text."""
    heads, kv_heads, *_ = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(shape))
    return [
        torch.randn(2, h, TEXT, 8, generator=generator) for h in (heads, kv_heads, kv_heads, heads)
    ]


def reads(shape: str, **more) -> Reads:
    _, _, softcap, window, block = SHAPES[shape]
    return Reads(0.4, softcap, window, block, **more)


def attention(shape: str, part: slice, **more) -> list[torch.Tensor]:
    """Output, dq, dk and dv of a part of the text."""
    q, k, v, grad = (x[:, :, part].clone().requires_grad_() for x in tensors(shape))
    out = ring_attention(q, k, v, reads(shape, **more))
    out.backward(grad.detach())
    return [out.detach(), q.grad, k.grad, v.grad]


def model(family: str, part: slice | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of a part of the text and the parameters' gradients of a loss on them; None: whole, by
    the model's own attention."""
    from tiny_models import swap, tiny, tokens  # seconds of imports, for those who need them

    from mismatch.mechanisms.ring import spread

    ids = tokens(2, TEXT)
    student = tiny(family).requires_grad_(True)
    if part is None:
        out = student(ids, use_cache=False).logits
    else:
        student = swap(student, "all:ring(block=5)").model
        at = torch.arange(TEXT)[None, part].expand(2, -1)
        with spread(student):
            out = student(ids[:, part], position_ids=at, use_cache=False).logits
            out.sin().sum().backward()
    if part is None:
        out.sin().sum().backward()
    return out.detach(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def refusal(part: slice, **call) -> str:
    """What a spread model says to a wrong call; every rank must hear it."""
    from tiny_models import swap, tiny, tokens

    from mismatch.mechanisms.ring import spread

    student = swap(tiny("llama"), "all:ring").model
    try:
        with spread(student):
            student(tokens(2, TEXT)[:, part], **call)
    except SurgeryError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    part = run(LENGTHS[world], rank)
    group = distributed.group.WORLD
    found = {f"attention {shape}": attention(shape, part, group=group) for shape in SHAPES}
    if world == 2:
        found |= {f"model {family}": model(family, part) for family in MODELS}
        at = torch.arange(TEXT)[None, part]
        found["no positions"] = refusal(part, use_cache=False)
        found["a cache"] = refusal(part, position_ids=at)
        found["padding"] = refusal(
            part,
            position_ids=at,
            use_cache=False,
            attention_mask=(torch.arange(part.stop - part.start) > 0).long()[None].expand(2, -1),
        )
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
