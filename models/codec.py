"""What stands between data and a network: a ``Codec`` makes latents of images and back, and conditions of prompts.

    images in [-1, 1], (B, C, H, W) or (B, C, T, H, W)  <->  z = mean + std y / scale  <->  y, what the sampler moves

``y`` is packed where the network wants it so (Flux: 2 x 2 patches as tokens). A Denoiser with ``codec=None`` samples
the data themselves; ``encode(d, images)`` and ``decode(d, x)`` ask no questions.

    >>> cond = Condition({"text": torch.zeros(1, 4)}, null={"text": torch.ones(1, 4)})
    >>> sorted(cond), sorted(cond.repeat(3)["null"])
    (['null', 'text'], ['text'])
    >>> cond.repeat(3)["text"].shape
    torch.Size([3, 4])
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .denoiser import NULL, Denoiser


class Condition(Mapping):
    """What a network is told about what to sample, and what it is told of nothing in particular.

    A mapping like any other ``cond``: the network's keywords and, under ``null``, those that guidance puts in their
    place. A null of None means that there is none, and guidance has nothing to lead away from.

    Args:
        cond: keywords of the network; tensors have a row a sample, or one row for all.
        null: what replaces some or all of them for no condition.
    """

    def __init__(self, cond: Mapping[str, Any], null: Mapping[str, Any] | None = None):
        self.cond, self.null = dict(cond), None if null is None else dict(null)

    def __getitem__(self, key: str) -> Any:
        if key == NULL and self.null is not None:
            return self.null
        return self.cond[key]

    def __iter__(self) -> Iterator[str]:
        yield from self.cond
        if self.null is not None:
            yield NULL

    def __len__(self) -> int:
        return len(self.cond) + (self.null is not None)

    def __repr__(self) -> str:
        return f"Condition({', '.join(self.cond)}; null: {', '.join(self.null or ()) or 'none'})"

    def repeat(self, times: int) -> Condition:
        """Every row ``times`` times, side by side."""
        return self._each(lambda value: value.repeat_interleave(times, 0))

    def take(self, index: torch.Tensor | list[int]) -> Condition:
        """The rows at ``index``: of samples that are copied, dropped or sorted."""
        index = torch.as_tensor(index)
        return self._each(lambda value: value[index.to(value.device)])

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """All tensors elsewhere."""
        return self._each(lambda value: value.to(*args, **kwargs))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Condition:
        return Condition(
            _changed(self.cond, change), None if self.null is None else _changed(self.null, change)
        )


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, Mapping):
        return {key: _changed(inner, change) for key, inner in value.items()}
    return change(value) if isinstance(value, torch.Tensor) and value.ndim else value


def dealt(cond: Mapping[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """A condition for the samples ``ids``: the rows of every tensor dealt out to all samples in turn, nested ones too.

    >>> dealt({"label": torch.tensor([5, 6, 7]), "more": {"size": torch.ones(1, 2)}}, torch.arange(2, 6))["label"]
    tensor([7, 5, 6, 7])
    """
    return _changed(cond, lambda value: value.to(ids.device)[ids % len(value)])


class Codec:
    """An autoencoder of diffusers and a function of prompts; without either it leaves things as they are.

    Args:
        vae: has ``encode``, ``decode`` and a config with ``scaling_factor``, ``shift_factor``, ``latents_mean``,
            ``latents_std``, or none of them.
        embed: ``embed(prompt, negative, **options) -> Condition``.
        grid: (rows, columns) of the tokens that latents are packed into, 2 x 2 latents each; None where they are not.
        batch: how many samples the autoencoder sees at once.
        null: the null condition of a model whose conditions are classes, e.g. ``{"label": 1000}``.
        guidance: the scale that the pipeline guides by where nothing is said.
        distilled: that scale is a number which the network is told, ``embed("a fox", guidance_scale=3.5)``, not cfg's.
        pipe: whose autoencoder and text encoders these are: ``to`` moves all of it.
        size: what of the pipeline's own size was chosen when it was loaded, by its own keywords.
    """

    def __init__(
        self,
        vae: nn.Module | None = None,
        embed: Callable[..., Condition] | None = None,
        grid: tuple[int, int] | None = None,
        batch: int = 4,
        null: Mapping[str, Any] | None = None,
        guidance: float = 1.0,
        distilled: bool = False,
        pipe: Any = None,
        size: Mapping[str, int] | None = None,
    ):
        self.size = dict(size or {})
        self.vae, self.grid, self.batch, self.null, self.pipe = vae, grid, batch, null, pipe
        self.guidance, self.distilled = guidance, distilled
        self._embed = embed

    def embed(
        self, prompt: str | list[str], negative: str | list[str] | None = "", **options: Any
    ) -> Condition:
        """The condition for a prompt, or one row a prompt.

        ``negative`` is what guidance leads away from: "" is what the pipeline itself takes where nothing is said,
        None makes no null. ``options`` are the pipeline's own.
        """
        if self._embed is None:
            instead = f"; cond={{{', '.join(map(repr, self.null))}: ..}} says a class" if self.null else ""
            raise ValueError(f"prompt is of no use to this model: it takes no text{instead}")
        return self._embed(prompt, negative, **options)

    def to(self, *args: Any, **kwargs: Any) -> Codec:
        """Moves the pipeline, or else the autoencoder, and returns self."""
        owner = self.vae if self.pipe is None else self.pipe
        if owner is not None:
            owner.to(*args, **kwargs)
        return self

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents, the mode of the autoencoder's posterior, as the network was trained on them."""
        if self.vae is None:
            return images
        return self._pieces(self._encode, images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images, about -1 to 1, in float32; gradients flow where ``latents`` want them."""
        if self.vae is None:
            return latents
        return self._pieces(self._decode, latents)

    def _pieces(self, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor) or not len(x):
            raise ValueError(f"images or latents must be a tensor (batch, ...), got {_told(x)}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            return torch.cat([run(piece) for piece in x.split(self.batch)])

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        with _in_full(self.vae) as dtype:
            found = self.vae.encode(images.to(self._device, dtype), return_dict=False)[0]
            z = (found if isinstance(found, torch.Tensor) else found.mode()).float()
        mean, std, scale = self._moments(z)
        return self._packed((z - mean) / std * scale)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        y = self._unpacked(latents.to(self._device, torch.float32))
        mean, std, scale = self._moments(y)
        with _in_full(self.vae) as dtype:
            return self.vae.decode((y / scale * std + mean).to(dtype), return_dict=False)[0].float()

    @property
    def decodes(self) -> bool:
        """Whether it can make images now: some are known by name only, until an autoencoder is given."""
        return True

    @property
    def takes_text(self) -> bool:
        """Whether it embeds prompts."""
        return self._embed is not None

    @property
    def _device(self) -> torch.device:
        execution = getattr(
            self.pipe, "_execution_device", None
        )  # elsewhere than the weights, if these are offloaded
        return next(self.vae.parameters()).device if execution is None else execution

    def _moments(self, like: torch.Tensor) -> tuple[Any, Any, float]:
        """(mean, std, scale) with  y = (z - mean) / std * scale."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        scale = getattr(config, "scaling_factor", None) or 1.0
        if mean is None or std is None:
            return getattr(config, "shift_factor", None) or 0.0, 1.0, scale
        shape = (-1,) + (1,) * (like.ndim - 2)
        return torch.tensor(mean).to(like).reshape(shape), torch.tensor(std).to(like).reshape(shape), scale

    def _packed(self, y: torch.Tensor) -> torch.Tensor:
        if self.grid is None:
            return y
        (rows, columns), (batch, channels) = self.grid, y.shape[:2]
        if y.shape[2:] != (2 * rows, 2 * columns):
            raise ValueError(
                f"images must have latents of {2 * rows} x {2 * columns}, which this model was loaded for; got "
                f"{y.shape[2]} x {y.shape[3]}"
            )
        y = y.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        return y.reshape(batch, rows * columns, 4 * channels)

    def _unpacked(self, y: torch.Tensor) -> torch.Tensor:
        if self.grid is None:
            return y
        rows, columns = self.grid
        if y.ndim != 3 or y.shape[1] != rows * columns or y.shape[2] % 4:
            raise ValueError(
                f"latents must have shape (batch, {rows * columns}, 4 x channels), {rows} x {columns} tokens, got "
                f"{tuple(y.shape)}"
            )
        y = y.reshape(len(y), rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(len(y), -1, 2 * rows, 2 * columns)


@contextlib.contextmanager
def _in_full(vae: nn.Module) -> Iterator[torch.dtype]:
    """What an autoencoder computes in: where it overflows in float16 and says so, float32 inside the block."""
    dtype = next(p.dtype for p in vae.parameters() if p.is_floating_point())
    if dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        yield dtype
        return
    vae.to(torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(dtype)


def encode(d: Denoiser, images: torch.Tensor) -> torch.Tensor:
    """What ``d`` samples of ``images``: themselves, or their latents."""
    return images if d.codec is None else d.codec.encode(images)


def decode(d: Denoiser, x: torch.Tensor) -> torch.Tensor:
    """The images of samples of ``d``.

    >>> from fewstep.models import load
    >>> decode(load("digits"), torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """
    return x if d.codec is None else d.codec.decode(x)


def _told(x: Any) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
