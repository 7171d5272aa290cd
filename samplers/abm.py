"""ABM: Adams-Bashforth-Moulton for x0 over the linear VP path's time. What we recommend, on ``grids.vp``.

    predict   x~_n = (sigma_n / sigma_s) x_s + sum_j b_j x0_j              nodes s, s-1, ..
    correct   x_n  = (sigma_n / sigma_s) x_s + sum_j c_j x0_j + c_new x0(x~_n)

The ODE's solution does not depend on the path, and x0 is a smooth function of that time u at both ends: near the data
rho^2 is nearly linear in u, near the noise log rho is quadratic in it. So u, and not the path's own t or log-SNR, is
what the outputs are interpolated in. As in UniPC (2302.04867) the corrector reuses the call at the predicted point.
No paper's method: a point of the family ``multistep`` that won the comparison of ``benchmarks/solvers.py``.
"""

from __future__ import annotations

from .multistep import adams, adams_order, check_order
from .program import solver
from .table import Table


@solver(
    paper="ours; 2302.04867", order=lambda o: adams_order(o["nodes"], {"corrector": True, "final": "auto"})
)
def abm(path, times, nodes: int = 3) -> Table:
    """Adams-Bashforth-Moulton for x0 over VP time, with 1 to 4 nodes: the recommended default, on grids.vp.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.flow()
    >>> abm(path, grids.vp(path, 8)).calls
    8
    """
    check_order("nodes", nodes, 1, 4)
    return adams(path, times, "x0", "vp", nodes, corrector=True)
