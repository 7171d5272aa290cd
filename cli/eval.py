"""``fewstep eval fid`` and its kin: measuring, by verbs of its own. A verb is a module with a ``main(argv)``."""

from __future__ import annotations

import importlib

VERBS = {
    "fid": (
        ".eval_fid",
        "distances between samples and a reference: FID, KID, precision, ... with their protocol",
    ),
    "suite": (".eval_suite", "samplers against each other: curves, samples and tables on one page"),
    "stats": (".eval_stats", "reference statistics of images: mu and sigma, as every tool reads them"),
}


def main(argv: list[str]) -> int:
    """Run one verb; the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fewstep eval VERB ...   (fewstep eval VERB --help says more)\n")
        print("\n".join(f"  {name:<8} {summary}" for name, (_, summary) in VERBS.items()))
        return 0 if argv else 2
    if argv[0] not in VERBS:
        raise ValueError(f"the verb of eval must be one of {', '.join(VERBS)}, got {argv[0]!r}")
    return importlib.import_module(VERBS[argv[0]][0], __package__).main(argv[1:])
