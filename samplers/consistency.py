"""Steps of consistency models: jump to x0, then noise it again (2303.01469; latent ones, LCM, 2310.04378).

    x_n = alpha_n x0 + sqrt(1 - gamma^2) sigma_n eps + gamma sigma_n z

gamma = 1 forgets eps altogether, gamma = 0 is DDIM; between them lies the gamma-sampling of 2310.02279.
"""

from __future__ import annotations

from .ddim import first_order
from .program import Program, solver
from .table import Table


@solver(paper="2303.01469, 2310.04378, 2310.02279", calls="1", order=lambda o: 0 if o["gamma"] else 1)
def consistency(path, times, gamma: float = 1.0) -> Table:
    """Multistep consistency sampling (CM, LCM): x0, and fresh noise of share ``gamma`` on top of it.

    For a denoiser it is no integrator: with gamma > 0 the samples do not converge to the data's as steps are added.

    >>> from fewstep.models import paths
    >>> path = paths.flow()
    >>> table = consistency(path, [1.0, 0.5, 0.0])
    >>> table.a[1:].any().item(), table.c[:, 0, 0].tolist()                      # nothing of the old x is kept
    (False, [0.0, 0.5, 0.0])
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma!r}")
    p = Program(path, times)
    x = p.start()
    for i in range(p.steps):
        d = p.call(x, at=i, form="x0")
        x = first_order(p, x, i, d, gamma * p.sigma[i + 1])
    return p.table(x)
