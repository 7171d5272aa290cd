"""``fewstep kernels``."""

from __future__ import annotations

from .arguments import parser_for


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for("kernels", "List the ops that have a Triton kernel, who runs them here, and why.")
    parser.parse_args(argv)
    from ..kernels import cases, dispatch

    impl, reason = dispatch.why()
    rows = [("op", "run by", "what it is")]
    for name, module in cases.ops().items():
        rows.append((name, impl, (module.__doc__ or "").strip().splitlines()[0]))
    widths = [max(len(row[k]) for row in rows) for k in range(2)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + "  " + row[2])
    print(f"\n{impl}: {reason}.")
    if impl == "triton":
        print("What a kernel does not take (float64, say) its torch reference runs.")
    print(f"{dispatch.VARIABLE}=reference or triton, and impl= at a call, say otherwise.")
    return 0
