"""A student: a Denoiser, and the table by which it makes samples from noise in a few calls.

One step from t to 0 is x0 = D(x, t). Between steps ``"sde"`` noises x0 afresh (the consistency sampler, DMD2's), and
``"ode"`` keeps the student's own noise (DDIM). A student that is its teacher tuned has a solver's table of many steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.denoiser import Denoiser
from ..samplers import catalogue, consistency, grids, init, sample, step
from ..samplers.table import Table


class Student(NamedTuple):
    """``table`` has a row a call, x0 in its form; what the student was trained on is what it is sampled by."""

    d: Denoiser
    table: Table

    @property
    def calls(self) -> int:
        """Network calls a sample."""
        return self.table.calls

    def sample(
        self,
        noise: torch.Tensor,
        cond: Mapping[str, Any] | None = None,
        seed: int = 0,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Samples (B, ...) from unit noise, without a graph."""
        with torch.no_grad():
            return sample(self.d, noise, self.table, cond=cond, seed=seed, ids=ids)

    def generate(
        self,
        noise: torch.Tensor,
        cond: Mapping[str, Any] | None = None,
        last: int = 0,
        seed: int = 0,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Its estimate of x0 at call ``last``, with a graph through that call only.

        The calls before are its own, from noise: the input is what the student will meet when it samples (DMD2's
        backward simulation), not noised data.
        """
        if not 0 <= last < self.calls:
            raise ValueError(f"last must lie in 0 .. {self.calls - 1}, got {last!r}")
        cond = dict(cond or {})
        plan = self.table.on(self.d, noise.device)
        with torch.no_grad():
            state = init(self.table, noise, ids, seed=seed)
            for _ in range(last):
                state, _ = step(self.d, plan, state, cond=cond, seed=seed)
        if last and torch.is_autocast_enabled(noise.device.type):
            torch.clear_autocast_cache()  # weights cast without a graph must not serve the call with one
        return self.d(state.y, plan.row(last).t, **cond)


def few_steps(
    d: Denoiser,
    steps: int = 1,
    sampler: str = "sde",
    times: Sequence[float] | None = None,
    t_max: float | None = None,
) -> Student:
    """A student of ``steps`` calls on its path's own grid, or at the ``times`` given (falling, the clean end left out).

    >>> from fewstep.models import paths
    >>> d = Denoiser(lambda x, tau: 0 * x, paths.flow(shift=3.0), predicts="flow")
    >>> few_steps(d, 4).table.times.round(3).tolist()
    [1.0, 0.9, 0.75, 0.5, 0.0]
    """
    if sampler not in ("sde", "ode"):
        raise ValueError(f"sampler must be 'sde' or 'ode', got {sampler!r}")
    if times is None:
        times = student_times(d, steps, t_max).tolist()[:-1]
    elif steps not in (1, len(times)):
        raise ValueError(f"steps is {steps}, but there are {len(times)} times; give one of the two")
    table = consistency(d.path, [*times, d.path.t_clean], gamma=1.0 if sampler == "sde" else 0.0)
    return Student(d, from_unit_noise(table) if d.path.name.startswith("vp") else table)


def many_steps(d: Denoiser, solver: str, steps: int, grid: str = "vp") -> Student:
    """A student that is sampled as its teacher would be: ``steps`` of a solver, on a grid, both by name."""
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    return Student(d, catalogue.find(solver)(d.path, catalogue.find_grid(grid)(d.path, steps)))


def sampled(d: Denoiser, s: Any) -> Student:
    """``d`` as a recipe's ``student`` says that it is sampled: in few steps, or as a teacher is."""
    if s.sampler in ("sde", "ode"):
        return few_steps(d, s.steps, s.sampler, s.times, s.t_max)
    return many_steps(d, s.sampler, s.steps, s.grid)


def from_unit_noise(table: Table) -> Table:
    """The table with an opening that leaves noise as it is, not sigma(t_0) of it: DMD2's, and every VP pipeline's.

    Where alpha(t_0) is small, 0.068 at Stable Diffusion's last time, x0 = (x - sigma eps) / alpha makes much of the
    0.2 % between the two.
    """
    opening = table.a.copy()
    opening[0] /= table.sigma[0].reshape(-1, 1, 1)
    return replace(table, a=opening)


def student_times(d: Denoiser, steps: int, t_max: float | None = None) -> np.ndarray:
    """EDM: the upper levels of Karras's grid with one step more; a flow: its shifted grid; VP: equal steps of t."""
    path = d.path
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    if path.name == "edm":  # the lowest of Karras's levels has next to no noise left: no use to a student
        return np.append(grids.karras(path, steps + 1, t_max=t_max)[:-2], path.t_clean)
    if path.name == "flow":
        return grids.shifted(path, steps)
    if path.name == "vp_discrete":  # whole times: what networks were trained at, and what schedulers count
        return np.ceil(grids.uniform(path, steps, t_max=t_max) - 1e-9)
    return grids.uniform(path, steps, t_max=t_max)
