"""The one interface between networks and everything else here: a ``Denoiser`` is a path plus a network.

Whatever a network predicts is  F = g_x x0 + g_e eps  at  x = alpha x0 + sigma eps, so any quantity we may want,
h_x x0 + h_e eps, is  P x + Q F  with scalars that depend on t alone (``convert``). Samplers fold them into their own
coefficients; people call ``d(x, t)``.

    >>> import torch
    >>> from fewstep.models import paths
    >>> d = Denoiser(lambda x, t: torch.zeros_like(x), paths.flow(), predicts="flow")   # a network that answers 0
    >>> d(torch.full((2, 3), 5.0), 0.25)[0]                                             # x0 = x - t v
    tensor([5., 5., 5.])
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from .paths import Path, Times, coefficient

Form = Literal["x0", "eps", "v"]
Predicts = Literal["eps", "x0", "v", "flow", "score"]
PREDICTS = ("eps", "x0", "v", "flow", "score")
FORMS = ("x0", "eps", "v")
NULL = "null"  # the key of ``cond`` under which a condition carries what guidance puts in its place


def combination(kind: str, path: Path, t: Times) -> tuple[Times, Times]:
    """(g_x, g_e) of a prediction: what it is made of, g_x x0 + g_e eps.

    ``v`` as a prediction is the VP velocity alpha eps - sigma x0 (2202.00512); ``flow`` is dx/dt on the path itself,
    which on the straight path is eps - x0.
    """
    if kind == "x0":
        return 1.0, 0.0
    if kind == "eps":
        return 0.0, 1.0
    if kind == "score":
        sigma = path.sigma(t)
        with np.errstate(divide="ignore"):
            return 0.0, -1.0 / (np.float64(sigma) if isinstance(sigma, float) else sigma)
    if kind == "v":
        return -path.sigma(t), path.alpha(t)
    if kind == "flow":
        return path.alpha_prime(t), path.sigma_prime(t)
    raise ValueError(f"predicts must be one of {', '.join(PREDICTS)}, got {kind!r}")


def convert(path: Path, t: Times, given: str, wanted: str) -> tuple[Times, Times]:
    """(P, Q) with  wanted = P x + Q given  at time t. ``wanted`` may also be called by a table's form: v is dx/dt.

    >>> from fewstep.models import paths
    >>> convert(paths.flow(), 0.25, "flow", "x0"), convert(paths.flow(), 1.0, "flow", "x0")
    ((1.0, -0.25), (1.0, -1.0))
    """
    if given == wanted:
        return 0.0, 1.0
    alpha, sigma = path.alpha(t), path.sigma(t)
    g_x, g_e = combination(given, path, t)
    h_x, h_e = combination(wanted, path, t)
    with np.errstate(divide="ignore", invalid="ignore"):
        if isinstance(alpha, float):
            alpha = np.float64(alpha)  # divides by 0 without an exception
        determinant = alpha * g_e - sigma * g_x
        p = (h_x * g_e - h_e * g_x) / determinant
        q = (alpha * h_e - sigma * h_x) / determinant
    if isinstance(t, (torch.Tensor, np.ndarray)):
        return p, q
    return float(p), float(q)


def _sqrt(value: Times) -> Times:
    """Not ``value**0.5``: torch rounds a power by where a number stands in its tensor."""
    return value.sqrt() if isinstance(value, torch.Tensor) else np.sqrt(value)


def _wanted(form: str) -> str:
    if form not in FORMS and form != "score":
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    return "flow" if form == "v" else form


def _place(name: str) -> tuple[str, int]:
    """("blocks.3", 1) of "blocks.3[1]"."""
    found = re.fullmatch(r"(.*)\[(\d+)\]", name)
    return (found[1], int(found[2])) if found else (name, 0)


class Denoiser:
    """A network on a path, seen as an estimator of x0.

    Args:
        call: ``call(x, tau, **cond)`` -> the network's output (or a tuple of them); ``tau`` has shape (B,). Written as
            ``partial(function, net)`` it lets ``copy`` bind a network of its own.
        path: the Gaussian path it was trained on.
        predicts: what the output is: ``eps``, ``x0``, ``v`` (VP), ``flow`` (dx/dt) or ``score``.
        precond: ``"edm"`` wraps the output as EDM does (2206.00364): x0 = c_skip x/alpha + c_out F with
            F = call(c_in x/alpha, ln(rho)/4).
        sigma_data: EDM's constant, the data's standard deviation.
        time: t -> the number the network wants (default: t itself; EDM: ln(rho)/4), on float64 tensors and floats.
        net: the module behind ``call``: what patching, LoRA, EMA and sharding see.
        shape: the shape of one sample.
        codec: encode/decode/embed for latent and text models; None means samples are the data.
        dtype: what the network's input is cast to; by default the dtype of ``net``'s parameters. Outputs come back as
            they are and meet the float32 state in the sampler.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        path: Path,
        predicts: Predicts = "eps",
        precond: Literal["edm"] | None = None,
        sigma_data: float = 0.5,
        time: Callable[[Times], Times] | None = None,
        net: nn.Module | None = None,
        shape: Sequence[int] | None = None,
        codec: Any = None,
        dtype: torch.dtype | None = None,
    ):
        if not callable(call):
            raise TypeError(f"call must be a function (x, tau, **cond) -> output, got {type(call).__name__}")
        if not isinstance(path, Path):
            raise TypeError(f"path must be a fewstep path, e.g. paths.flow(), got {type(path).__name__}")
        if predicts not in PREDICTS:
            raise ValueError(f"predicts must be one of {', '.join(PREDICTS)}, got {predicts!r}")
        if precond not in (None, "edm"):
            raise ValueError(f"precond must be 'edm' or None, got {precond!r}")
        if precond == "edm" and predicts != "x0":
            raise ValueError(f"precond='edm' makes an x0 estimate: predicts must be 'x0', got {predicts!r}")
        self.call, self.path, self.predicts, self.precond = call, path, predicts, precond
        self.sigma_data, self.time, self.net = float(sigma_data), time, net
        self.shape = None if shape is None else tuple(shape)
        self.codec = codec
        self.config: dict[str, Any] | None = None  # what ``load.build`` made it from: enough to save it
        self._dtype = dtype

    # --- what samplers use: outputs as they are, and the scalars that turn them into something --------------------

    def raw(self, x: torch.Tensor, t: Times, **cond: Any) -> tuple[torch.Tensor, ...]:
        """The outputs (F_1 .. F_m) of the network(s) at x, time t; ``cond``'s ``null`` is guidance's, not theirs."""
        cond.pop(NULL, None)
        scale = self._input_scale(t)
        network_input = x if scale is None else x * coefficient(scale, x)
        dtype = self.dtype
        if dtype is not None and network_input.dtype != dtype:
            network_input = network_input.to(dtype)
        out = self.call(network_input, self._network_time(x, t), **cond)
        return out if isinstance(out, tuple) else (out,)

    def affine(self, t: Times, form: Form = "x0") -> tuple[Times, tuple[Times, ...]] | None:
        """(P, (Q_1 .. Q_m)) with  form = P x + sum_i Q_i F_i  at time t; None where a composite is not affine."""
        wanted = _wanted(form)
        if self.precond is None:
            p, q = convert(self.path, t, self.predicts, wanted)
            return p, (q,)
        # x0 = c_skip x / alpha + c_out F, written without dividing by alpha
        alpha, sigma, s = self.path.alpha(t), self.path.sigma(t), self.sigma_data
        total = sigma * sigma + alpha * alpha * s * s
        skip, out = alpha * s * s / total, sigma * s / _sqrt(total)
        p, q = convert(self.path, t, "x0", wanted)
        return p + q * skip, (q * out,)

    def parts(self) -> tuple[Denoiser, ...]:
        """The leaves: itself, or for a composite the denoisers that it blends."""
        return (self,)

    # --- what people use ---------------------------------------------------------------------------------------

    def __call__(self, x: torch.Tensor, t: Times, **cond: Any) -> torch.Tensor:
        """The estimate of x0 given x at time t (a float, one a sample, or leading axes of x)."""
        return self._as("x0", x, t, cond)

    def eps(self, x: torch.Tensor, t: Times, **cond: Any) -> torch.Tensor:
        """The estimate of the noise."""
        return self._as("eps", x, t, cond)

    def velocity(self, x: torch.Tensor, t: Times, **cond: Any) -> torch.Tensor:
        """dx/dt of the probability-flow ODE: alpha' x0 + sigma' eps."""
        return self._as("v", x, t, cond)

    def score(self, x: torch.Tensor, t: Times, **cond: Any) -> torch.Tensor:
        """The gradient of log p_t: -eps / sigma."""
        return self._as("score", x, t, cond)

    def _as(self, form: str, x: torch.Tensor, t: Times, cond: dict) -> torch.Tensor:
        if isinstance(t, np.ndarray) or isinstance(t, int):
            t = torch.as_tensor(t, device=x.device) if isinstance(t, np.ndarray) else float(t)
        outputs = self.raw(x, t, **cond)
        scalars = self.affine(t, form)  # type: ignore[arg-type]
        if scalars is None:
            raise NotImplementedError(f"{type(self).__name__} is not affine and must define __call__ itself")
        p, qs = scalars
        if isinstance(p, float) and not np.isfinite([p, *qs]).all():
            at = f"alpha = {self.path.alpha(t):.3g}, sigma = {self.path.sigma(t):.3g}"
            raise ValueError(
                f"t must be a time where {form} follows from {self.predicts}, got t = {t} ({at})"
            )
        answer = x * coefficient(p, x)
        for q, output in zip(qs, outputs, strict=True):
            answer = answer + coefficient(q, x) * output.to(x.dtype)
        return answer

    @property
    def dtype(self) -> torch.dtype | None:
        """What the network computes in; None when there is no module to ask."""
        if self._dtype is not None or self.net is None:
            return self._dtype
        return next((p.dtype for p in self.net.parameters() if p.is_floating_point()), None)

    @contextlib.contextmanager
    def tap(self, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Collect the outputs of named submodules during the calls inside the block.

        Of a module with several outputs the first, or the k-th as ``name[k]``: blocks of SD3 and Flux answer with text
        and then with image tokens.

        >>> from fewstep.models import paths
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 2))
        >>> d = Denoiser(lambda x, tau: net(x), paths.edm(), predicts="x0", net=net)
        >>> with d.tap(["0"]) as feats: _ = d(torch.zeros(3, 2), 1.0)
        >>> feats["0"].shape
        torch.Size([3, 4])
        """
        if self.net is None:
            raise ValueError("tap needs a Denoiser made with net=..., so that it can find the submodules")
        modules = dict(self.net.named_modules())
        places = {name: _place(name) for name in names}
        missing = [name for name, (module, _) in places.items() if module not in modules]
        if missing:
            raise ValueError(
                f"names must be submodules of {type(self.net).__name__}; it has no {', '.join(missing)}"
            )
        features: dict[str, torch.Tensor] = {}

        def keep(name: str, k: int):
            def hook(_module, _inputs, output):
                outputs = output if isinstance(output, tuple) else (output,)
                if k < len(outputs) and isinstance(outputs[k], torch.Tensor):
                    features[name] = outputs[k]

            return hook

        handles = [modules[m].register_forward_hook(keep(name, k)) for name, (m, k) in places.items()]
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()

    def copy(self) -> Denoiser:
        """A Denoiser of the same kind over a copy of ``net``: a student, or a critic, that starts as its teacher.

        >>> from functools import partial
        >>> from fewstep.models import paths
        >>> def ask(net, x, tau): return net(x)
        >>> net = nn.Linear(2, 2)
        >>> twin = Denoiser(partial(ask, net), paths.flow(), predicts="flow", net=net).copy()
        >>> twin.net is net, twin.call.args[0] is twin.net
        (False, True)
        """
        if not isinstance(self.call, functools.partial) or self.call.args[:1] != (self.net,):
            raise ValueError(
                "to be copied, a Denoiser must be made with net=net and call=functools.partial(function, net), "
                "so that the copy can bind a network of its own"
            )
        twin, net = copy.copy(self), copy.deepcopy(self.net)
        twin.net = net
        twin.call = functools.partial(self.call.func, net, *self.call.args[1:], **self.call.keywords)
        return twin

    def to(self, *args: Any, **kwargs: Any) -> Denoiser:
        """Move ``net`` (as ``nn.Module.to`` does), what its codec is made of too, and return self."""
        if self.net is not None:
            self.net.to(*args, **kwargs)
        if self.codec is not None:
            self.codec.to(*args, **kwargs)
        return self

    # --- how the network wants its input -----------------------------------------------------------------------

    def _input_scale(self, t: Times) -> Times | None:
        if self.precond is None:
            return None
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return 1 / _sqrt(sigma * sigma + alpha * alpha * self.sigma_data**2)

    def _network_time(self, x: torch.Tensor, t: Times) -> torch.Tensor:
        if self.time is not None:
            tau = self.time(t)
        elif self.precond == "edm":
            tau = self.path.lam(t) * -0.25
        else:
            tau = t
        # float32 rounds t = 999.37 to 6e-5: enough for any network; exact models run in float64 and keep it
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if isinstance(tau, torch.Tensor):
            tau = tau.to(device=x.device, dtype=dtype)
            return tau.expand(x.shape[0]) if tau.ndim == 0 else tau
        return torch.full((x.shape[0],), float(tau), dtype=dtype, device=x.device)
