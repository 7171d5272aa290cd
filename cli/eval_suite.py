"""``fewstep eval suite [RECIPE] --model .. --samplers .. --nfe .. --out report/``: samplers against each other."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import parser_for

if TYPE_CHECKING:
    from ..eval.ranks import Ranks

FOLDER = Path(__file__).parent / "suites"
FLAGS = (
    "model",
    "samplers",
    "nfe",
    "metrics",
    "ref",
    "num",
    "features",
    "weights",
    "resize",
    "seed",
    "batch",
    "device",
)


@dataclass
class SuiteRecipe:
    """What a recipe may say.

    ``model``, ``prompts`` (a file, a line a sample), ``negative``, ``guidance``, ``label``, ``height``, ``width``,
    ``dtype``, ``variant``: as for ``fewstep sample``. ``samplers``: see ``eval.contestants``. ``nfe``: network calls
    a sample. ``ref``: statistics or images. ``features``, ``weights``, ``resize``, ``metrics``, ``num``: as for
    ``fewstep eval fid``. ``expected``: what papers give, each {sampler, budget, value, source}.
    """

    kind: str = "suite"
    title: str = "Samplers by network calls"
    about: str = ""
    model: str = "digits"
    prompts: str | None = None
    negative: str | None = None
    guidance: float | None = None
    label: int | None = None
    height: int | None = None
    width: int | None = None
    dtype: str | None = None
    variant: str | None = None
    samplers: list[str] = field(default_factory=lambda: ["abm", "deis", "unipc", "heun"])
    nfe: list[int] = field(default_factory=lambda: [5, 10, 20])
    metrics: list[str] = field(default_factory=lambda: ["fd"])
    ref: str = "digits"
    features: str = "digits"
    weights: str | None = None
    resize: str | None = None
    num: int = 2000
    seed: int = 0
    batch: int = 64
    device: str | None = None
    expected: list[dict[str, Any]] = field(default_factory=list)


def names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "eval suite",
        "Every sampler at every budget of network calls, from the same noise, on one page.\n\n"
        "  fewstep eval suite --model digits --samplers deis,unipc,heun --nfe 5,10,20 --metrics fd,kid,prdc\n"
        "  fewstep eval suite cifar10-edm model=edm-cifar10-32x32-cond-vp.pkl ref=cifar10-32x32.npz --out report\n"
        "  torchrun --nproc_per_node=8 -m fewstep eval suite cifar10-edm model=.. ref=.. --out report\n\n"
        "A sampler is SOLVER[:option=value,..][@GRID][+time_shift|+teleport:stats=FILE.npz], or FILE-{nfe}.json.\n"
        f"Recipes: {', '.join(names())}, or a YAML file of yours. A suite that was broken off goes on.",
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE, key=value", help="a recipe, and changes of it")
    for name in FLAGS:
        # torchrun of Python 3.11 and older takes --num for the start of an option of its own
        also = ["--count"] if name == "num" else []
        parser.add_argument(f"--{name}", *also, help=f"as {name}=..")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder of the page (default: report)"
    )
    parser.add_argument("--pictures", type=int, default=10, help="samples shown of each (default: 10)")
    parser.add_argument("--print-config", action="store_true", help="print the recipe as it is understood")
    parser.add_argument("--dry-run", action="store_true", help="load and check everything; sample nothing")
    arguments = parser.parse_intermixed_args(argv)
    recipe = _recipe(arguments)
    if arguments.print_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.structured(recipe)), end="")
        return 0

    from ..eval import ranks as processes

    ranks = processes.start(recipe.device or "auto")
    try:
        _run(recipe, arguments, ranks)
    finally:
        processes.finish()
    return 0


def _run(recipe: SuiteRecipe, arguments: argparse.Namespace, ranks: Ranks) -> None:
    from ..eval import suite
    from ..eval.contestants import contestant
    from ..eval.measure import METRICS, MOMENTS_DO
    from ..eval.report import report
    from ..eval.seen import reference_of
    from .eval_arguments import extractor_of

    samplers = [contestant(text) for text in recipe.samplers]
    if wrong := [name for name in recipe.metrics if name not in METRICS]:
        raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {', '.join(wrong)}")
    d, conditions = _conditions(recipe, ranks)
    suite.check(samplers, recipe.nfe, d)
    asked = argparse.Namespace(
        features=recipe.features, weights=recipe.weights and Path(recipe.weights), resize=recipe.resize,
        no_download=False,
    )  # fmt: skip
    judge = extractor_of(asked, ranks)
    if arguments.dry_run:
        print(
            f"{recipe.model} and {judge.name} features load; {len(samplers) * len(recipe.nfe)} cells would be made"
        )
        return
    keep = any(name not in MOMENTS_DO for name in recipe.metrics)
    reference = reference_of(recipe.ref, judge, keep, batch=recipe.batch, ranks=ranks)
    words = ("model", "guidance", "negative", "label", "height", "width", "dtype")
    told = {name: getattr(recipe, name) for name in words if getattr(recipe, name) is not None}
    if recipe.prompts is not None:
        told["prompts"] = suite.hash_of(Path(recipe.prompts).read_text(encoding="utf-8"))
    results = suite.run(
        d, samplers, recipe.nfe, reference, judge, arguments.out, metrics=recipe.metrics, num=recipe.num,
        seed=recipe.seed, batch=recipe.batch, conditions=conditions, told=told, expected=recipe.expected, ranks=ranks,
        progress=True,
    )  # fmt: skip
    if ranks.first:
        shown = suite.pictures(arguments.out, results, arguments.pictures)
        print(report(results, shown, arguments.out, recipe.title, recipe.about))


def _conditions(recipe: SuiteRecipe, ranks: Ranks):
    """The denoiser, guided or not, and the conditions of its samples by their ids."""
    from ..models.codec import dealt
    from .maker import read_prompts
    from .model import embedded, scale_of, told

    lines = None if recipe.prompts is None else read_prompts(Path(recipe.prompts))
    asked = argparse.Namespace(**asdict(recipe), prompt=lines and lines[:1], frames=None)
    d, cond, classes = told(asked, ranks.device, blocks=True)
    scale = scale_of(asked, d.codec)

    def conditions(ids):
        if lines is not None:
            return embedded(asked, [lines[i % len(lines)] for i in ids.tolist()], d.codec, scale)[0], None
        mine = None if cond is None else dealt(cond, ids)
        return mine, mine["label"] if classes and mine is not None else None

    return d, conditions


def _recipe(arguments: argparse.Namespace) -> SuiteRecipe:
    """Defaults, the recipe, its changes, then flags."""
    from ..distill import recipe as recipes
    from ..eval.contestants import separate

    words = list(arguments.words)
    base: dict[str, Any] = {}
    if words and "=" not in words[0]:
        base = recipes.raw(_find(words.pop(0)))
    flags = {name: getattr(arguments, name) for name in FLAGS if getattr(arguments, name) is not None}
    recipe = recipes.read(base, SuiteRecipe, [w for w in words if not w.startswith("samplers=")])
    for word in words:
        if word.startswith("samplers="):
            flags["samplers"] = word.partition("=")[2].strip("[]")
    if "samplers" in flags:
        recipe.samplers = separate(flags.pop("samplers"))
    listed = [f"{k}=[{v}]" if k in ("nfe", "metrics") else f"{k}={v}" for k, v in flags.items()]
    recipe = recipes.read(asdict(recipe), SuiteRecipe, listed)
    if recipe.kind != "suite":
        raise ValueError(f"recipe must be a suite, got kind: {recipe.kind}")
    return recipe


def _find(name_or_path: str) -> str:
    if name_or_path in names():
        return str(FOLDER / f"{name_or_path}.yaml")
    if Path(name_or_path).suffix in (".yaml", ".yml") and Path(name_or_path).is_file():
        return name_or_path
    near = difflib.get_close_matches(name_or_path, names(), 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"recipe must be one of {', '.join(names())} or a YAML file, got {name_or_path!r}{hint}")
