"""What a number depends on besides the settings: package versions, platform, commit. No torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path

DISTRIBUTION = "llm-mismatch"
"""What pip knows `mismatch` by: on PyPI that name is another package's."""

PACKAGES = (
    "mismatch",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "matplotlib",
    "nnsight",
)


_SECRETS = re.compile(
    r"(?P<before>://[^\s/@:]*:(?=[^\s/]*@)|--[\w-]*(?:token|secret|password|api-key)[= ]|"
    r"[?&;](?:\w*token|secret|password|api_key)=)"
    r"[^\s@&'\"]+|\b(?:hf|ghp|gho|ghs|glpat|sk|xoxb)[_-][A-Za-z0-9_-]{16,}",
    re.IGNORECASE,
)
"""A password in an address, what follows a flag of that name, and what the tokens of known services look like."""
_NAMES_A_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8


def private(text: str) -> str:
    """A text as it may stand in a file: the home folder is `~`, tokens and passwords are `***`."""
    home = str(Path.home()).rstrip("/")
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)
    for name, value in os.environ.items():
        if _NAMES_A_SECRET.search(name) and len(value) >= _SHORTEST:
            text = text.replace(value, "***")
    return _SECRETS.sub(lambda found: f"{found['before'] or ''}***", text)


def versions() -> dict[str, str]:
    """Python and the packages that matter, by their metadata: nothing is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            known = DISTRIBUTION if name == "mismatch" else name
            found[name] = importlib.metadata.version(known)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit(file: Path = Path(__file__)) -> dict[str, str | bool] | None:
    """Commit of the checkout that this code runs from, and whether it has uncommitted changes.

    None when the code is not a tracked file of a checkout: a package installed inside somebody
    else's repository must not claim that repository's commit.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=file.parent, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory() -> int:
    """Largest memory of this process so far, in bytes (the GPU's, when there is one)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
