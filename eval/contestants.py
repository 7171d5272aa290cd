"""A sampler as a few words, so that shells, recipes and reports mean the same: ``deis:order=4@karras+time_shift``.

    SOLVER[:option=value,..][@GRID]            any solver and grid of ``fewstep solvers``; ``grids.vp`` if none is said
    FILE-{nfe}.json                            saved tables, as ``fewstep search`` writes them, one a budget
    ..+time_shift[:match=marginal,..]          labels of each sample's own (2305.15583)
    ..+teleport:stats=FILE.npz[,steps=2]       the first steps in closed form (2412.09726); calls are what remains

>>> from fewstep.models import paths
>>> c = contestant("deis:order=4,variable=t@karras")
>>> c.name, c.table(paths.vp_linear(), 7).calls
('deis:order=4,variable=t@karras', 7)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path as File
from typing import Any, NamedTuple

import torch

from ..models import GaussianStats
from ..models.denoiser import Denoiser
from ..models.paths import Path
from ..samplers import Table, catalogue, grids, sample, skip, time_shift


class Contestant(NamedTuple):
    """``table(path, calls)``: what it runs, of at most so many network calls; ``draw``: its samples from noise."""

    name: str
    solver: Callable[..., Table] | None
    grid: Callable[..., Any]
    options: Mapping[str, Any]
    file: str = ""
    method: str = ""
    told: Mapping[str, Any] = {}

    def table(self, path: Path, calls: int) -> Table:
        """Of at most ``calls`` calls; ``ValueError`` where there is none."""
        if self.file:
            file = File(self.file.replace("{nfe}", str(calls)))
            if not file.is_file():
                raise ValueError(f"there is no table {file}, of {calls} calls")
            saved = Table.load(file)
            if saved.calls != calls:
                raise ValueError(
                    f"{file} is a table of {saved.calls} calls, not of {calls}; name it by {{nfe}}"
                )
            return saved
        steps = calls + self._closed
        times = grids.for_calls(self._solve, path, steps, grid=self.grid)
        return self._solve(path, times)

    def calls(self, path: Path, calls: int) -> int:
        """How many network calls a sample really takes where ``calls`` are allowed."""
        return self.table(path, calls).calls - self._closed

    def draw(
        self,
        d: Denoiser,
        noise: torch.Tensor,
        calls: int,
        cond: Mapping[str, Any] | None,
        seed: int,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """Samples (n, ...) from noise (n, ...)."""
        table = self.table(d.path, calls)
        more = {"cond": cond, "seed": seed, "ids": ids}
        if self.method == "time_shift":
            return time_shift(d, noise, self._solve, table.times, **self.told, **more)
        if self.method == "teleport":
            stats = GaussianStats.load(self.told["stats"])
            return skip(stats, d, noise, self._solve, table.times, steps=self._closed, **more)
        return sample(d, noise, table.on(d, noise.device), **more)

    @property
    def _closed(self) -> int:
        return int(self.told.get("steps", 2)) if self.method == "teleport" else 0

    def _solve(self, path: Path, times: Any) -> Table:
        assert self.solver is not None
        return self.solver(path, times, **self.options)


METHODS = {
    "time_shift": ("match", "window", "cutoff", "data_variance", "compat"),
    "teleport": ("stats", "steps"),
}


def contestant(text: str) -> Contestant:
    """The sampler that ``text`` means; ``ValueError`` says what may stand there."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a sampler must be some words, such as deis:order=3@karras, got {text!r}")
    text = text.strip()
    if text.endswith(".json"):
        return Contestant(File(text).stem.replace("{nfe}", "").strip("-_."), None, grids.vp, {}, text)
    head, plus, method = text.partition("+")
    head, at, grid = head.partition("@")
    name, _, options = head.partition(":")
    solver = catalogue.find(name)
    made = _options(options, text)
    if unknown := [key for key in made if key not in solver.entry.options]:
        known = ", ".join(solver.entry.options) or "none"
        raise ValueError(f"{text!r}: {name} has no option {unknown[0]!r}; its options are {known}")
    method, _, told = method.partition(":")
    if plus and method not in METHODS:
        raise ValueError(f"{text!r}: after + must come {' or '.join(METHODS)}, got {method!r}")
    words = _options(told, text)
    if plus:
        if unknown := [key for key in words if key not in METHODS[method]]:
            raise ValueError(
                f"{text!r}: {method} has no option {unknown[0]!r}; its options are {', '.join(METHODS[method])}"
            )
        if method == "teleport" and "stats" not in words:
            raise ValueError(f"{text!r}: teleport needs stats=FILE.npz, which `fewstep teleport-stats` makes")
    return Contestant(text, solver, catalogue.find_grid(grid) if at else grids.vp, made, "", method, words)


def separate(text: str) -> list[str]:
    """Samplers separated by commas, which their own options may hold, too.

    >>> separate("deis:order=4,variable=t@karras,unipc, heun")
    ['deis:order=4,variable=t@karras', 'unipc', 'heun']
    """
    found: list[str] = []
    for part in text.split(","):
        option = "=" in part and ":" not in part.partition("=")[0]
        if option and found:
            found[-1] += f",{part.strip()}"
        else:
            found.append(part.strip())
    return [name for name in found if name]


def _options(text: str, whole: str) -> dict[str, Any]:
    """``order=3,variable=t`` as values: numbers and truth where they read as such, else words."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise ValueError(f"{whole!r}: options are written key=value,key=value, got {part!r}")
        found[key.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
