"""Losses of the distillers as pure functions of tensors: no config, no trainer, no network.

x0 is a student's sample (B, ...), D_r and D_f are the teacher's and the critic's estimates of x0 at the noised sample
x_t = alpha x0 + sigma eps, and alpha, sigma are one number a sample (B,) or one for all. A *gradient* function answers
g, what d loss / d x0 is to be for a sample; ``surrogate(x0, g)`` is the scalar that has it.
"""

from .adversarial import approximate_r1, discriminator_loss, generator_loss, gradient_r1
from .consistency import consistency_loss, next_level, ode_step
from .denoising import denoising_loss, x0_weight
from .divergences import (
    DIVERGENCES,
    Divergence,
    LevelMeans,
    batch_level_means,
    density_ratio,
    divergence_weight,
    level_means,
)
from .dmd import dmd_gradient
from .inversion import invert
from .mean_flow import guided_velocity, mean_flow_loss, mean_flow_target
from .phased import phased_critic_loss, phased_gradient, phased_kernel, phased_target
from .policy import (
    clipped_surrogate,
    flat_groups,
    flow_level,
    group_advantages,
    judged_win_rates,
    matching_loss,
    rank_advantages,
    velocity_gap,
    win_rates,
)
from .preference import (
    dpo_loss,
    mapo_loss,
    mapo_score,
    network_error,
    output_weight,
    preference_logit,
    smoothed_labels,
    smpo_loss,
)
from .rendered import cds_gradient, classifier_gradient, score_distillation_gradient, variational_gradient
from .score_matching import sid_loss, sim_loss
from .surrogate import surrogate
from .trigflow import consistency_tangent, normalised, scm_loss, trig_output

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "LevelMeans",
    "approximate_r1",
    "batch_level_means",
    "cds_gradient",
    "classifier_gradient",
    "clipped_surrogate",
    "consistency_loss",
    "consistency_tangent",
    "denoising_loss",
    "density_ratio",
    "discriminator_loss",
    "divergence_weight",
    "dmd_gradient",
    "dpo_loss",
    "flat_groups",
    "flow_level",
    "generator_loss",
    "gradient_r1",
    "group_advantages",
    "guided_velocity",
    "invert",
    "judged_win_rates",
    "level_means",
    "mapo_loss",
    "mapo_score",
    "matching_loss",
    "mean_flow_loss",
    "mean_flow_target",
    "network_error",
    "next_level",
    "normalised",
    "ode_step",
    "output_weight",
    "phased_critic_loss",
    "phased_gradient",
    "phased_kernel",
    "phased_target",
    "preference_logit",
    "rank_advantages",
    "scm_loss",
    "score_distillation_gradient",
    "sid_loss",
    "sim_loss",
    "smoothed_labels",
    "smpo_loss",
    "surrogate",
    "trig_output",
    "variational_gradient",
    "velocity_gap",
    "win_rates",
    "x0_weight",
]
