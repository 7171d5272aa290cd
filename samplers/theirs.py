"""What a diffusers scheduler does, as a table of ours: its solver, on its own grid, from where it starts.

    table, start = table_of(DDIMScheduler(clip_sample=False), path, {"num_inference_steps": 10})

The numbers are equal to rounding, and tested to be. A scheduler that has no equal here, or whose options make it
something else, is refused with a reason.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.paths import Path
from .catalogue import find
from .table import Table

INDEXED = ("DDIM", "DDPM", "PNDM", "LCM", "TCD")  # these know their noise levels by index
SCALED = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete")
INSTEAD = (
    "give a table, e.g. table=lambda path, n: abm(path, grids.vp(path, n)), or set pipe.scheduler = "
    "FewstepScheduler.from_config(pipe.scheduler.config)"
)


class Theirs(NamedTuple):
    """The table, and what the sample is at its first time: ``start`` times unit noise."""

    table: Table
    start: float


def table_of(scheduler: Any, path: Path, schedule: Mapping[str, Any]) -> Theirs:
    """The equal of a diffusers scheduler for ``schedule``, the arguments of its ``set_timesteps``."""
    twin = copy.deepcopy(scheduler)
    prepare(twin, **schedule)
    times = _grid(twin, path)
    name, options = solver_of(twin, len(times) - 1)
    start = float(getattr(twin, "init_noise_sigma", 1.0))  # flows begin with the noise itself
    if kind_of(twin) in SCALED:
        start /= float(twin.sigmas[0] ** 2 + 1) ** 0.5
    return Theirs(find(name)(path, times, **options), start)


def solver_of(scheduler: Any, steps: int) -> tuple[str, dict[str, Any]]:
    """The name and options of the solver that a scheduler is, over ``steps`` steps."""
    kind, config = kind_of(scheduler), scheduler.config
    if kind not in _SOLVERS:
        raise ValueError(f"table must be given, for a {kind}Scheduler has no equal here: {INSTEAD}")
    try:
        return _SOLVERS[kind](config, steps)
    except _Other as error:
        raise ValueError(
            f"table must be given, for a {kind}Scheduler {error} has no equal here: {INSTEAD}"
        ) from None


def kind_of(scheduler: Any) -> str:
    """The name of its class, without what all have."""
    return type(scheduler).__name__.removesuffix("Scheduler")


def prepare(scheduler: Any, num_inference_steps: int | None = None, **schedule: Any) -> None:
    """``set_timesteps``, with everything that the scheduler computes with in float64, before and after."""
    _widen(scheduler)
    scheduler.set_timesteps(**{"num_inference_steps": num_inference_steps, **schedule})
    _widen(scheduler)


def grid_of(scheduler: Any, path: Path, steps: int) -> np.ndarray:
    """The scheduler's own grid as times of ``path``: the noise levels of its steps, and where its last one ends."""
    prepare(scheduler, steps)
    return _grid(scheduler, path)


def _grid(scheduler: Any, path: Path) -> np.ndarray:
    kind = kind_of(scheduler)
    if kind in INDEXED:
        # PNDM's timesteps are its calls, of which some share a step
        asked = scheduler._timesteps[::-1].copy() if kind == "PNDM" else scheduler.timesteps
        abar = scheduler.alphas_cumprod[torch.as_tensor(asked).long().cpu()].cpu().numpy()
        last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        rho = np.sqrt((1 - np.append(abar, last)) / np.append(abar, last))
    else:
        rho = scheduler.sigmas.double().cpu().numpy()
        if kind.startswith("FlowMatch") or getattr(scheduler.config, "use_flow_sigmas", False):
            with np.errstate(divide="ignore"):
                rho = rho / (1 - rho)
    rho = rho[np.append(True, np.diff(rho) != 0)]
    return np.clip(path.time_of_rho(rho), path.t_clean, path.t_max)


def _widen(scheduler: Any) -> None:
    for name, value in list(vars(scheduler).items()):
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and name != "timesteps":
            setattr(scheduler, name, value.double())


# --- one function a class -----------------------------------------------------------------------------------------


class _Other(Exception):
    """These options make it a method that is not here."""


def _ddim(config: Any, steps: int) -> tuple[str, dict]:
    if config.timestep_spacing == "linspace":
        raise _Other("with timestep_spacing='linspace', whose steps end beside its own grid,")
    if config.clip_sample or config.thresholding:
        raise _Other("with clip_sample=True or thresholding, which it does not apply to the noise,")
    return "ddim", {}


def _ddpm(config: Any, steps: int) -> tuple[str, dict]:
    variance = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}.get(
        config.variance_type
    )
    if variance is None:
        raise _Other(f"with variance_type={config.variance_type!r}")
    return "ddpm", {"variance": variance}


def _pndm(config: Any, steps: int) -> tuple[str, dict]:
    even = config.num_train_timesteps % steps == 0
    if config.timestep_spacing == "linspace" or (config.timestep_spacing == "trailing" and not even):
        raise _Other(
            f"with timestep_spacing={config.timestep_spacing!r}, whose steps end beside its own grid,"
        )
    return "pndm", {"variant": "plms" if config.skip_prk_steps else "fast"}


def _dpmpp(config: Any, steps: int) -> tuple[str, dict]:
    name = {"dpmsolver++": "dpmpp", "dpmsolver": "dpm", "sde-dpmsolver++": "sde_dpmpp"}.get(
        config.algorithm_type
    )
    order = config.solver_order
    if name is None or (name == "sde_dpmpp" and order == 3):
        raise _Other(f"with algorithm_type={config.algorithm_type!r} and solver_order={order}")
    if order == 2 and config.solver_type == "heun":
        return name, {"order": order, "weight": "exact", "final": _final(config, steps)}
    return name, {"order": order, "final": _final(config, steps)}


def _deis(config: Any, steps: int) -> tuple[str, dict]:
    return "deis", {"order": config.solver_order, "variable": "lam", "final": _final(config, steps)}


def _unipc(config: Any, steps: int) -> tuple[str, dict]:
    off = len(set(config.disable_corrector) & set(range(steps)))
    if 0 < off < steps:
        raise _Other(f"with disable_corrector={config.disable_corrector}")
    return "unipc", {
        "order": config.solver_order, "rule": config.solver_type, "form": "x0" if config.predict_x0 else "eps",
        "corrector": not off, "final": "lower" if config.lower_order_final else "auto",
    }  # fmt: skip


def _flow_euler(config: Any, steps: int) -> tuple[str, dict]:
    if config.get("invert_sigmas"):
        raise _Other("with invert_sigmas=True")
    return ("consistency", {}) if config.get("stochastic_sampling") else ("euler", {"form": "v"})


def _final(config: Any, steps: int) -> str:
    """They lower the order towards the end of less than 15 steps."""
    if config.get("euler_at_final") and config.get("final_sigmas_type") != "zero" and steps >= 15:
        raise _Other("with euler_at_final=True")
    return "lower" if config.lower_order_final and steps < 15 else "auto"


_SOLVERS = {
    "DDIM": _ddim,
    "DDPM": _ddpm,
    "PNDM": _pndm,
    "DPMSolverMultistep": _dpmpp,
    "EDMDPMSolverMultistep": _dpmpp,
    "DEISMultistep": _deis,
    "UniPCMultistep": _unipc,
    "FlowMatchEulerDiscrete": _flow_euler,
    "FlowMatchHeunDiscrete": lambda config, steps: ("heun", {"form": "v"}),
    "EulerDiscrete": lambda config, steps: ("euler", {}),
    "EDMEuler": lambda config, steps: ("euler", {}),
    "EulerAncestralDiscrete": lambda config, steps: ("ddim", {"eta": 1.0}),
    "HeunDiscrete": lambda config, steps: ("heun", {}),
    "LMSDiscrete": lambda config, steps: ("multistep", {"form": "eps", "variable": "rho", "nodes": 4}),
    "KDPM2Discrete": lambda config, steps: ("dpm_single", {"order": 2, "form": "eps"}),
    "LCM": lambda config, steps: ("consistency", {}),
}
