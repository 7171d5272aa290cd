"""What an export finds: a pipeline of diffusers' own and how it is called, or the reason why there is none."""

from __future__ import annotations

from typing import Any, NamedTuple


class Stock(NamedTuple):
    """A pipeline of diffusers' own, and the arguments by which it makes what the student makes."""

    pipeline: Any
    call: dict[str, Any]


class NoStockPipeline(ValueError):
    """No pipeline of diffusers can run this student; the message says why."""
