"""Solvers as data, and the one loop that runs them."""

from . import grids
from .consistency import consistency
from .ddim import ddim
from .ddpm import ddpm
from .deis import deis
from .dpm_single import dpm_single, fast_orders
from .dpmpp import dpmpp
from .euler import euler
from .heun import heun
from .loop import Info, State, init, sample, step, take
from .multistep import multistep
from .noise import starting_noise
from .program import Program
from .restart import restart
from .rk import rk
from .table import Table

__all__ = [
    "Info", "Program", "State", "Table", "consistency", "ddim", "ddpm", "deis", "dpm_single", "dpmpp", "euler",
    "fast_orders", "grids", "heun", "init", "multistep", "restart", "rk", "sample", "starting_noise", "step", "take",
]  # fmt: skip
