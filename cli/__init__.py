"""The ``fewstep`` command: a thin skin. A verb is a module with a ``main(argv)``, imported when it is used.

fewstep sample digits --solver deis --order 3 --steps 10 --num 64 --seed 0 --out samples.png
fewstep sample path/to/sdxl --prompt "a fox" --negative blurry --steps 8 --out fox.png
fewstep solvers
fewstep table deis --steps 6 --path vp_linear
fewstep search digits --nfe 5 --out table.json
fewstep control digits-inpaint num=4 --out inpainted.png
fewstep eval fid --samples out/ --ref stats.npz
fewstep teacher digits-flow
fewstep demo
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "sample": (".sample", "samples from a model or a pipeline, as one picture, an .npz, or a folder of PNGs"),
    "solvers": (".solvers", "lists every solver: options, calls a step, order of convergence, paper"),
    "table": (".table", "prints a solver's coefficients on a path, draws or saves them"),
    "convert": (".convert", "a checkpoint of EDM or EDM2 as safetensors, without running its pickled code"),
    "teleport-stats": (".teleport_stats", "mean and covariance of a data set, for skipping the noisy steps"),
    "control": (".control", "samples under a reward, a target density or an observation, by a recipe"),
    "search": (".search", "searches a solver for a model at a number of network calls, and saves its table"),
    "teacher": ("..distill.teacher", "trains one of the small teachers by its recipe"),
    "latents": ("..distill.data.latents", "encodes a data set once by an autoencoder, to train in latents"),
    "distill": ("..distill.run", "trains a student of few steps from a teacher, by a recipe"),
    "pairs": ("..distill.make_pairs", "pairs of samples from a reward, for preference methods"),
    "eval": (".eval", "measures samples: FID and its kin, and reference statistics for them"),
    "kernels": (".kernels", "lists the ops that have a Triton kernel, and who runs them here"),
    "bench": (".bench", "times every kernel beside torch, torch.compile and the memory's bandwidth"),
    "export": ("..distill.export", "makes a student a diffusers folder, or says why there is none for it"),
    "demo": ("..eval.demo", "samples the embedded teacher with several solvers: a picture and a table"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; bad input ends with one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: fewstep VERB ...   (fewstep VERB --help says more)\n")
        print("\n".join(f"  {name:<15} {summary}" for name, (_, summary) in VERBS.items()))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from ..version import __version__

        print(f"fewstep {__version__}")
        return 0
    if arguments[0] not in VERBS:
        return _fail(f"the verb must be one of {', '.join(VERBS)}, got {arguments[0]!r}")
    try:
        return importlib.import_module(VERBS[arguments[0]][0], __package__).main(arguments[1:])
    except (ValueError, TypeError, FileExistsError, FileNotFoundError, ImportError) as error:
        return _fail(str(error))
    except BrokenPipeError:  # fewstep solvers | head
        sys.stderr.close()
        return 0


def _fail(message: str) -> int:
    print(f"fewstep: {message}", file=sys.stderr)
    return 2
