"""What a scheduler's configuration says of the network that it was saved beside: its path, its prediction, its clock.

Only configuration is read, never a scheduler's steps. Configs of diffusers' schedulers and of ``FewstepScheduler``
are read alike: by their keys, for a flow's has no ``prediction_type``.

    >>> scheduler_meaning({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})["path"]
    Flow(shift=3.0, t_max=1.0, t_min=0.001)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import paths
from .paths import Path

PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
# What only flow schedulers' configs hold; they do not say a prediction_type.
FLOW_KEYS = {
    "shift", "flow_shift", "time_shift_type", "use_dynamic_shifting", "invert_sigmas", "shift_terminal",
    "stochastic_sampling", "base_image_seq_len",
}  # fmt: skip
DDPM_KEYS = {"beta_schedule", "beta_start", "beta_end", "trained_betas"}


def scheduler_meaning(config: Mapping[str, Any], mu: float | None = None) -> dict[str, Any]:
    """path, predicts, precond, sigma_data, time: what a ``Denoiser`` is made with.

    ``mu`` is the shift of a config with ``use_dynamic_shifting``, which depends on the size of the image: pipelines
    pass it to ``set_timesteps``.

    >>> round(scheduler_meaning({"shift": 3.0, "use_dynamic_shifting": True}, mu=1.15)["path"].shift, 3)
    3.158
    """
    path, predicts = network({**config, "prediction_type": family(config, "the scheduler's config")})
    if is_edm(config):
        return {"path": path, "predicts": predicts, "precond": "edm", "sigma_data": config["sigma_data"]}
    if path.name != "flow":
        return {"path": path, "predicts": predicts}
    steps = config.get("num_train_timesteps", 1000)
    shift = config.get("shift", config.get("flow_shift", 1.0))
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise ValueError("mu must be given: the scheduler's config says use_dynamic_shifting=True")
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return {"path": paths.flow(shift), "predicts": predicts, "time": lambda t: t * steps}


def is_edm(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a network in EDM's preconditioning (2206.00364)."""
    return config.get("sigma_data") is not None


def family(config: Mapping[str, Any], name: str = "config") -> str:
    """The ``prediction_type`` that a config means, ``flow_prediction`` where only its keys give a flow away.

    >>> family({"num_train_timesteps": 1000, "shift": 3.0}), family({"beta_schedule": "linear"})
    ('flow_prediction', 'epsilon')
    """
    if "clip_denoised" in config and is_edm(config):
        raise ValueError(
            f"{name} is of a consistency model, whose network has a preconditioning of its own: that is not supported; "
            "CMStochasticIterativeScheduler runs it"
        )
    if is_edm(config):
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError(
                f"{name} must have prediction_type='epsilon' beside sigma_data, which is the preconditioning of EDM's "
                f"paper; {config['prediction_type']!r}, its opposite sign or none, is not supported"
            )
        return "epsilon"
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} has invert_sigmas=True: time that runs from data to noise is not supported")
    if config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{name} has timestep_type='continuous': networks that are told log(sigma) are not supported"
        )
    if "prediction_type" in config and (DDPM_KEYS | FLOW_KEYS) & set(config):
        return config["prediction_type"]
    if DDPM_KEYS & set(config):
        return "epsilon"
    if FLOW_KEYS & set(config):
        return "flow_prediction"
    kind = config.get("_class_name", "an unknown class")
    raise ValueError(
        f"{name} must be that of a scheduler with betas ({', '.join(sorted(DDPM_KEYS))}), of flow matching (shift, "
        f"..) or of EDM (sigma_data), got one of {kind} without any of these keys"
    )


def betas(config: Mapping[str, Any]) -> np.ndarray:
    """The variances that the forward process adds, float64 of shape (num_train_timesteps,)."""
    given = config.get("trained_betas")
    count, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if given is not None:
        values = np.asarray(given, dtype=np.float64)
    elif kind == "linear":
        values = np.linspace(first, last, count)
    elif kind == "scaled_linear":
        values = np.linspace(math.sqrt(first), math.sqrt(last), count) ** 2
    elif kind == "squaredcos_cap_v2":  # 2102.09672
        abar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        values = np.minimum(1.0 - abar[1:] / abar[:-1], 0.999)
    elif kind == "sigmoid":
        values = first + (last - first) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, count)))
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2, sigmoid"
        raise ValueError(f"beta_schedule must be one of {known}, got {kind!r}; or pass trained_betas")
    if not config.get("rescale_betas_zero_snr"):
        return values
    root = np.sqrt(np.cumprod(1.0 - values))  # 2305.08891: shift the last to 0, keep the first
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1.0 - abar / np.append(1.0, abar[:-1])


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """The share of signal left, float64. Zero terminal SNR ends at 2^-24 or less instead, so that lam stays finite."""
    values = np.cumprod(1.0 - betas(config))
    if config.get("rescale_betas_zero_snr"):
        values[-1] = min(2.0**-24, values[-2] / 2)
    return values


def network(config: Mapping[str, Any]) -> tuple[Path, str]:
    """The path that the network lives on, and what it predicts.

    >>> network({"prediction_type": "epsilon", "beta_schedule": "scaled_linear"})[0].t_max
    999.0
    """
    if is_edm(config):
        return paths.edm(config.get("sigma_max", 80.0), config.get("sigma_min", 0.002)), "x0"
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTS)}, got {prediction!r}")
    if prediction == "flow_prediction":
        return paths.flow(), "flow"
    return paths.vp_discrete(alphas_cumprod(config)), PREDICTS[prediction]
