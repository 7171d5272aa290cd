"""What stands in a compiled kernel: registers, spills, shared memory and kinds of instructions, for each target.

Registers come from cuobjdump and instructions from nvdisasm, both of which Triton brings along; for AMD both stand in
the assembly. ``aot`` compiles, and asks here.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of GPU: how Triton names it, and the shared memory that one program may have there, in bytes."""

    backend: str
    arch: int | str
    warp: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),  # A100
    "sm_90": Target("cuda", 90, 32, 227 * 1024),  # H100, H200
    "sm_100": Target("cuda", 100, 32, 227 * 1024),  # B200
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),  # MI300
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What stands in one compiled kernel.

    ``tile_loads``: loads in the source of tiles that hold at least 16 bytes a thread; ``wide_loads``: instructions that
    load 16 bytes or more a thread. Stores likewise. ``spills``: instructions on NVIDIA, vector registers on AMD.
    """

    kernel: str
    registers: int
    spills: int
    stack: int
    shared: int
    fp64: int
    tile_loads: int
    wide_loads: int
    tile_stores: int
    wide_stores: int
    tensor_cores: int
    instructions: int
    warps: int
    seconds: float

    def faults(self, target: str) -> dict[str, str]:
        """What is wrong with it on ``target``: {check: what was found}; the checks' names are what a Case waives."""
        found = {}
        if self.spills or self.stack:
            found["spills"] = f"{self.spills} spills, {self.stack} bytes of stack"
        if self.shared > TARGETS[target].shared:
            found["shared"] = f"{self.shared} bytes of shared memory, {target} has {TARGETS[target].shared}"
        if self.fp64:
            found["fp64"] = f"{self.fp64} float64 instructions"
        if self.wide_loads < self.tile_loads or self.wide_stores < self.tile_stores:
            loads = f"{self.wide_loads} wide loads for {self.tile_loads} tiles"
            found["wide"] = f"{loads}, {self.wide_stores} wide stores for {self.tile_stores}"
        return {check: f"{self.kernel}: {what}" for check, what in found.items()}


_readings: dict[str, Reading] = {}  # a kernel that several cases launch is read once


def read(made: Any) -> Reading:
    """What stands in ``made``, a kernel as ``warmup`` returns it."""
    key = made.hash
    if key not in _readings:
        count = _read_cuda if made.metadata.target.backend == "cuda" else _read_hip
        threads = made.metadata.num_warps * made.metadata.target.warp_size
        counts = {f"tile_{kind}s": _tiles(made.asm["ttir"], kind, threads) for kind in ("load", "store")}
        counts |= count(made)
        _readings[key] = Reading(
            kernel=made.metadata.name,
            shared=made.metadata.shared,
            warps=made.metadata.num_warps,
            seconds=0.0,
            **counts,
        )
    return _readings[key]


def _tiles(ir: str, kind: str, threads: int) -> int:
    """Loads or stores in Triton's IR of whole tiles: 16 bytes or more a thread.

    >>> ir = "%3 = tt.load %2, %1 : tensor<64x8x!tt.ptr<bf16>>" "\\n %4 = tt.load %2 : !tt.ptr<f32>"
    >>> _tiles(ir, "load", threads=64), _tiles(ir, "load", threads=128)
    (1, 0)
    """
    count = 0
    for shape, bits in re.findall(rf"tt\.{kind}\b[^\n]*tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)", ir):
        count += math.prod(map(int, shape.rstrip("x").split("x"))) * int(bits) // 8 >= 16 * threads
    return count


def _read_cuda(made: Any) -> dict[str, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", cubin)
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if used is None:
        raise RuntimeError(f"cuobjdump says nothing about registers: {usage[:200]}")
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9][A-Z0-9_.]*)", sass, re.M)
    histogram = collections.Counter(found)

    def count(pattern: str) -> int:
        return sum(n for name, n in histogram.items() if re.match(pattern, name))

    wide = r".*\.(128|256)\b"
    return {
        "registers": int(used[1]),
        "stack": int(used[2]),
        "spills": count(r"LDL|STL"),
        "fp64": count(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|.*\.F64\b|MUFU\.\w*64H"),
        "wide_loads": count(r"(LDG|LDGSTS|UBLKCP)\b" + wide) + count(r"UTMALDG"),
        "wide_stores": count(r"STG\b" + wide) + count(r"UTMASTG"),
        "tensor_cores": count(r"HMMA|[HQI]GMMA|UTC\w*MMA"),
        "instructions": len(found),
    }


def _read_hip(made: Any) -> dict[str, int]:
    text = made.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", text, re.M))

    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count"),  # scalar ones go to lanes of vector registers, not to memory
        "fp64": count(r"v_\w+_f64"),
        "wide_loads": count(r"(?:global|buffer|flat)_load_(?:lds_)?dwordx4"),
        "wide_stores": count(r"(?:global|buffer|flat)_store_dwordx4"),
        "tensor_cores": count(r"v_mfma"),
        "instructions": count(r"[sv]_\w+") + count(r"(?:global|buffer|flat|ds)_\w+"),
    }


def _output(*command: Any) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout
