"""Other code bases' choices, as options of ``DMD2`` and ``FDistill``, and of ``GRPO`` and ``AWM`` at the end.

    method: {name: dmd2, preset: fastgen}

What differs between the two, beside the number of critic updates (``train.critic_steps``: 5 in DMD2's ImageNet recipe;
4 in FastGen, whose every fifth iteration is the student's):

                  dmd2 (the paper's repository)            fastgen
    normaliser    1 / mean|x0 - D_r|, nan_to_num           1 / (mean|x0 - D_r| + 1e-6)
    levels        Karras, 2 % to 98 %                      Karras, 0.2 % to 99.8 %
    critic        EDM's weight, all levels                 unweighted x0 error, the student's levels
    GAN           on the critic's encoder, weight 0.01     on the frozen teacher's features, weight 1
    few steps     from the student's own steps             from noised data: not offered here
"""

from __future__ import annotations

from typing import Any

_KARRAS = {"kind": "karras"}

PRESETS: dict[str, dict[str, Any]] = {
    "dmd2": {
        "weight": "dmd2",
        "critic_weight": "edm",
        "times": {**_KARRAS, "low": 0.02, "high": 0.98},
        "critic_times": _KARRAS,
        "gan": {"features": "critic", "critic": 0.01, "times": _KARRAS},
    },
    "fastgen": {
        "weight": "fastgen",
        "critic_weight": "x0",
        "times": {**_KARRAS, "low": 0.002, "high": 0.998},
        "critic_times": {**_KARRAS, "low": 0.002, "high": 0.998},
        "gan": {"features": "teacher", "critic": 1.0, "times": {**_KARRAS, "low": 0.002, "high": 0.998}},
    },
    # ddpo-pytorch (2305.13301): per-prompt whitening, no KL, the mean log-likelihood in the place of the paper's sum
    "ddpo": {
        "rollout": {"sampler": "ddim", "steps": 50, "grid": "uniform", "options": {"eta": 1.0}},
        "advantage": "group",
        "clip": 1e-4,
        "log_prob": "mean",
        "beta": 0.0,
    },
    # flow_grpo's configurations for SD3.5-M (2505.05470); their guidance of 4.5 is left out
    "flow_grpo": {
        "rollout": {"sampler": "flow_sde", "steps": 10, "grid": "shifted"},
        "group": 24,
        "advantage": "global",
        "clip": 1e-4,
        "log_prob": "mean",
        "share": 0.99,
        "beta": 0.04,
        "kl": "released",
        "kl_of": "trained",
    },
    # advantage_weighted_matching's for SD3.5-M (2509.25050); an update a batch of rollouts
    "awm": {
        "rollout": {"sampler": "sa", "steps": 14, "grid": "shifted"},
        "group": 24,
        "advantage": "global",
        "objective": "on_policy",
        "updates": 1,
        "repeats": 6,
        "weight": "t",
        "power": 0.25,
        "beta": 0.001,
        "times": {"kind": "logistic", "mean": 1.0986},
    },
}


def with_preset(options: dict[str, Any]) -> dict[str, Any]:
    """The options with those of their ``preset`` filled in below them.

    >>> with_preset({"preset": "fastgen", "weight": "kl", "gan": {"student": 0.1}})["gan"]["features"]
    'teacher'
    """
    options = dict(options)
    name = options.pop("preset", None)
    if name is None:
        return options
    if name not in PRESETS:
        raise ValueError(f"method.preset must be one of {', '.join(PRESETS)}, got {name!r}")
    filled = dict(PRESETS[name])
    for key, value in options.items():
        filled[key] = {**filled[key], **value} if isinstance(filled.get(key), dict) else value
    return filled
