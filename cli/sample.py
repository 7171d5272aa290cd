"""``fewstep sample MODEL ...``."""

from __future__ import annotations

import sys
from pathlib import Path

from .arguments import add_grid, parser_for, solver_options, times_of


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "sample", "Sample a model. Options of the solver (fewstep solvers lists them) are given as flags too."
    )
    parser.add_argument(
        "model", help="digits-edm, digits-vp, digits-flow, a checkpoint, or a diffusers folder"
    )
    parser.add_argument("--solver", default="abm", help="fewstep solvers lists them (default: abm)")
    parser.add_argument("--table", type=Path, help="a saved table instead of --solver, --grid and --steps")
    add_grid(parser)
    parser.add_argument("--num", type=int, default=64, help="number of samples (default: 64)")
    parser.add_argument(
        "--batch", type=int, default=256, help="samples at once; changes nothing but memory (default: 256)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", type=int, help="class of all samples (default: every class in turn)")
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="scale of classifier-free guidance: 1 is none, 0 forgets the class (default: 1)",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help=".png, .npz, or a new folder (default: samples.png)",
    )
    arguments, rest = parser.parse_known_args(argv)

    import torch

    from ..eval import images
    from ..models import in_blocks, load
    from ..samplers import Table, catalogue, cfg
    from ..samplers import sample as draw
    from ..samplers.noise import starting_noise

    if arguments.num < 1 or arguments.batch < 1:
        raise ValueError(f"--num and --batch must be positive, got {arguments.num} and {arguments.batch}")
    if arguments.out.suffix not in (".png", ".npz", ""):
        raise ValueError(f"--out must end in .png or .npz, or name a folder, got {arguments.out}")
    solver = catalogue.find(arguments.solver)
    if arguments.table is not None and rest:
        raise ValueError(f"--table is a table as it is: it takes no {' '.join(rest)}")
    options = solver_options(solver, rest)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    d = load(arguments.model).to(device)
    if device.type == "cpu":
        d = in_blocks(d, 16)  # the same bits whatever --batch and --num
    if arguments.table is not None:
        table = Table.load(arguments.table)
    else:
        table = solver(d.path, times_of(d.path, solver, arguments, options), **options)
    classes = getattr(d.net, "null_label", None)  # the label after the last class
    if arguments.label is not None and not (classes and 0 <= arguments.label < classes):
        raise ValueError(
            f"--label must lie in 0 .. {classes - 1}" if classes else f"{arguments.model} takes no --label"
        )
    if arguments.guidance != 1:
        if not classes:
            raise ValueError(f"--guidance needs a model of classes, and {arguments.model} has none")
        d = cfg(d, arguments.guidance)
    plan = table.on(d, device)
    made, labels = [], []
    for first in _progress(range(0, arguments.num, arguments.batch)):
        ids = torch.arange(first, min(first + arguments.batch, arguments.num), device=device)
        label = ids % classes if classes else ids
        if arguments.label is not None:
            label = torch.full_like(ids, arguments.label)
        cond = {"label": label} if classes else {}
        noise = starting_noise(arguments.seed, ids, d.shape)
        made.append(draw(d, noise, plan, cond=cond, seed=arguments.seed, ids=ids).cpu())
        labels.append(label.cpu())
    pictures = images.to_uint8(torch.cat(made))
    if arguments.out.suffix == ".png":
        columns = 10 if classes and arguments.label is None else None
        images.save_png(
            arguments.out, images.grid(pictures, columns=columns, scale=max(1, 32 // pictures.shape[-1]))
        )
    elif arguments.out.suffix == ".npz":
        images.save_npz(arguments.out, pictures, torch.cat(labels) if classes else None)
    else:
        images.save_folder(arguments.out, pictures)
    print(
        f"{arguments.num} samples of {arguments.model} by {table.solver}, {table.calls} calls each: {arguments.out}"
    )
    return 0


def _progress(steps: range):
    if len(steps) < 2 or not sys.stderr.isatty():
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, unit="batch")
