"""A solver schedule (USF, 2312.07243): what is decided anew at every step, as text, compiled to a ``Table``.

A step from the accepted point x_s to time n is the exact integral of an interpolant of what the network said,

    x_n = (g_n / g_s) x_s + sum_j b_j d_j,      g = alpha, sigma, 1 for d = eps, x0, v

and a ``Step`` says which: the form d, the variable of the interpolant, over how many of the newest outputs it goes, the
rule for its derivatives, how many points back s is, and how many outputs the corrector takes beside the new one.

The form may change from step to step, so each output is wanted in every form. With y = alpha x0 + sigma eps one form
gives the others if the point y of that call is known, and it is: whatever the forms, a point is (sigma / sigma_0) times
the opening state plus a combination of the x0's so far. So a table stores x0's alone, and needs one register.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.vp_linear()
    >>> table = usf(path, grids.vp(path, 4), steps=["x0 vp 1", "eps t 2", "eps lam 3 taylor", "x0 vp 3"])
    >>> table.calls, set(table.form)
    (4, {'x0'})
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .multistep import check_choice, check_order
from .program import Program, Value, solver
from .quadrature import VARIABLES, decay, variable_at, weights
from .table import Table

FORMS = ("x0", "eps", "v")
RULES = ("exact", "taylor", "bh1", "bh2", "shipped")
SCALES = (0.0, 3.0)
DUST = 1e-13  # what is left where two equal weights are subtracted


@dataclass(frozen=True)
class Step:
    """The decisions of one step.

    Args:
        form: what is interpolated: eps, x0, or v = dx/dt (only on flow and edm).
        variable: the interpolant's: t, rho, lam, snr or vp.
        nodes: over how many of the newest outputs it goes, 1 to 4, as far as there are any.
        rule: how the interpolant's derivatives are estimated and scaled. ``exact``: from all nodes, integrated exactly.
            ``taylor``: the k-th from the k + 1 newest nodes alone. Over lam with two nodes also B(h) in place of the
            exact first moment, ``bh1`` (h) or ``bh2`` (e^h - 1); ``shipped`` is ``bh2`` with two, and
            with three half of the second moment. ``exact`` stands in wherever a rule has nothing to say.
        back: from which accepted point the step is made: 0 is the newest, 1 the one before.
        corrector: how many outputs, beside the new one at its end, the step is redone with; 0 for no corrector.
        scale: factor on what the interpolant adds to a constant d, the newest; B(h) are such factors. 0 is first order.

    >>> Step.read("eps lam 2 bh1 corrector=2")
    Step(form='eps', variable='lam', nodes=2, rule='bh1', back=0, corrector=2, scale=1.0)
    >>> str(Step("x0", "t", 3, back=1))
    'x0 t 3 back=1'
    """

    form: str = "x0"
    variable: str = "vp"
    nodes: int = 3
    rule: str = "exact"
    back: int = 0
    corrector: int = 0
    scale: float = 1.0

    def __post_init__(self):
        check_choice("form", self.form, FORMS)
        check_choice("variable", self.variable, VARIABLES)
        check_choice("rule", self.rule, RULES)
        check_order("nodes", self.nodes, 1, 4)
        check_order("back", self.back, 0, 3)
        check_order("corrector", self.corrector, 0, 4)
        if not SCALES[0] <= self.scale <= SCALES[1]:
            raise ValueError(f"scale must lie in {SCALES[0]:g} .. {SCALES[1]:g}, got {self.scale!r}")

    @staticmethod
    def read(text: str | Step) -> Step:
        """What ``str`` wrote: form, variable, nodes, then rule, back=, corrector=, scale= where not the default."""
        return text if isinstance(text, Step) else _read(text if isinstance(text, str) else repr(text))

    def __str__(self) -> str:
        words = [self.form, self.variable, str(self.nodes), *([self.rule] if self.rule != "exact" else [])]
        numbers = [f"{k}={v}" for k in ("back", "corrector") if (v := getattr(self, k))]
        return " ".join(words + numbers + ([f"scale={float(self.scale)!r}"] if self.scale != 1 else []))


@lru_cache(maxsize=4096)
def _read(text: str) -> Step:
    words = text.split()
    if len(words) < 3 or not words[2].isdigit():
        raise ValueError(f"steps must be like 'x0 vp 3' or 'eps lam 2 bh2 back=1 corrector=2', got {text!r}")
    numbers = {"back": int, "corrector": int, "scale": float}
    options: dict[str, float | str] = {}
    for word in words[3:]:
        key, equals, value = word.partition("=")
        try:
            options[key if equals else "rule"] = numbers[key](value) if equals else word
        except (KeyError, ValueError):
            message = f"steps may have back=, corrector= and scale= with a number, got {word!r} in {text!r}"
            raise ValueError(message) from None
    return Step(words[0], words[1], int(words[2]), **options)  # type: ignore[arg-type]


def read_steps(steps: str | Step | Sequence[str | Step], count: int) -> list[Step]:
    """One ``Step`` for each of ``count``, from one for all or one for each."""
    if isinstance(steps, (str, Step)):
        return [Step.read(steps)] * count
    if not isinstance(steps, Sequence) or len(steps) != count:
        got = f"{len(steps)} steps" if isinstance(steps, Sequence) else repr(steps)
        raise ValueError(f"steps must be one for all or one for each of the {count} of the grid, got {got}")
    return [Step.read(step) for step in steps]


def _order(options: dict) -> int:
    """A first-order first step costs O(h^2), one that is corrected O(h^3); of a list the least, on that one grid."""
    steps = options["steps"]
    every = [Step.read(step) for step in ([steps] if isinstance(steps, (str, Step)) else steps)]
    return min(min(s.nodes + 1, s.corrector + 1, 3) if s.corrector else min(s.nodes, 2) for s in every)


@solver(paper="2312.07243", calls="1", order=_order)
def usf(path, times, steps: str | Sequence[str] = "x0 vp 3 corrector=2") -> Table:
    """A schedule of decisions a step, ``steps``: one text for all steps, or one for each; see ``Step``.

    A step in eps form from alpha = 0, where eps says nothing of x0, is made in x0 form, with one node and uncorrected;
    a last step to sigma = 0 over lam or snr is first order; the result is not corrected.
    """
    p = Program(path, times)
    schedule = read_steps(steps, p.steps)
    if any(step.form == "v" for step in schedule) and path.name not in ("flow", "edm"):
        raise ValueError(f"steps in form v (dx/dt) need a straight path, flow or edm, got {path.name}")
    return _compiled(p, _points(p, schedule))


def _points(p: Program, schedule: list[Step]) -> list[Value]:
    """Every call's point, and last the result, in terms of the opening state ("s", 0) and the x0's ("d", call)."""
    y = Value({("s", 0): np.ones(p.lanes)})
    points, accepted, outputs, made = [y], [y], [], []
    for i, step in enumerate(schedule):
        outputs.insert(0, (_forms(p, i, y), p.t[i]))
        if i and made[-1].corrector:
            base = _base(made[-1], i - 1)
            accepted[i] = _moved(p, made[-1], accepted[base], base, i, outputs[: 1 + made[-1].corrector])
        base = _base(step, i)
        if step.form == "eps" and (p.alpha[base] == 0).any():
            step = Step(nodes=1, back=step.back)
        y = _moved(p, step, accepted[base], base, i + 1, outputs[: step.nodes], step.scale)
        points.append(y)
        accepted.append(y)
        made.append(step)
    return points


def _base(step: Step, i: int) -> int:
    return max(i - step.back, 0)


def _forms(p: Program, i: int, y: Value) -> dict[str, Value]:
    """The output of call i at point y in every form. At alpha = 0 eps is y itself."""
    x0 = Value({("d", i + 1): np.ones(p.lanes)})
    eps = (y - p.alpha[i] * x0) / p.sigma[i]
    forms = {"x0": x0, "eps": eps}
    if p.path.name in ("flow", "edm"):
        forms["v"] = p.path.alpha_prime(p.t[i]) * x0 + p.path.sigma_prime(p.t[i]) * eps
    return forms


def _moved(p: Program, step: Step, x: Value, s: int, n: int, known: list[tuple[dict[str, Value], np.ndarray]],
           scale: float = 1.0) -> Value:  # fmt: skip
    """The step from grid point s, where x is accepted, to n over ``known`` outputs."""
    path, begin, end = p.path, p.t[s], p.t[n]
    nodes = [t for _, t in known]
    has_start = any((t == begin).all() for t in nodes)
    paired = step.variable == "lam" and (has_start if len(nodes) == 2 else len(nodes) == 3)
    rule = step.rule if paired and step.rule != "taylor" else "exact"
    all_b = weights(path, begin, end, nodes, step.form, step.variable, rule=rule, limit=False)
    if step.rule == "taylor" and len(nodes) > 2:
        all_b = _taylor(all_b, [variable_at(path, step.variable, t) for t in nodes])
    if scale != 1:
        whole = sum(all_b)
        all_b = [scale * b + (1 - scale) * whole * (j == 0) for j, b in enumerate(all_b)]
    moved = decay(path, begin, end, step.form) * x
    for (forms, _), b in zip(known, all_b, strict=True):
        moved = moved + b * forms[step.form]
    return moved


def _taylor(all_b: list[np.ndarray], places: list[np.ndarray]) -> list[np.ndarray]:
    """Newton's divided differences from the newest nodes, times the moments of powers instead of products.

    The exact weights give these moments, since they integrate every polynomial that the nodes determine.
    """
    usable = [j for j, place in enumerate(places) if np.isfinite(place).all()]
    if usable[:1] != [0]:
        return all_b
    answer = [np.zeros_like(b) for b in all_b]
    for k in range(len(usable)):
        moment = sum(all_b[j] * (places[j] - places[0]) ** k for j in usable)
        for j in usable[: k + 1]:
            others = [places[j] - places[m] for m in usable[: k + 1] if m != j]
            answer[j] = answer[j] + moment / np.prod(others, axis=0)
    return answer


def _compiled(p: Program, points: list[Value]) -> Table:
    """Rows that make each point from the one before: the opening state is eliminated, its share being known."""
    x = p.start()
    for i, (old, new) in enumerate(zip(points, points[1:], strict=False)):
        p.call(x, at=i, form="x0")
        ratio = p.sigma[i + 1] / p.sigma[i]
        row = ratio * x
        for key in sorted({*old.terms, *new.terms} - {("s", 0)}):
            before, after = ratio * old.terms.get(key, 0.0), new.terms.get(key, np.zeros(p.lanes))
            weight = after - before
            if (np.abs(weight) > DUST * np.maximum(np.abs(after), np.abs(before))).any():
                row = row + Value({key: weight})
        x = row
    return p.table(x)
