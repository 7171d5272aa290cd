"""What a diffusers scheduler's config says of the times to call a network at, and of the solver.

>>> from fewstep.models import paths
>>> times({"timestep_spacing": "trailing", "shift": 3.0}, paths.flow(), 4).tolist()
[1.0, 0.9, 0.75, 0.5, 0.0]
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..models.paths import Path
from ..models.scheduler_meaning import family, is_edm
from . import grids
from .catalogue import find, find_grid
from .fused import Clip
from .table import Table

SPACINGS = ("leading", "linspace", "trailing")  # diffusers' own; every grid of ours may be named beside them
GRID_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "logsnr",
}
# Keys of other classes that count here too.
ALSO_READ = {
    *GRID_FLAGS, "steps_offset", "thresholding", "dynamic_thresholding_ratio", "sample_max_value", "variance_type",
}  # fmt: skip
# diffusers leaves index 0 out of "linspace" and "leading" for its multistep classes, but not for these.
KEEPS_INDEX_ZERO = {"ddim", "ddpm", "euler", "heun", "pndm", "consistency"}
SHIFTABLE = {*SPACINGS, "shifted", "uniform", "power", "quadratic", "vp"}  # grids in t, that a shift moves


def handed_over(
    config: Any, changes: Mapping[str, Any], known: set[str], strict: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Another scheduler's config, and the keyword arguments to make ours of it with.

    diffusers' ``from_config`` leaves out what a config holds by default, and drops arguments that ``__init__`` has not
    (``known``): so what gives a flow away, and flags that we do read, are seen to here.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a scheduler's config, e.g. pipe.scheduler.config, got {config!r}")
    changes = dict(changes)
    read = {key: changes.pop(key) for key in ALSO_READ & set(changes)}
    unknown = [key for key in changes if key not in known]
    if unknown and strict:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise TypeError(f"FewstepScheduler has no argument {unknown[0]!r}{hint}")
    config = {**config, **read}
    if "_use_default_values" in config:  # an LCM's grid is its own, said or not
        kept = {*read, "original_inference_steps"}
        config["_use_default_values"] = [key for key in config["_use_default_values"] if key not in kept]
    spacing = changes.get("timestep_spacing")
    if spacing is not None:  # what the config says itself is left to the class that it came from
        changes.setdefault("grid", spacing)
        if spacing not in SPACINGS:
            del changes["timestep_spacing"]
    prediction = family({**config, **changes})
    if is_edm(config):
        for key in ("sigma_data", "sigma_min", "sigma_max"):
            if key in config:
                changes.setdefault(key, config[key])
    if prediction == "flow_prediction":
        if "prediction_type" not in config and "prediction_type" not in changes:
            logging.getLogger(__name__).info("a flow scheduler's config: prediction_type is flow_prediction")
            changes["prediction_type"] = prediction
        if "flow_shift" in config and "shift" not in config:
            changes.setdefault("shift", config["flow_shift"])
    return config, changes


def transform(config: Mapping[str, Any]) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What ``clip_sample`` or ``thresholding`` (2205.11487) make of an estimate of x0; None where there is neither."""
    if config.get("thresholding"):
        share, most = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)

        def threshold(x0: torch.Tensor) -> torch.Tensor:
            reach = torch.quantile(x0.flatten(1).abs(), share, dim=1).clamp(1.0, max(most, 1.0))
            reach = reach.reshape(-1, *[1] * (x0.ndim - 1))
            return x0.clamp(-reach, reach) / reach

        return threshold
    if config.get("clip_sample"):
        return Clip(config.get("clip_sample_range", 1.0))
    return None


def network_time(config: Mapping[str, Any], path: Path, t: np.ndarray) -> np.ndarray:
    """The timesteps that a network is told: t, on a flow num_train_timesteps times t, on EDM's path ln(sigma) / 4."""
    if path.name == "edm":
        return np.log(t) / 4
    return t * float(config.get("num_train_timesteps", 1000)) if path.name == "flow" else t


def time_of(config: Mapping[str, Any], path: Path, timesteps: Any) -> Any:
    """Our times, of timesteps."""
    if path.name == "edm":
        return (4 * timesteps).exp() if isinstance(timesteps, torch.Tensor) else np.exp(4 * timesteps)
    return timesteps / float(config.get("num_train_timesteps", 1000)) if path.name == "flow" else timesteps


def grid_name(config: Mapping[str, Any]) -> str:
    """Which grid a config asks for: ``grid``, else a ``use_.._sigmas`` flag, else ``timestep_spacing``."""
    flags = [name for flag, name in GRID_FLAGS.items() if config.get(flag)]
    if is_edm(config) and not flags:
        flags = [config.get("sigma_schedule") or "karras"]  # there are no timesteps to be spaced
    name = config.get("grid") or (flags or [config.get("timestep_spacing", "trailing")])[0]
    if name not in (*SPACINGS, *grids.NAMES):
        raise ValueError(
            f"timestep_spacing must be one of {', '.join(SPACINGS)} or a grid of fewstep's "
            f"({', '.join(n for n in grids.NAMES if n not in SPACINGS)}), got {name!r}"
        )
    return name


def steps_of(n: Any, *given: Sequence[float] | None) -> int:
    """The number of steps: ``num_inference_steps``, which must be that of the sigmas or timesteps where both come."""
    lengths = [len(values) for values in given if values is not None]
    if n is None and lengths:
        return lengths[0]
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"num_inference_steps must be a positive integer, got {n!r}")
    if lengths and lengths[0] != n:
        raise ValueError(
            f"num_inference_steps must be the number of sigmas or timesteps, {lengths[0]}, or None; got {n}"
        )
    return int(n)


def times(
    config: Mapping[str, Any],
    path: Path,
    n: int | None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
    original: int | None = None,
) -> np.ndarray:
    """The grid, n + 1 falling times: from the config, or from explicit ``sigmas`` or ``timesteps``.

    ``timesteps`` are used as they are. So are ``sigmas`` on a VP path (there they are sigma / alpha); on a flow they
    are shifted, as pipelines count on, unless the config has ``shift_custom=False``. Flux and its kin never leave them
    out: where they are the even ones, 1 .. 1/n, and the config names a grid of ours, they say no more than n.
    ``original`` is of how many steps an LCM was made, on whose grid it is to be called.
    """
    if sigmas is not None and timesteps is not None:
        raise ValueError("sigmas and timesteps say the same thing twice: pass one of them")
    n = steps_of(n, sigmas, timesteps)
    flow = path.name == "flow"
    if flow and sigmas is not None and grid_name(config) not in SPACINGS and _even(sigmas):
        sigmas = None
    if timesteps is not None:
        given = time_of(config, path, np.asarray(timesteps, dtype=np.float64))
        result = _named("timesteps", timesteps, grids.explicit, path, given)
    elif sigmas is not None:
        given = np.asarray(sigmas, dtype=np.float64)
        if flow and config.get("shift_custom", True):
            given = shifted(config, given, mu)
        most = 1.0 if flow else path.rho(path.t_max)
        given = np.where((given > most) & (given < 1.001 * most), most, given)  # written with few digits
        result = _named("sigmas", sigmas, grids.explicit, path, sigmas=given)
    else:
        original = _original(config) if original is None else original
        result = _generated(config, path, n, mu) if original is None else distilled(config, path, n, original)
    if config.get("final_sigmas_type", "zero") == "sigma_min":
        if flow:
            raise ValueError("final_sigmas_type='sigma_min' needs a table of betas: on a flow it is 'zero'")
        if result[-2] <= path.t_min:
            raise ValueError(
                "final_sigmas_type='sigma_min' ends at index 0, where this grid has its last call"
            )
        result = np.append(result[:-1], path.t_min)
    return result


def _even(sigmas: Sequence[float]) -> bool:
    n = len(sigmas)
    return bool(np.allclose(np.asarray(sigmas, dtype=np.float64), np.linspace(1.0, 1.0 / n, n), atol=1e-5))


def _named(name: str, given: Any, build: Any, *arguments: Any, **options: Any) -> np.ndarray:
    try:
        return build(*arguments, **options)
    except ValueError as error:
        raise ValueError(
            f"{name} do not make a grid ({error}): got {list(np.asarray(given).tolist())}"
        ) from None


def _generated(config: Mapping[str, Any], path: Path, n: int, mu: float | None) -> np.ndarray:
    name = grid_name(config)
    try:
        if path.name == "flow":
            if name == "linspace":
                plain = np.append(
                    np.linspace(1.0, 1.0 / config.get("num_train_timesteps", 1000), n + 1)[:n], 0.0
                )
            else:  # "leading" has no meaning of its own here
                plain = find_grid("uniform" if name in (*SPACINGS, "shifted") else name)(path, n)
            return np.append(shifted(config, plain[:-1], mu), 0.0) if name in SHIFTABLE else plain
        if name == "trailing":
            return grids.trailing(path, n)
        if path.name == "edm" and name == "karras":
            return grids.karras(path, n, exponent=config.get("rho", 7.0))
        if name in SPACINGS:
            like = "ddim" if config.get("solver") in KEEPS_INDEX_ZERO else "dpm"
            if name == "linspace":
                return grids.linspace(path, n, like)
            return grids.leading(path, n, config.get("steps_offset", 0), like)
        return find_grid(name)(path, n)
    except ValueError as error:
        raise ValueError(f"num_inference_steps = {n} makes no {name!r} grid: {error}") from None


def _original(config: Mapping[str, Any]) -> int | None:
    """Of how many steps an LCM was made, where the config says so, runs it as one, and names no other grid."""
    plain = not config.get("grid") and not any(config.get(flag) for flag in GRID_FLAGS)
    return config.get("original_inference_steps") if plain and config.get("solver") == "consistency" else None


def distilled(config: Mapping[str, Any], path: Path, n: int, original: int) -> np.ndarray:
    """n of the times of an LCM (2310.04378), which learned to jump from ``original`` of a DDPM's.

    >>> from fewstep.models import paths
    >>> distilled({}, paths.vp_discrete(paths.ddpm_alphas_cumprod()), 4, 50).tolist()
    [999.0, 759.0, 499.0, 259.0, -1.0]
    """
    if path.name != "vp_discrete":
        raise ValueError(
            "original_inference_steps is of models with betas; an LCM on another path has no such grid"
        )
    total = len(path.alphas_cumprod)  # type: ignore[attr-defined]
    if isinstance(original, bool) or not isinstance(original, int) or not n <= original <= total:
        raise ValueError(
            f"original_inference_steps must be an integer from num_inference_steps = {n} to {total}, got {original!r}"
        )
    learned = np.arange(1, original + 1)[::-1] * (total // original) - 1.0
    return np.append(learned[np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)], path.t_clean)


def shifted(config: Mapping[str, Any], t: np.ndarray, mu: float | None = None) -> np.ndarray:
    """t' = s t / (1 + (s - 1) t), s the config's shift or, with dynamic shifting, e^mu (or mu itself)."""
    s = config.get("shift", 1.0)
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise ValueError("mu must be passed where the config says use_dynamic_shifting=True")
        s = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    if not s > 0:
        raise ValueError(f"shift must be positive, got {s!r}")
    t = s * t / (1.0 + (s - 1.0) * t)
    end = config.get("shift_terminal")
    if end and len(t) > 1:  # stretched so that the last call stands there
        t = 1.0 - (1.0 - t) * (1.0 - end) / (1.0 - t[-1])
    return t


def build(config: Mapping[str, Any], path: Path, grid: np.ndarray) -> Table:
    """The config's solver on a grid; ``solver_order`` is its ``order``, ``nodes`` or ``predictor``, if it has one."""
    solver = find(config.get("solver", "abm"))
    options = dict(config.get("solver_options") or {})
    for name in ("order", "nodes", "predictor"):
        if name in solver.entry.options and name not in options:
            options[name] = config.get("solver_order", 3)
            break
    if config.get("solver") == "ddpm" and config.get("variance_type") == "fixed_large":
        options.setdefault("variance", "large")
    return solver(path, grid, **options)


def calls_a_step(config: Mapping[str, Any], path: Path) -> int:
    """How many calls the solver makes a step once it has started: what diffusers calls a scheduler's ``order``."""
    try:
        counts = [build(config, path, np.linspace(path.t_max, path.t_min, n + 1)).calls for n in (7, 6)]
    except ValueError:  # options that fit one number of steps alone
        return 1
    return max(counts[0] - counts[1], 1)
