"""``steer(pipe, method)``: any method of control in an unmodified diffusers pipeline, and off again.

    handle = steer(pipe, rlg("preferences", scale=1.6))          # a guidance, over the network with a LoRA on and off
    image = pipe("a photo of a fox", num_inference_steps=20).images[0]
    handle.undo()

    with steer(pipe, functools.partial(tree_search, reward=reward, budget=400)) as handle:
        image = pipe("a photo of a fox").images[0]
    print(handle.info.calls)

In a call of the pipeline all is the pipeline's but the loop: it embeds the prompt, draws the initial noise from its
generator, guides by its scale, and decodes the result. In between its loop makes one step, and in this step the whole
of  ``method(d, noise, table, cond=.., seed=..)``  runs. ``sample`` is the method that changes nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..models.codec import Codec, Condition
from ..models.denoiser import Denoiser, Form
from ..models.load_diffusers import codec_of, denoiser_of
from ..models.paths import Path, Times
from ..models.pipeline import Asked, StandIn, intercepted, network
from . import scheduler_config as meaning
from .blend import Composite, as_time
from .guidance import Interval, cfg
from .guide import Guide
from .loop import sample
from .table import Table
from .theirs import Theirs, table_of

# What a pipeline's call may say that means steps of a loop which is not run. None, 0 and [] say nothing.
PER_STEP = {
    "callback_on_step_end": "give the method a callback: functools.partial(sample, callback=..)",
    "callback": "give the method a callback: functools.partial(sample, callback=..)",
    "eta": "what noise a step adds is its table's: table=lambda path, n: ddim(path, grids.trailing(path, n), eta=1.0)",
    "denoising_end": "the method samples to the end",
    "denoising_start": "the method samples from the beginning",
    "skip_guidance_layers": "write the guidance as a Guide",
}
PARTS = {"controlnet": "a ControlNet, which sees every step's latents", "transformer_2": "two networks"}


class Run(NamedTuple):
    """What is known of a call: ``calls`` of the network, the ``table``, the pipeline's guidance ``scale`` (None: none),
    the ``seed`` of the method, and ``info``, what the method returned beside its samples."""

    calls: int
    table: Table
    scale: float | None
    seed: int
    info: Any


def steer(
    pipe: Any,
    *how: Callable[..., Any] | Guide,
    table: Table | Callable[[Path, int], Table] | None = None,
    interval: Interval | None = None,
    seed: int | None = None,
) -> Steered:
    """Make every call of ``pipe`` sample by ``how``, until ``undo()`` or the end of a ``with`` block.

    Args:
        pipe: a pipeline from text, classes or nothing to images or video (DDPM, DiT, Stable Diffusion, SDXL, SD3, Flux,
            Wan and their like). Image-to-image, inpainting and ControlNets are refused: a ``FewstepScheduler`` runs any
            solver in these.
        how: guidances (``rlg``, ``autoguidance``, ``minority`` without a denoiser, ``Guide(f)``), each over the one
            before it, and at most one method  ``(d, noise, table, *, cond, seed) -> x or (x, info)``, by default
            ``sample``. What else a method wants is given by ``functools.partial``.
        table: what is run. By default what the pipeline's scheduler would, with its clipping: a ``FewstepScheduler``'s
            own table, and of diffusers' classes the equal here (``theirs.table_of``). Else a Table, which is run as it
            is, or a function of the path and ``num_inference_steps``.
        interval: the pipeline's guidance acts at noise levels lo < sigma/alpha <= hi alone (2404.07724).
        seed: of what the method draws; by default a ``FewstepScheduler``'s own, or else drawn from the call's
            ``generator``, after the initial noise.

    The network, the scheduler and all else of ``pipe`` are its own between calls and after them, whatever happened.

    >>> steer("a pipeline's name", sample)
    Traceback (most recent call last):
    TypeError: pipe must be a diffusers pipeline with a scheduler, got str
    """
    return Steered(pipe, how, table, interval, seed)


class Steered:
    """A pipeline that is steered. ``info`` is the ``Run`` of its last call."""

    def __init__(
        self,
        pipe: Any,
        how: tuple[Any, ...],
        table: Table | Callable[[Path, int], Table] | None,
        interval: Interval | None,
        seed: int | None,
    ):
        _check_pipe(pipe)
        self.guides = tuple(one for one in how if isinstance(one, Guide))
        self.method, *more = [one for one in how if not isinstance(one, Guide)] or [sample]
        if not how or more or isinstance(self.method, Denoiser) or not callable(self.method):
            raise TypeError(
                "how must be guidances, e.g. rlg('adapter', scale=1.6), and at most one method of sampling, "
                f"e.g. sample; got {', '.join(map(_name, how)) or 'nothing'}"
            )
        if table is not None and not isinstance(table, Table) and not callable(table):
            raise TypeError(f"table must be a Table or a function (path, steps) -> Table, got {_name(table)}")
        self.pipe, self.table, self.interval, self.seed = pipe, table, interval, seed
        self.info: Run | None = None
        self._original = type(pipe)
        self._steered = _subclass(type(pipe), self)
        object.__setattr__(pipe, "__class__", self._steered)

    def undo(self) -> None:
        """The pipeline as it was. A second time does nothing."""
        if type(self.pipe) is self._steered:
            object.__setattr__(self.pipe, "__class__", self._original)

    def __enter__(self) -> Steered:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def _call(self, pipe: Any, *arguments: Any, **options: Any) -> Any:
        plain = self._original.__call__
        if isinstance(pipe.scheduler, StandIn):  # it is asked what it would tell its network
            return plain(pipe, *arguments, **options)
        said = inspect.signature(plain).bind(pipe, *arguments, **options).arguments
        for name, instead in PER_STEP.items():
            value = said.get(name)
            if value is not None and not (isinstance(value, (int, float, list, tuple)) and not value):
                raise ValueError(
                    f"{name} is of no use to a steered pipeline, whose loop makes one step: {instead}"
                )
        run = functools.partial(self._run, pipe, pipe.scheduler, said.get("generator"))
        with intercepted(pipe, run):
            return plain(pipe, *arguments, **options)

    def _run(self, pipe: Any, scheduler: Any, generator: Any, asked: Asked) -> torch.Tensor:
        d, scale = denoiser_of(pipe, asked), None if asked.null is None else asked.scale
        d.codec = codec_of(pipe, asked) or Codec()
        d.codec.null = None  # the condition carries it
        calls = _counted(d)
        for guide in self.guides:
            d = guide(d) if guide.around == "network" else d
        if scale is not None:
            d = cfg(d, scale, interval=self.interval, rescale=asked.rescale)
        elif self.interval is not None:
            raise ValueError("interval must be None for a call without classifier-free guidance")
        for guide in self.guides:
            d = guide(d) if guide.around == "guidance" else d
        noise = asked.noise if asked.noise.dtype == torch.float64 else asked.noise.float()
        if self.table is None:
            table, start, transform = _scheduled(scheduler, d.path, asked.schedule)
            noise = noise * (
                start / float(table.a[0, 0].sum(-1).flat[0])
            )  # so that it opens where theirs does
            d = d if transform is None else Transformed(d, transform)
        else:
            table = (
                self.table if isinstance(self.table, Table) else self.table(d.path, _steps(asked.schedule))
            )
        draws = table.stochastic or self.method is not sample
        seed = self._seed(scheduler, generator) if draws else 0  # as the plain pipeline leaves its generator
        known = {} if _has_seed(self.method) else {"seed": seed}
        result = self.method(d, noise, table, cond=Condition(asked.cond, asked.null), **known)
        x, info = result if isinstance(result, tuple) else (result, None)
        if not isinstance(x, torch.Tensor) or x.shape != noise.shape:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(
                f"the method must answer one sample a row of noise, {tuple(noise.shape)}, it answered {got}"
            )
        self.info = Run(len(calls), table, scale, seed, info)
        return x

    def _seed(self, scheduler: Any, generator: Any) -> int:
        own = scheduler.noise if self.seed is None and hasattr(scheduler, "table_for") else self.seed
        if isinstance(own, int):
            return own
        first = generator[0] if isinstance(generator, (list, tuple)) else generator
        device = "cpu" if first is None else first.device
        return int(torch.randint(2**62, (1,), generator=first, device=device))


class Transformed(Composite):
    """``d`` with every estimate of x0 changed, as schedulers clip it. Not affine."""

    def __init__(self, d: Denoiser, transform: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__((d,))
        self.transform = transform

    def affine(self, t: Times, form: Form = "x0") -> None:
        """None: the change depends on x."""
        return None

    def _as(self, form: str, x: torch.Tensor, t: Times, cond: dict) -> torch.Tensor:
        t = as_time(x, t)
        return self._from("x0", form, x, t, self.transform(self.children[0]._as("x0", x, t, cond)))


def _check_pipe(pipe: Any) -> None:
    if not callable(pipe) or not callable(getattr(getattr(pipe, "scheduler", None), "step", None)):
        raise TypeError(f"pipe must be a diffusers pipeline with a scheduler, got {type(pipe).__name__}")
    if hasattr(type(pipe), "_steered_by"):
        raise ValueError(
            "pipe is steered already: undo() that first, or give one steer all guidances and the method"
        )
    for name, said in PARTS.items():
        if getattr(pipe, name, None) is not None:
            raise ValueError(
                f"pipe must have one network and nothing beside it: a {type(pipe).__name__} has {said}"
            )
    if "strength" in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(
            f"pipe must begin with noise: a {type(pipe).__name__} begins with an image. FewstepScheduler runs any "
            "solver in it"
        )
    network(pipe)


def _subclass(kind: type, handle: Steered) -> type:
    """A class like the pipeline's but for its call, under its name, which diffusers goes by."""

    @functools.wraps(kind.__call__)
    def __call__(self: Any, *arguments: Any, **options: Any) -> Any:
        return handle._call(self, *arguments, **options)

    own = {
        "__call__": __call__,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "_steered_by": handle,
    }
    return type(kind.__name__, (kind,), own)


def _scheduled(scheduler: Any, path: Path, schedule: Mapping[str, Any]) -> tuple[Table, float, Any]:
    """The scheduler's own table, what its first sample is of unit noise, and what it does to estimates of x0."""
    if hasattr(scheduler, "table_for"):  # ours
        found = Theirs(scheduler.table_for(**schedule), float(scheduler.init_noise_sigma))
    else:
        found = table_of(scheduler, path, schedule)
    return *found, meaning.transform(scheduler.config)


def _counted(d: Denoiser) -> list[None]:
    """A list that grows by one a call of the network."""
    calls: list[None] = []
    inner = d.call

    def call(x: torch.Tensor, tau: torch.Tensor, **cond: Any) -> Any:
        calls.append(None)
        return inner(x, tau, **cond)

    d.call = call
    return calls


def _steps(schedule: Mapping[str, Any]) -> int:
    given = [schedule[name] for name in ("sigmas", "timesteps") if name in schedule]
    return meaning.steps_of(schedule.get("num_inference_steps"), *given)


def _has_seed(method: Any) -> bool:
    return isinstance(method, functools.partial) and "seed" in method.keywords


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)
