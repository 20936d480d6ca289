"""Freed pages stay while batches run, and go back afterwards."""

from __future__ import annotations

import ctypes
import resource
import sys

import pytest
import torch

from mismatch import pages

glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc"
)
MIB = 2**20


def faults() -> int:
    """Page faults of three blocks of 64 MiB, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(16 * MIB).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@glibc
def test_what_is_freed_is_taken_again_without_the_kernel():
    outside = faults()
    with pages.kept_pages():
        faults()
        inside = faults()
    assert inside < outside / 10
    assert faults() > 10 * inside


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(pages.sys, "platform", "darwin")
    with pages.kept_pages():
        assert torch.ones(3).sum() == 3
