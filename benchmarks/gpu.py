"""What only a GPU can show of the samplers, ordered by worth; JSON after every part, and an end after ``--minutes``.

    python benchmarks/gpu.py --out benchmarks/results/samplers-gpu.json
    python benchmarks/gpu.py --device cpu --out out/samplers-cpu.json          # the script itself, tried without one

Parts: every kernel's answer; its noise; captured loops; every kernel's time (``fewstep bench kernels`` has options);
the same samples as on a CPU; steps that wait for nothing; what a step costs beside diffusers' scheduler.step (where
diffusers is installed), eagerly and as a CUDA graph; images a second of the embedded teacher. What whole networks gain
is in ``kernels_end_to_end.py``.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch

from fewstep.eval import bench, bench_kernels
from fewstep.kernels import cases, dispatch, philox
from fewstep.models import Denoiser, load, paths
from fewstep.models.mixture import random_mixture
from fewstep.samplers import abm, capture, deis, dpmpp, grids, init, sample, sde_dpmpp, starting_noise, step
from fewstep.samplers.noise import normal, words

SHAPES = {
    "SD 1.5, batch 4": (4, 4, 64, 64),
    "Flux 1024, batch 1": (1, 16, 128, 128),
    "digits, batch 1024": (1024, 1, 8, 8),
}


def kernels_right(device: torch.device) -> dict:
    """Every op's small cases, the kernel against the reference in float64: (error, tolerance), and who is out of it."""
    answer: dict = {"wrong": []}
    for name, module in cases.ops().items():
        for case in module.CASES:
            if case.real:
                continue
            arguments = case.make(device)
            try:
                run = module.launch if device.type == "cuda" else module.reference
                gap = cases.error(run(**arguments), module.reference(**cases.exact(arguments)))
                answer[f"{name}, {case.name}"] = (gap, case.tolerance)
                right = gap <= case.tolerance
            except Exception as error:  # one op's failure is a result
                answer[f"{name}, {case.name}"], right = f"{type(error).__name__}: {error}", False
            if not right:
                answer["wrong"].append(f"{name}, {case.name}")
    return answer


def kernel_noise(device: torch.device) -> dict:
    """The kernel's normals against the CPU's, and the same bits for every block and split of the batch."""
    if device.type != "cuda":
        return {"left out": "no kernel runs on a CPU"}
    ids = torch.arange(64, device=device)
    whole = normal(7, ids, (4, 64, 64), row=3)
    cpu = normal(7, ids.cpu(), (4, 64, 64), row=3)
    block, same = philox.BLOCK, []
    for size in (64, 256, 2048):
        philox.BLOCK = size  # type: ignore[bad-assignment]  (a constant, but for this question)
        same.append(torch.equal(whole, normal(7, ids, (4, 64, 64), row=3)))
    philox.BLOCK = block
    split = torch.cat([normal(7, ids[k : k + 5], (4, 64, 64), row=3) for k in range(0, 64, 5)])
    return {
        "largest difference from a CPU": float((whole.cpu() - cpu).abs().max()),
        "equal for every block": all(same),
        "equal for every split": torch.equal(whole, split),
    }


def captured_loops(device: torch.device) -> dict:
    """Ten calls of the embedded teacher: captured, as ``sample``, and in diffusers' loop; copies to the host."""
    d = load("digits").to(device)
    table, answer = abm(d.path, grids.vp(d.path, 10)), {}
    plan = table.on(d, device)
    for batch in (1, 16, 256) if device.type == "cuda" else (1,):
        noise = starting_noise(0, batch, d.shape).to(device)
        cond = {"label": torch.arange(batch, device=device) % 10}
        fast = capture(d, table, noise.shape, cond, device=device)
        gap = float((fast(noise, cond) - sample(d, noise, plan, cond=cond)).abs().max())
        runs: dict[str, Callable] = {
            "captured": functools.partial(fast, noise, cond, check="off"),
            "sample": functools.partial(sample, d, noise, plan, cond=cond, check="off"),
        }
        runs |= _diffusers_loop(d, noise, cond)
        times = bench.compare(runs, repeats=10, baseline="captured")["names"]
        answer[f"batch {batch}"] = {"difference": gap, "times": times, "report": fast.report()}
        if device.type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                fast(noise, cond, check="off")
                torch.cuda.synchronize()
            answer[f"batch {batch}"]["copies to the host"] = sum("DtoH" in e.name for e in profile.events())
    return answer


def _diffusers_loop(d: Denoiser, noise: torch.Tensor, cond: dict) -> dict[str, Callable]:
    try:
        from diffusers import EDMDPMSolverMultistepScheduler
    except ImportError:
        return {}

    def run() -> torch.Tensor:
        scheduler = EDMDPMSolverMultistepScheduler(sigma_max=80.0)
        scheduler.set_timesteps(10, device=noise.device)
        x = noise * scheduler.init_noise_sigma
        with torch.no_grad():
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t)
                x = scheduler.step(d.call(scaled, t.expand(len(x)), **cond), t, x).prev_sample
        return x

    return {"diffusers": run}


def kernel_times(device: torch.device) -> dict:
    """Every kernel beside eager torch, torch.compile and the copy bandwidth, for as long as three minutes allow."""
    return bench_kernels.run(device=device, minutes=3.0, repeats=10, say=lambda text: print(text, flush=True))


def same_noise(device: torch.device) -> dict:
    """Philox' words bit for bit; the normals made of them to a rounding of log and cos."""
    ids = torch.arange(64)
    here, there = words(2**40 + 7, ids, 1024, 3, 0), words(2**40 + 7, ids.to(device), 1024, 3, 0)
    a, b = normal(7, ids, (4, 64, 64)), normal(7, ids.to(device), (4, 64, 64)).cpu()
    equal = all(torch.equal(x, y.cpu()) for x, y in zip(here, there))
    return {
        "words_equal": equal,
        "normals_equal": float((a == b).float().mean()),
        "largest_difference": float((a - b).abs().max()),
    }


def same_samples(device: torch.device) -> dict:
    """The exact mixture in float64 and the teacher in float32, on the device and on the CPU."""
    answer = {}
    d = random_mixture(64, 10, seed=0)
    noise = starting_noise(0, 32, (64,), torch.float64)
    for name, solver in (("abm", abm), ("sde_dpmpp", sde_dpmpp)):
        table = solver(paths.flow(), grids.vp(paths.flow(), 10))
        runs = [
            sample(d.to(where).denoiser(paths.flow()), noise.to(where), table).cpu()
            for where in ("cpu", device)
        ]
        answer[f"mixture, {name}"] = float((runs[0] - runs[1]).abs().max())
    teacher = load("digits")
    table, label = abm(teacher.path, grids.vp(teacher.path, 10)), torch.arange(10)
    noise = starting_noise(0, 10, teacher.shape)
    runs = [
        sample(teacher.to(where), noise.to(where), table, cond={"label": label.to(where)}).cpu()
        for where in ("cpu", device)
    ]
    answer["digits, abm"] = float((runs[0] - runs[1]).abs().max())
    return answer


def no_waiting(device: torch.device) -> dict:
    """Steps under CUDA's own alarm for synchronisation: together, and with samples at rows of their own."""
    d = Denoiser(lambda x, tau: x * 0.5, paths.vp_linear())
    table = sde_dpmpp(d.path, grids.logsnr(d.path, 8))
    plan = table.on(d, device)
    noise = torch.randn(8, 4, 16, 16, device=device)
    answer = {}
    for name, apart in (("together", False), ("apart", True)):
        state = init(plan, noise)
        if apart:
            state = state._replace(row=torch.arange(8, device=device) % 4)
        step(d, plan, state)  # uploads the table
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                state, _ = step(d, plan, state)
            answer[name] = "no synchronisation"
        except RuntimeError as error:
            answer[name] = str(error).splitlines()[0]
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return answer


def step_cost(device: torch.device) -> dict:
    """A deterministic step outside the network, interleaved with diffusers' and with one axpy."""
    return {name: _one_shape(shape, device) for name, shape in SHAPES.items()}


def _one_shape(shape: tuple[int, ...], device: torch.device) -> dict:
    noise, out = torch.randn(shape, device=device), torch.randn(shape, device=device)
    d = Denoiser(lambda x, tau: out, paths.vp_linear())
    times = grids.logsnr(d.path, 20)
    runs: dict[str, Callable] = {"axpy": lambda: torch.add(noise, out, alpha=0.5)}
    for label, table in (("deis 3", deis(d.path, times)), ("dpmpp 2M", dpmpp(d.path, times))):
        plan = table.on(d, device)
        state = init(plan, noise)
        for _ in range(5):
            state, _ = step(d, plan, state)
        runs[label] = functools.partial(step, d, plan, state)
        runs[f"{label}, by torch"] = functools.partial(_by_torch, runs[label])
        if device.type == "cuda":
            runs[f"{label}, graph"] = _captured(runs[label])
    runs |= _diffusers_steps(noise, out)
    return bench.compare(runs, repeats=100, warmup=20, baseline="axpy")["names"]


def _by_torch(run: Callable) -> None:
    with dispatch.using("reference"):
        run()


def _captured(run: Callable) -> Callable:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _diffusers_steps(noise: torch.Tensor, out: torch.Tensor) -> dict[str, Callable]:
    try:
        from diffusers.schedulers import DEISMultistepScheduler, DPMSolverMultistepScheduler
    except ImportError:
        return {}
    runs = {}
    for name, scheduler in (
        ("diffusers DEIS 3", DEISMultistepScheduler(solver_order=3)),
        ("diffusers DPM++ 2M", DPMSolverMultistepScheduler()),
    ):
        scheduler.set_timesteps(20, device=noise.device)
        for t in scheduler.timesteps[:5]:
            scheduler.step(out, t, noise)
        index, t = scheduler._step_index, scheduler.timesteps[5]

        def run(scheduler=scheduler, index=index, t=t):
            scheduler._step_index = index
            scheduler.step(out, t, noise)

        runs[name] = run
    return runs


def throughput(device: torch.device) -> dict:
    """Images a second of the embedded teacher, ten calls each."""
    d = load("digits").to(device)
    table = abm(d.path, grids.vp(d.path, 10)).on(d, device)
    results = {}
    for batch in (16, 256, 4096) if device.type == "cuda" else (16, 64):
        noise, label = starting_noise(0, batch, d.shape).to(device), torch.arange(batch, device=device) % 10
        times = bench.compare(
            {"sample": lambda noise=noise, label=label: sample(d, noise, table, cond={"label": label})},
            repeats=5,
        )
        results[f"batch {batch}"] = batch / times["names"]["sample"]["median"]
    return results


PARTS = (kernels_right, kernel_noise, captured_loops, kernel_times, same_noise, same_samples, no_waiting, step_cost,
         throughput)  # fmt: skip


def main() -> None:
    """Run the parts that time allows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    device, end = torch.device(arguments.device), time.monotonic() + 60 * arguments.minutes
    results: dict = {}
    for part in PARTS:
        if time.monotonic() > end:
            results[part.__name__] = "no time left"
        else:
            try:
                results[part.__name__] = part(device)
            except Exception as error:  # one part's failure is a result; the others still run
                results[part.__name__] = f"{type(error).__name__}: {error}"
        print(part.__name__, results[part.__name__], flush=True)
        bench.save(arguments.out, results)


if __name__ == "__main__":
    main()
