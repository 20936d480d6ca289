"""A text in its role, and what the manifest tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mismatch.texts.documents import Documents
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class Text:
    """A text in its role: the documents it comes from, and the windows that were cut."""

    documents: Documents
    cut: Windows

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        cut, source = self.cut, self.cut.source
        return {
            "source": self.documents.source,
            "note": self.documents.note,
            "revision": source.revision,
            "documents": cut.n_docs,
            "documents_read": source.documents,
            "documents_seen": source.seen,
            "left_out": source.left_out,
            "copies": source.copies,
            "more": source.more,
            "windows": len(cut),
            "seq_len": cut.seq_len,
            "tokens": cut.tokens,
            "asked": cut.asked,
            "scored": int(cut.scored.sum()),
            "fingerprint": cut.fingerprint,
        }
