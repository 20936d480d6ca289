"""Ring attention is softmax attention: outputs, gradients, in one process and with the text on several."""

from __future__ import annotations

import functools
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ring_processes
import torch
import torch.nn.functional as F
from ring_processes import LENGTHS, MODELS, SHAPES, TEXT, attention, reads, run, tensors
from tiny_models import FAMILIES, in_chunks, part, positions, swap, tiny, tokens
from torch import distributed

from mismatch.errors import SurgeryError
from mismatch.mechanisms.parts.blockwise import Reads, ring_attention
from mismatch.mechanisms.ring import Ring, spread


def by_hand(q, k, v, reads, allowed=None):
    """Softmax attention row by row: for each row and head the keys it may read, and nothing else."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                i = reads.first + t
                js = [
                    j
                    for j in range(k.shape[2])
                    if j <= i and (reads.window is None or i - j < reads.window)
                    if allowed is None or allowed[b, t, j]
                ]
                if not js:
                    continue
                s = k[b, h // group, js] @ q[b, h, t] * reads.scale
                if reads.softcap is not None:
                    s = reads.softcap * torch.tanh(s / reads.softcap)
                weights = s.exp() / s.exp().sum()
                out[b, h, t] = weights @ v[b, h // group, js]
    return out


def doubles(shape, queries=TEXT):
    q, k, v, grad = (x.double() for x in tensors(shape))
    q, grad = q[:, :, -queries:], grad[:, :, -queries:]
    return [x.clone().requires_grad_() for x in (q, k, v)], grad


def assert_same_with_gradients(inputs, grad, call, wanted):
    """Two functions of q, k, v: outputs and all three gradients."""
    results = []
    for function in (call, wanted):
        for x in inputs:
            x.grad = None
        out = function(*inputs)
        out.backward(grad)
        results.append([out.detach(), *(x.grad.clone() for x in inputs)])
    for got, true in zip(*results, strict=True):
        torch.testing.assert_close(got, true, atol=1e-10, rtol=0)


@pytest.mark.parametrize("queries", [TEXT, 4, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_softmax_attention(shape, queries):
    inputs, grad = doubles(shape, queries)
    how = reads(shape, first=TEXT - queries)
    assert_same_with_gradients(
        inputs, grad, lambda *x: ring_attention(*x, how), lambda *x: by_hand(*x, how)
    )


@pytest.mark.parametrize("kind", ["bool", "added", "pads"])
@pytest.mark.parametrize("shape", ["plain", "grouped", "window"])
def test_masks_and_pads(shape, kind):
    inputs, grad = doubles(shape)
    allowed = torch.rand(2, TEXT, TEXT, generator=torch.Generator().manual_seed(1)) > 0.4
    allowed |= torch.eye(TEXT).bool()
    if kind == "pads":
        allowed = (torch.arange(TEXT) >= torch.tensor([[5], [0]]))[:, None].expand(-1, TEXT, -1)
        how = reads(shape, real=allowed[:, 0])
    elif kind == "bool":
        how = reads(shape, mask=allowed[:, None])
    else:
        least = torch.finfo(torch.float64).min
        how = reads(
            shape, mask=torch.zeros(2, 1, TEXT, TEXT).double().masked_fill(~allowed[:, None], least)
        )
    assert_same_with_gradients(
        inputs,
        grad,
        lambda *x: ring_attention(*x, how),
        lambda *x: by_hand(*x, how, allowed),
    )


def test_gradients_by_finite_differences():
    inputs, _ = doubles("one kv head, capped")
    inputs = [x[:1, :, :7].detach().requires_grad_() for x in inputs]
    how = Reads(0.4, 2.0, window=5, block=3)
    assert torch.autograd.gradcheck(lambda *x: ring_attention(*x, how), inputs)


def test_scores_far_apart_neither_overflow_nor_vanish():
    """exp of these scores is infinite; with one maximum for all blocks half of them would be lost."""
    q, k, v, _ = tensors("plain")
    for scale in (300.0, -300.0):
        got = ring_attention(q, k, v, Reads(scale, block=4))
        scores = q.double() @ k.double().mT * scale
        assert scores.abs().max() > 1000
        scores = scores.masked_fill(~torch.ones(TEXT, TEXT).tril().bool(), -torch.inf)
        wanted = scores.softmax(-1) @ v.double()
        torch.testing.assert_close(got, wanted.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("block", [1, 8, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shift_is_zero(family, block):
    """In float64 to 1e-5, and in float32 as near to that as the model's own kernels are: sdpa and
    eager attention are 1.7e-5 and 1.3e-5 away from it in the llama here."""
    ids, text = tokens(2, 40), f"all:ring(block={block})"
    true = tiny(family).double()(ids).logits
    got = swap(tiny(family).double(), text).model(ids).logits
    torch.testing.assert_close(got, true, atol=1e-5, rtol=0)
    models = [tiny(family, attn) for attn in ("sdpa", "eager")]
    theirs, ours = (
        max((model(ids).logits.double() - true).detach().abs().max() for model in every)
        for every in (models, [swap(model, text).model for model in models])
    )
    assert ours <= max(1e-5, 2 * theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_are_the_models_own(family):
    grads = []
    for spec in (None, "all:ring(block=8)"):
        model = tiny(family).double().requires_grad_(True)
        student = model if spec is None else swap(model, spec).model
        student(tokens(2, 40)).logits.sin().sum().backward()
        grads.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, true in grads[0].items():
        # Relative to the largest entry: these gradients reach 1000.
        assert (grads[1][name] - true).abs().max() <= 1e-5 * true.abs().max().clamp(min=1), name


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_and_in_chunks_it_is_the_model_too(family, attn):
    model, ids = tiny(family, attn), tokens(2, 20)
    student = swap(model, "all:ring(block=4)").model
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    given = {"attention_mask": mask, "position_ids": positions(mask)}
    wanted = model(ids, **given).logits[mask == 1]
    for size in (20, 6, 1):
        got = in_chunks(student, ids, size, mask)[mask == 1]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_several_texts_packed_in_one_row_stay_apart():
    model = tiny("llama")
    ids, at = tokens(1, 20), torch.cat([torch.arange(12), torch.arange(8)])[None]
    student = swap(model, "all:ring(block=4)").model
    packed = student(ids, position_ids=at, use_cache=False).logits
    torch.testing.assert_close(packed[:, 12:], model(ids[:, 12:]).logits, atol=1e-5, rtol=0)


def test_under_a_mask_of_another_kind_padding_is_still_known():
    """As a flash kernel's host does: no 4-D mask, the padding in the 2-D one only."""
    model = tiny("llama")
    student = swap(model, "layer1:ring(block=4)")
    x, mask = torch.randn(2, 20, 24), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    student.model(tokens(2, 20), attention_mask=mask)  # so the host knows
    pe = model.model.rotary_emb(x, positions(mask))
    got = part(student)(hidden_states=x, position_embeddings=pe, attention_mask=mask)[0]
    causal = torch.ones(20, 20).tril().bool() & mask[:, None, None].bool()
    causal = causal | torch.eye(20).bool()
    wanted = model.model.layers[1].self_attn(
        hidden_states=x, position_embeddings=pe, attention_mask=causal
    )[0]
    torch.testing.assert_close(got[mask == 1], wanted[mask == 1], atol=1e-5, rtol=0)


def test_memory_grows_with_the_length_and_not_with_its_square():
    def kept(length):
        """Numbers that autograd keeps from forward to backward, apart from the inputs."""
        q, k, v = (torch.randn(1, 2, length, 8).requires_grad_() for _ in range(3))
        sizes, known = [], {x.data_ptr() for x in (q, k, v)}

        def pack(x):
            sizes.append(0 if x.data_ptr() in known else x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ring_attention(q, k, v, Reads(0.3, block=16))
        return sum(sizes)

    assert kept(512) == 2 * kept(256)
    assert kept(512) <= 512 * 2 * (8 + 1)  # the output and one number per row


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """`ranks(world)`: what each of so many processes found."""
    return functools.cache(lambda world: started(tmp_path_factory.mktemp("ranks"), world))


def started(folder: Path, world: int) -> list[dict]:
    more = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    more |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, ring_processes.__file__, str(folder)],
            env={**os.environ, **more, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, said
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("world", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_over_several_processes_it_is_one_attention(ranks, shape, world):
    """Output, dq, dk and dv of every rank are its part of those of the whole text."""
    found = ranks(world)
    inputs, grad = doubles(shape)
    out = by_hand(*inputs, reads(shape))
    out.backward(grad)
    wanted = [out.detach(), *(x.grad for x in inputs)]
    alone = attention(shape, slice(None))
    for rank in range(world):
        mine = run(LENGTHS[world], rank)
        got = found[rank][f"attention {shape}"]
        for name, ours, one, true in zip(
            ("out", "dq", "dk", "dv"), got, alone, wanted, strict=True
        ):
            where = f"{name} of rank {rank}"
            torch.testing.assert_close(
                ours.double(),
                true[:, :, mine],
                atol=2e-6,
                rtol=0,
                msg=lambda m, w=where: f"{w}: {m}",
            )
            torch.testing.assert_close(ours, one[:, :, mine], atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", MODELS)
def test_over_two_processes_a_model_gives_its_logits_and_gradients(ranks, family):
    logits, grads = ring_processes.model(family, None)
    found = [rank[f"model {family}"] for rank in ranks(2)]
    got = torch.cat([part for part, _ in found], dim=1)
    torch.testing.assert_close(got, logits, atol=1e-5, rtol=0)
    assert grads.keys() == found[0][1].keys()
    for name, true in grads.items():
        summed = sum(grad.get(name, torch.zeros(())) for _, grad in found)
        assert (summed - true).abs().max() <= 1e-5 * true.abs().max().clamp(min=1), name


def test_over_two_processes_wrong_calls_are_refused_by_every_rank(ranks):
    for rank in ranks(2):
        # Rank 0 counts from 0 anyway, but without positions none is sure of it.
        assert rank["no positions"].startswith(
            "rank 0 holds the text from token 0 on, and got no position_ids"
        )
        assert (
            "layer0.attn: a text that is spread over processes takes no KV cache" in rank["a cache"]
        )
        assert "call the model with use_cache=False" in rank["a cache"]
        assert (
            "layer0.attn: a text that is spread over processes takes no padding" in rank["padding"]
        )


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_spread_over_one_process_it_is_the_model(one_process):
    model, ids = tiny("llama"), tokens(2, 20)
    student = swap(model, "all:ring(block=6)").model
    at = torch.arange(20)[None].expand(2, -1)
    with spread(student):
        got = student(ids, position_ids=at, use_cache=False).logits
        with pytest.raises(
            SurgeryError, match=r"rank 0 .* from token 0 on, and got first position 3"
        ):
            student(ids, position_ids=at + 3, use_cache=False)
    torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=0)
    # Afterwards it is an ordinary model again, which takes a cache and any positions.
    torch.testing.assert_close(in_chunks(student, ids, 7), got, atol=1e-4, rtol=0)
    assert all(m.processes is None for m in student.modules() if isinstance(m, Ring))


@pytest.mark.parametrize(
    "spec, layers",
    [
        ("layers[0,2]:ring", r"1 \(LlamaAttention\)"),
        ("all:ring; layer1.rope:parallel(nope)", r"1 \(Parallel\)"),
        ("layer1:infini; layers[0,2]:ring", r"1 \(Infini\)"),
    ],
)
def test_a_layer_that_would_read_one_process_only_is_refused(one_process, spec, layers):
    student = swap(tiny("llama"), spec).model
    with (
        pytest.raises(SurgeryError, match=f"would read one process's tokens only: {layers}"),
        spread(student),
    ):
        pass


def test_without_processes_nothing_can_be_spread():
    student = swap(tiny("llama"), "all:ring").model
    with pytest.raises(SurgeryError, match="no processes to spread a text over"), spread(student):
        pass


def test_a_mask_or_pads_over_processes_are_refused(one_process):
    q, k, v, _ = tensors("plain")
    group = distributed.group.WORLD
    for more in (
        {"real": torch.ones(2, TEXT).bool()},
        {"mask": torch.ones(2, 1, TEXT, TEXT).bool()},
    ):
        with pytest.raises(SurgeryError, match="it takes a run of tokens without mask or pads"):
            ring_attention(q, k, v, Reads(1.0, group=group, **more))
    with pytest.raises(SurgeryError, match="got 4 queries, 23 keys"):
        ring_attention(q[:, :, :4], k, v, Reads(1.0, group=group))


def test_training_with_dropout_is_refused():
    student = swap(tiny("gpt2", attn_pdrop=0.1), "layer1:ring").model
    ids = tokens(2, 20)
    assert student(ids).logits.isfinite().all()
    with pytest.raises(
        SurgeryError, match=r"layer1\.attn: `ring` has no dropout .* trains with 0\.1"
    ):
        student.train()(ids)
    assert swap(tiny("gpt2"), "layer1:ring").model.train()(ids).logits.isfinite().all()


@pytest.mark.parametrize("mask", [torch.ones(2, 20, 20), torch.ones(2, 4, 20, 20), "flex"])
def test_a_mask_of_another_kind_is_refused(mask):
    student = swap(tiny("llama"), "layer1:ring")
    x = torch.zeros(2, 20, 24)
    pe = student.model.model.rotary_emb(x, torch.arange(20)[None])
    with pytest.raises(SurgeryError, match=r"layer1\.attn: the host passes its attention the mask"):
        part(student)(hidden_states=x, position_embeddings=pe, attention_mask=mask)


def test_in_bfloat16_it_is_as_near_the_truth_as_torch():
    q, k, v, _ = (x.bfloat16() for x in tensors("grouped"))
    how = Reads(1 / math.sqrt(8), block=5)
    true = by_hand(q.double(), k.double(), v.double(), how)
    ours = ring_attention(q, k, v, how)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert ours.dtype == torch.bfloat16
    # One rounding of the output: half a unit in the last of 8 bits.
    assert (ours.double() - true).abs().max() <= true.abs().max() * 2**-8
    assert (ours.double() - true).abs().max() <= (torchs.double() - true).abs().max() * 1.01
    with torch.autocast("cpu", torch.bfloat16):
        inside = ring_attention(q.float(), k.float(), v.float(), how)
    torch.testing.assert_close(inside.double(), true, atol=1e-5, rtol=0)
