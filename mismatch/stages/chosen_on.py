"""Which documents an earlier run chose, calibrated or trained on, so that no number is reported on them.

A run writes a short digest of each document into its manifest, by role (`mismatch.stages.text_role`). A command that
builds on it (`plan --scan`, `--selected-by`) leaves these documents out of its evaluation text, and refuses where none
would be left. `--allow-overlap` evaluates on them all the same, and the report says on how many. What an earlier run
knew of still earlier ones goes on with it. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch.errors import DataError, RunError
from mismatch.runs.folder import load_run
from mismatch.stages.text_role import short
from mismatch.texts.documents import Documents
from mismatch.texts.windows import Windows

CHOSE = "chosen_on"
"""Of the manifest: the runs before this one, and the digests of what they used."""


@dataclass(frozen=True)
class ChosenOn:
    """What the numbers of a command must not be measured on.

    Attributes:
        run: the earlier run, as it is named in errors.
        digests: of its documents.
        remedy: what to do where there are no others.
    """

    run: str
    digests: frozenset[str]
    remedy: str = "give other --data"

    @classmethod
    def of(cls, path: Path | str) -> ChosenOn:
        """The documents that a run chose, calibrated or trained on, and those of the runs before it.

        A scan chooses on its evaluation text; of other runs that text only reports.

        Raises:
            RunError: no run there, or it does not say.
        """
        manifest = load_run(path).manifest
        texts: Mapping[str, Mapping[str, Any]] = manifest.get("texts", {})
        chooses = manifest["kind"] == "scan"
        used = [text for role, text in texts.items() if role != "evaluation" or chooses]
        if any("digests" not in text for text in used):
            raise RunError(
                f"the run in {path} does not say on which documents it chose: an earlier version made it",
                hint="make it again",
            )
        digests = {digest for text in used for digest in text["digests"]}
        before = manifest.get(CHOSE, {}).get("digests", [])
        return cls(str(path), frozenset({*digests, *before}))

    def shared(self, documents: Documents) -> list[bool]:
        """Which documents are among those."""
        return [short(digest) in self.digests for digest in documents.hashes]

    def read_in(self, documents: Documents, cut: Windows) -> int:
        """How many of those are in windows of these documents."""
        pairs = zip(documents.names, self.shared(documents), strict=True)
        return len({name for name, shared in pairs if shared} & set(cut.names))

    def without(self, documents: Documents) -> Documents:
        """The documents that are not.

        Raises:
            DataError: there is none.
        """
        shared = self.shared(documents)
        if all(shared):
            raise DataError(
                f"{documents.source}: all {len(documents)} documents are such that {self.run} chose, calibrated or "
                "trained on, and none is left to evaluate it on: a number would be reported on what it was chosen by",
                hint=f"{self.remedy}; or take --allow-overlap, and the report says that they are the same",
            )
        return documents.without(shared)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"run": Path(self.run).name, "digests": sorted(self.digests)}
