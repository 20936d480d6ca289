"""Faults planted into an attention: those of the script that plants them into a real model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "analyses" / "planted_faults.py"
found = importlib.util.spec_from_file_location("planted_faults", SCRIPT)
planted_faults = importlib.util.module_from_spec(found)
sys.modules["planted_faults"] = planted_faults  # a dataclass looks up the module of its annotations
found.loader.exec_module(planted_faults)

Fault, plant = planted_faults.Fault, planted_faults.plant
