"""Ask the pipeline: what would it tell its network, for this prompt?

A diffusers pipeline is run unchanged with its network and its scheduler replaced for the time of the call. What stands
in for the network keeps what it is given and answers noise, what stands in for the scheduler sees what the pipeline
made of these answers. So nothing of a family's text encoding, sizes, packing or guidance is written here again:

    cond, null        the network's keywords with the prompt and without it
    scale, rescale    the pipeline's guidance:  null + scale (cond - null), found by solving for the answers' weights
    noise             the latents that the pipeline drew, before any scheduler scaled them
    clock             how the network counts time, against the scheduler's t: "t", "t / T" or "1 - t / T"

    with intercepted(pipe, lambda asked: method(asked)):   # ``method`` takes the place of the whole loop
        image = pipe("a fox").images[0]
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

POSITIONS = frozenset({"img_ids", "txt_ids"})  # of tokens, for a whole batch, whatever its size
ENOUGH = 4096  # elements of an answer to tell it by
CLOCKS: dict[str, Callable[[Any, float], Any]] = {
    "t": lambda t, steps: t,
    "t / T": lambda t, steps: t / steps,
    "1 - t / T": lambda t, steps: 1 - t / steps,
}


class Asked(NamedTuple):
    """What a pipeline gave its network and its scheduler at the first step.

    Tensors of ``cond`` and ``null`` have a row a sample; what the network gets once for all of them, named in
    ``shared``, has one row here, a copy a sample if you like. ``null`` is None where the pipeline has one branch.
    """

    cond: dict[str, Any]
    null: dict[str, Any] | None
    shared: frozenset[str]
    scale: float
    rescale: float
    noise: torch.Tensor  # (B, ...): where a pipeline doubles its latents (DiT), one of the two
    dtype: torch.dtype  # of the network's input
    channels: int  # of the network's output, 2C where it answers with a variance too
    clock: str
    tau_shape: tuple[int, ...]  # of one sample's time, () unless every token has its own
    schedule: dict[str, Any]  # what the pipeline passed to set_timesteps


class Call(NamedTuple):
    """One call of the network: its input, its time, its other arguments, and the noise that it got for an answer."""

    x: torch.Tensor
    tau: torch.Tensor
    arguments: dict[str, Any]
    answer: torch.Tensor


def network(pipe: Any) -> nn.Module:
    """The network that denoises."""
    for name in ("transformer", "unet"):
        found = getattr(pipe, name, None)
        if found is not None:
            break
    else:
        raise ValueError(f"pipe must have a unet or a transformer, got a {type(pipe).__name__}")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            f"pipe must have one network, and this {type(pipe).__name__} has two, for early and late times: that is "
            "not supported"
        )
    return found


def bare(net: nn.Module) -> nn.Module:
    """The network inside of what torch.compile and peft put round it."""
    net = getattr(net, "_orig_mod", net)
    return net.get_base_model() if hasattr(net, "get_base_model") else net


def argument_names(net: nn.Module) -> list[str]:
    """The names of what the network takes, its input first."""
    return [name for name in inspect.signature(type(bare(net)).forward).parameters if name != "self"]


@contextlib.contextmanager
def intercepted(pipe: Any, step: Callable[[Asked], torch.Tensor]) -> Iterator[None]:
    """Inside the block the pipeline's calls make one step each, ``step(asked)`` its result; then all is as it was.

    The pipeline's own loop sees one time. Its network is not called by it, but may be called by ``step``.
    """
    if not callable(getattr(pipe, "scheduler", None) and getattr(pipe.scheduler, "step", None)):
        raise TypeError(f"pipe must be a diffusers pipeline with a scheduler, got {type(pipe).__name__}")
    net, scheduler = network(pipe), pipe.scheduler
    calls: list[Call] = []
    recorder = {"forward": _recorder(calls, argument_names(net), bare(net)), "_compiled_call_impl": None}
    held = {name: net.__dict__[name] for name in recorder if name in net.__dict__}

    def restore() -> None:
        for name in recorder:
            net.__dict__.pop(name, None)
        net.__dict__.update(held)

    def answer(stand_in: StandIn, output: torch.Tensor, t: Any, sample: torch.Tensor) -> torch.Tensor:
        asked = _asked(calls, stand_in, output, t, sample)
        calls.clear()
        restore()  # for ``step`` wants the network itself
        try:
            return _doubled_again(step(asked), sample)
        finally:
            net.__dict__.update(recorder)

    net.__dict__.update(recorder)
    object.__setattr__(pipe, "scheduler", StandIn(scheduler, answer))  # past the pipeline's own bookkeeping
    try:
        yield
    finally:
        restore()
        object.__setattr__(pipe, "scheduler", scheduler)


def ask(pipe: Any, *arguments: Any, **options: Any) -> Asked:
    """What a call of the pipeline with these arguments would ask of its network; it goes no further than that."""
    found: list[Asked] = []

    def stop(asked: Asked) -> torch.Tensor:
        found.append(asked)
        raise _Stop

    if "num_inference_steps" in inspect.signature(pipe.__call__).parameters:
        options.setdefault("num_inference_steps", 1)
    bar = dict(getattr(pipe, "_progress_bar_config", None) or {})
    with intercepted(pipe, stop), torch.no_grad():
        try:
            pipe.set_progress_bar_config(**{**bar, "disable": True})
            pipe(*arguments, **options)
        except _Stop:
            pipe.maybe_free_model_hooks()
        finally:
            pipe.set_progress_bar_config(**bar)
    if not found:
        raise ValueError(
            f"this {type(pipe).__name__} made no step of its scheduler, so nothing is known of it"
        )
    return found[0]


class _Stop(Exception):
    """The pipeline has said all that we wanted to know."""


class StandIn:
    """In the scheduler's place: one time, nothing scaled, and a step that is somebody else's. Else the scheduler."""

    order, init_noise_sigma = 1, 1.0

    def __init__(
        self, scheduler: Any, answer: Callable[[StandIn, torch.Tensor, Any, torch.Tensor], torch.Tensor]
    ):
        self.scheduler, self.config, self._answer = scheduler, scheduler.config, answer
        self.schedule: dict[str, Any] = {}
        self.total = int(scheduler.config.get("num_train_timesteps", 1000))
        times = getattr(scheduler, "timesteps", None)
        whole = times is not None and not torch.is_floating_point(torch.as_tensor(times))
        self.timesteps = torch.tensor([self.total - 1 if whole else float(self.total)])
        self.sigmas, self.step_index, self.begin_index = torch.tensor([1.0, 0.0]), None, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def __len__(self) -> int:
        return self.total

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None,
                      timesteps: Any = None, mu: float | None = None, **more: Any) -> None:  # fmt: skip
        """Keeps what it is told. (Pipelines look the names of these arguments up.)"""
        told = {
            "num_inference_steps": num_inference_steps,
            "sigmas": sigmas,
            "timesteps": timesteps,
            "mu": mu,
            **more,
        }
        self.schedule = {name: value for name, value in told.items() if value is not None}
        self.timesteps, self.num_inference_steps = self.timesteps.to(device), 1

    def set_begin_index(self, begin_index: int = 0) -> None:
        """There is one time."""

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample as it is."""
        return sample

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True,
             **_: Any) -> Result:  # fmt: skip
        """What the answer makes of it."""
        result = self._answer(self, model_output, timestep, sample)
        return Result(result, result)


class Result(NamedTuple):
    """What a scheduler's step returns, as an object or as a tuple."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


def _recorder(calls: list[Call], names: list[str], net: nn.Module) -> Callable[..., Any]:
    """A forward that answers each row of each call with noise of its own."""

    def forward(*positional: Any, **named: Any) -> Any:
        arguments = dict(zip(names, positional)) | named
        x, tau = arguments.pop(names[0]), arguments.pop("timestep")
        arguments.pop("return_dict", None)
        shape = list(x.shape)
        channels = getattr(net.config, "out_channels", None)
        if channels:
            shape[1 if x.ndim > 3 else -1] = channels
        generator = torch.Generator().manual_seed(len(calls))
        # double precision whatever the network's, so that the guidance's scale is read off exactly
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        answer = torch.randn(shape, generator=generator, dtype=dtype).to(x.device)
        calls.append(Call(x, tau, arguments, answer))
        return _Output(answer)

    return forward


class _Output(tuple):
    """``output[0]`` and ``output.sample``, whichever the pipeline reads."""

    def __new__(cls, sample: torch.Tensor) -> _Output:
        return super().__new__(cls, (sample,))

    @property
    def sample(self) -> torch.Tensor:
        return self[0]


# --- what the pipeline made of it -------------------------------------------------------------------------------


def _asked(calls: list[Call], stand_in: StandIn, output: torch.Tensor, t: Any, sample: torch.Tensor) -> Asked:
    if not calls:
        raise ValueError("the pipeline stepped its scheduler without calling its network")
    first = calls[0]
    if first.x.shape[1:] != sample.shape[1:]:
        raise ValueError(
            f"the pipeline must give its network the latents and nothing beside them: they are "
            f"{tuple(sample.shape[1:])}, and the network is given {tuple(first.x.shape[1:])}"
        )
    weights = _weights(calls, output)
    if len(weights) not in (1, 2) or abs(sum(weights.values())) < 1e-6:
        raise ValueError(
            f"the pipeline must combine one or two answers of its network, and it combines {len(weights)}: guidance "
            "of this kind is not supported"
        )
    factor = sum(weights.values())  # 1, unless the guidance is rescaled
    (cond_at, cond_weight), *others = sorted(weights.items(), key=lambda item: -item[1] / factor)
    halves = 2 if others and others[0][0][0] == cond_at[0] else 1
    batch = len(calls[cond_at[0]].x) // halves
    shared: set[str] = set()

    def branch(at: tuple[int, int]) -> dict[str, Any]:
        call, begin = calls[at[0]], at[1]
        return _rows(call.arguments, len(call.x), slice(begin, begin + batch), shared)

    cond = branch(cond_at)
    null = branch(others[0][0]) if others else None
    scale = round(cond_weight / factor, 6)
    return Asked(
        cond, null, frozenset(shared), scale, _rescale(calls, weights, cond_at, factor), sample[:batch], first.x.dtype,
        first.answer.shape[1 if first.x.ndim > 3 else -1], _clock(first.tau, t, stand_in.total),
        tuple(torch.as_tensor(first.tau).shape[1:]), stand_in.schedule,
    )  # fmt: skip


def _weights(calls: list[Call], output: torch.Tensor) -> dict[tuple[int, int], float]:
    """(call, row) -> weight: how the first row of the scheduler's output is made of the answers."""
    channel = slice(None) if output.ndim == 3 else slice(output.shape[1])
    wanted = output[0].flatten()[:ENOUGH].double().cpu()
    if not wanted.isfinite().all():
        raise ValueError(
            "the pipeline made infinities or NaN of its network's answers: is its guidance a number?"
        )
    keys, columns = [], []
    for index, call in enumerate(calls):
        for row, answer in enumerate(call.answer):
            keys.append((index, row))
            columns.append(answer[channel].flatten()[:ENOUGH].double().cpu())
    basis = torch.stack(columns, 1)
    solution = torch.linalg.lstsq(basis, wanted[:, None]).solution[:, 0]
    if (basis @ solution - wanted).abs().max() > 1e-3 * wanted.abs().max():
        raise ValueError(
            "the pipeline must guide by a weighted sum of its network's answers, and it does something else"
        )
    return {key: float(w) for key, w in zip(keys, solution) if abs(w) > 1e-4}


def _rescale(
    calls: list[Call], weights: Mapping[tuple[int, int], float], cond: tuple[int, int], factor: float
) -> float:
    """phi of 2305.08891, by which guidance was shrunk: factor = phi std(cond) / std(guided) + 1 - phi."""
    if abs(factor - 1) < 1e-5:
        return 0.0
    answers = {at: calls[at[0]].answer[at[1]] for at in weights}
    guided = sum(w / factor * answers[at] for at, w in weights.items())
    return round(float((1 - factor) / (1 - answers[cond].std() / guided.std())), 4)


def _rows(value: Any, batch: int, rows: slice, shared: set[str], name: str = "") -> Any:
    """The rows of one branch; tensors that have no such rows are shared by all samples."""
    if isinstance(value, Mapping):
        found = {
            key: _rows(inner, batch, rows, shared, key) for key, inner in value.items() if inner is not None
        }
        return {key: inner for key, inner in found.items() if not (isinstance(inner, dict) and not inner)}
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    if name in POSITIONS or len(value) != batch:
        shared.add(name)
        return value[None]
    return value[rows]


def _clock(tau: Any, t: Any, total: int) -> str:
    """How the network's time follows from the scheduler's."""
    given, counted = float(torch.as_tensor(tau).flatten()[0]), float(t)
    for name, clock in CLOCKS.items():
        if abs(given - clock(counted, total)) <= 0.01 * max(abs(given), 1e-3):  # times in half precision
            return name
    raise ValueError(
        f"the pipeline must give its network a time that is one of {', '.join(CLOCKS)}; at t = {counted:g} of {total} "
        f"it gave {given:g}"
    )


def _doubled_again(result: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """As many rows as the pipeline's own sample has."""
    if len(result) == len(sample):
        return result.to(sample.dtype)
    return torch.cat([result] * (len(sample) // len(result))).to(sample.dtype)
