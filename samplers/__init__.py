"""Solvers as data, and the one loop that runs them."""

from . import grids, operators, targets
from .abm import abm
from .adapters import adapted
from .best_of_n import best_of_n, importance
from .blend import Blend
from .capture import capture
from .consistency import consistency
from .ddim import ddim
from .ddpm import ddpm
from .deis import deis
from .dpm_single import dpm_single, fast_orders
from .dpmpp import dpm, dpmpp
from .dps import dps
from .ensemble_posterior import ensemble_posterior
from .ersde import ersde
from .euler import euler
from .feynman_kac import feynman_kac
from .first_hitting import first_hitting
from .flow_sde import flow_sde
from .fused import Clip
from .gs_jacobi import gs_jacobi
from .guidance import autoguidance, cfg, rlg
from .guide import Guide
from .heun import heun
from .ipndm import ipndm, ipndm_v
from .loop import Info, State, init, sample, step, take
from .masked_ancestral import masked_ancestral
from .masked_cfg import masked_cfg
from .minority import feature_distance, minority, minority_classes, minority_score
from .multistep import multistep
from .noise import starting_noise
from .pndm import pndm
from .program import Program
from .restart import restart
from .rk import rk
from .sa import sa
from .sde_dpmpp import sde_dpmpp
from .search import search
from .smc_steering import smc_steering
from .steer import steer
from .svdd import svdd
from .table import Table
from .teleport import skip, teleport
from .time_shift import time_shift
from .tree import Tree
from .tree_sample import tree_sample
from .tree_search import tree_search
from .unipc import unipc
from .usf import usf

__all__ = [
    "Blend", "Clip", "Guide", "Info", "Program", "State", "Table", "Tree", "abm", "adapted",
    "autoguidance", "best_of_n", "capture", "cfg", "consistency", "ddim", "ddpm", "deis", "dpm",
    "dpm_single", "dpmpp", "dps", "ensemble_posterior", "ersde", "euler", "fast_orders",
    "feature_distance", "feynman_kac", "first_hitting", "flow_sde", "grids", "gs_jacobi", "heun", "importance",
    "init", "ipndm", "ipndm_v", "masked_ancestral", "masked_cfg", "minority", "minority_classes",
    "minority_score", "multistep", "operators", "pndm", "restart", "rk", "rlg", "sa", "sample",
    "sde_dpmpp", "search", "skip", "smc_steering", "starting_noise", "steer", "step", "svdd",
    "take", "targets", "teleport", "time_shift", "tree_sample", "tree_search", "unipc", "usf",
]  # fmt: skip


def __getattr__(name: str):
    """``FewstepScheduler`` is imported when it is asked for: it alone needs diffusers."""
    if name != "FewstepScheduler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"FewstepScheduler needs diffusers ({error}): pip install 'fewstep[diffusers]'"
        ) from error
    from .scheduler import FewstepScheduler

    return FewstepScheduler
