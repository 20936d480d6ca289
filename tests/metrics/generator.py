"""Two fixed point clouds and their reference numbers, and small helpers for the metric tests.

The clouds come from numpy's RandomState, whose stream is frozen, so their checksums hold anywhere.
"""

from __future__ import annotations

import numpy as np
import torch

from mismatch.metrics import load_metric
from mismatch.metrics.base import LogitPair, Pair
from mismatch.metrics.sums.meter import StudentMeter, TeacherMeter

BATCH, POS, D, VOCAB = 4, 12, 16, 50
N_DOCS = 6


def pair(n=256, d1=64, d2=96, seed=20240613, noise=0.5):
    r = np.random.RandomState(seed)
    scale = 2.0 ** (-np.arange(d1) / 16.0)
    x = r.standard_normal((n, d1)) * scale + 0.3
    v = r.standard_normal(d2)
    q = (np.eye(d2) - 2.0 * np.outer(v, v) / (v @ v))[:d1]  # Householder: no LAPACK signs
    return x, x @ q + noise * r.standard_normal((n, d2))


def shifted(x, seed=7):
    r = np.random.RandomState(seed)
    z = 1.25 * x + 0.1 * r.standard_normal(x.shape)
    z[:, :4] += 0.5
    z[:, 10] *= 8
    return z


def indep(n=32, d=200, seed=14):
    r = np.random.RandomState(seed)
    return r.standard_normal((n, d)), r.standard_normal((n, d))


def logit_rows():
    r = np.random.RandomState(99)
    first = 3 * r.standard_normal((8, 49152))
    return first, first + 0.3 * r.standard_normal((8, 49152))


def batch(seed, *, dtype=torch.float64, equal=False, docs=None, garbage=False, n=BATCH):
    """A `Pair` of random vectors with masks that keep most tokens."""
    g = torch.Generator().manual_seed(seed)
    shape = (n, POS, D)
    teacher = (torch.randn(shape, generator=g, dtype=torch.float64) + 0.3).to(dtype)
    moved = (teacher + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64) + 0.2).to(dtype)
    stream = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    stream_moved = stream * 1.25
    valid = torch.rand(n, POS, generator=g) > 0.2
    bulk = valid.clone()
    bulk[:, 0] = False
    sample = bulk & (torch.rand(n, POS, generator=g) > 0.1)
    docs = torch.arange(n) % N_DOCS if docs is None else torch.as_tensor(docs)
    student, after = (teacher, stream) if equal else (moved, stream_moved)
    if garbage:
        teacher, student, stream, after = (x.clone() for x in (teacher, student, stream, after))
        teacher[~valid], student[~valid] = 1e30, float("nan")
        stream[~valid], after[~valid] = float("inf"), -1e30
    elif equal:
        student, after = student.clone(), after.clone()
    return Pair(teacher, student, docs, valid, bulk, sample, (stream, after))


def chunk(seed, *, dtype=torch.float32, equal=False, n=40):
    """A `LogitPair` of random log-probabilities."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, VOCAB, generator=g, dtype=torch.float64)
    noise = 0.5 * torch.randn(n, VOCAB, generator=g).double()
    moved = logits if equal else logits + noise
    targets = torch.randint(-1, VOCAB, (n,), generator=g)
    docs = torch.randint(0, N_DOCS, (n,), generator=g)
    positions = torch.randint(0, POS, (n,), generator=g)
    teacher, student = (x.log_softmax(-1).to(dtype) for x in (logits, moved))
    return LogitPair(teacher, student.clone(), targets, docs, positions)


def make(name, seed, **options):
    """What feeds metric `name`: a `Pair`, or a `LogitPair`."""
    return chunk(seed, **options) if of_logits(name) else batch(seed, **options)


def of_logits(name):
    return load_metric(name).at in ("logits", "lens")


class Both:
    """Teacher's and student's meter of one metric, fed and merged as a trace does."""

    def __init__(self, name):
        self.name = name
        self.teacher = TeacherMeter([name], D, group=16)
        self.student = StudentMeter([name], D, n_docs=N_DOCS, n_pos=POS, group=16)

    def update(self, *pairs):
        for one in pairs:
            if isinstance(one, Pair):
                self.teacher.update(one)
            self.student.update(one)
        return self

    def merge(self, other):
        self.teacher.merge(other.teacher)
        self.student.merge(other.student)
        return self

    def read(self):
        return [reading for _, reading in self.student.read(self.teacher)]

    def numbers(self):
        return {(r.stat, r.position): (r.value, r.lo, r.hi, r.n) for r in self.read()}


def value(readings, stat, position="all"):
    (found,) = [r for r in readings if (r.stat, r.position) == (stat, position)]
    return found.value
