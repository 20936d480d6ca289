"""What one set of sums is of: which student, in which mode, at which layer and site."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Address:
    """What one meter measures. `scope` keeps the floor's own teacher values apart from the run's."""

    scope: str
    student: str
    mode: str
    layer: int
    site: str

    def __str__(self) -> str:
        return f"{self.scope}|{self.student}|{self.mode}|{self.layer}|{self.site}"

    def of_teacher(self) -> Address:
        """The teacher's own values at the same place, shared by all students and modes."""
        return Address(self.scope, TEACHER, "free", self.layer, self.site)

    @classmethod
    def parse(cls, text: str) -> Address:
        scope, student, mode, layer, site = text.split("|")
        return cls(scope, student, mode, int(layer), site)


NO_LAYER = -1  # the layer of `final` and `logits` inside an Address; empty in the table
TEACHER = ""  # the student of a teacher's own meter
