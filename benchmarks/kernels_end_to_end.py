"""Ten-step sampling with networks of random weights: ours, patched and captured, against diffusers and torch.compile.

    python benchmarks/kernels_end_to_end.py --out benchmarks/results/kernels-end-to-end.json
    python benchmarks/kernels_end_to_end.py --tiny --device cpu --out out/kernels-end-to-end.json   # the script itself

Rows: the EDM UNet of CIFAR-10 (ours), DiT-XL/2, SDXL's UNet and a stack of Flux blocks (diffusers'; left out where it
is not installed). All loops call the network ten times, without guidance. JSON after every row, and no row begins after
``--minutes``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fewstep.eval import bench
from fewstep.models import Denoiser, patch, paths
from fewstep.models.edm_unet import EDMUNet
from fewstep.samplers import capture, deis, grids, sample, starting_noise

STEPS = 10


class Row(NamedTuple):
    """A network, how ours calls it, its conditions, a sample's shape, and diffusers' loop over it."""

    net: torch.nn.Module
    denoiser: Callable[[torch.nn.Module], Denoiser]
    cond: dict[str, Any]
    shape: tuple[int, ...]
    loop: Callable[[Callable, torch.Tensor], torch.Tensor] | None


def edm(device: torch.device, dtype: torch.dtype, tiny: bool) -> Row:
    """CIFAR-10, unconditional, DDPM++: batch 64."""
    config = dict(kind="song", img_resolution=32, in_channels=3, out_channels=3, channel_mult=(2, 2, 2))
    if tiny:
        config |= dict(
            img_resolution=8, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)
        )
    net = EDMUNet(config)
    size = config["img_resolution"]

    def loop(call: Callable, x: torch.Tensor) -> torch.Tensor:
        from diffusers import EDMEulerScheduler

        scheduler = EDMEulerScheduler()
        scheduler.set_timesteps(STEPS, device=device)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            out = call(scheduler.scale_model_input(x, t).to(dtype), t.float().expand(len(x)))
            x = scheduler.step(out.float(), t, x).prev_sample
        return x

    def denoiser(net: torch.nn.Module) -> Denoiser:
        return Denoiser(net, paths.edm(), "x0", precond="edm", net=net)

    return Row(net, denoiser, {}, (2 if tiny else 64, 3, size, size), loop)


def dit(device: torch.device, dtype: torch.dtype, tiny: bool) -> Row:
    """DiT-XL/2 at 256 pixels, batch 8."""
    from diffusers import DiTTransformer2DModel

    config = dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
                  sample_size=32, patch_size=2, num_embeds_ada_norm=1000, norm_elementwise_affine=False)  # fmt: skip
    if tiny:
        config |= dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8)
    net = DiTTransformer2DModel(**config)
    batch, size = (2 if tiny else 8), config["sample_size"]
    label = torch.arange(batch, device=device)

    def call(net: Callable) -> Callable:
        return lambda x, t, label: net(x, timestep=t, class_labels=label).sample[:, :4]

    def denoiser(net: torch.nn.Module) -> Denoiser:
        return Denoiser(call(net), paths.vp_linear(), "eps", time=lambda t: t * 999, net=net)

    return Row(net, denoiser, {"label": label}, (batch, 4, size, size), _vp(call, {"label": label}, dtype))


def sdxl(device: torch.device, dtype: torch.dtype, tiny: bool) -> Row:
    """SDXL's UNet at 1024 pixels, batch 2."""
    from diffusers import UNet2DConditionModel

    config = dict(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    text, pooled = 2048, 1280
    if tiny:
        config |= dict(sample_size=8, block_out_channels=(32, 64, 64), cross_attention_dim=16, layers_per_block=1,
                       attention_head_dim=(2, 4, 4), transformer_layers_per_block=1, addition_time_embed_dim=8,
                       projection_class_embeddings_input_dim=64)  # fmt: skip
        text, pooled = 16, 16
    net, batch, size = UNet2DConditionModel(**config), 2, config["sample_size"]
    cond = {
        "text": torch.randn(batch, 77, text, device=device, dtype=dtype),
        "added": {
            "text_embeds": torch.randn(batch, pooled, device=device, dtype=dtype),
            "time_ids": torch.full((batch, 6), 1024.0, device=device, dtype=dtype),
        },
    }

    def call(net: Callable) -> Callable:
        return lambda x, t, text, added: net(
            x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]

    def denoiser(net: torch.nn.Module) -> Denoiser:
        return Denoiser(call(net), paths.vp_linear(), "eps", time=lambda t: t * 999, net=net)

    return Row(net, denoiser, cond, (batch, 4, size, size), _vp(call, cond, dtype))


def flux(device: torch.device, dtype: torch.dtype, tiny: bool) -> Row:
    """Five double and ten single blocks of Flux at 1024 pixels, batch 1; the latents stay packed."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    config = dict(num_layers=5, num_single_layers=10, guidance_embeds=False)
    tokens, words, text, pooled = 4096, 512, 4096, 768
    if tiny:
        config |= dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, in_channels=16,
                       joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8))  # fmt: skip
        tokens, words, text, pooled = 16, 8, 32, 16
    net = FluxTransformer2DModel(**config)
    cond = {
        "text": torch.randn(1, words, text, device=device, dtype=dtype),
        "pooled": torch.randn(1, pooled, device=device, dtype=dtype),
        "places": torch.zeros(tokens, 3, device=device),
        "word_places": torch.zeros(words, 3, device=device),
    }
    side = int(tokens**0.5)
    cond["places"][:, 1:] = torch.cartesian_prod(torch.arange(side), torch.arange(side)).to(device)

    def call(net: Callable) -> Callable:
        return lambda x, t, text, pooled, places, word_places: net(
            x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t.to(x.dtype), img_ids=places,
            txt_ids=word_places, return_dict=False,
        )[0]  # fmt: skip

    def loop(net: Callable, x: torch.Tensor) -> torch.Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(STEPS, device=x.device)
        for t in scheduler.timesteps:
            out = call(net)(x.to(dtype), (t / 1000).expand(len(x)), **cond)
            x = scheduler.step(out, t, x).prev_sample
        return x

    def denoiser(net: torch.nn.Module) -> Denoiser:
        return Denoiser(call(net), paths.flow(), "flow", net=net)

    return Row(net, denoiser, cond, (1, tokens, config.get("in_channels", 64)), loop)


def _vp(call: Callable, cond: dict, dtype: torch.dtype) -> Callable:
    def loop(net: Callable, x: torch.Tensor) -> torch.Tensor:
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler()
        scheduler.set_timesteps(STEPS, device=x.device)
        for t in scheduler.timesteps:
            out = call(net)(x.to(dtype), t.expand(len(x)), **cond)
            x = scheduler.step(out, t, x).prev_sample
        return x

    return loop


ROWS = {"EDM CIFAR-10": edm, "DiT-XL/2": dit, "SDXL": sdxl, "Flux blocks": flux}


def measure(
    make: Callable, device: torch.device, dtype: torch.dtype, tiny: bool, compiles: bool
) -> dict[str, Any]:
    """Seconds of every way to ten steps, interleaved, with ratios to ours captured; and what patching changed."""
    torch.manual_seed(0)
    with torch.device(device):
        row = make(device, dtype, tiny)
    net = row.net.to(device, dtype).eval().requires_grad_(False)
    noise = starting_noise(0, row.shape[0], row.shape[1:]).to(device)
    other = copy.deepcopy(net)
    handle = patch(other)
    plain, patched = row.denoiser(net), row.denoiser(other)
    table = deis(plain.path, grids.vp(plain.path, STEPS))
    plans = {"plain": table.on(plain, device), "patched": table.on(patched, device)}
    captured = capture(patched, table, row.shape, row.cond, device=device)
    runs: dict[str, Callable] = {
        "ours, patched, captured": lambda: captured(noise, row.cond, check="off"),
        "ours, patched": lambda: sample(patched, noise, plans["patched"], cond=row.cond, check="off"),
        "ours": lambda: sample(plain, noise, plans["plain"], cond=row.cond, check="off"),
    }
    result: dict[str, Any] = {"patched": handle.report(), "captured": captured.report(), "left_out": {}}
    with torch.no_grad():
        if row.loop is not None:
            compiled = torch.compile(net) if compiles else None
            for name, model in (("diffusers", net), ("diffusers, torch.compile", compiled)):
                try:
                    if model is not None:
                        row.loop(model, noise)
                        runs[name] = lambda model=model: row.loop(model, noise)
                except Exception as error:  # what does not run here is told of
                    result["left_out"][name] = (
                        f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                    )
        with_kernels, without = runs["ours, patched"](), runs["ours"]()
        result["patching_changed"] = float((with_kernels - without).abs().max() / without.abs().max())
        result["times"] = bench.compare(runs, repeats=2 if tiny else 8, warmup=1 if tiny else 2)["names"]
    return result


def main() -> int:
    """Measure the rows that time allows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--tiny", action="store_true", help="networks a CPU can run: to try the script")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    device, end = torch.device(arguments.device), time.monotonic() + 60 * arguments.minutes
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    results: dict[str, Any] = {}
    for name in arguments.rows:
        if time.monotonic() > end:
            results[name] = {"failed": "no time left"}
        else:
            try:
                results[name] = measure(ROWS[name], device, dtype, arguments.tiny, not arguments.no_compile)
            except ImportError as error:
                results[name] = {"failed": f"left out: {error}"}
            except Exception as error:  # one row's failure is a result; the others still run
                results[name] = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        bench.save(arguments.out, results)
        times = results[name].get("times", {})
        said = ", ".join(
            f"{k} {v['median'] * 1e3:.1f} ms (x{v['ratio']['median']:.2f})" for k, v in times.items()
        )
        print(f"{name}: {said or results[name]['failed']}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0 if any("times" in row for row in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
