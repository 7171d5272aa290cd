"""The metrics by their names: from what was seen in samples, and a reference, to numbers with their protocol.

>>> from .features import extractor
>>> from .seen import reference_of, see
>>> judge = extractor("digits")
>>> (fd,) = measure(see("digits:held_out", judge), reference_of("digits:train", judge), ["fd"])
>>> fd.metric, fd.value < 20, fd.protocol.num, fd.protocol.reference
('fd', True, 360, 'digits:train')
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .by_class import by_class
from .cmmd import cmmd
from .fd_infinity import fd_infinity
from .frechet import frechet_distance
from .inception_score import inception_score
from .jackknife import frechet_jackknife
from .kid import kernel_distance
from .mmd import Estimate, rbf_mmd
from .prdc import prdc
from .protocol import FEATURES, Number, replace
from .seen import Seen
from .sliced import sliced_wasserstein
from .statistics_files import Statistics

SEED = 2020  # of subsets and splits: torch-fidelity's


def measure(
    samples: Seen, reference: Statistics, metrics: Sequence[str] = ("fd",), groups: int | None = None
) -> list[Number]:
    """The numbers that `metrics` ask for, each with the protocol it was made under.

    groups: give "fd" a standard error by the jackknife over so many groups. ``ValueError`` where samples and reference
    were not seen alike, or a metric needs features that a file does not have.
    """
    if wrong := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {', '.join(wrong)}")
    if found := samples.protocol.differences(reference.protocol, FEATURES):
        raise ValueError(f"samples and {reference.name} do not compare: {'; '.join(found)}")
    ours, theirs = len(samples.stats.finish().mean), len(reference.gaussian.mean)
    if ours != theirs:
        raise ValueError(
            f"{reference.name} is of {theirs} dimensions, and {samples.protocol.features} features have {ours}; "
            "expected statistics of the same features"
        )
    protocol = replace(samples.protocol, reference=reference.name)
    numbers = []
    for name in metrics:
        for label, value, settings in METRICS[name](samples, reference, groups):
            estimate = value if isinstance(value, Estimate) else Estimate(value, float("nan"))
            error = None if np.isnan(estimate.stderr) else estimate.stderr
            numbers.append(Number(label, estimate.value, protocol, error, settings))
    return numbers


Rows = list[tuple[str, Estimate | float, str]]


def _fd(samples: Seen, reference: Statistics, groups: int | None) -> Rows:
    if groups is not None:
        settings = f"jackknife of {groups} groups"
        return [("fd", frechet_jackknife(_kept(samples, "fd's error"), reference.gaussian, groups), settings)]
    few = samples.features is not None and len(samples.features) <= samples.features.shape[1]
    return [("fd", frechet_distance(samples.features if few else samples.stats, reference.gaussian), "")]


def _fd_infinity(samples: Seen, reference: Statistics, groups: int | None) -> Rows:
    value = fd_infinity(_kept(samples, "fd-infinity"), reference.gaussian, seed=SEED)
    return [("fd-infinity", value, f"15 subsets, seed {SEED}")]


def _kid(samples: Seen, reference: Statistics, groups: int | None) -> Rows:
    a, b = _both(samples, reference, "kid")
    size = min(1000, len(a), len(b))
    value = kernel_distance(a, b, subsets=100, subset_size=size, seed=SEED)
    return [("kid", value, f"100 subsets of {size}, seed {SEED}")]


def _kid_full(samples: Seen, reference: Statistics, groups: int | None) -> Rows:
    return [("kid-full", kernel_distance(*_both(samples, reference, "kid-full")), "all pairs")]


def _inception_score(samples: Seen, reference: Statistics, groups: int | None) -> Rows:
    if samples.logits is None:
        raise ValueError(
            f"is needs a classifier's logits, which {samples.protocol.features} features do not have"
        )
    splits = min(10, len(samples.logits))
    value = inception_score(samples.logits, splits, SEED)
    return [("is", value, f"{splits} splits, seed {SEED}, +- over splits")]


def _prdc(samples: Seen, reference: Statistics, groups: int | None) -> Rows:
    a, b = _both(samples, reference, "prdc")
    three, five = prdc(a, b, k=3), prdc(a, b, k=5)
    return [
        ("precision", three.precision, "k 3"),
        ("recall", three.recall, "k 3"),
        ("density", five.density, "k 5"),
        ("coverage", five.coverage, "k 5"),
    ]


def _cmmd(samples: Seen, reference: Statistics, groups: int | None) -> Rows:
    a, b = _both(samples, reference, "cmmd")
    return [("cmmd", cmmd(a, b), "unbiased"), ("cmmd-released", cmmd(a, b, "released").value, "with i = j")]


def _mmd(samples: Seen, reference: Statistics, groups: int | None) -> Rows:
    return [("mmd", rbf_mmd(*_both(samples, reference, "mmd"), seed=SEED), "rbf, median distance")]


def _sliced(samples: Seen, reference: Statistics, groups: int | None) -> Rows:
    value = sliced_wasserstein(*_both(samples, reference, "sw2"), projections=512, seed=SEED)
    return [("sw2", value, f"512 directions, seed {SEED}")]


def _fd_by_class(samples: Seen, reference: Statistics, groups: int | None) -> Rows:
    a, b = _both(samples, reference, "fd-by-class")
    for name, labels in (("the samples", samples.labels), (reference.name, reference.labels)):
        if labels is None:
            raise ValueError(f"fd-by-class needs labels, and {name} have none")
    found = by_class(frechet_distance, a, samples.labels, b, reference.labels)
    mean = sum(found.values()) / len(found)
    return [
        ("fd-by-class", mean, f"mean of {len(found)}"),
        *((f"fd class {c}", v, "") for c, v in found.items()),
    ]


METRICS: dict[str, Callable[[Seen, Statistics, int | None], Rows]] = {
    "fd": _fd,
    "fd-infinity": _fd_infinity,
    "fd-by-class": _fd_by_class,
    "kid": _kid,
    "kid-full": _kid_full,
    "is": _inception_score,
    "prdc": _prdc,
    "cmmd": _cmmd,
    "mmd": _mmd,
    "sw2": _sliced,
}
MOMENTS_DO = ("fd",)  # every other metric needs features


def _kept(samples: Seen, metric: str) -> torch.Tensor:
    if samples.features is None:
        raise ValueError(f"{metric} needs the samples' features; see(..., keep=True) keeps them")
    return samples.features


def _both(samples: Seen, reference: Statistics, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    if reference.features is None:
        raise ValueError(
            f"{metric} needs the features of the reference, and {reference.name} has moments alone: make the file with "
            "`fewstep eval stats --keep-features`, or give the images themselves"
        )
    return _kept(samples, metric), reference.features
