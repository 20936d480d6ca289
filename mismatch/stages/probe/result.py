"""What a run of probes returns: the table, the headlines, the retrieval map. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from mismatch.stages.base import Result
from mismatch.stages.probe.passkey_figure import passkey
from mismatch.stages.probe.words import headlines, probe_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Probed(Result):
    """The answers of one run of probes."""

    @property
    def headlines(self) -> pd.DataFrame:
        """The headline of every probe: teacher, each student, and their paired difference."""
        return headlines(self.table, self.run.dictionary)

    def words(self) -> str:
        text = probe_summary(self.table, self.plan, self.run.dictionary)
        said = [
            f"{f.title}: {f.text}\n  -> {f.next}" if f.next else f"{f.title}: {f.text}"
            for f in self.findings
        ]
        return "\n\n".join([text, *said])

    def as_dict(self) -> dict[str, Any]:
        rows = json.loads(self.headlines.to_json(orient="records"))
        return super().as_dict() | {"probes": rows}

    def passkey(self, **options: Any) -> Figure:
        """Retrieval over length and depth; see `mismatch.stages.probe.passkey_figure`."""
        return passkey(self.table, plan=self.plan, dictionary=self.run.dictionary, **options)
