"""Flow-GRPO's sampler (2505.05470): the SDE with a rectified flow's marginals, by Euler-Maruyama, on any path.

On the flow x_t = (1 - t) x0 + t eps with v = dx/dt, and any noise S(t),

    dx = [ v + (S^2 / 2t) (x + (1 - t) v) ] dt + S dw,        S = a sqrt(t / (1 - t)),        run from t = 1 to 0

has the flow's marginals. A step of Euler-Maruyama from t to s < t, with S at t:

    x' = x (1 - S^2 (t - s) / 2t) - v (1 + S^2 (1 - t) / 2t) (t - s) + S sqrt(t - s) z

Any path is a flow seen at another scale: x / (alpha + sigma) at t = sigma / (alpha + sigma), and so is its sampler.
``scheme="euler"`` is the paper's. At a step's end it leaves more noise than the marginal has, of the order of the step
squared, and at the last, where s = 0, all of it: S sqrt(t) in the sample. ``"preserving"`` draws the same noise but
never more than s, and takes so much off the old that the marginals of a point stay exact (the coefficients-preserving
sampler, 2509.05952, does so with another amount of noise).

S is infinite at t = 1; the released code puts the second time of the grid into 1 - t there. We do so in every first
step, since a path that starts at a finite noise level (t = 0.988 on EDM's) would take off: its S sqrt(t - s) is 1.3.
"""

from __future__ import annotations

import numpy as np

from .ddim import first_order
from .multistep import check_choice
from .program import Program, solver
from .table import Table


@solver(paper="2505.05470", calls="1", order=1)
def flow_sde(path, times, a: float = 0.7, scheme: str = "euler") -> Table:
    """The SDE sampler of Flow-GRPO: ``a`` scales its noise, ``scheme`` is the paper's "euler", or "preserving".

    At a = 0 it is Euler's method on the flow, DDIM.

    >>> from fewstep.models import paths
    >>> path = paths.flow()
    >>> table = flow_sde(path, [1.0, 0.5, 0.0])
    >>> table.c[1:, 0, 0].round(3).tolist()                   # 0.7 sqrt(1 / 0.5 * 0.5), then 0.7 sqrt(0.5)
    [0.7, 0.495]
    >>> flow_sde(path, [1.0, 0.5, 0.0], scheme="preserving").c[1:, 0, 0].round(3).tolist()
    [0.5, 0.0]
    """
    check_choice("scheme", scheme, ("euler", "preserving"))
    if not 0.0 <= a <= 10.0:
        raise ValueError(f"a must lie in [0, 10], got {a!r}")
    p = Program(path, times)
    scale = p.alpha + p.sigma
    t = p.sigma / scale
    x = p.start()
    for i in range(p.steps):
        d = p.call(x, at=i, form="x0")
        length = t[i] - t[i + 1]
        left = 1.0 - (t[1] if i == 0 else t[i])
        variance = a * a * t[i] / left  # S^2
        drawn = np.sqrt(variance * length)
        if scheme == "preserving":
            x = first_order(p, x, i, d, scale[i + 1] * np.minimum(drawn, t[i + 1]))
            continue
        # v = (x - x0) / t of the flow's x, which is the path's over its scale
        along = (1.0 + variance * (1.0 - t[i]) / (2.0 * t[i])) * length / t[i]
        keep = 1.0 - variance * length / (2.0 * t[i]) - along
        x = (scale[i + 1] * keep / scale[i]) * x + (scale[i + 1] * along) * d
        if np.any(drawn > 0):
            x = x + scale[i + 1] * drawn * p.noise()
    return p.table(x)
