"""``fewstep control RECIPE [key=value ...]``: rewards, targets and observations at inference, by a YAML recipe."""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .arguments import parser_for

FOLDER = Path(__file__).parent / "recipes"
REWARDED = ("tree_sample", "tree_search", "best_of_n", "importance", "smc_steering", "svdd", "dps")
METHODS = (*REWARDED, "feynman_kac", "ensemble_posterior")
GIVEN = (
    "reward",
    "target",
    "operator",
    "observation",
    "seed",
    "cond",
    "ids",
    "sample",
)  # not among the options


@dataclass
class ControlRecipe:
    """What a recipe may say.

    ``model``: as for ``fewstep sample``. ``label``: a class for all samples, "all" for every class in turn, "none".
    ``prompt``: of a pipeline of texts, one or several that samples take in turn, with ``negative``, ``height`` and
    ``width``; ``guidance``: its scale. ``solver``: name, grid, steps (or calls) and the solver's own options.
    ``reward``: the name of a function in ``fewstep.models.rewards`` or ``reward_models`` and its arguments. ``target``:
    the same of ``samplers.targets``, where ``tilt`` takes the recipe's reward; ``operator``: of ``samplers.operators``
    (``inpaint`` hides one side: left, right, top or bottom), with ``images`` to observe: "digits" (those held out), an
    .npz or a folder. ``options``: of the method. ``num``: samples.
    """

    kind: str = "control"
    model: str = "digits"
    method: str = "tree_search"
    label: str = "none"
    prompt: Any = None
    negative: str | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
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
    parser.epilog = _told_of_recipes()
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
    from ..models import decode
    from ..samplers.noise import starting_noise

    if recipe.kind != "control":
        raise ValueError(f"recipe must be one for control, got kind: {recipe.kind}")
    if recipe.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {recipe.method!r}")
    if recipe.num < 1:
        raise ValueError(f"num must be positive, got {recipe.num}")
    device = torch.device(recipe.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    method = getattr(samplers, recipe.method)
    known = [*inspect.signature(method).parameters][3:]
    options = {key: value for key, value in recipe.options.items() if value is not None}
    _check_options(recipe.method, options, [key for key in known if key not in GIVEN])
    d, cond = _model(recipe, device)
    noise = starting_noise(recipe.seed, torch.arange(recipe.num, device=device), d.shape)
    options |= {"seed": recipe.seed, "cond": cond}
    truth = reward = None
    if recipe.reward:
        reward = _made("reward", recipe.reward, _rewards())
    if recipe.method in REWARDED:
        if reward is None:
            raise ValueError(
                f"reward must be given for {recipe.method}: {{name: ..}} of {', '.join(_rewards())}"
            )
        options["reward"] = reward
    elif recipe.method == "feynman_kac":
        tilted = recipe.target.get("name") == "tilt" and reward is not None
        options["target"] = _made(
            "target", {**recipe.target, **({"reward": reward} if tilted else {})}, _targets()
        )
    else:
        truth = _images(recipe, d).to(device)
        options["operator"] = _operator(recipe.operator, d.shape)
        fresh = starting_noise(recipe.seed + 1, recipe.num, options["operator"].observed).to(device)
        options["observation"] = options["operator"](truth) + options.get("noise_std", 0.1) * fresh
        options.setdefault("noise_std", 0.1)
    x, info = method(d, noise, _table(recipe.solver, d), **options)
    x = decode(d, x)
    return x.cpu(), _told(recipe.method, x, info, reward, truth)


def _told_of_recipes() -> str:
    """What follows ``--help``: what may stand in a recipe."""
    return (
        f"A recipe's keys: {', '.join(f.name for f in fields(ControlRecipe))}.\n"
        f"Methods: {', '.join(METHODS)}.\n"
        f"Examples:\n  fewstep control digits-ink-search options.budget=200 num=4 --out ink.png\n"
        "  fewstep control digits-seven-sample reward.label=3 model=digits-flow\n"
        "  fewstep control mine.yaml model=path/to/sdxl prompt='a fox' reward='{name: brightness}'"
    )


def _model(recipe: ControlRecipe, device) -> tuple[Any, dict[str, Any] | None]:
    """The denoiser, guided or not, and the condition of ``num`` samples."""
    import torch

    from ..models import load
    from ..models.codec import dealt
    from ..samplers import cfg
    from .model import told

    prompts = [recipe.prompt] if isinstance(recipe.prompt, str) else list(recipe.prompt or ())
    if not Path(recipe.model).is_dir():
        d = load(recipe.model).to(device)
        if prompts or recipe.negative:
            raise ValueError(f"prompt is of no use: {recipe.model} takes no text")
        cond = _condition(recipe, d, device)
        if recipe.guidance not in (None, 1) and cond is None:
            raise ValueError(f"guidance needs a model of classes or texts, and {recipe.model} is neither")
        return d if recipe.guidance in (None, 1) else cfg(d, recipe.guidance), cond
    label = int(recipe.label) if recipe.label.isdigit() else None
    asked = argparse.Namespace(
        model=recipe.model, prompt=prompts, negative=recipe.negative, label=label, guidance=recipe.guidance,
        height=recipe.height, width=recipe.width, frames=None, dtype=None, variant=None,
    )  # fmt: skip
    d, cond, _ = told(asked, device)
    return d, None if cond is None else dealt(cond, torch.arange(recipe.num, device=device))


def _told(method: str, x, info: Any, reward: Callable | None, truth) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if isinstance(info, list):  # trees
        told["calls"] = info[0].calls
        told |= {"leaves": [len(t.leaves) for t in info], "best_reward": [max(t.rewards) for t in info]}
        if method == "tree_sample":
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


def _targets() -> dict[str, Any]:
    from ..samplers import targets

    return {
        name: getattr(targets, name)
        for name in ("own", "anneal", "product", "geometric", "cfg", "rlg", "tilt")
    }


def _made(what: str, given: dict[str, Any], known: dict[str, Any]) -> Any:
    """``{name: .., other arguments}`` as a call of what ``known`` has under that name; null takes an argument away."""
    arguments = {key: value for key, value in given.items() if value is not None}
    name = arguments.pop("name", None)
    if name not in known:
        raise ValueError(f"{what}.name must be one of {', '.join(known)}, got {name!r}")
    parameters = inspect.signature(known[name]).parameters
    _check_options(f"{what} {name}", arguments, list(parameters))
    missing = [key for key, one in parameters.items() if one.default is one.empty and key not in arguments]
    if missing:
        raise ValueError(f"{what}.{missing[0]} must be given for {name}, which takes {', '.join(parameters)}")
    return known[name](**arguments)


def _check_options(of: str, given: dict[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"{of} takes {', '.join(known) or 'nothing more'}; got {key}{hint}; {key}=null takes it away"
            )


def _operator(given: dict[str, Any], shape: tuple[int, ...]):
    import torch

    from ..samplers import operators

    arguments = {key: value for key, value in given.items() if value is not None}
    name = arguments.pop("name", None)
    if name == "inpaint":
        _check_options("operator inpaint", arguments, ["hide"])
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
    made = {key: functools.partial(getattr(operators, key), shape) for key in ("blur", "downsample")}
    return _made("operator", {"name": name, **arguments}, made)


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
