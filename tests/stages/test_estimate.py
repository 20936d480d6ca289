"""What a trace is said to need, beside what it needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import mismatch


@pytest.mark.slow
@pytest.mark.timeout(900)  # the real model
@pytest.mark.parametrize("length, size", [(256, 1), (1024, 1), (1024, 2), (4096, 1)])
def test_the_memory_of_a_trace_is_foretold_within_a_fifth(tmp_path, length, size):
    swap, run = "layer12:infini(segment=64)", tmp_path / "run"
    settings = {"tokens": max(2048, length), "seq_len": length, "batch_size": size}
    told = mismatch.check("smollm2", swap, **settings).estimate.peak
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "mismatch", "trace", "--model", "smollm2", "--swap", swap]
    subprocess.run([*command, *flags, "--quiet", "--output", str(run)], check=True)
    needed = json.loads((run / "manifest.json").read_text())["peak_memory_bytes"]
    assert 0.8 < told / needed < 1.2
