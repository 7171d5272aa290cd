"""Inception score, CMMD, FD at infinity, jackknives and metrics a class, against definitions and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.eval import (
    Gaussian,
    by_class,
    cmmd,
    extractor,
    fd_infinity,
    frechet_distance,
    frechet_jackknife,
    gaussian_stats,
    inception_score,
    interval,
    jackknife,
    measure,
    reference_of,
    see,
)
from fewstep.eval.mmd import Estimate

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# -- Inception score ---------------------------------------------------------------------------------------------------


def test_the_score_by_its_formula():
    logits = 3 * normal(23, 5)
    p = logits.softmax(dim=1).tolist()
    whole = [math.fsum(row[c] for row in p) / 23 for c in range(5)]
    kl = math.fsum(q * math.log(q / w) for row in p for q, w in zip(row, whole)) / 23
    assert inception_score(logits, splits=1, chunk=4).value == pytest.approx(math.exp(kl), rel=1e-13)
    # Parts are runs of rows: of 23 in 2, 11 and 12.
    parts = [inception_score(part, 1).value for part in (logits[:11], logits[11:])]
    two = inception_score(logits, splits=2, seed=None)
    assert two.value == pytest.approx(sum(parts) / 2) and two.stderr == pytest.approx(
        abs(parts[0] - parts[1]) / 2
    )


def test_the_score_of_nothing_said_and_of_everything_said():
    assert inception_score(torch.zeros(20, 7), splits=2).value == pytest.approx(1.0, abs=1e-14)
    sure = 2000 * torch.eye(7).repeat(3, 1)  # probabilities underflow: 0 log 0
    assert inception_score(sure, splits=1).value == pytest.approx(7.0, rel=1e-14)
    with pytest.raises(ValueError, match="splits is 8; expected at most 7"):
        inception_score(normal(7, 3), splits=8)


# -- CMMD --------------------------------------------------------------------------------------------------------------


def test_cmmd_by_double_loops():
    a, b = normal(9, 4), normal(7, 4, seed=1) + 0.5
    ua, ub = (
        [(torch.tensor(row, dtype=F64) / math.hypot(*row)).tolist() for row in x.tolist()] for x in (a, b)
    )

    def mean(x, y, skip):
        terms = [
            math.exp(-(math.dist(p, q) ** 2) / 200)
            for i, p in enumerate(x)
            for j, q in enumerate(y)
            if not (skip and i == j)
        ]
        return math.fsum(terms) / len(terms)

    for estimator, skip in (("unbiased", True), ("released", False)):
        exact = 1000 * (mean(ua, ua, skip) + mean(ub, ub, skip) - 2 * mean(ua, ub, False))
        assert cmmd(a, b, estimator, chunk=4).value == pytest.approx(exact, abs=1e-10)
    assert cmmd(5 * a, b).value == pytest.approx(cmmd(a, b).value, abs=1e-10)  # lengths do not count
    with pytest.raises(ValueError, match="b has a row of zeros"):
        cmmd(a, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="estimator must be one of unbiased, released"):
        cmmd(a, b, "biased")


# -- FD at infinity ----------------------------------------------------------------------------------------------------


def test_the_bias_of_fd_goes():
    # One distribution, b exact: FD of N samples is about tr cov (D + 1) / (4 N), and 0 at infinity.
    dim, exact = 10, Gaussian(torch.zeros(10, dtype=F64), torch.eye(10, dtype=F64))
    plain, corrected, errors = [], [], []
    for seed in range(20):
        x = normal(1000, dim, seed=seed)
        plain.append(frechet_distance(x, exact))
        value, error = fd_infinity(x, exact, seed=seed)
        corrected.append(value)
        errors.append(error)
    mean, spread = torch.tensor(corrected).mean(), torch.tensor(corrected).std() / 20**0.5
    assert min(plain) > 0.02
    assert abs(float(mean)) < 4 * float(spread) + 0.1 * sum(plain) / 20
    assert 0 < sum(errors) / 20 < 0.05


def test_fd_at_infinity_is_reproducible_and_says_what_it_cannot():
    x, y = normal(60, 3), normal(80, 3, seed=1)
    assert fd_infinity(x, y, seed=1) == fd_infinity(x, gaussian_stats(y), seed=1) != fd_infinity(x, y, seed=2)
    with pytest.raises(ValueError, match="least is 60; expected less than 60, the rows of a"):
        fd_infinity(x, y, least=60)


# -- jackknives --------------------------------------------------------------------------------------------------------


def test_the_jackknife_of_a_mean_is_the_usual_error():
    x = normal(40, 1)
    value, error = jackknife(lambda rows: float(rows.mean()), x, groups=40)
    assert value == float(x.mean()) and error == pytest.approx(float(x.std()) / 40**0.5, rel=1e-10)


def test_fd_by_groups_of_moments_is_fd_by_rows():
    a, b = normal(60, 4), normal(70, 4, seed=1) + 0.3
    ours = frechet_jackknife(a, b, groups=6)
    rows = jackknife(lambda x: frechet_distance(x, b), a, groups=6)
    assert ours.value == pytest.approx(rows.value, rel=1e-10) and ours.stderr == pytest.approx(
        rows.stderr, rel=1e-8
    )
    with pytest.raises(ValueError, match="a has 5 rows of 4 dimensions; without one of 5 groups"):
        frechet_jackknife(a[:5], b, groups=5)


def test_the_error_is_how_much_fd_moves():
    b = Gaussian(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64))
    runs = [frechet_jackknife(normal(400, 3, seed=s) * 1.2 + 0.4, b, 20) for s in range(40)]
    moved = torch.tensor([run.value for run in runs]).std()
    said = torch.tensor([run.stderr for run in runs]).mean()
    # The std of 40 values is known to about 1 / sqrt(80) = 11 %: three of those.
    assert float(said / moved) == pytest.approx(1.0, abs=0.34)


def test_the_interval_widens_for_few_groups():
    low, high = interval(Estimate(1.0, 0.1), 5)
    assert (low, high) == pytest.approx((1 - 0.2776, 1 + 0.2776))
    assert interval(Estimate(1.0, 0.1), 100)[1] == pytest.approx(1.196)


# -- a class at a time -------------------------------------------------------------------------------------------------


def test_mixing_classes_up_is_seen_by_class_alone():
    judge = extractor("digits")
    held, train = see("digits:held_out", judge), reference_of("digits:train", judge)
    right = by_class(frechet_distance, held.features, held.labels, train.features, train.labels)
    wrong = by_class(frechet_distance, held.features, (held.labels + 1) % 10, train.features, train.labels)
    assert list(right) == list(range(10)) and all(wrong[c] > 3 * right[c] for c in right)
    numbers = {number.metric: number.value for number in measure(held, train, ["fd", "fd-by-class"])}
    assert numbers["fd class 3"] == right[3] and numbers["fd-by-class"] == pytest.approx(
        sum(right.values()) / 10
    )
    with pytest.raises(ValueError, match="class 4 has 1 samples and 1437 real images"):
        by_class(frechet_distance, held.features[:1], [4], train.features, torch.full((1437,), 4))


def test_measure_says_what_there_is():
    judge = extractor("digits")
    held, train = see("digits:held_out", judge), reference_of("digits:train", judge)
    names = ["fd", "fd-infinity", "kid", "kid-full", "is", "prdc", "cmmd", "mmd", "sw2"]
    numbers = measure(held, train, names)
    found = {number.metric: number for number in numbers}
    assert set(found) >= {
        "fd",
        "kid",
        "is",
        "precision",
        "recall",
        "density",
        "coverage",
        "cmmd-released",
        "sw2",
    }
    assert all(math.isfinite(number.value) and number.protocol.num == 360 for number in numbers)
    assert abs(found["kid"].value - found["kid-full"].value) < 4 * found["kid-full"].stderr
    assert found["fd"].value == pytest.approx(frechet_distance(held.features, train.features), rel=1e-9)
    error = measure(held, train, ["fd"], groups=5)[0]
    assert error.value == pytest.approx(found["fd"].value, rel=1e-9) and error.stderr > 0
    with pytest.raises(ValueError, match="metrics must be among fd, fd-infinity.*got fid"):
        measure(held, train, ["fid"])
