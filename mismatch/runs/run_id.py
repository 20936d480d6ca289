"""The name of a run: model, swap, and a hash of its settings; no time and no folder. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_id(model: str, swap: str, settings: Mapping[str, Any]) -> str:
    """`smollm2_layer12-infini_a1b2c3`: model, swap without its arguments, hash of all settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    bare = re.sub(r"\([^()]*\)", "", re.sub(r"\([^()]*\([^()]*\)[^()]*\)", "", swap))
    return f"{_slug(Path(model).name or model, 32)}_{_slug(bare, 48)}_{digest}"


def _slug(text: str, limit: int) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:limit].strip("-.") or "x"
