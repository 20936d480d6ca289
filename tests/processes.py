"""Commands in several processes at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(words: list[str], before: str = "", world: int = 2) -> list[subprocess.Popen]:
    """Processes as torchrun starts them, without its own seconds; `before` is code that each runs first."""
    code = (
        "import sys\nfrom mismatch import cli\nfrom mismatch.stages import runner\n"
        f"runner.write_html = lambda path: None\n{before}\nsys.exit(cli.main(sys.argv[1:]))"
    )
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(world)
    ]


def finished(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    try:
        said = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, said, strict=True)]


def assert_told_of_the_dead(done: list[tuple[int, str, str]], run: Path) -> None:
    """Of two ranks the second died by `os._exit(9)`; the first said so, and the run folder says failed."""
    (code, out, err), (died, _, _) = done
    assert (code, died) == (1, 9), err
    assert out == ""
    assert err.endswith(
        "error: rank 0 of 2 waited for the others, and one of them is gone\n\nhint: its own message says why\n"
    )
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "failed" and "one of them is gone" in manifest["error"]
