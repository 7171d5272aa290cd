"""What compilers make of the kernels, read on a machine without a GPU.

    python -m fewstep.kernels.aot philox --target sm_90      # a table: registers, spills, shared memory, ...

Triton's compiler, ptxas and LLVM need no device. So the launchers of ``kernels/<op>.py`` run unmodified on meta tensors
of real sizes, in a child process where ``kernel[grid](...)`` compiles with Triton's own specialisation and launches
nothing; what is read comes from the binaries. This finds what the interpreter cannot: spills, shared memory that no
device has, float64 arithmetic, loads that are not vectorised. It says nothing about time.

An op's ``launch`` is what is run, or its ``launches`` where that exists: forward and backward, say.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from .binaries import TARGETS, Reading, read
from .cases import Case, ops

LIMIT = 100.0  # seconds that the compiles of one case may take


class CompileError(RuntimeError):
    """A case that does not compile, or not in time."""


class Compiler:
    """A child process that compiles; ``compile`` it one case at a time. To be closed, or used as a context.

    Args:
        limit: seconds that one case may take; beyond it the child is ended, and the next case starts another.
    """

    def __init__(self, limit: float = LIMIT):
        self.limit = limit
        self._child: subprocess.Popen | None = None

    def compile(self, op: str, case: str, target: str) -> list[Reading]:
        """The kernels that case ``case`` of ``op`` launches; ``op`` is a file of this folder or the path of one."""
        if target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
        child = self._started()
        child.stdin.write(json.dumps({"op": op, "case": case, "target": target}) + "\n")
        child.stdin.flush()
        if not select.select([child.stdout], [], [], self.limit)[0]:
            self.close()
            raise CompileError(f"{op}, {case}, {target}: no result within {self.limit:g} s")
        line = child.stdout.readline()
        if not line:
            self.close()
            raise CompileError(f"{op}, {case}, {target}: the compiler died")
        answer = json.loads(line)
        if "error" in answer:
            raise CompileError(f"{op}, {case}, {target}: {answer['error']}")
        return [Reading(**r) for r in answer["readings"]]

    def _started(self) -> subprocess.Popen:
        if self._child is None:
            env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            command = [sys.executable, "-m", f"{__package__}.aot", "--child"]
            self._child = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
            if not select.select([self._child.stdout], [], [], LIMIT)[0] or not self._child.stdout.readline():
                self.close()
                raise CompileError("the compiling process did not start")
        return self._child

    def close(self) -> None:
        """End the child, and ptxas with it."""
        if self._child is not None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._child.stdin.close()
            self._child.stdout.close()
            self._child = None

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


# --- in the child ----------------------------------------------------------------------------------------------------


class _Offline:
    """As much of a Triton driver as a compile asks for; the device's number keeps the targets' caches apart."""

    def __init__(self, target: Any, number: int):
        self.target, self.number = target, number

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def _serve() -> None:
    """Answer a line of JSON for a line of JSON. This process compiles and never launches."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    from .lang import require

    require()
    from triton.runtime.jit import KernelInterface

    launched: list[Any] = []

    def getitem(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            start = time.perf_counter()
            made = kernel.warmup(*args, grid=grid, **options)
            launched.append((made, time.perf_counter() - start))

        return launch

    KernelInterface.__getitem__ = getitem
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        job = json.loads(line)
        launched.clear()
        try:
            _launches(job["op"], job["case"], job["target"])
            seen: dict[str, dict[str, Any]] = {}
            for made, seconds in launched:
                if made.hash not in seen:
                    reading = dataclasses.replace(read(made), seconds=round(seconds, 2))
                    seen[made.hash] = dataclasses.asdict(reading)
            answer = {"readings": list(seen.values())}
        except Exception as error:  # whatever it is, it is a finding about this case
            answer = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _launches(op: str, case: str, target: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    module = load(op)
    t = TARGETS[target]
    driver.set_active(_Offline(GPUTarget(t.backend, t.arch, t.warp), list(TARGETS).index(target)))
    found = next(c for c in module.CASES if c.name == case)
    getattr(module, "launches", module.launch)(**found.make("meta"))


def load(op: str) -> ModuleType:
    """The module of an op: a file of this folder by its name, or any file by its path."""
    if not op.endswith(".py"):
        return importlib.import_module(f"{__package__}.{op}")
    name = f"_aot_{Path(op).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, op)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# --- all of them -----------------------------------------------------------------------------------------------------


def jobs(names: list[str] | None = None, targets: list[str] | None = None) -> Iterator[tuple[str, Case, str]]:
    """Every (op, real case, target) but those that the case waives."""
    for name, module in ({name: load(name) for name in names} if names else ops()).items():
        for case in module.CASES:
            if case.real:
                yield from ((name, case, t) for t in targets or TARGETS if t not in case.waived)


def registers(readings: list[Reading]) -> dict[str, int]:
    """The most registers of each kernel: what is kept in a file a Triton version."""
    most: dict[str, int] = {}
    for r in readings:
        most[r.kernel] = max(most.get(r.kernel, 0), r.registers)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fewstep.kernels.aot", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("op", nargs="*", help="ops, all by default")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--target", action="append", choices=TARGETS, help="all by default; may be repeated")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a case (%(default)g)")
    parser.add_argument("--registers", metavar="FOLDER", help="write registers-<triton version>.json there")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _serve()
    ceilings: dict[str, dict[str, dict[str, int]]] = {}
    with Compiler(args.limit) as compiler:
        for name, case, target in jobs(args.op, args.target):
            if args.case not in case.name:
                continue
            print(f"{name}, {case.name}, {target}", flush=True)
            try:
                readings = compiler.compile(name, case.name, target)
            except CompileError as error:
                print(f"    FAILED {error}")
                continue
            for r in readings:
                facts = {k: v for k, v in dataclasses.asdict(r).items() if k != "kernel"}
                print(f"    {r.kernel}:", ", ".join(f"{k} {v}" for k, v in facts.items()))
                for check, fault in r.faults(target).items():
                    print(f"    {'waived' if check in case.waived else 'WRONG'}: {fault}")
            ceilings.setdefault(name, {}).setdefault(case.name, {})[target] = registers(readings)
    if args.registers:
        _write(Path(args.registers), ceilings, bool(args.op or args.case or args.target))


def _write(folder: Path, ceilings: dict[str, dict[str, dict[str, Any]]], partly: bool) -> None:
    """The ceilings as a file, aside first; of some ops only: the others stay as they are."""
    path = folder / f"registers-{version()}.json"
    kept = json.loads(path.read_text()) if partly and path.exists() else {}
    for name, by_case in ceilings.items():
        for case, by_target in by_case.items():
            kept.setdefault(name, {}).setdefault(case, {}).update(by_target)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    aside.replace(path)


def version() -> str:
    """Triton's version to the second number, without importing it."""
    from importlib.metadata import version as of

    return ".".join(of("triton").split(".")[:2])


if __name__ == "__main__":
    main()
