"""Schedules of masked diffusion: alpha(t), the share of tokens that are still seen at time t.

alpha falls from 1 at t = 0 (data) to 0 at t = 1 (nothing but masks), and each token is hidden at time t on its own with
probability 1 - alpha(t). A schedule only says how fast time passes: what a model without time learns, and what the
first-hitting sampler draws, do not depend on it.

>>> a = torch.tensor([0.25, 0.75], dtype=torch.float64)
>>> cosine.alpha(cosine.time(a)).round(decimals=12).tolist()
[0.25, 0.75]
>>> mask_schedule(MaskSchedule("square", lambda t: 1 - t**2, lambda a: (1 - a).sqrt())).name
'square'
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

Curve = Callable[[torch.Tensor], torch.Tensor]


class MaskSchedule(NamedTuple):
    """``alpha(t)`` and its inverse, ``time(a)``: functions of float64 tensors."""

    name: str
    alpha: Curve
    time: Curve


linear = MaskSchedule("linear", lambda t: 1 - t, lambda a: 1 - a)
# 1 - cos(pi (1 - t) / 2), as in 2406.04329: slow near t = 1, where all is hidden
cosine = MaskSchedule(
    "cosine",
    lambda t: 1 - (0.5 * math.pi * (1 - t)).cos(),
    lambda a: 1 - (1 - a).clamp(-1, 1).arccos() * (2 / math.pi),
)
SCHEDULES = {schedule.name: schedule for schedule in (linear, cosine)}


def mask_schedule(schedule: str | MaskSchedule) -> MaskSchedule:
    """A schedule by its name, or one's own, checked: it must fall from 1 to 0, and ``time`` undo ``alpha``."""
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)} or a MaskSchedule, got {schedule!r}"
            )
        return SCHEDULES[schedule]
    if not isinstance(schedule, MaskSchedule):
        raise TypeError(f"schedule must be a name or a MaskSchedule, got {type(schedule).__name__}")
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    a = schedule.alpha(t)
    if abs(float(a[0]) - 1) > 1e-6 or abs(float(a[-1])) > 1e-6 or not bool((a.diff() < 0).all()):
        raise ValueError(
            f"schedule.alpha must fall from 1 at t = 0 to 0 at t = 1, and that of {schedule.name!r} goes "
            f"from {float(a[0]):g} to {float(a[-1]):g}"
        )
    if not bool(((schedule.time(a) - t).abs() < 1e-6).all()):
        raise ValueError(f"schedule.time must be the inverse of alpha, and that of {schedule.name!r} is not")
    return schedule
