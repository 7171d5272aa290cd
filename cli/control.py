"""``fewstep control RECIPE [key=value ...]``: rewards, targets and observations at inference, by a YAML recipe."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import parser_for

FOLDER = Path(__file__).parent / "recipes"
REWARDED = ("tree_sample", "tree_search", "best_of_n", "importance", "smc_steering", "svdd", "dps")
METHODS = (*REWARDED, "feynman_kac", "ensemble_posterior")


@dataclass
class ControlRecipe:
    """What a recipe may say.

    ``model``: as for ``fewstep sample``. ``label``: a class for all samples, "all" for every class in turn, "none".
    ``solver``: name, grid, steps (or calls) and the solver's own options. ``reward``: the name of a function in
    ``fewstep.models.rewards`` and its arguments. ``target``: the same of ``samplers.targets``; ``operator``: of
    ``samplers.operators`` (``inpaint`` hides one side: left, right, top or bottom), with ``images`` to observe:
    "digits" (those held out), an .npz or a folder. ``options``: of the method. ``num``: samples.
    """

    kind: str = "control"
    model: str = "digits"
    method: str = "tree_search"
    label: str = "none"
    num: int = 10
    seed: int = 0
    device: str | None = None
    solver: dict[str, Any] = field(
        default_factory=lambda: {"name": "ddim", "grid": "vp", "steps": 16, "eta": 1.0}
    )
    reward: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    operator: dict[str, Any] = field(default_factory=dict)
    images: str = "digits"
    options: dict[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name_or_path: str) -> Path:
    """A recipe's file, by name or path."""
    if name_or_path in names():
        return FOLDER / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    near = difflib.get_close_matches(name_or_path, names(), 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"recipe must be one of {', '.join(names())} or a YAML file, got {name_or_path!r}{hint}")


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "control",
        "Sample a model under a reward, a target density or an observation, as a recipe says.\n"
        f"Recipes: {', '.join(names())}, or a file of yours; key=value changes one.",
    )
    parser.add_argument("recipe", help="a name or a YAML file")
    parser.add_argument("changes", nargs="*", help="e.g. options.budget=800 num=4 reward.label=7")
    parser.add_argument(
        "--out", type=Path, default=Path("control.png"),
        help=".png, .npz or a folder; beside it a .json of what was done"
    )  # fmt: skip
    arguments = parser.parse_args(argv)

    from ..distill import recipe as recipes

    if arguments.out.suffix not in (".png", ".npz", ""):
        raise ValueError(f"--out must end in .png or .npz, or name a folder, got {arguments.out}")
    recipe = recipes.read(recipes.raw(find(arguments.recipe)), ControlRecipe, arguments.changes)
    x, told = run(recipe)
    _write(arguments.out, x, {"recipe": vars(recipe), **told})
    print(f"{recipe.method}: {len(x)} samples, {told['calls']} network calls each: {arguments.out}")
    for key in ("reward", "best_reward", "ess", "log_z", "log_evidence", "psnr"):
        if key in told:
            values = told[key]
            print(
                f"  {key}: mean {sum(values) / len(values):.4g}, from {min(values):.4g} to {max(values):.4g}"
            )
    return 0


def run(recipe: ControlRecipe):
    """Samples (num, ...) and what there is to tell of them, as plain data."""
    import torch

    from .. import samplers
    from ..models import load
    from ..samplers.noise import starting_noise

    if recipe.kind != "control":
        raise ValueError(f"recipe must be one for control, got kind: {recipe.kind}")
    if recipe.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {recipe.method!r}")
    if recipe.num < 1:
        raise ValueError(f"num must be positive, got {recipe.num}")
    device = torch.device(recipe.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    d = load(recipe.model).to(device)
    noise = starting_noise(recipe.seed, torch.arange(recipe.num, device=device), d.shape)
    options = {**recipe.options, "seed": recipe.seed, "cond": _condition(recipe, d, device)}
    truth = reward = None
    if recipe.method in REWARDED:
        reward = _made("reward", recipe.reward, _rewards())
        options["reward"] = reward
    elif recipe.method == "feynman_kac":
        options["target"] = _made("target", recipe.target, vars(samplers.targets))
    else:
        truth = _images(recipe, d).to(device)
        options["operator"] = _operator(recipe.operator, d.shape)
        fresh = starting_noise(recipe.seed + 1, recipe.num, options["operator"].observed).to(device)
        options["observation"] = options["operator"](truth) + options.get("noise_std", 0.1) * fresh
        options.setdefault("noise_std", 0.1)
    x, info = getattr(samplers, recipe.method)(d, noise, _table(recipe.solver, d), **options)
    return x.cpu(), _told(x, info, reward, truth)


def _told(x, info: Any, reward: Callable | None, truth) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if isinstance(info, list):  # trees
        told["calls"] = info[0].calls
        told |= {"leaves": [len(t.leaves) for t in info], "best_reward": [max(t.rewards) for t in info]}
        told |= {"ess": [t.ess for t in info], "log_z": [t.log_z for t in info]}
    else:
        told["calls"] = info.calls
        for name, source in (("log_z", "log_z"), ("log_evidence", "log_evidence"), ("log_normaliser", "log_normaliser"),
                             ("distinct", "distinct")):  # fmt: skip
            if hasattr(info, source):
                told[name] = getattr(info, source).double().tolist()
        if hasattr(info, "ess"):
            told["ess"] = info.ess[-1].double().tolist()
        if hasattr(info, "rewards") and info.rewards.ndim == 2:
            told["best_reward"] = info.rewards.amax(-1).double().tolist()
    if reward is not None:
        told["reward"] = reward(x).double().tolist()
    if truth is not None:
        error = (info.mean - truth).square().flatten(1).mean(1)
        told["psnr"] = (10 * (4 / error).log10()).double().tolist()
    return told


def _write(out: Path, x, told: dict[str, Any]) -> None:
    from ..eval import images
    from ..eval.files import written_aside

    pictures = images.to_uint8(x)
    if out.suffix == ".png":
        images.save_png(out, images.grid(pictures, scale=max(1, 32 // pictures.shape[-1])))
    elif out.suffix == ".npz":
        images.save_npz(out, pictures, None)
    else:
        images.save_folder(out, pictures)
    with written_aside(out.with_name(f"{out.name}.json")) as file:
        file.write_text(json.dumps(told, indent=1, default=str) + "\n")


def _table(solver: dict[str, Any], d):
    from ..samplers import catalogue, grids

    options = dict(solver)
    made, grid = catalogue.find(options.pop("name", "ddim")), catalogue.find_grid(options.pop("grid", "vp"))
    calls, steps = options.pop("calls", None), options.pop("steps", 16)
    unknown = [key for key in options if key not in made.entry.options]
    if unknown:
        raise ValueError(
            f"solver must have options of {made.entry.name}, {', '.join(made.entry.options)}; got {unknown[0]!r}"
        )
    times = grids.for_calls(made, d.path, calls, grid=grid, **options) if calls else grid(d.path, steps)
    return made(d.path, times, **options)


def _condition(recipe: ControlRecipe, d, device) -> dict[str, Any] | None:
    import torch

    classes = getattr(d.net, "null_label", None)
    if not classes:
        return None
    if recipe.label in ("none", "all"):
        each = (
            torch.arange(recipe.num) % classes
            if recipe.label == "all"
            else torch.full((recipe.num,), classes)
        )
        return {"label": each.to(device)}
    if not recipe.label.isdigit() or int(recipe.label) >= classes:
        raise ValueError(f"label must be all, none or one of 0 .. {classes - 1}, got {recipe.label!r}")
    return {"label": torch.full((recipe.num,), int(recipe.label), device=device)}


def _rewards() -> dict[str, Any]:
    from ..models import reward_models, rewards

    known = {
        name: getattr(rewards, name) for name in ("class_probability", "ink", "brightness", "compressibility")
    }
    return known | {
        name: getattr(reward_models, name) for name in ("clip_score", "hps", "pick_score", "image_reward")
    }


def _made(what: str, given: dict[str, Any], known: dict[str, Any]) -> Any:
    """``{name: .., other arguments}`` as a call of what ``known`` has under that name."""
    arguments = dict(given)
    name = arguments.pop("name", None)
    public = [
        key for key, value in known.items() if callable(value) and not key.startswith("_") and key.islower()
    ]
    if name not in public:
        raise ValueError(f"{what}.name must be one of {', '.join(sorted(public))}, got {name!r}")
    return known[name](**arguments)


def _operator(given: dict[str, Any], shape: tuple[int, ...]):
    import torch

    from ..samplers import operators

    arguments = dict(given)
    name = arguments.pop("name", None)
    if name == "inpaint":
        height, width = shape[-2:]
        sides = {
            "left": (..., slice(width // 2)), "right": (..., slice(width // 2, None)),
            "top": (..., slice(height // 2), slice(None)), "bottom": (..., slice(height // 2, None), slice(None)),
        }  # fmt: skip
        if arguments.get("hide") not in sides:
            raise ValueError(
                f"operator.hide must be one of {', '.join(sides)}, got {arguments.get('hide')!r}"
            )
        mask = torch.ones(shape, dtype=torch.bool)
        mask[sides[arguments["hide"]]] = False
        return operators.inpaint(mask)
    if name not in ("blur", "downsample"):
        raise ValueError(f"operator.name must be inpaint, blur or downsample, got {name!r}")
    return getattr(operators, name)(shape, **arguments)


def _images(recipe: ControlRecipe, d):
    import torch

    from ..models import digits
    from ..models.image_data import image_batches

    if recipe.images == "digits":
        held = torch.as_tensor(digits("held_out")[0])
        return held[
            torch.arange(recipe.num) * (len(held) // recipe.num if recipe.num <= len(held) else 1) % len(held)
        ]
    found = torch.cat([torch.as_tensor(images) for images, _ in image_batches(recipe.images)])[: recipe.num]
    if len(found) < recipe.num or tuple(found.shape[1:]) != tuple(d.shape):
        raise ValueError(f"images must hold {recipe.num} of shape {tuple(d.shape)}, got {tuple(found.shape)}")
    return found
