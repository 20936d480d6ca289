"""Means, covariances and the sums that debiased CKA needs, streamed: `TeacherMoments`, `PairMoments`.

Each batch is centred on its own mean in its own precision (so a constant 100 in one channel costs
nothing), multiplied in that precision, and added in float64 by the pairwise update of Chan, Golub
and LeVeque (1983): parts merge in any order and no pilot has to be agreed on.

The teacher's part is one per site, the student's one per site and student: three students share
the teacher's sums. The teacher is kept in two halves, documents of even and of odd number, whose
distance is the null of the unpaired metrics; together they are the whole.
Products of d x d per token: 1 for the teacher, 2 per student, 0 for a student that is bit-equal.
Memory: 2 d^2 float64 for the teacher, 2 d^2 per student, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mismatch.errors import RunError
from mismatch.metrics.sums.gaussian import Gaussian
from mismatch.metrics.sums.pairs import Pair, TeacherSide

FIELDS = ("mx", "my", "cross", "a", "b", "ab", "av", "bu")


class CrossSums:
    """Sums over paired rows x, y about their means; u = x - mean, v = y - mean, a = |u|^2, b = |v|^2.

    n; mx, my: means; cross: sum u v' (`dx dy`); a, b: sum a, sum b; ab: sum a b; av: sum a v;
    bu: sum b u. The last three move the sum a b to another centre when parts are merged.
    """

    n: int
    mx: Tensor
    my: Tensor
    cross: Tensor
    a: Tensor
    b: Tensor
    ab: Tensor
    av: Tensor
    bu: Tensor

    def __init__(self, dx: int, dy: int, device: torch.device | str = "cpu") -> None:
        shapes = {"mx": (dx,), "my": (dy,), "cross": (dx, dy), "av": (dy,), "bu": (dx,)}
        self.n = 0
        for name in FIELDS:
            zeros = torch.zeros(shapes.get(name, ()), dtype=torch.float64, device=device)
            setattr(self, name, zeros)

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> CrossSums:
        """The sums of the rows of `x` (`tokens dx`) and `y` (`tokens dy`); `y is x` is cheaper."""
        if len(x) == 0:
            return cls(x.shape[1], y.shape[1], x.device)
        out = cls(0, 0)
        out.n = len(x)
        u, out.mx, du = _centre(x)
        v, out.my, dv = (u, out.mx, du) if y is x else _centre(y)
        a = u.square().sum(1)
        b = a if y is x else v.square().sum(1)
        out.cross = (u.T @ v).double()
        out.a, out.b = a.sum(dtype=torch.float64), b.sum(dtype=torch.float64)
        out.ab = (a.double() * b.double()).sum()
        out.av, out.bu = (a @ v).double(), (b @ u).double()
        # u and v were centred on means rounded to their precision: move by the rest
        out._move(-du, -dv, out.n * du, out.n * dv)
        out.cross.addr_(du, dv, alpha=-out.n)
        return out

    def _move(self, e: Tensor, f: Tensor, su: Tensor | float, sv: Tensor | float) -> None:
        """Rewrites all sums but `cross` for u + e, v + f; su, sv: the present sums of u and v."""
        n = self.n
        ee, ff = (e * e).sum(), (f * f).sum()
        e_u, f_v = (e * su).sum(), (f * sv).sum()
        cf, ce = self.cross @ f, self.cross.T @ e
        self.ab = (
            self.ab + 2 * (f * self.av).sum() + ff * self.a + 2 * (e * self.bu).sum()
            + 4 * (e * cf).sum() + 2 * ff * e_u + ee * self.b + 2 * ee * f_v + n * ee * ff
        )  # fmt: skip
        self.av = self.av + f * self.a + 2 * ce + 2 * f * e_u + ee * sv + n * ee * f
        self.bu = self.bu + e * self.b + 2 * cf + 2 * e * f_v + ff * su + n * ff * e
        self.a = self.a + 2 * e_u + n * ee
        self.b = self.b + 2 * f_v + n * ff

    def copy(self, device: torch.device | None = None) -> CrossSums:
        """A copy that shares no memory, on `device` if given."""
        out = CrossSums(0, 0)
        out.n = self.n
        for name in FIELDS:
            setattr(out, name, getattr(self, name).to(device, copy=True))
        return out

    def merge(self, other: CrossSums) -> CrossSums:
        """Adds the rows of `other`; equals one pass over both up to the order of additions."""
        if self.cross.shape != other.cross.shape:
            raise RunError(
                f"moments of {tuple(self.cross.shape)} and {tuple(other.cross.shape)} channels "
                "do not fit together",
                hint="merge only parts of one run, with the same model.",
            )
        if other.n == 0:
            return self
        device = self.cross.device
        if self.n == 0:
            self.__dict__.update(other.copy(device).__dict__)
            return self
        moved = CrossSums(0, 0)
        moved.__dict__.update(other.__dict__)
        if other.cross.device != device:
            moved = other.copy(device)
        n, alpha = self.n + moved.n, self.n * moved.n / (self.n + moved.n)
        gap_x, gap_y = moved.mx - self.mx, moved.my - self.my
        share = moved.n / n
        self._move(-share * gap_x, -share * gap_y, 0.0, 0.0)
        moved._move((1 - share) * gap_x, (1 - share) * gap_y, 0.0, 0.0)
        self.cross.add_(moved.cross).addr_(gap_x, gap_y, alpha=alpha)
        self.n, self.mx, self.my = n, self.mx + share * gap_x, self.my + share * gap_y
        for name in ("a", "b", "ab", "av", "bu"):
            setattr(self, name, getattr(self, name) + getattr(moved, name))
        return self

    def state(self, prefix: str) -> dict[str, np.ndarray]:
        arrays = {name: getattr(self, name).cpu().numpy().copy() for name in FIELDS}
        return {
            f"{prefix}.{name}": array for name, array in (arrays | {"n": np.array(self.n)}).items()
        }

    def load(self, state: dict[str, np.ndarray], prefix: str) -> CrossSums:
        for name in FIELDS:
            old, new = getattr(self, name), torch.from_numpy(np.array(state[f"{prefix}.{name}"]))
            if old.shape != new.shape:
                raise RunError(
                    f"saved moments have {tuple(new.shape)} numbers where {tuple(old.shape)} are due",
                    hint="resume with the same model and settings.",
                )
            setattr(self, name, new.to(old.device))
        self.n = int(state[f"{prefix}.n"])
        return self

    @property
    def hsic(self) -> float:
        """n (n - 3) HSIC_u of the linear kernels x x' and y y' (Song et al. 2012, eq. 5), n >= 4."""
        n = self.n
        if n < 4:
            return float("nan")
        whole = (self.cross * self.cross).sum()
        return float(whole - n / (n - 2) * self.ab + self.a * self.b / ((n - 1) * (n - 2)))

    def gaussian(self) -> Gaussian:
        """Mean and covariance of x, for sums made of (x, x)."""
        return Gaussian(self.n, self.mx, self.cross, float(self.ab))


class TeacherMoments:
    """The teacher's moments at one site; `d`: channels."""

    def __init__(self, d: int) -> None:
        self.even, self.odd = CrossSums(d, d), CrossSums(d, d)

    def update(self, side: TeacherSide) -> None:
        """Adds the sampled tokens of one batch; call once per batch, not once per student."""
        even, odd = batch_halves(side)
        self.even.merge(even)
        self.odd.merge(odd)

    def merge(self, other: TeacherMoments) -> TeacherMoments:
        self.even.merge(other.even)
        self.odd.merge(other.odd)
        return self

    def state(self) -> dict[str, np.ndarray]:
        return self.even.state("even") | self.odd.state("odd")

    def load(self, state: dict[str, np.ndarray]) -> TeacherMoments:
        self.even.load(state, "even")
        self.odd.load(state, "odd")
        return self

    def whole(self) -> CrossSums:
        """Both halves together."""
        return self.even.copy().merge(self.odd)


class PairMoments:
    """One student's moments at one site, and its cross moments with the teacher.

    `equal` stays True while every sampled token was bit-equal in teacher and student; the metrics
    then read exactly their null.
    """

    def __init__(self, d: int, d_student: int | None = None) -> None:
        d_student = d if d_student is None else d_student
        self.student, self.cross = CrossSums(d_student, d_student), CrossSums(d, d_student)
        self.equal = True

    def update(self, pair: Pair) -> None:
        """Adds the sampled tokens of one batch."""
        x, y = pair.side.rows, pair.rows
        if pair.same_rows:
            student = cross = batch_whole(pair.side)
        else:
            self.equal = False
            student, cross = CrossSums.of(y, y), CrossSums.of(x, y)
        self.student.merge(student)
        self.cross.merge(cross)

    def merge(self, other: PairMoments) -> PairMoments:
        self.student.merge(other.student)
        self.cross.merge(other.cross)
        self.equal &= other.equal
        return self

    def state(self) -> dict[str, np.ndarray]:
        equal = {"equal": np.array(self.equal)}
        return self.student.state("student") | self.cross.state("cross") | equal

    def load(self, state: dict[str, np.ndarray]) -> PairMoments:
        self.student.load(state, "student")
        self.cross.load(state, "cross")
        self.equal = bool(state["equal"])
        return self


class TeacherView:
    """The teacher's moments as Gaussians, decomposed once for all students. Made when the numbers are read."""

    def __init__(self, moments: TeacherMoments) -> None:
        self.sums = moments.whole()
        self.law = self.sums.gaussian()
        self.even, self.odd = moments.even.gaussian(), moments.odd.gaussian()
        self.nulls: dict[str, float] = {}

    @cached_property
    def hsic(self) -> float:
        """n (n - 3) HSIC_u of the teacher with itself."""
        return self.sums.hsic

    def null(self, name: str, distance: Callable[[Gaussian, Gaussian], float]) -> float:
        """`distance(even, odd)`, computed once per site and name."""
        if name not in self.nulls:
            self.nulls[name] = distance(self.even, self.odd)
        return self.nulls[name]


class Moments:
    """What a moments metric reads: teacher and one student of one site."""

    def __init__(self, teacher: TeacherMoments | TeacherView, pair: PairMoments) -> None:
        self.view = teacher if isinstance(teacher, TeacherView) else TeacherView(teacher)
        self.pair = pair
        self.n = pair.student.n
        self.equal = pair.equal and self.n > 0

    @property
    def teacher(self) -> Gaussian:
        """Mean and covariance of the teacher."""
        return self.view.law

    @cached_property
    def student(self) -> Gaussian:
        """Mean and covariance of the student."""
        return self.view.law if self.equal else self.pair.student.gaussian()

    def hsics(self) -> tuple[float, float, float]:
        """n (n - 3) HSIC_u of (teacher, student), (teacher, teacher), (student, student)."""
        own = self.view.hsic
        return (
            (own, own, own) if self.equal else (self.pair.cross.hsic, own, self.pair.student.hsic)
        )


def batch_halves(side: TeacherSide) -> tuple[CrossSums, CrossSums]:
    """The sums of the sampled tokens of even and of odd documents; computed once per batch."""
    if "halves" not in side.cache:
        even = side.halves[1]
        first, second = side.rows[:even], side.rows[even:]
        side.cache["halves"] = CrossSums.of(first, first), CrossSums.of(second, second)
    return side.cache["halves"]


def batch_whole(side: TeacherSide) -> CrossSums:
    """The sums of all sampled tokens of a batch, from its halves; computed once per batch."""
    if "whole" not in side.cache:
        even, odd = batch_halves(side)
        side.cache["whole"] = even.copy().merge(odd)
    return side.cache["whole"]


def _centre(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x - c for c = the mean rounded to x's type; the true mean and mean - c in float64."""
    c = x.mean(0, dtype=torch.float64).to(x.dtype)
    u = x - c
    rest = u.mean(0, dtype=torch.float64)
    return u, c.double() + rest, rest
