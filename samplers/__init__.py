"""Solvers as data, and the one loop that runs them."""

from . import grids
from .ddim import ddim
from .deis import deis
from .dpmpp import dpmpp
from .loop import Info, State, init, sample, step, take
from .multistep import multistep
from .noise import starting_noise
from .program import Program
from .table import Table

__all__ = [
    "Info", "Program", "State", "Table", "ddim", "deis", "dpmpp", "grids", "init", "multistep", "sample", "starting_noise",
    "step", "take",
]  # fmt: skip
