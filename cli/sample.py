"""``fewstep sample MODEL ...``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import add_device, add_grid, parser_for, solver_options, times_of
from .model import add_model, told
from .sample_kinds import Drawer, kind_of

if TYPE_CHECKING:
    import torch

IMAGES, VIDEOS = (".png", ".npz", ""), (".png", ".gif", ".npz", "")


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "sample", "Sample a model. Options of the solver (fewstep solvers lists them) are given as flags too."
    )
    add_model(parser)
    add_device(parser)
    parser.add_argument("--solver", default="abm", help="fewstep solvers lists them (default: abm)")
    parser.add_argument("--table", type=Path, help="a saved table instead of --solver, --grid and --steps")
    add_grid(parser)
    parser.add_argument("--num", type=int, help="number of samples (default: 64; of a pipeline 4)")
    parser.add_argument(
        "--batch",
        type=int,
        help="samples at once; changes nothing but memory (default: 256; of a pipeline 4)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help=".png, .npz, or a new folder, of a video .gif too: 8 bits a channel, rounded (default: samples.png)",
    )
    arguments, rest = parser.parse_known_args(argv)

    import torch

    from ..models import decode
    from ..models.codec import dealt
    from ..samplers import Table, catalogue
    from ..samplers import sample as draw
    from ..samplers.noise import starting_noise

    if any(count is not None and count < 1 for count in (arguments.num, arguments.batch)):
        raise ValueError(f"--num and --batch must be positive, got {arguments.num} and {arguments.batch}")
    if arguments.out.suffix not in VIDEOS:
        raise ValueError(f"--out must end in .png or .npz, or name a folder, got {arguments.out}")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind := kind_of(arguments.model):
        return _sample_kind(kind, arguments, rest, device)
    solver = catalogue.find(arguments.solver)
    if arguments.table is not None and rest:
        raise ValueError(f"--table is a table as it is: it takes no {' '.join(rest)}")
    options = solver_options(solver, rest)
    d, cond, classes = told(arguments, device, blocks=True)
    if arguments.out.suffix == ".gif" and len(d.shape) != 4:
        raise ValueError(
            f"--out must end in .png or .npz, or name a folder, for pictures: got {arguments.out}"
        )
    if arguments.table is not None:
        table = Table.load(arguments.table)
    else:
        table = solver(d.path, times_of(d.path, solver, arguments, options), **options)
    pipeline = d.codec is not None
    num, batch = arguments.num or (4 if pipeline else 64), arguments.batch or (4 if pipeline else 256)
    bar = pipeline and sys.stderr.isatty()
    plan, own = table.on(d, device), getattr(d.net, "sample", None)  # an autoregressive model goes by itself
    made, labels = [], []
    for first in _progress(range(0, num, batch)):
        ids = torch.arange(first, min(first + batch, num), device=device)
        mine = None if cond is None else dealt(cond, ids)
        if own is not None:
            x = own((mine or {}).get("label"), arguments.seed, ids)
        else:
            noise = starting_noise(arguments.seed, ids, d.shape)
            x = draw(d, noise, plan, cond=mine, seed=arguments.seed, ids=ids, progress=bar)
        made.append(decode(d, x).cpu())
        labels.append(mine["label"].cpu() if classes else ids.cpu())
    samples = torch.cat(made)
    if samples.ndim == 5:
        _save_videos(arguments.out, samples)
    else:
        columns = 10 if classes and arguments.label is None else None
        _save_images(arguments.out, samples, torch.cat(labels) if classes else None, columns)
    by = f"{table.solver}, {table.calls} calls each" if own is None else "itself, one place after another"
    print(f"{num} samples of {arguments.model} by {by}: {arguments.out}")
    return 0


def _sample_kind(kind: str, arguments, words: list[str], device: torch.device) -> int:
    """Masked models and flows."""
    import torch

    if arguments.out.suffix not in IMAGES:
        raise ValueError(f"--out must end in .png or .npz, or name a folder, got {arguments.out}")
    draw, num = Drawer(kind, arguments, words, device), arguments.num or 64
    made, labels = [], []
    for first in _progress(range(0, num, arguments.batch or 256)):
        x, label = draw(torch.arange(first, min(first + (arguments.batch or 256), num), device=device))
        made.append(x.cpu())
        labels.append(label)
    found = None if draw.classes is None else torch.cat(labels).cpu()
    columns = None if found is None or arguments.label is not None else draw.classes
    _save_images(arguments.out, torch.cat(made), found, columns)
    print(f"{num} samples of {arguments.model} by {draw.said}: {arguments.out}")
    return 0


def _save_images(out: Path, samples: torch.Tensor, labels: torch.Tensor | None, columns: int | None) -> None:
    from ..eval import images

    pictures = images.to_uint8(samples)
    if out.suffix == ".png":
        images.save_png(out, images.grid(pictures, columns=columns, scale=max(1, 32 // pictures.shape[-1])))
    elif out.suffix == ".npz":
        images.save_npz(out, pictures, labels)
    else:
        images.save_folder(out, pictures)


def _save_videos(out: Path, samples: torch.Tensor) -> None:
    from ..eval import images, videos

    if out.suffix == ".png":
        images.save_png(out, videos.contact_sheet(samples))
    else:
        {".gif": videos.save_gif, ".npz": videos.save_npz}.get(out.suffix, videos.save_folder)(out, samples)


def _progress(steps: range):
    if len(steps) < 2 or not sys.stderr.isatty():
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, unit="batch")
