"""What a teacher is worth, and its model card."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch

from ..eval import images
from ..eval.frechet import frechet_distance
from ..eval.neighbours import memorisation
from ..models.classifier import load_classifier
from ..models.codec import decode
from ..models.denoiser import Denoiser
from ..models.digits import CLASSES, SHAPE, digits
from ..models.paths import EDM, Path
from .card import DIGITS, LICENCE, model_card
from .data import Data
from .draws import Draws
from .validation import set_exam


@torch.no_grad()
def measure(
    d: Denoiser, num: int = 2000, steps: int = 40, seed: int = 0, batch: int = 500
) -> dict[str, float]:
    """Judge ``num`` samples, 1/10 of them of each class, of Heun's method with ``steps`` steps.

    Frechet distances are in the classifier's 64 features, in float64, to all 1797 digits and to the 360 held out;
    beside them stands what the training digits score against the held-out ones, for that is what a set of 360 allows.
    Distances to the nearest training image are medians of Euclidean ones; the held-out digits' own stands beside it.
    """
    label = torch.arange(num) % CLASSES
    noise = torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(seed))
    samples = torch.cat(
        [heun(d, x, steps, y) for x, y in zip(noise.split(batch), label.split(batch), strict=True)]
    )
    real_images = {split: torch.from_numpy(digits(split)[0]) for split in ("all", "train", "held_out")}
    judge = load_classifier()
    features, logits = judge(samples)
    real = {split: judge.features(x) for split, x in real_images.items()}
    near = memorisation(
        samples.flatten(1), real_images["train"].flatten(1), real_images["held_out"].flatten(1)
    )
    loss, trivial = held_out_loss(d)
    numbers = {
        "feature_fd_all": frechet_distance(features, real["all"]),
        "feature_fd_held_out": frechet_distance(features, real["held_out"]),
        "feature_fd_train_to_held_out": frechet_distance(real["train"], real["held_out"]),
        "label_accuracy": float((logits.argmax(-1) == label).float().mean()),
        "nearest_train": near.samples,
        "nearest_train_of_held_out": near.held_out,
        "held_out_loss": loss,
        "held_out_loss_of_a_gaussian": trivial,
    }
    return {k: round(v, 4) for k, v in numbers.items()}


def time_grid(path: Path, steps: int) -> list[float]:
    """steps + 1 times, t_max first, t_clean last; EDM's (2206.00364) for EDM, quadratic for the others."""
    if isinstance(path, EDM):
        ends = path.t_max ** (1 / 7), path.t_min ** (1 / 7)
        return [*(np.linspace(*ends, steps) ** 7).tolist(), 0.0]
    return [*(np.linspace(path.t_max**0.5, path.t_min**0.5, steps) ** 2).tolist(), path.t_clean]


@torch.no_grad()
def heun(d: Denoiser, noise: torch.Tensor, steps: int, label: torch.Tensor) -> torch.Tensor:
    """Heun's method on dx/dt in float64, the last step by x0: slow, plain, and independent of the samplers."""
    times = time_grid(d.path, steps)
    x = noise.double() * d.path.sigma(times[0])
    slope = lambda x, t: d.velocity(x.float(), t, label=label).double()  # noqa: E731
    for t, after in zip(times[:-2], times[1:-1], strict=True):
        first = slope(x, t)
        guess = x + (after - t) * first
        x = x + (after - t) / 2 * (first + slope(guess, after))
    return d(x.float(), times[-2], label=label)


@torch.no_grad()
def held_out_loss(d: Denoiser, seed: int = 0) -> tuple[float, float]:
    """Mean |x0_hat - x0|^2 / E|x0 - best constant|^2 over held-out digits at lam = -2, -1 .. 2; and what the best
    denoiser for a Gaussian with the training digits' mean and covariance scores (no labels, no network)."""
    x0, label = (torch.from_numpy(a) for a in digits("held_out"))
    train = torch.from_numpy(digits("train")[0]).flatten(1).double()
    mean, covariance = train.mean(0), train.T.cov()
    flat = x0.flatten(1).double()
    random = torch.Generator().manual_seed(seed)
    ours, gaussian = [], []
    for lam in (-2.0, -1.0, 0.0, 1.0, 2.0):
        t = d.path.time(lam)
        alpha, sigma = d.path.alpha(t), d.path.sigma(t)
        x = alpha * flat + sigma * torch.randn(flat.shape, generator=random, dtype=torch.float64)
        guess = d(x.reshape(x0.shape).float(), t, label=label).flatten(1).double()
        gain = torch.linalg.solve(alpha**2 * covariance + sigma**2 * torch.eye(64), alpha * covariance)
        linear = mean + (x - alpha * mean) @ gain
        scale = (flat - mean).square().mean()
        ours.append(float((guess - flat).square().mean() / scale))
        gaussian.append(float((linear - flat).square().mean() / scale))
    return float(np.mean(ours)), float(np.mean(gaussian))


def measure_on(d: Denoiser, data: Data, num: int, picture: FilePath) -> dict[str, float]:
    """Frechet and kernel distance of ``num`` samples to as many real ones, beside those of real ones to others.

    A grid of samples goes to ``picture``. Features are those of ``validation``; latents are compared as latents.
    """
    if not num:
        return {}
    exam = set_exam(d, data, num)
    assert exam.real is not None  # a teacher was trained on them
    device = next(d.net.parameters()).device  # type: ignore[union-attr]
    others = data.batch(Draws(20_011, 0, 0, num, num, device)).real
    numbers = {f"data_{k}": v for k, v in exam.compare(exam.teacher, exam.real).items()}
    numbers |= {f"real_{k}": v for k, v in exam.compare(others.cpu(), exam.real).items()}
    if len(data.shape) == 3 and (d.codec is None or d.codec.decodes):
        made = decode(d, exam.teacher[:64].to(device))
        images.save_png(picture, images.grid(images.to_uint8(made).cpu(), columns=8))
    return {k: round(v, 5) for k, v in numbers.items()}


def plain_card(config: dict[str, Any], record: dict[str, Any]) -> str:
    """The model card of a teacher of other data than the digits."""
    recipe, numbers = record["recipe"], record["metrics"]
    given = ", ".join(f"{k} {v}" for k, v in config["net"].items())
    rows = {
        "data": recipe["data"]["path"],
        "autoencoder": config.get("latents", {}).get("name", ""),
        "net": f"{given}; {record['parameters']} parameters",
        "training": _training(recipe),
        "cost": f"{record['minutes']} minutes on {record['device']}, torch {record['torch']}",
        **{k.replace("_", " "): f"{v:.4g}" for k, v in numbers.items()},
    }
    precond = f", preconditioned as {config['precond']}" if config["precond"] else ""
    return model_card(
        recipe["name"],
        f"Generator of samples of {' x '.join(map(str, config['shape']))}: path `{config['path']['path']}`, predicts "
        f"`{config['predicts']}`{precond}.",
        rows,
        "Distances marked data are of samples to real ones, those marked real of real ones to others."
        * bool(numbers),
    )


def _training(recipe: dict[str, Any]) -> str:
    times = recipe["times"]
    drawn = (
        times["kind"] if times["kind"] == "uniform" else f"{times['kind']} ({times['mean']}, {times['std']})"
    )
    return (
        f"{recipe['steps']} steps of {recipe['batch']}, AdamW, lr {recipe['lr']}, times {drawn}, "
        f"{recipe['label_dropout']:.0%} of labels dropped, weights averaged over the last {recipe['ema_share']:.0%}, "
        f"seed {recipe['seed']}"
        + (f"; time frequencies above {recipe['time_cutoff']} rad held at 0" if recipe["time_cutoff"] else "")
    )


def card(config: dict[str, Any], record: dict[str, Any]) -> str:
    """The model card."""
    recipe, numbers = record["recipe"], record["metrics"]
    net = ", ".join(
        [f"U-Net, {record['parameters']} parameters", *(f"{k} {v}" for k, v in recipe["net"].items())]
    )
    precond = f", preconditioned as {config['precond']}" if config["precond"] else ""
    return model_card(
        recipe["name"],
        f"Class-conditional generator of 8x8 digits: path `{config['path']['path']}`, predicts "
        f"`{config['predicts']}`{precond}. Labels are 0..9; 10 is the null label.",
        {
            "retrain": f"`fewstep teacher {recipe['name']}`",
            "data": DIGITS,
            "net": net,
            "training": _training(recipe),
            "cost": f"{record['minutes']} minutes ({record['core_seconds']} core-seconds, one thread), "
            f"torch {record['torch']}",
            "feature FD to all 1797 digits": f"**{numbers['feature_fd_all']:.2f}**",
            "feature FD to the 360 held out": f"{numbers['feature_fd_held_out']:.2f} (the training digits themselves: "
            f"{numbers['feature_fd_train_to_held_out']:.2f})",
            "accuracy of labels": f"{numbers['label_accuracy']:.3f}",
            "median distance to the nearest training digit": f"{numbers['nearest_train']:.2f} (held-out digits: "
            f"{numbers['nearest_train_of_held_out']:.2f})",
            "held-out denoising loss": f"{numbers['held_out_loss']:.3f} of the variance, mean of lam -2..2 (the best "
            f"Gaussian denoiser: {numbers['held_out_loss_of_a_gaussian']:.3f})",
            "licence": LICENCE,
        },
        "Measured on 2000 samples of Heun's method with 40 steps, in the features of `digits-classifier`.",
    )
