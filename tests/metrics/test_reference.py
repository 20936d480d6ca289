"""Every number against one that somebody else's code, or a paper, gives."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import scipy
import torch
from generator import Both, batch, indep, logit_rows, pair, shifted, value

from mismatch.metrics import measure
from mismatch.metrics.base import LogitPair, Pair
from mismatch.metrics.sums.gaussian import Gaussian, frechet2, mean_gap2, shrunk_kl
from mismatch.metrics.sums.meter import StudentMeter, TeacherMeter
from mismatch.metrics.sums.moments import CrossSums

X, Y = pair()
Z = shifted(X)
A, B = indep()
CLOUDS = {"X": X, "Y": Y, "Z": Z, "A": A, "B": B}
EXACT = {"rel": 1e-9, "abs": 1e-10}


def law(x):
    x = torch.as_tensor(x)
    return CrossSums.of(x, x).gaussian()


@pytest.mark.parametrize(
    ("name", "total", "square"),
    [
        ("X", 4945.3370287914, 4556.5962265298),
        ("Y", 4951.8507718267, 10774.5379634705),
        ("Z", 7412.5522088750, 21240.6121759702),
        ("A", -125.2691714211, 6713.1520247911),
        ("B", 69.6707232882, 6402.3208105215),
    ],
)
def test_checksums_of_the_clouds(name, total, square):
    cloud = CLOUDS[name]
    assert (cloud.sum(), (cloud**2).sum()) == pytest.approx((total, square), rel=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (X, Y, 0.5938635548),
        (X, Z, 0.2524082104),
        (A, B, -0.1097328864),
    ],
    ids=["XY", "XZ", "AB"],
)
def test_debiased_cka(x, y, expected):
    """Agreed by ckatorch, dcor (exponent 2) and, for XY, pytorch-cka."""
    assert value(measure("cka", x, y), "value") == pytest.approx(expected, **EXACT)


def test_debiased_cka_of_kornblith_notebook():
    np.random.seed(1337)
    x = np.random.randn(100, 10)
    y = np.random.randn(100, 10) + x
    assert value(measure("cka", x, y), "value") == pytest.approx(0.51346, abs=5e-6)


def _song(x, y):
    """HSIC_u written out from Song et al. 2012, eq. 5, on uncentred kernels, in numpy."""
    k, l = x @ x.T, y @ y.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    n = len(k)
    one = np.ones(n)
    whole = np.trace(k @ l) + one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2))
    return (whole - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def test_hsic_equals_song_eq_5():
    x, y = torch.as_tensor(X), torch.as_tensor(Y)
    n = len(X)
    hsic = CrossSums.of(x, y).hsic / (n * (n - 3))
    assert hsic == pytest.approx(_song(X, Y), rel=1e-11)
    assert hsic == pytest.approx(6.4978817435, **EXACT)


def _minibatch(x, y, size):
    """`cka_minibatch` fed with one window per group, in order."""
    teacher, student = TeacherMeter(["cka_minibatch"], x.shape[1], group=size), None
    student = StudentMeter(["cka_minibatch"], n_docs=256, n_pos=size, group=size)
    for i in range(0, len(x), size):
        t, s = (torch.as_tensor(c[i : i + size])[None] for c in (x, y))
        keep = torch.ones(t.shape[:2], dtype=torch.bool)
        one = Pair(t, s, torch.tensor([i]), keep, keep, keep)
        teacher.update(one)
        student.update(one)
    return [reading for _, reading in student.read(teacher)]


@pytest.mark.parametrize(
    ("size", "xy", "xz"),
    [
        (16, 0.6136807066, 0.2197569885),
        (32, 0.6007881248, 0.2378271913),
        (64, 0.5917092735, 0.2448122302),
        (128, 0.5914682875, 0.2507364516),
    ],
)
def test_minibatch_cka(size, xy, xz):
    """Agreed by ckatorch's cka_batch and a loop over Song's formula."""
    assert value(_minibatch(X, Y, size), "value") == pytest.approx(xy, **EXACT)
    assert value(_minibatch(X, Z, size), "value") == pytest.approx(xz, **EXACT)


@pytest.mark.parametrize(("size", "wrong"), [(16, 0.6041247075), (64, 0.5921298075)])
def test_minibatch_cka_is_not_the_mean_of_ratios(size, wrong):
    ratios = [
        _song(x, y) / math.sqrt(_song(x, x) * _song(y, y))
        for x, y in ((X[i : i + size], Y[i : i + size]) for i in range(0, len(X), size))
    ]
    assert np.mean(ratios) == pytest.approx(wrong, **EXACT)  # what that mistake would give
    assert abs(value(_minibatch(X, Y, size), "value") - wrong) > 4e-4


@pytest.mark.parametrize("name", ["cka", "cka_minibatch"])
def test_one_constant_channel_does_not_break_float32(name):
    """Uncentred float32 gives 0.0 (pytorch-cka) or nan here."""
    x, z = (np.pad(c, ((0, 0), (0, 1)), constant_values=100.0).astype(np.float32) for c in (X, Z))
    assert value(measure(name, x, z), "value") == pytest.approx(0.2524082104, rel=1e-5)


@pytest.mark.parametrize(("n", "d"), [(64, 576), (256, 576)])
def test_debiased_cka_of_independent_clouds_is_near_0(n, d):
    """The biased form would give d / (n + d): .900 and .692."""
    g = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, d, generator=g).double() for _ in range(2))
    assert abs(value(measure("cka", x, y), "value")) < 0.02
    sums = CrossSums.of(x, y)
    own = [(CrossSums.of(c, c).cross ** 2).sum() for c in (x, y)]
    biased = float((sums.cross**2).sum() / (own[0] * own[1]).sqrt())
    assert biased == pytest.approx(d / (n + d), abs=0.003)


TOKEN = [
    ("rel_l2", "mean", 1.346687015),
    ("cosine", "mean", 1 - 0.8035004918),
    ("angle", "mean", 0.1921975670),
    ("norm_ratio", "mean", math.log2(1.891759000)),
]


@pytest.mark.parametrize(("name", "stat", "expected"), TOKEN)
def test_per_token_metrics(name, stat, expected):
    assert value(measure(name, X, Z), stat) == pytest.approx(expected, rel=2e-9)


@pytest.mark.parametrize(
    ("name", "stat", "exact"),
    [
        ("norm_ratio", "p5", math.log2(1.306150851)),
        ("norm_ratio", "p50", math.log2(1.731487238)),
        ("norm_ratio", "p95", math.log2(3.658994672)),
        ("cosine", "p95", 1 - 0.6291466445),
    ],
)
def test_quantiles_from_the_histogram(name, stat, exact):
    """numpy interpolates between tokens, so the last bit of the 1 % is the gap between two."""
    assert value(measure(name, X, Z), stat) == pytest.approx(exact, rel=0.02)


def test_update_size_by_hand():
    before = (np.full((256, 64), 2.0), np.full((256, 64), 4.0))
    got = measure("update_size", X, Z, before=before)
    teacher = np.linalg.norm(X, axis=1) / 16
    student = np.linalg.norm(Z, axis=1) / 32
    assert value(got, "teacher") == pytest.approx(teacher.mean(), rel=1e-12)
    assert value(got, "student") == pytest.approx(student.mean(), rel=1e-12)
    assert value(got, "shift") == pytest.approx(np.log2(student / teacher).mean(), rel=1e-12)


def test_mean_shift():
    assert math.sqrt(mean_gap2(law(X), law(Z))) == pytest.approx(3.212231564, rel=2e-9)
    assert value(measure("mean_shift", X, Z), "value") == pytest.approx(0.9279369734, rel=2e-9)


def test_frechet_against_pot_and_scipy():
    x, z = law(X), law(Z)
    bures2 = frechet2(x, z) - mean_gap2(x, z)
    assert bures2 == pytest.approx(35.32453436, rel=2e-9)
    assert frechet2(x, z) == pytest.approx(45.64296598, rel=2e-9)
    a, b = np.cov(X.T), np.cov(Z.T)
    pot = ot.gaussian.bures_wasserstein_distance(X.mean(0), Z.mean(0), a, b) ** 2
    assert frechet2(x, z) == pytest.approx(pot, rel=1e-9)
    cross = scipy.linalg.sqrtm(scipy.linalg.sqrtm(a) @ b @ scipy.linalg.sqrtm(a)).trace().real
    assert bures2 == pytest.approx(np.trace(a) + np.trace(b) - 2 * cross, rel=1e-9)
    got = measure("frechet", X, Z)
    assert value(got, "value") == pytest.approx(pot / np.trace(a), rel=1e-9)
    even, odd = X[::2], X[1::2]
    null = ot.gaussian.bures_wasserstein_distance(
        even.mean(0), odd.mean(0), np.cov(even.T), np.cov(odd.T)
    )
    assert value(got, "null") == pytest.approx(null**2 / np.trace(a), rel=1e-8)


def test_frechet_with_fewer_tokens_than_channels():
    """Singular covariances. Reference: |Xc Zc'|_* / (n - 1), the nuclear-norm form."""
    a, b = A - A.mean(0), B - B.mean(0)
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum() / (len(A) - 1)
    spread = np.trace(np.cov(A.T)) + np.trace(np.cov(B.T))
    expected = ((A.mean(0) - B.mean(0)) ** 2).sum() + spread - 2 * overlap
    assert frechet2(law(A), law(B)) == pytest.approx(expected, rel=1e-8)


def test_gaussian_kl():
    """Shrinkage and value as in scikit-learn's ledoit_wolf; the KL itself by torch.distributions."""
    x, z = law(X), law(Z)
    assert (x.shrinkage, z.shrinkage) == pytest.approx((0.12433408, 0.01202890), abs=5e-9)
    got = measure("gaussian_kl", X, Z)
    assert value(got, "reverse") == pytest.approx(80.77465254, rel=2e-9)
    normal = [
        torch.distributions.MultivariateNormal(side.mean, scale_tril=side.shrunk[0])
        for side in (x, z)
    ]
    expected = torch.distributions.kl_divergence(*normal)
    assert value(got, "value") == pytest.approx(float(expected), rel=1e-9)
    for side, cloud in ((x, X), (z, Z)):
        share, empirical = side.shrinkage, np.cov(cloud.T, ddof=0)
        mixed = (1 - share) * empirical + share * np.trace(empirical) / 64 * np.eye(64)
        assert np.allclose((side.shrunk[0] @ side.shrunk[0].T).numpy(), mixed, rtol=1e-12)


def test_gaussian_kl_without_shrinkage(monkeypatch):
    """torch.distributions on plain covariances (divided by n - 1)."""
    monkeypatch.setattr(Gaussian, "shrinkage", 0.0)
    x, z = law(X), law(Z)
    for side in (x, z):
        side.scatter = side.scatter * side.n / (side.n - 1)
    assert shrunk_kl(z, x) == pytest.approx(103.7138519, rel=2e-9)
    assert shrunk_kl(x, z) == pytest.approx(13.37655015, rel=2e-9)


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [
        ("effective_rank", 47.08128749, 37.27329145),
        ("participation_ratio", 20.76522896, 2.049390978),
        ("kurtosis", 1.835866715, 26.35861939),
    ],
)
def test_shape_of_the_cloud(name, teacher, student):
    got = measure(name, X, Z)
    assert value(got, "teacher") == pytest.approx(teacher, rel=2e-9)
    assert value(got, "student") == pytest.approx(student, rel=2e-9)
    assert value(got, "shift") == pytest.approx(math.log2(student / teacher), rel=1e-8)


@pytest.mark.parametrize(
    ("name", "stat", "tolerance"),
    [
        ("cka", "value", 1e-6), ("mean_shift", "value", 1e-6), ("frechet", "value", 1e-6),
        ("gaussian_kl", "reverse", 1e-5), ("effective_rank", "student", 1e-6),
        ("participation_ratio", "student", 1e-6), ("kurtosis", "student", 1e-6),
        ("rel_l2", "mean", 1e-6), ("cosine", "mean", 1e-6), ("angle", "mean", 1e-6),
        ("norm_ratio", "mean", 1e-6), ("cka_minibatch", "value", 1e-6),
    ],
)  # fmt: skip
def test_float32_input_stays_close(name, stat, tolerance):
    exact = value(measure(name, X, Z), stat)
    single = value(measure(name, X.astype(np.float32), Z.astype(np.float32)), stat)
    assert single == pytest.approx(exact, rel=tolerance)


def test_massive_activations_by_hand():
    h = torch.ones(2, 6, 32)
    h[0, 0, 5] = 25_000.0
    h[1, 3, 7] = 900.0  # above 100, under 1000 times the median
    h[1, 4, 9] = -2_000.0
    student = h.clone()
    student[0, 0, 5] = 12_500.0
    got = measure("massive", h, student)
    assert value(got, "teacher") == 25_000 and value(got, "student") == 12_500
    assert value(got, "teacher_tokens") == pytest.approx(2 / 12)
    assert value(got, "teacher_channels") == 1
    assert value(got, "shift") == pytest.approx(-1 / 12)


def test_logit_metrics():
    first, second = logit_rows()
    p, q = scipy.special.softmax(first, 1), scipy.special.softmax(second, 1)
    kl = scipy.special.rel_entr(p, q).sum(1)
    js = scipy.spatial.distance.jensenshannon(p, q, axis=1) ** 2
    assert kl[0] == pytest.approx(0.04650069494, rel=1e-9)
    for name, expected, by_row in (("kl", 0.0422115707, kl), ("js", 0.0104229632, js)):
        got = measure(name, first, second)
        assert value(got, "mean") == pytest.approx(expected, rel=2e-9)
        assert value(got, "mean") == pytest.approx(by_row.mean(), rel=1e-12)
        single = measure(name, first.astype(np.float32), second.astype(np.float32))
        assert value(single, "mean") == pytest.approx(expected, rel=1e-5)
    assert value(measure("lens_kl", first, second), "mean") == pytest.approx(kl.mean(), rel=1e-12)
    assert value(measure("kl", second, first), "mean") == pytest.approx(0.04218566227, rel=2e-9)
    assert value(measure("top1", first, second), "mean") == pytest.approx(1 - 0.875)
    assert value(measure("top5", first, second), "mean") == pytest.approx(1 - 0.800)
    targets = np.arange(8)
    nll = -np.log(q[targets, targets]) + np.log(p[targets, targets])
    assert value(measure("nll", first, second, targets=targets), "mean") == pytest.approx(
        nll.mean()
    )


def _chunk(first, second):
    n = len(first)
    zeros = torch.zeros(n, dtype=torch.int64)
    logs = [torch.as_tensor(x).log_softmax(-1) for x in (first, second)]
    return LogitPair(*logs, zeros, zeros, zeros)


@pytest.mark.parametrize("step", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("joint", [False, True])
def test_float32_kl_is_never_negative_and_right_where_the_plain_sum_is_noise(step, joint):
    """KL of 5e-11, 5e-9 and 5e-7: the plain float32 sum is negative in half of the rows."""
    g = torch.Generator().manual_seed(0)
    first = 3 * torch.randn(32, 20_000, generator=g)
    second = first + step * torch.randn(32, 20_000, generator=g)
    single, double = _chunk(first, second), _chunk(first.double(), second.double())
    logs = single.teacher, single.student
    plain = (logs[0].exp() * (logs[0] - logs[1])).sum(1)
    single.joint = joint
    assert (single.kl >= 0).all()
    if step == 1e-4:
        assert (plain < 0).any()  # the trap is there
    # the float32 log-probabilities themselves are rounded: compare with float64 on the same ones
    same = LogitPair(
        *(x.double().log_softmax(-1) for x in logs), single.targets, single.docs, single.positions
    )
    assert single.kl.double().median() == pytest.approx(float(same.kl.median()), rel=0.05)
    if step == 1e-3:
        assert single.kl.double().mean() == pytest.approx(float(double.kl.mean()), rel=1e-2)


def test_joint_kl_and_js_equal_the_separate_ones():
    first, second = logit_rows()
    alone, both = _chunk(first, second), _chunk(first, second)
    both.joint = True
    assert torch.allclose(alone.kl, both.kl, rtol=1e-12)
    assert torch.allclose(alone.js, both.js, rtol=1e-12)


def test_unrelated_predictions_do_not_overflow():
    """d > 88 overflows expm1 in float32, and such rows share blocks with equal ones."""
    first = torch.zeros(3, 100)
    first[0, 0], first[1, 0] = 200.0, 200.0
    second = torch.zeros(3, 100)
    second[0, 0], second[1, 1] = 200.0, 200.0
    for joint in (False, True):
        got, exact = _chunk(first, second), _chunk(first.double(), second.double())
        got.joint = exact.joint = joint
        assert got.kl.tolist() == [0.0, pytest.approx(200.0), 0.0]
        assert exact.kl[1] == pytest.approx(200.0)
        assert got.js.tolist() == [0.0, pytest.approx(math.log(2.0)), pytest.approx(0.0, abs=1e-9)]


def test_vectors_that_are_gone():
    zero = torch.zeros(1, 4, 16)
    ones = torch.ones(1, 4, 16)
    assert value(measure("norm_ratio", ones, zero), "mean") == -24.0
    assert value(measure("norm_ratio", zero, zero), "mean") == 0.0
    assert value(measure("cosine", ones, zero), "mean") == 1.0
    assert value(measure("angle", ones, zero), "mean") == pytest.approx(0.5)
    assert value(measure("cosine", ones, -ones), "mean") == pytest.approx(2.0)
    assert value(measure("angle", ones, -ones), "mean") == pytest.approx(1.0)
    assert value(measure("rel_l2", ones, zero), "mean") == 1.0
    assert value(measure("rel_l2", zero, zero), "mean") == 0.0
    assert value(measure("rel_l2", zero, ones), "mean") == math.inf
    gone = Both("cka").update(batch(1).with_student(torch.zeros_like(batch(1).student))).read()
    assert math.isnan(value(gone, "value"))


def test_small_angles_keep_their_digits():
    """arccos of a float32 cosine would read 0 or 3e-4 here."""
    x = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    y = torch.tensor([[1.0, 1e-5]]).repeat(4, 1)
    assert value(measure("angle", x, y), "mean") == pytest.approx(1e-5 / math.pi, rel=1e-4)
