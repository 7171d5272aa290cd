"""A diffusers pipeline's whole call, as it is, with our scheduler, and sampled by us: interleaved, in one run.

Rows, all from prompt to latents (decoding is the same for all), with as many network calls:

    pipeline            its own scheduler
    compiled            the same with its network through torch.compile (where asked for)
    FewstepScheduler    the same pipeline, our solver in it
    sample              ``load(pipe)`` and our loop
    captured            our loop as one CUDA graph (on a GPU)
    patched, captured   with fused norms and gates in the network, too (on a GPU)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..models import load, patch
from ..models.pipeline import network
from ..samplers import FewstepScheduler, capture, cfg, dpmpp, grids, sample, starting_noise
from . import bench
from .checks import whole_number


def measure(
    pipe: Any,
    call: Mapping[str, Any],
    steps: int = 10,
    repeats: int = 5,
    compile_mode: str = "off",
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Seconds a call and ratios to the pipeline as it is; the pipeline is left as it came.

    call: what the pipeline is called with, such as {"prompt": "a fox"}. compile_mode: "off", or torch.compile's.
    """
    steps = whole_number(steps, "steps")
    rows: dict[str, Callable[[], Any]] = {}
    net, own = network(pipe), pipe.scheduler
    name = next(n for n, part in pipe.components.items() if part is net)
    told = {**call, "num_inference_steps": steps, "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)

    def with_parts(scheduler: Any, part: Any) -> Callable[[], Any]:
        def run() -> Any:
            pipe.scheduler = scheduler
            setattr(pipe, name, part)
            try:
                return pipe(**told)
            finally:
                pipe.scheduler = own
                setattr(pipe, name, net)

        return run

    rows["pipeline"] = with_parts(own, net)
    if compile_mode != "off":
        rows["compiled"] = with_parts(own, torch.compile(net, mode=compile_mode))
    ours = FewstepScheduler.from_config(own.config, solver="dpmpp", solver_order=2, timestep_spacing="logsnr")
    rows["FewstepScheduler"] = with_parts(ours, net)
    rows |= _sampled(pipe, call, steps)
    with torch.no_grad():
        found = bench.compare(rows, repeats=repeats, warmup=2, baseline="pipeline")
    if say is not None:
        for row in rows:
            numbers = found["names"][row]
            say(f"{row:<18} {numbers['median']:8.4f} s   {numbers['ratio']['median']:5.2f}")
    return {"pipeline": type(pipe).__name__, "steps": steps, "compile": compile_mode, **found}


def _sampled(pipe: Any, call: Mapping[str, Any], steps: int) -> dict[str, Callable[[], Any]]:
    d = load(pipe)
    codec = d.codec
    assert codec is not None
    table = dpmpp(d.path, grids.logsnr(d.path, steps), order=2)
    prompts = call.get("prompt")
    words = [prompts] if isinstance(prompts, str) else prompts
    batch = 1 if words is None else len(words)
    device = next(network(pipe).parameters()).device
    noise = starting_noise(0, batch, d.shape).to(device)
    guided = codec.guidance not in (None, 1) and not codec.distilled
    asked = cfg(d, codec.guidance) if guided else d

    def condition() -> Any:
        if words is None:
            return {
                key: torch.zeros(batch, dtype=torch.long, device=device) for key in codec.null or {}
            } or None
        return codec.embed(words, call.get("negative_prompt", "") if guided else None)

    rows: dict[str, Callable[[], Any]] = {"sample": lambda: sample(asked, noise, table, cond=condition())}
    if device.type == "cuda":
        fast = capture(asked, table, noise.shape, condition())
        rows["captured"] = lambda: fast(noise, condition())
        handle = patch(network(pipe))
        faster = capture(asked, table, noise.shape, condition())
        handle.undo()
        rows["patched, captured"] = lambda: faster(noise, condition())
    return rows


def plot(result: Mapping[str, Any], file: Any) -> None:
    """Seconds a call of each row."""
    from matplotlib.figure import Figure

    names = list(result["names"])
    figure = Figure(figsize=(7, 0.5 + 0.45 * len(names)), layout="constrained", dpi=110)
    ax = figure.subplots()
    ax.barh(names, [result["names"][n]["median"] for n in names])
    ax.invert_yaxis()
    ax.set(xlabel="seconds a call, median", title=f"{result['pipeline']}, {result['steps']} steps")
    figure.savefig(file)
