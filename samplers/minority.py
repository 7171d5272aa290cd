"""Minority guidance: find the samples that a model thinks unusual, and sample towards them (2301.12334).

Denoising pulls towards what is common, so how far a noised sample comes back from itself says how uncommon it is:

    l(x) = E_eps d( x, x0_hat(alpha x + sigma eps, t) )                         the minority score

Scores are cut into ordinal classes of equal size (``minority_classes``), a small classifier p(c | x_t, t) learns them
on noised samples, and sampling follows its gradient, which in a score, an eps or an x0 is

    score + w g,   eps - w sigma g,   x0 + w sigma^2/alpha g,         g = grad_x log p(c | x_t, t)

``minority`` is that guidance; with any other classifier it is plain classifier guidance (2105.05233).

    >>> from fewstep.models import GaussianMixture, paths
    >>> d = GaussianMixture([0.98, 0.02], [[0.0], [4.0]], 0.05).denoiser(paths.vp_linear())
    >>> scores = minority_score(d, torch.tensor([[0.1], [4.1], [-0.1]]), t=0.6)
    >>> int(scores.argmax())
    1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import numpy as np
import torch

from ..models.denoiser import Denoiser, Form, convert
from ..models.paths import Times, coefficient, vp_linear
from .blend import Composite, as_time
from .guidance import check_denoiser, number
from .guide import Guide
from .noise import USER, normal
from .table import Table

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Classifier = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Mode = Literal["score", "mean"]

USUAL_RHO = vp_linear().rho(
    0.6
)  # 60 of the 100 steps of a linear DDPM, where the paper measures images of 64 to 256


@torch.no_grad()
def minority_score(
    d: Denoiser,
    x: torch.Tensor,
    t: float | None = None,
    distance: Distance | None = None,
    draws: int = 5,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """l(x) of each sample, (B,): the mean of ``distance`` between x and what d makes of it, noised to time t.

    Args:
        t: by default where sigma/alpha is that of the paper (0.6 on the linear VP path); where classes of features
            begin to be undecided is best, which for small or simple data is later (less noise).
        distance: (B, ...), (B, ...) -> (B,); by default the mean squared difference. ``feature_distance(net)`` makes
            one of a classifier's features; LPIPS, the paper's, is ``fewstep.models.lpips.lpips(vgg, heads)`` of files
            that you have.
        draws: normals a sample. All samples get the same ones, so that scores differ by the samples alone.
    """
    check_denoiser("d", d)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be a positive integer, got {draws!r}")
    t = d.path.time_of_rho(USUAL_RHO) if t is None else number("t", t)
    if not d.path.sigma(t) > 0:
        raise ValueError(f"t must be a time with noise, got {t} where sigma = {d.path.sigma(t):g}")
    distance = distance or squared
    total = x.new_zeros(len(x))
    for draw in range(draws):
        ids = torch.tensor([draw], device=x.device)
        eps = normal(seed, ids, x.shape[1:], 0, USER, x.dtype)
        back = d(d.path.add_noise(x, t, eps), t, **(cond or {}))
        apart = distance(x, back)
        if apart.shape != (len(x),):
            raise ValueError(
                f"distance must answer one number a sample, ({len(x)},), got {tuple(apart.shape)}"
            )
        total = total + apart.to(total.dtype)
    return total / draws


def squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The mean squared difference of each sample."""
    return (a - b).flatten(1).square().mean(1)


def feature_distance(features: Callable[[torch.Tensor], torch.Tensor]) -> Distance:
    """A distance from features: (B, ...) -> (B, F), each sample's scaled to length 1 before they are compared.

    >>> from fewstep.models import load_classifier
    >>> distance = feature_distance(load_classifier().features)
    >>> distance(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))
    tensor([0., 0.])
    """

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        one, two = (torch.nn.functional.normalize(features(value).flatten(1), dim=1) for value in (a, b))
        return (one - two).square().sum(1)

    return distance


def minority_classes(scores: torch.Tensor, classes: int = 100) -> torch.Tensor:
    """Ordinal classes of equal size (to one): 0 the most common samples, ``classes`` - 1 the rarest.

    Ranks are cut, not values, so that ties empty no class.

    >>> minority_classes(torch.tensor([0.3, 0.1, 0.9, 0.1]), 2)
    tensor([1, 0, 1, 0])
    """
    if scores.ndim != 1 or not torch.isfinite(scores).all():
        raise ValueError(f"scores must be finite, of shape (N,), got shape {tuple(scores.shape)}")
    if isinstance(classes, bool) or not isinstance(classes, int) or not 2 <= classes <= len(scores):
        raise ValueError(
            f"classes must be an integer from 2 to the number of scores, {len(scores)}, got {classes!r}"
        )
    rank = torch.empty(len(scores), dtype=torch.long, device=scores.device)
    rank[scores.argsort(stable=True)] = torch.arange(len(scores), device=scores.device)
    return rank * classes // len(scores)


@overload
def minority(
    d: Denoiser,
    classifier: Classifier,
    scale: float,
    target: int = ...,
    mode: Mode = ...,
    table: Table | None = ...,
) -> Denoiser: ...
@overload
def minority(
    *, classifier: Classifier, scale: float, target: int = ..., mode: Mode = ..., table: Table | None = ...
) -> Guide: ...
def minority(
    d: Denoiser | None = None,
    classifier: Classifier | None = None,
    scale: float | None = None,
    target: int = -1,
    mode: Mode = "score",
    table: Table | None = None,
) -> Denoiser | Guide:
    """``d`` guided towards the class ``target`` of a classifier of noised samples. Not affine.

    Without ``d`` it is a ``Guide`` for ``steer``, round a pipeline's own guidance.

    Args:
        classifier: (x_t, t) -> logits (B, L), differentiable in x_t; t (B,) are times of the path.
        scale: w; 0 is ``d`` itself.
        target: the class; negative counts from the last, so that -1 is the rarest.
        mode: ``"score"`` adds w g to the score, for any solver. ``"mean"`` is what the paper's code does on ancestral
            rows: the next point's mean moves by w c^2 g, with c the row's noise.
        table: for ``"mean"``, the stochastic one-step table that will be run; the shift of x0 is w c^2 g / B, where the
            next point is  A x + B x0 + c z.

    On a DDPM row from s to n the score's way moves the mean by  w g (alpha_n/alpha_s)(sigma_s^2 - sigma_n^2
    alpha_s^2/alpha_n^2): with c the small variance that is  alpha_n sigma_s^2 / (alpha_s sigma_n^2)  times, with the
    large one alpha_n/alpha_s times, what ``"mean"`` does; the two agree for small steps. Where alpha = 0 nothing is
    known of the class, and nothing is added.

    >>> from fewstep.models import GaussianMixture, paths
    >>> d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.edm())
    >>> right = lambda x, t: torch.cat([0 * x, x], 1)                    # log p(1) grows with x
    >>> bool(minority(d, right, 2.0)(torch.zeros(1, 1), 1.0) > 0)
    True
    """
    if not callable(classifier):
        raise TypeError(f"classifier must be a function (x_t, t) -> logits, got {type(classifier).__name__}")
    if isinstance(target, bool) or not isinstance(target, int):
        raise ValueError(f"target must be an integer, the class to go to, got {target!r}")
    if mode not in ("score", "mean"):
        raise ValueError(f"mode must be 'score' or 'mean', got {mode!r}")
    if (table is None) != (mode == "score"):
        raise ValueError(
            f"table goes with mode='mean' and with nothing else, got mode={mode!r} and table={table!r}"
        )
    scale = number("scale", scale)
    if d is None:
        return Guide(lambda d: minority(d, classifier, scale, target, mode, table), around="guidance")
    check_denoiser("d", d)
    return ClassifierGuided(d, classifier, scale, target, table)


class ClassifierGuided(Composite):
    """x0 + w k(t) grad log p(target | x_t, t), with k = sigma^2/alpha, or a table's c^2/B."""

    def __init__(self, d: Denoiser, classifier: Classifier, scale: float, target: int, table: Table | None):
        super().__init__((d,), ("d",))
        self.classifier, self.scale, self.target = classifier, scale, target
        self._rows = None if table is None else mean_gains(table)

    def affine(self, t: Times, form: Form = "x0") -> None:
        """None: the gradient is no linear function of outputs."""
        return None

    def gain(self, t: Times) -> Times:
        """k(t)."""
        if self._rows is None:
            alpha, sigma = self.path.alpha(t), self.path.sigma(t)
            if isinstance(alpha, torch.Tensor):
                return torch.where(
                    alpha > 0, sigma * sigma / alpha.clamp_min(1e-300), torch.zeros_like(alpha)
                )
            return sigma * sigma / alpha if alpha > 0 else 0.0
        times, gains = self._rows
        if isinstance(t, torch.Tensor):
            apart = (t.double().cpu()[..., None] - torch.as_tensor(times)).abs()
            return torch.as_tensor(gains)[_row(apart.numpy(), times)].to(t.device)
        return float(gains[_row(np.abs(t - times), times)])

    def _as(self, form: str, x: torch.Tensor, t: Times, cond: dict) -> torch.Tensor:
        t = as_time(x, t)
        value = self.children[0]._as(form, x, t, cond)
        gain = self.gain(t)
        if self.scale == 0 or (isinstance(gain, float) and gain == 0):
            return value
        # an x0 that is off by s moves every form by its own factor
        _, q = convert(self.path, t, "x0", "flow" if form == "v" else form)
        shift = coefficient(self.scale * gain, x) * self._slope(x, t).to(x.dtype)
        return value + coefficient(q, x) * shift

    def _slope(self, x: torch.Tensor, t: Times) -> torch.Tensor:
        """grad_x log p(target | x, t)."""
        through = torch.is_grad_enabled() and x.requires_grad
        tau = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x)).to(x.dtype)
        with torch.enable_grad():
            point = x if through else x.detach().requires_grad_()
            logits = self.classifier(point, tau)
            if (
                logits.ndim != 2
                or len(logits) != len(x)
                or not -logits.shape[1] <= self.target < logits.shape[1]
            ):
                raise ValueError(f"classifier must answer logits ({len(x)}, L) with L > target = {self.target}, "
                                 f"got shape {tuple(logits.shape)}")  # fmt: skip
            (slope,) = torch.autograd.grad(
                logits.log_softmax(-1)[:, self.target].sum(), point, create_graph=through
            )
        return slope


def mean_gains(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """(times, c^2/B) of the rows of a stochastic one-step table, where a row is  A x + B x0 + c z.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import ddpm
    >>> times, gains = mean_gains(ddpm(paths.edm(), [2.0, 1.0, 0.0]))
    >>> times.tolist(), gains.round(9).tolist()               # c^2 = 3/4, B = 3/4; the last row draws no noise
    ([2.0, 1.0], [1.0, 0.0])
    """
    from ..models import paths

    if table.lanes != 1 or not table.stochastic:
        raise ValueError(f"table must be stochastic and of one lane, e.g. ddpm(...), got {table.solver} with "
                         f"{table.lanes} lane(s)")  # fmt: skip
    path, gains = paths.from_config(table.path), []
    for row, form in enumerate(table.form):
        b, slot, t = table.b[row + 1, 0, 0], table.slot[row], float(table.t[row, 0])
        if np.count_nonzero(b) > 1 or (b.any() and not b[slot]):
            raise ValueError(
                f"table must be of a one-step solver, row {row} of {table.solver} reads older outputs"
            )
        weight = b[slot] * convert(path, t, "x0", "flow" if form == "v" else form)[1]
        variance = table.c[row + 1, 0, 0] ** 2
        if variance > 0 and weight == 0:
            raise ValueError(
                f"table must move by x0 wherever it draws noise, row {row} of {table.solver} does not"
            )
        gains.append(variance / weight if variance > 0 else 0.0)
    return table.t[:, 0].copy(), np.array(gains)


def _row(apart: np.ndarray, times: np.ndarray) -> np.ndarray:
    nearest = apart.argmin(-1)
    if (apart.min(-1) > 1e-6 * max(1.0, float(np.abs(times).max()))).any():
        raise ValueError("t must be one of the times of the table that this guidance was made for")
    return nearest
