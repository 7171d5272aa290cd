"""Quantiles of the beta law, in numpy alone.

>>> beta_quantile(np.array([0.0, 0.25, 1.0]), 0.5, 0.5).round(12).tolist()      # sin^2(pi p / 2)
[0.0, 0.146446609407, 1.0]
"""

from __future__ import annotations

import math

import numpy as np


def beta_quantile(p: np.ndarray, a: float, b: float) -> np.ndarray:
    """x with I_x(a, b) = p, the regularised incomplete beta function, to 1e-12.

    Up to I_1/2 by Newton's method on the power series, convex or concave in x^a as b is below or above 1, so that
    from the right end it never overshoots; beyond, by the mirror image I_x(a, b) = 1 - I_(1-x)(b, a).
    """
    for name, value in (("a", a), ("b", b)):
        if not (isinstance(value, (int, float, np.number)) and 0 < value <= 10):
            raise ValueError(f"{name} of a beta grid must lie in (0, 10], got {value!r}")
    p = np.asarray(p, dtype=np.float64)
    middle = float(_beta_lower(np.array([0.5]), a, b)[0])
    below = _beta_solve(np.minimum(p, middle), a, b)
    above = 1.0 - _beta_solve(np.minimum(1.0 - p, 1.0 - middle), b, a)
    return np.where(p <= middle, below, above)


def _beta_norm(a: float, b: float) -> float:
    return math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))


def _beta_lower(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """I_x(a, b) for x <= 1/2:  x^a / B sum_k (1 - b)_k x^k / (k! (a + k))."""
    series, term = np.full_like(x, 1.0 / a), np.ones_like(x)
    for k in range(1, 80):
        term = term * x * (k - b) / k
        series = series + term / (a + k)
    return x**a * _beta_norm(a, b) * series


def _beta_solve(p: np.ndarray, a: float, b: float) -> np.ndarray:
    u = np.full_like(p, 0.5**a if b < 1 else 0.0)  # u = x^a, from the end where Newton's steps all go one way
    for _ in range(60):
        x = u ** (1 / a)
        slope = _beta_norm(a, b) / a * (1 - x) ** (b - 1)
        u = np.clip(u - (_beta_lower(x, a, b) - p) / slope, 0.0, 0.5**a)
    return u ** (1 / a)
