"""What a student is worth, measured on samples: its distance to the teacher and to the data, never its loss.

Images are compared by the Frechet and the kernel distance of features: the digit classifier's for 8x8 digits, pixels
themselves for anything else that is small. Points are compared by MMD and sliced Wasserstein, and by the modes found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..eval.frechet import frechet_distance
from ..eval.kid import kernel_distance
from ..eval.mmd import rbf_mmd
from ..eval.sliced import sliced_wasserstein
from ..models.codec import decode
from ..models.denoiser import NULL, Denoiser
from ..models.rewards import Reward
from ..samplers import abm, cfg, grids, sample
from .data import STD, Data, grid_means
from .draws import Draws
from .student import Student


class Exam(NamedTuple):
    """The held-out noise and conditions of a run, what the teacher makes of them, and how samples are compared.

    Samples are made ``size`` at once; ``noise`` and ``cond`` are where the networks are, samples on the CPU. ``decode``
    makes pictures of them.
    """

    noise: torch.Tensor
    cond: Mapping[str, Any]
    teacher: torch.Tensor
    real: torch.Tensor | None
    compare: Callable[[torch.Tensor, torch.Tensor], dict[str, float]]
    size: int
    decode: Callable[[torch.Tensor], torch.Tensor] | None

    def sat(self, student: Student) -> torch.Tensor:
        """The student's samples."""
        return _in_pieces(
            lambda x, cond, ids: student.sample(x, cond, ids=ids), self.noise, self.cond, self.size
        )

    def mark(self, x: torch.Tensor) -> dict[str, float]:
        """Distances of samples to the teacher's and to real ones; ``main`` is the one that runs are chosen by."""
        to_teacher = self.compare(x, self.teacher)
        numbers = {f"teacher_{k}": v for k, v in to_teacher.items()}
        if self.real is not None:
            numbers |= {f"data_{k}": v for k, v in self.compare(x, self.real).items()}
        return {"main": next(iter(to_teacher.values())), **numbers}


def set_exam(
    teacher: Denoiser,
    data: Data,
    count: int = 1000,
    guidance: float = 1.0,
    calls: int = 40,
    seed: int = 10_007,
) -> Exam:
    """``count`` held-out starts; the teacher answers with ``calls`` calls, guided, of the solver that we recommend."""
    net = teacher.net
    device = torch.device("cpu") if net is None else next(net.parameters()).device
    batch = data.batch(Draws(seed, 0, 0, count, count, device))
    noise = batch.draws.normal("start", data.shape)
    table = abm(teacher.path, grids.vp(teacher.path, calls))
    guided, cond = teacher if guidance == 1 else cfg(teacher, guidance), dict(batch.cond)
    if guidance != 1 and teacher.codec is not None:
        cond[NULL] = batch.null
    own = getattr(net, "sample", None)  # an autoregressive model makes its samples itself

    def answer(x: torch.Tensor, cond: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
        if own is not None:
            return own(cond.get("label"), seed, ids)
        return sample(guided, x, table, cond=cond)

    with torch.no_grad():
        made = _in_pieces(
            answer,
            noise,
            cond,
            500 if teacher.codec is None else 8,
        )
    if teacher.codec is not None:  # latents have no bounds
        compare, size = images_by(lambda x: x.flatten(1), bounded=False), 8
    else:
        compare, size = images_by(features_for(data.shape)) if len(data.shape) > 1 else compare_points, count
    real = None if batch.real is None else batch.real.cpu()
    shown = teacher.codec is None or teacher.codec.decodes
    pictures = (lambda x: decode(teacher, x.to(device)).cpu()) if shown else None
    return Exam(noise, batch.cond, made, real, compare, size, pictures)


def rewards_of(exam: Exam, made: torch.Tensor, reward: Reward | None) -> dict[str, float]:
    """The mean reward of samples with its standard error, and the teacher's: ``main`` where there is a reward."""
    if reward is None:
        return {}
    scores, base = (
        torch.cat([reward(part.to(exam.noise.device)).double().cpu() for part in x.split(exam.size)])
        for x in (made, exam.teacher)
    )
    mean = float(scores.mean())
    error = float(scores.std() / len(scores) ** 0.5)
    return {"main": -mean, "reward": mean, "reward_error": error, "teacher_reward": float(base.mean())}


def _in_pieces(
    make: Callable[[torch.Tensor, Mapping[str, Any], torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    cond: Mapping[str, Any],
    size: int,
) -> torch.Tensor:
    places = torch.arange(len(noise), device=noise.device)
    return torch.cat(
        [make(noise[part], _rows(cond, part, len(noise)), part).cpu() for part in places.split(size)]
    )


def _rows(value: Any, part: torch.Tensor, count: int) -> Any:
    """A condition's rows; what has one row for all keeps it."""
    if isinstance(value, Mapping):
        return {key: _rows(inner, part, count) for key, inner in value.items()}
    return value[part] if isinstance(value, torch.Tensor) and value.ndim and len(value) == count else value


def features_for(shape: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The digit classifier's features of 8x8 digits, else pixels, in 8x8 means where there are more."""
    if shape == (1, 8, 8):
        from ..models.classifier import load_classifier

        return load_classifier().features
    side = min(8, *shape[-2:])
    return lambda x: torch.nn.functional.adaptive_avg_pool2d(x, side).flatten(1)


def images_by(features: Callable[[torch.Tensor], torch.Tensor], bounded: bool = True):
    """FD and unbiased KID of features of images in [-1, 1], or of what has no bounds."""

    def compare(x: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        a, b = (features(images.clamp(-1, 1) if bounded else images) for images in (x, reference))
        return {"fd": frechet_distance(a, b), "kid": kernel_distance(a, b).value}

    return compare


def compare_points(x: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """MMD^2 (unbiased; at a twentieth, a fifth and all of the spread, or it would not see modes) and sliced W2."""
    x, reference = x.double(), reference.double()
    widths = [share * float(reference.std()) for share in (0.05, 0.2, 1.0)]
    return {"mmd": rbf_mmd(x, reference, widths).value, "sliced_w2": sliced_wasserstein(x, reference)}


def modes_found(x: torch.Tensor, least: float = 0.2) -> int:
    """Modes of the grid mixture that have at least ``least`` of their share of samples within 4 standard deviations.

    >>> modes_found(grid_means().repeat(10, 1))
    25
    """
    distance = torch.cdist(x.double().cpu(), grid_means())
    near, which = distance.min(dim=1)
    counts = torch.bincount(which[near < 4 * STD], minlength=distance.shape[1])
    return int((counts >= least * len(x) / distance.shape[1]).sum())


def draw(path: str | os.PathLike, made: torch.Tensor, exam: Exam, rows: int = 10) -> None:
    """A picture of the same noise through the teacher (above) and the student (below); points as a scatter.

    None of latents whose autoencoder is not at hand.
    """
    from ..eval import images

    if made.ndim == 2:
        return _scatter(path, made, exam)
    if exam.decode is None:
        return
    both = torch.cat([exam.decode(x[:rows]) for x in (exam.teacher, made)])
    both = both[:, :, 0] if both.ndim == 5 else both  # of a video its first frame
    grid = images.grid(images.to_uint8(both), columns=rows, scale=max(1, 48 // both.shape[-1]))
    images.save_png(Path(path), grid)


def _scatter(path: str | os.PathLike, made: torch.Tensor, exam: Exam) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from ..eval.files import written_aside

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True, layout="constrained")
    both = {"teacher": exam.teacher, "student": made}
    for axis, (title, points) in zip(axes, both.items(), strict=True):
        axis.plot(*points.T.numpy(), ".", markersize=2)
        axis.set_title(title)
        axis.set_aspect("equal")
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=100)
    pyplot.close(figure)
