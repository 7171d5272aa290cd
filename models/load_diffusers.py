"""A Denoiser from a folder that diffusers saved: a UNet2DModel, and a scheduler that says what its outputs mean.

Only configuration is read from the scheduler, never its steps: what it says is the path, the prediction and how the
network counts time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import paths
from .denoiser import Denoiser
from .unet import UNet

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
LOADABLE = "a UNet2DModel with a scheduler of DDPM's betas, a FlowMatch scheduler or an EDM scheduler"


def load_folder(folder: Path, attention: str = "sdpa") -> Denoiser:
    """From a pipeline folder with ``model_index.json``, ``unet/`` and ``scheduler/`` in it."""
    index = _json(folder / "model_index.json")
    if index is None:
        raise ValueError(
            f"{folder} has no model_index.json; what can be loaded is a pipeline's folder: {LOADABLE}"
        )
    config, scheduler = _json(folder / "unet/config.json"), _json(folder / "scheduler/scheduler_config.json")
    if config is None or config.get("_class_name") != "UNet2DModel" or scheduler is None:
        found = f"{index.get('_class_name')} with {config.get('_class_name') if config else 'no unet'}"
        raise ValueError(f"{folder} is a {found}; what can be loaded is {LOADABLE}")
    meaning = scheduler_meaning(scheduler)

    from diffusers import UNet2DModel

    net = UNet.from_diffusers(UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True), attention)
    size = net.config.sample_size

    def call(x, tau, label=None):
        # of a foreign net we do not know that its last class stands for none
        if net.null_label is not None and label is None:
            raise ValueError(
                f"label is needed: the net in {folder} knows {net.config.num_class_embeds} classes"
            )
        return net(x, tau, label)

    shape = None if size is None else (net.config.in_channels, size, size)
    return Denoiser(call, net=net, shape=shape, **meaning)


def scheduler_meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler's configuration says of a network: path, predicts, precond, sigma_data, time.

    >>> scheduler_meaning({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})["path"]
    Flow(shift=3.0, t_max=1.0, t_min=0.001)
    """
    name, prediction = str(config.get("_class_name")), config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") and not config.get("invert_sigmas"):
        steps = config.get("num_train_timesteps", 1000)
        return {"path": paths.flow(config.get("shift", 1.0)), "predicts": "flow", "time": lambda t: t * steps}
    if name.startswith("EDM") and prediction == "epsilon":  # the sign that EDM itself uses
        path = paths.edm(config.get("sigma_max", 80.0), config.get("sigma_min", 0.002))
        return {"path": path, "predicts": "x0", "precond": "edm", "sigma_data": config.get("sigma_data", 0.5)}
    if "beta_schedule" in config and "num_train_timesteps" in config and prediction in PREDICTIONS:
        from diffusers import DDPMScheduler

        table = DDPMScheduler.from_config(dict(config)).alphas_cumprod
        return {"path": paths.vp_discrete(table), "predicts": PREDICTIONS[prediction]}
    raise ValueError(
        f"scheduler is a {name} with prediction_type {prediction!r}; what can be loaded is {LOADABLE}, with "
        f"prediction_type {', '.join(PREDICTIONS)} (epsilon for EDM)"
    )


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None
