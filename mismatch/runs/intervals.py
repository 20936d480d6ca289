"""What an interval can be over, as the column `over` of the table says it, and how much of it an interval takes."""

from __future__ import annotations

DOCUMENTS = "documents"
BLOCKS = "moving blocks of windows"
"""Pieces of few long documents."""
SAMPLES = "samples"
"""Inputs of a probe: prompts, random sequences."""

DOCUMENTS_NEEDED = 4
"""Fewer give no interval over documents (nor fewer samples)."""
WINDOWS_NEEDED = 8
"""Fewer give no interval over blocks of windows."""

FORMER = f"{DOCUMENTS}, by the percentile bootstrap"
"""Of numbers that were stored before they said what their intervals are over."""
