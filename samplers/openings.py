"""Which network call opens each step of a grid: what enters or leaves a table between two steps must know.

>>> from fewstep.models import paths
>>> from fewstep.samplers import grids, heun, pndm
>>> path = paths.vp_linear(); times = grids.uniform(path, 6)
>>> openings(heun(path, times)), openings(pndm(path, times))
([0, 2, 4, 6, 8, 10], [0, 4, 8, 12, 13, 14])
"""

from __future__ import annotations

import numpy as np

from .plan import joined
from .table import Table


def openings(table: Table) -> list[int]:
    """The calls at grid points 0 .. n - 1 that open the steps: those made where the table's two registers agree. (A
    stage that ends a step is called at a grid point too, but holds x fast at the step's start.) Else ``ValueError``.
    """
    if table.times.ndim != 1:
        raise ValueError(f"times must be one grid for all samples here, got {len(table.times)} lanes of them")
    together, found = joined(table), []
    for point, t in enumerate(table.times[:-1]):
        at = [call for call in np.flatnonzero(table.t[:, 0] == t).tolist() if together[call]]
        if len(at) != 1 or (found and at[0] <= found[-1]):
            raise ValueError(
                f"{table.solver} opens {len(at)} steps at grid point {point}, t = {t:g}, instead of one: its steps "
                "cannot be told apart (it adds noise first, or goes back)"
            )
        found += at
    return found
