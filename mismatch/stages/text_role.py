"""A text in its role, and what the manifest tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mismatch.texts.documents import Documents
from mismatch.texts.windows import Windows

DIGITS = 12
"""Of a document's hash in a manifest: two of a million documents have the same once in 500 times."""
MOST = 1024
"""Documents whose digest is kept; of more, those of the smallest, so that texts that share many share some of these."""


@dataclass(frozen=True)
class Text:
    """A text in its role: the documents it comes from, and the windows that were cut.

    `overlap`: documents that an earlier run chose, calibrated or trained on, and that are evaluated on all the same.
    """

    documents: Documents
    cut: Windows
    overlap: int = 0

    @property
    def digests(self) -> list[str]:
        """Of the documents in the windows, ascending."""
        used = set(self.cut.names)
        pairs = zip(self.documents.names, self.documents.hashes, strict=True)
        return sorted(short(digest) for name, digest in pairs if name in used)[:MOST]

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
            "digests": self.digests,
            "overlap": self.overlap,
        }


def short(digest: str) -> str:
    """The digest of a document as manifests hold it."""
    return digest[:DIGITS]
