"""How a number was made, as an object: printed with it, stored with statistics, and what decides whether two compare.

An FID without its resize, its weights and its N says little: on the same images, three common resizes differ by up to
three percent. Two numbers compare when nothing known of them differs; what is not known (None, as in files that other
tools wrote) is said, and not guessed.

>>> ours = Protocol(features="inception", weights="6726825d", resize="tensorflow", rounding="nearest", num=50000)
>>> ours.line()
'features=inception weights=6726825d resize=tensorflow rounding=nearest num=50000 reference=? seeds=?'
>>> a, b = Number("fd", 2.1, ours), Number("fd", 2.3, replace(ours, resize="clean"))
>>> a < b
Traceback (most recent call last):
ValueError: fd = 2.1 and fd = 2.3 do not compare: resize is 'tensorflow' in one and 'clean' in the other
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

__all__ = ["FEATURES", "Number", "Protocol", "replace", "require_same"]

# What two sets of features must share for a distance between them to mean anything.
FEATURES = ("features", "weights", "resize", "rounding")


@dataclass(frozen=True)
class Protocol:
    """What was done to images until they were a number. None: not known.

    features: the network and layer; weights: sha256 of its file; resize: a name in ``resize.METHODS``; rounding: how
    values came to bytes ("nearest": of floats, here; unknown for files, which hold bytes); num: images measured;
    reference: what they were measured against; seeds: what the samples were drawn by.
    """

    features: str | None = None
    weights: str | None = None
    resize: str | None = None
    rounding: str | None = None
    num: int | None = None
    reference: str | None = None
    seeds: str | None = None

    def differences(self, other: Protocol, among: Iterable[str] | None = None) -> list[str]:
        """What is known of both and differs, in words."""
        found = []
        for name in _names() if among is None else among:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours is not None and theirs is not None and ours != theirs:
                found.append(f"{name} is {ours!r} in one and {theirs!r} in the other")
        return found

    def unknown(self, among: Iterable[str] | None = None) -> list[str]:
        """The names of what is not known."""
        return [name for name in (_names() if among is None else among) if getattr(self, name) is None]

    def line(self) -> str:
        """One line, as it is printed beside a number."""
        shown = {name: getattr(self, name) for name in _names()}
        if self.weights is not None and len(self.weights) == 64:
            shown["weights"] = self.weights[:12]
        return " ".join(f"{name}={'?' if value is None else value}" for name, value in shown.items())

    def text(self) -> str:
        """JSON, as it is stored."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def read(text: str) -> Protocol:
        """What ``text()`` made; a name that this version does not know is an error."""
        content = json.loads(text)
        unknown = sorted(set(content) - set(_names()))
        if unknown:
            raise ValueError(f"protocol has {', '.join(unknown)}; expected {', '.join(_names())}")
        return Protocol(**content)


@dataclass(frozen=True)
class Number:
    """A metric's value with its protocol: ordered and subtracted only where both were made alike.

    settings: what the metric was told (k of precision, subsets of KID), part of what must agree.
    """

    metric: str
    value: float
    protocol: Protocol
    stderr: float | None = None
    settings: str = ""

    def __sub__(self, other: Number) -> float:
        require_same(self, other)
        return self.value - other.value

    def __lt__(self, other: Number) -> bool:
        require_same(self, other)
        return self.value < other.value

    def __gt__(self, other: Number) -> bool:
        return other < self

    def line(self) -> str:
        """The number, its error, and how it was made."""
        error = "" if self.stderr is None else f" +- {self.stderr:.2g}"
        settings = f" ({self.settings})" if self.settings else ""
        return f"{self.metric} = {self.value:.6g}{error}{settings}   {self.protocol.line()}"

    def record(self) -> dict[str, Any]:
        """Flat, for JSON and CSV: metric, value, stderr, settings, and the fields of the protocol."""
        own = {"metric": self.metric, "value": self.value, "stderr": self.stderr, "settings": self.settings}
        return {**own, **asdict(self.protocol)}


def require_same(a: Number, b: Number, ignore: Iterable[str] = ()) -> None:
    """``ValueError`` with the difference where two numbers were not made alike.

    ignore: what may differ, such as ("seeds",) between repetitions of one measurement.

    >>> require_same(Number("fd", 1.0, Protocol(seeds="0-9")), Number("fd", 2.0, Protocol(seeds="10-19")), ["seeds"])
    """
    ignore = set(ignore)
    if wrong := ignore - set(_names()):
        raise ValueError(f"ignore has {', '.join(sorted(wrong))}; expected some of {', '.join(_names())}")
    found = a.protocol.differences(b.protocol, [name for name in _names() if name not in ignore])
    if a.metric != b.metric:
        found.insert(0, f"one is {a.metric} and the other {b.metric}")
    elif a.settings != b.settings:
        found.insert(0, f"settings are {a.settings!r} and {b.settings!r}")
    if found:
        numbers = f"{a.metric} = {a.value:.6g} and {b.metric} = {b.value:.6g}"
        raise ValueError(f"{numbers} do not compare: {'; '.join(found)}")


def _names() -> tuple[str, ...]:
    return tuple(field.name for field in fields(Protocol))
