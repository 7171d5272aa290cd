"""Ancestral sampling (DDPM, 2006.11239) on any path, with either of its two fixed variances.

The mean is that of the exact reverse step given x0, q(x_n | x_s, x0), in both:

    small:  c = sigma_n sqrt(1 - (alpha_s sigma_n / alpha_n sigma_s)^2)      its own variance: DDIM at eta = 1
    large:  c = sqrt(sigma_s^2 - (alpha_s/alpha_n)^2 sigma_n^2)              the forward step's: beta on a VP path
"""

from __future__ import annotations

import numpy as np

from .ddim import ancestral_noise
from .multistep import check_choice
from .program import Program, solver
from .table import Table


@solver(paper="2006.11239", calls="1", order=1)
def ddpm(path, times, variance: str = "small") -> Table:
    """Ancestral sampling, ``variance="small"`` or ``"large"``.

    Small keeps a point mass exactly on its marginals. Large is wider than them on purpose: it is right for data of
    unit variance. Neither draws noise on a last step to sigma = 0.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.vp_linear(); times = grids.uniform(path, 10)
    >>> bool((ddpm(path, times, variance="large").c >= ddpm(path, times).c).all())
    True
    """
    check_choice("variance", variance, ("small", "large"))
    p = Program(path, times)
    x = p.start()
    for i in range(p.steps):
        d = p.call(x, at=i, form="x0")
        small = ancestral_noise(p, i)
        a = np.sqrt(np.maximum(p.sigma[i + 1] ** 2 - small**2, 0.0)) / p.sigma[i]
        c = small
        if variance == "large":
            forward = p.sigma[i] ** 2 - (p.alpha[i] / p.alpha[i + 1] * p.sigma[i + 1]) ** 2
            c = np.where(p.sigma[i + 1] > 0, np.sqrt(np.maximum(forward, 0.0)), 0.0)
        x = a * x + (p.alpha[i + 1] - a * p.alpha[i]) * d
        if np.any(c > 0):
            x = x + c * p.noise()
    return p.table(x)
