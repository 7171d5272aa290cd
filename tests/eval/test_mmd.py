"""Unbiased MMD and KID against double loops, closed-form variances and leave-one-out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.eval import kernel_distance, kernel_mmd, rbf_mmd
from fewstep.eval.kid import cubic_kernel
from fewstep.eval.mmd import median_distance


def uniform(count: int, dim: int, seed: int) -> torch.Tensor:
    return 2 * torch.rand(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1


def double_loop(a, b, kernel) -> float:
    def mean(x, y, skip):
        terms = [
            kernel(x[i].tolist(), y[j].tolist())
            for i in range(len(x))
            for j in range(len(y))
            if not (skip and i == j)
        ]
        return math.fsum(terms) / len(terms)

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


def gaussian(*widths):
    return lambda x, y: sum(math.exp(-(math.dist(x, y) ** 2) / (2 * h * h)) for h in widths) / len(widths)


def cubic(x, y):
    return (sum(p * q for p, q in zip(x, y)) / len(x) + 1) ** 3


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_rbf_equals_the_double_loop(chunk):
    a, b = uniform(7, 3, 0), uniform(11, 3, 1) + 0.4
    assert rbf_mmd(a, b, 0.7, chunk).value == pytest.approx(double_loop(a, b, gaussian(0.7)), abs=1e-13)
    several = rbf_mmd(a, b, [0.3, 1.0, 2.0], chunk)
    assert several.value == pytest.approx(double_loop(a, b, gaussian(0.3, 1.0, 2.0)), abs=1e-13)
    median = median_distance(torch.cat([a, b]))
    assert rbf_mmd(a, b, chunk=chunk).value == pytest.approx(double_loop(a, b, gaussian(median)), abs=1e-13)


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_kid_equals_the_double_loop(chunk):
    a, b = uniform(9, 5, 0), uniform(6, 5, 1) + 0.4
    assert kernel_distance(a, b, chunk=chunk).value == pytest.approx(double_loop(a, b, cubic), abs=1e-13)


def test_a_far_origin_costs_no_digits():
    a, b = uniform(7, 3, 0), uniform(11, 3, 1)
    here, far = rbf_mmd(a, b, 0.7), rbf_mmd(a + 2.0**16, b + 2.0**16, 0.7)
    # The rows themselves are rounded at 2^16 eps; each kernel value moves by no more than about that.
    assert far.value == pytest.approx(here.value, abs=8 * 2.0**16 * 2.3e-16)


def test_jackknife_equals_leaving_one_out_by_hand():
    a, b = uniform(6, 2, 0), uniform(8, 2, 1)
    without_a = [kernel_mmd(torch.cat([a[:i], a[i + 1 :]]), b, cubic_kernel).value for i in range(6)]
    without_b = [kernel_mmd(a, torch.cat([b[:i], b[i + 1 :]]), cubic_kernel).value for i in range(8)]
    variance = sum(
        (len(v) - 1) / len(v) * sum((t - sum(v) / len(v)) ** 2 for t in v) for v in (without_a, without_b)
    )
    assert kernel_mmd(a, b, cubic_kernel, chunk=3).stderr == pytest.approx(math.sqrt(variance), rel=1e-11)


def test_kid_is_unbiased_within_its_exact_standard_error():
    # In one dimension (xy + 1)^3 is an inner product of features sqrt(C(3, j)) x^j, whose covariance C under
    # the uniform law on [-1, 1] is known. For equal distributions the estimate has mean 0 and variance
    # |C|_F^2 (2 / (m (m - 1)) + 2 / (n (n - 1)) + 4 / (m n)).
    def moment(k):
        return 0.0 if k % 2 else 1 / (k + 1)

    frobenius = sum(
        math.comb(3, i) * math.comb(3, j) * (moment(i + j) - moment(i) * moment(j)) ** 2
        for i in range(4)
        for j in range(4)
    )
    m, n, seeds = 20, 30, 500
    variance = frobenius * (2 / (m * (m - 1)) + 2 / (n * (n - 1)) + 4 / (m * n))
    runs = [kernel_distance(uniform(m, 1, 2 * s), uniform(n, 1, 2 * s + 1)) for s in range(seeds)]
    values = torch.tensor([run.value for run in runs], dtype=torch.float64)
    assert abs(float(values.mean())) < 4 * math.sqrt(variance / seeds)
    assert float(values.min()) < 0 < float(values.max())
    # The biased form, with i = j kept, would be off by E k~(x, x) (1/m + 1/n): far outside that bound.
    trace = sum(math.comb(3, j) * (moment(2 * j) - moment(j) ** 2) for j in range(4))
    assert trace * (1 / m + 1 / n) > 10 * math.sqrt(variance / seeds)
    # Efron and Stein: the jackknife's variance errs upward; twice, for a statistic of this kind.
    assert 1 < sum(run.stderr**2 for run in runs) / seeds / variance < 3


def test_the_standard_error_is_right_for_different_distributions():
    runs = [kernel_distance(uniform(40, 2, 2 * s), uniform(40, 2, 2 * s + 1) + 0.7) for s in range(300)]
    values = torch.tensor([run.value for run in runs], dtype=torch.float64)
    assert all(run.value > 2 * run.stderr for run in runs)
    # A standard deviation of 300 draws is known to 1 / sqrt(600) = 4 %; four of those.
    spread = math.sqrt(sum(run.stderr**2 for run in runs) / len(runs))
    assert spread == pytest.approx(float(values.std()), rel=0.17)


def test_rbf_is_unbiased_with_the_median_width():
    values = torch.tensor(
        [rbf_mmd(uniform(12, 2, 2 * s), uniform(20, 2, 2 * s + 1)).value for s in range(400)]
    )
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(400)


def test_subsets_follow_the_seed_and_agree_with_all_pairs():
    a, b = uniform(120, 4, 0), uniform(150, 4, 1) + 0.3
    some = kernel_distance(a, b, subsets=40, subset_size=50, seed=5)
    assert some == kernel_distance(a, b, subsets=40, subset_size=50, seed=5)
    assert some != kernel_distance(a, b, subsets=40, subset_size=50, seed=6)
    assert abs(some.value - kernel_distance(a, b).value) < 4 * some.stderr
    everything = kernel_distance(a, b[:120], subsets=2, subset_size=120)
    assert everything.value == pytest.approx(kernel_distance(a, b[:120]).value, rel=1e-12)


def test_bad_input_is_named():
    a, b = uniform(10, 3, 0), uniform(12, 3, 1)
    for metric in (rbf_mmd, kernel_distance):
        with pytest.raises(ValueError, match="a has 1 rows; this needs at least 2"):
            metric(a[:1], b)
        with pytest.raises(ValueError, match="b has 2 dimensions; expected 3"):
            metric(a, b[:, :2])
        with pytest.raises(ValueError, match="b has NaN or infinity in 12 of 12 rows"):
            metric(a, b * float("nan"))
        with pytest.raises(ValueError, match="chunk is 0; expected a whole number of at least 1"):
            metric(a, b, chunk=0)
    for wrong in (0, -1.0, [], [1.0, 0.0], float("nan"), "wide"):
        with pytest.raises(ValueError, match="bandwidths is .*; expected a positive number"):
            rbf_mmd(a, b, wrong)
    with pytest.raises(ValueError, match="give bandwidths instead"):
        rbf_mmd(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="subset_size is 11; expected at most 10"):
        kernel_distance(a, b, subsets=5, subset_size=11)
    with pytest.raises(ValueError, match="subsets is 1; expected a whole number of at least 2"):
        kernel_distance(a, b, subsets=1)
