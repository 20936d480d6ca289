"""A model of three layers in which it is known which one matters for what, and a plan's tasks and cells for it."""

from __future__ import annotations

import numpy as np
import torch
from measured import cut

from mismatch.models.layout import Layout
from mismatch.stages.plan.config import PlanConfig
from mismatch.stages.scan.cells import cells, columns
from mismatch.stages.scan.stage import sweep_of
from mismatch.stages.scan.tasks import Task, text_task
from mismatch.surgery.students import Teacher

TEXT, RETRIEVAL = 0, 2
"""The layer that matters for text alone, and the one that matters for answers alone; layer 1 matters for nothing."""


def planted_layers(tiny):
    """Words of text and words of prompts lie in different dimensions; each layer reads those of one kind, and writes
    where neither lies."""
    model = tiny("llama", tie_word_embeddings=False)
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table[:50, 10:] = 0
        table[50:, :10] = 0
        table[:, 20:] = 0
        for at, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight[:20] = 0
            layer.self_attn.o_proj.weight *= 6
            reads = {TEXT: slice(0, 10), RETRIEVAL: slice(10, 20)}.get(at, slice(0, 0))
            kept = layer.self_attn.v_proj.weight[:, reads].clone()
            layer.self_attn.v_proj.weight.zero_()
            layer.self_attn.v_proj.weight[:, reads] = kept
    return Teacher(model, None, Layout.of(model), None)


def prompts(teacher, rows=8, length=20, answer=3):
    """Words of prompts, and as their answer what the model itself says."""
    ids = np.random.default_rng(1).integers(50, 101, (rows, length))
    for at in range(length - answer, length):
        logits = teacher.model(torch.from_numpy(ids[:, :at])).logits[:, -1]
        ids[:, at] = 50 + logits[:, 50:].argmax(-1).numpy()
    asked = np.zeros(ids.shape, bool)
    asked[:, length - answer - 1 : -1] = True
    return Task("needles", ids, asked, np.arange(rows), "logprob", chance=100.0)


def text(vocab=50):
    return text_task(cut(8, vocab=vocab))


def config(**changes):
    return PlanConfig(
        **{"model": "m", "mechanism": "zero", "layers": 2, "seq_len": 24, "controls": (), **changes}
    )


def swept(teacher, settings):
    every = cells(columns(settings.templates, ()), range(3), teacher.layout)
    return every, sweep_of(teacher, settings, every, None)
