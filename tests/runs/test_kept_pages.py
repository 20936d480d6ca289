"""Freed pages stay while batches run, and go back afterwards."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from mismatch.runs import kept_pages as pages

# In a process of its own: glibc serves other threads than the main one from smaller heaps.
COUNT = """
import resource, torch
from mismatch.runs.kept_pages import kept_pages
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        x = torch.ones(12 * 2**20)  # 48 MiB, as the logits of a chunk
        y = x + 1
        del x, y
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
outside = faults()
with kept_pages():
    faults()
    inside = faults()
print(outside, inside, faults())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc"
)
def test_what_is_freed_is_taken_again_without_the_kernel():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    outside, inside, after = map(int, done.stdout.split())
    assert inside < outside / 10
    assert after > 10 * (inside + 1)


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(pages.sys, "platform", "darwin")
    with pages.kept_pages():
        assert torch.ones(3).sum() == 3
