"""``fewstep convert model.pkl --out model.safetensors``."""

from __future__ import annotations

from pathlib import Path

from .arguments import parser_for


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "convert", "A checkpoint of EDM or EDM2 as one of fewstep, without running the code that it carries."
    )
    parser.add_argument("source", type=Path, help="a .pkl of the EDM or EDM2 repositories")
    parser.add_argument("--out", type=Path, help="default: beside it, as .safetensors")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.source.with_suffix(".safetensors")
    if out.exists():
        raise FileExistsError(f"{out} exists already: --out must name a new file")

    from ..models.load import convert

    d = convert(arguments.source, out)
    parameters = sum(p.numel() for p in d.net.parameters()) / 1e6
    print(
        f"{out}: {type(d.net).__name__}, {parameters:.1f} million parameters, {' x '.join(map(str, d.shape))}"
    )
    return 0
