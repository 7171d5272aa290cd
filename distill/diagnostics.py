"""What goes wrong in a distillation and does not show in its losses: numbers in metrics.jsonl, and words, once each.

The student is moved by g = D_critic - D_teacher. On fresh samples x0 of the student the mean of x0 given x_t is the
student's own denoiser D_q, so what g ought to be can be regressed on what it is, with no D_q at hand:

    critic_fit = sum w <g, x0 - D_teacher> / sum w |g|^2           over held-out samples, levels of the student's loss

It is 1 for an exact critic; 1 / l for one that has gone the part l of the way from the teacher to the student, so more
than 1 for one that lags behind; less than 1 where a part of g is the critic's own error, and 0 where all of it is.
``critic_gap`` is sum w |g|^2 as a share of sum w |x0 - D_teacher|^2: where it is next to nothing the fit means little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .draws import Draws
from .levels import Times
from .losses import x0_weight
from .players import Batch, Players
from .precision import autocast
from .training import Trainer

NEXT_TO_NOTHING = 0.01  # of the teacher's denoising error


class Examined(NamedTuple):
    """Estimates of x0 by critic and teacher (B, ...), what both aim at, and weights (B,)."""

    critic: torch.Tensor
    teacher: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


def critic_numbers(examined: Examined) -> dict[str, float]:
    """critic_fit with its standard error, critic_gap, and the weighted denoising errors of critic and teacher.

    >>> teacher, truth = torch.zeros(8, 2), torch.ones(8, 2)
    >>> half_way = Examined(0.5 * truth, teacher, truth, torch.ones(8))
    >>> critic_numbers(half_way)["critic_fit"], critic_numbers(half_way)["critic_gap"]
    (2.0, 0.25)
    """
    critic, teacher, target = (u.flatten(1).double() for u in examined[:3])
    weight, g, wanted = examined.weight.double(), critic - teacher, target - teacher
    along = weight * (g * wanted).sum(1)
    size = weight * g.square().sum(1)
    whole = weight * wanted.square().sum(1)
    count = len(weight) * critic.shape[1]
    numbers = {
        "critic_error": float((weight * (target - critic).square().sum(1)).sum()) / count,
        "teacher_error": float(whole.sum()) / count,
    }
    if float(size.sum()) > 0:
        fit = along.sum() / size.sum()
        spread = (along - fit * size).std() * math.sqrt(len(weight)) / size.sum()
        numbers |= {
            "critic_fit": float(fit),
            "critic_fit_error": float(spread),
            "critic_gap": float(size.sum() / whole.sum()),
        }
    return numbers


def examined(method: Any, players: Players, batch: Batch) -> Examined:
    """Critic and teacher on fresh samples, as the method's own ``examined`` has it or as DMD2 does."""
    with torch.no_grad():
        if hasattr(method, "examined"):
            return Examined(*method.examined(players, batch))
        x0 = batch.generate(players.student)
        path = players.teacher.path
        t, _ = batch.level(getattr(method, "times", Times("karras")), players.teacher)
        x_t = path.add_noise(x0, t, batch.draws.normal("forward", batch.shape))
        weight = x0_weight("edm", path.alpha(t), path.sigma(t), players.teacher.sigma_data)
        real = players.real(x_t, t, batch, getattr(method, "guidance", 1.0))
        return Examined(players.critic(x_t, t, **batch.cond), real, x0, weight)


def diagnose(trainer: Trainer, batches: int = 4) -> dict[str, float]:
    """``critic_numbers`` on so many batches that no turn sees; nothing for a method that has no critic."""
    if "critic" not in trainer.trained:
        return {}
    train, ranks = trainer.recipe.train, trainer.ranks
    seed, count = trainer.recipe.seed ^ 0xD1A6, train.batch // (train.accumulate * ranks.world)
    found = []
    for k in range(batches):
        draws = Draws(seed, trainer.iteration * batches + k, 0, count, count, ranks.device)
        with autocast(train.precision, ranks.device):
            found.append(examined(trainer.method, trainer.players, trainer.data.batch(draws)))
    return critic_numbers(Examined(*(torch.cat(parts) for parts in zip(*found, strict=True))))


def contrast(made: torch.Tensor, teacher: torch.Tensor) -> float:
    """How far samples spread, as a share of what the teacher's do.

    >>> x = torch.randn(100, 2)
    >>> round(contrast(3 * x, x), 4)
    3.0
    """
    return float(made.double().std() / teacher.double().std())


class Watch:
    """Reads the lines of metrics.jsonl and answers with what is wrong, each complaint once.

    >>> watch = Watch(iters=100)
    >>> lagging = {"iteration": 50, "critic_fit": 4.0, "critic_fit_error": 0.1, "critic_gap": 0.3}
    >>> watch(lagging)                                                             # doctest: +ELLIPSIS
    ['the critic lags behind the student: ...']
    >>> watch({**lagging, "iteration": 100})
    []
    """

    def __init__(self, iters: int, memory: int = 20):
        self.iters, self.memory = iters, memory
        self.means: dict[str, float] = {}
        self.said: set[str] = set()

    def __call__(self, line: Mapping[str, Any]) -> list[str]:
        for key in ("gan_accuracy", "ratio_clipped", "flat_groups", "winner_error", "winner_gain"):
            if key in line:  # a batch alone says little
                old = self.means.get(key, line[key])
                self.means[key] = old + (line[key] - old) / self.memory
        wrong = _complaints({**line, **self.means}, self.iters)
        if line.get("flat_groups") == 1:
            wrong["constant"] = (
                "the reward is constant in every group (flat_groups): this batch made no update; is it a reward, or "
                "has the policy reached the most there is?"
            )
        new = {kind: words for kind, words in wrong.items() if kind not in self.said}
        self.said |= set(new)
        return list(new.values())


def _complaints(line: Mapping[str, Any], iters: int) -> dict[str, str]:
    found = {}
    late = line["iteration"] >= 20
    fit, error = line.get("critic_fit"), 3 * line.get("critic_fit_error", 0.0)
    if fit is not None:
        gap = line["critic_gap"]
        if fit - error > 2 and fit**2 * gap > NEXT_TO_NOTHING:  # what g ought to be, by its square
            found["lag"] = (
                f"the critic lags behind the student: on fresh samples the difference to the teacher is "
                f"{fit:.1f} times what the critic says (critic_fit); raise train.critic_steps or "
                f"optim.critic_lr, or lower optim.lr"
            )
        if fit + error < 0.5 and gap > NEXT_TO_NOTHING:
            found["noise"] = (
                f"the student is moved by the critic's errors: of the critic's difference to the teacher only "
                f"{max(fit, 0):.0%} is there on fresh samples (critic_fit); raise train.critic_steps or "
                f"train.batch, or lower optim.critic_lr"
            )
    if late and line.get("gan_accuracy", 0) > 0.98:
        found["discriminator"] = (
            f"the discriminator is saturated: it is right {line['gan_accuracy']:.1%} of the time (gan_accuracy) and "
            f"learns no more; set method.gan.r1, or lower method.gan.critic or optim.critic_lr"
        )
    if late and line.get("ratio_clipped", 0) > 0.5:
        found["ratio"] = (
            f"{line['ratio_clipped']:.0%} of the density ratios are clipped (ratio_clipped), so the divergence is not "
            f"the one asked for; set method.gan.r1, or lower method.gan.critic or optim.critic_lr"
        )
    if late and line.get("flat_groups", 0) > 0.5:
        found["flat"] = (
            f"the reward is constant in {line['flat_groups']:.0%} of the groups (flat_groups), which teach nothing: "
            f"raise method.group, or stop, if the reward cannot rise any more"
        )
    theirs = line.get("winner_error", 0) + line.get("winner_gain", 0)  # the teacher's error
    if late and "winner_gain" in line and line["winner_error"] > 1.5 * theirs:
        found["displaced"] = (
            f"winners are denoised worse than by the teacher, by {line['winner_error'] / theirs:.1f} times its error "
            f"(winner_gain): losers are only worse still; raise method.beta, lower optim.lr, or try mapo"
        )
    spread = line.get("contrast", 1.0)
    if spread > 1.3:
        found["saturated"] = (
            f"the samples are saturated: they spread {spread:.2f} times as far as the teacher's (contrast); lower "
            f"optim.lr or method.guidance"
        )
    if late and spread < 0.7 and 2 * line["iteration"] >= iters:
        found["collapsed"] = (
            f"the samples spread only {spread:.2f} times as far as the teacher's (contrast): modes are lost, or the "
            f"student has hardly moved; raise optim.lr or train.iters, or try f-distill"
        )
    return found
