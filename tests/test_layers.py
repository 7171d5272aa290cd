"""No import runs to the right, none in a circle, and nothing optional is imported before it is used.

kernels < models < samplers < eval < distill < cli
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import fewstep

ROOT = Path(fewstep.__file__).resolve().parent
LAYERS = ("kernels", "models", "samplers", "eval", "distill", "cli")

# What a plain module may import where it is loaded. Everything else is imported inside the function that wants it.
CORE = {"torch", "numpy", "safetensors", "tqdm", "fewstep"} | set(sys.stdlib_module_names)
# Modules that exist only for an optional library; no package's __init__ may load them.
EXCEPTIONS = {"samplers.scheduler": {"diffusers"}}
OPTIONAL = (
    "diffusers xformers torchvision transformers accelerate peft triton matplotlib sklearn scipy omegaconf PIL "
    "torch_fidelity cv2 yaml"
).split()


# -- reading imports ---------------------------------------------------------------------------------------------------


def modules(root: Path) -> dict[str, str]:
    """Dotted name -> source of every module of the package: ``""``, ``"cli"``, ``"models"``, ``"models.paths"``."""
    found = {}
    for top in [*root.glob("*.py"), *(p for layer in LAYERS for p in (root / layer).rglob("*.py"))]:
        parts = top.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = top.read_text(encoding="utf-8")
    return found


def is_package(name: str, names: Iterable[str]) -> bool:
    return name == "" or name in LAYERS or any(other.startswith(name + ".") for other in names)


def statements(tree: ast.AST, everywhere: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements: of the whole file, or only those that run when the module is loaded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (found for branch in node.orelse for found in statements(branch, everywhere))
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(node, everywhere)


def imports(name: str, sources: dict[str, str], everywhere: bool) -> set[str]:
    """Absolute names that module ``name`` imports; the package's own as ``fewstep.models.paths``."""
    found: set[str] = set()
    here = name.split(".") if name else []
    package = here if is_package(name, sources) else here[:-1]
    for node in statements(ast.parse(sources[name]), everywhere):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
            continue
        base = node.module or ""
        if node.level:
            above = package[: len(package) - (node.level - 1)]
            base = ".".join(["fewstep", *above, *([base] if base else [])])
        if base.split(".")[0] != "fewstep":
            found.add(base)
            continue
        own = base[len("fewstep.") :]
        for (
            alias
        ) in node.names:  # `from .. import grids` names a module, `from ..grids import karras` does not
            inner = f"{own}.{alias.name}" if own else alias.name
            found.add(f"fewstep.{inner}" if inner in sources else base)
    return found


def own_imports(name: str, sources: dict[str, str], everywhere: bool) -> set[str]:
    found = imports(name, sources, everywhere)
    return {n[len("fewstep.") :] for n in found if n.startswith("fewstep.")} | (
        {""} if "fewstep" in found else set()
    )


# -- what must hold ----------------------------------------------------------------------------------------------------


def rightward(sources: dict[str, str]) -> list[str]:
    """Imports, lazy ones too, from a layer that stands further right."""
    bad = []
    for name in sources:
        layer = name.split(".")[0]
        if layer not in LAYERS:
            continue
        for target in own_imports(name, sources, everywhere=True):
            top = target.split(".")[0]
            if top in LAYERS and LAYERS.index(top) > LAYERS.index(layer):
                bad.append(f"{name} imports {target}")
    return sorted(bad)


def circle(sources: dict[str, str]) -> list[str]:
    """The names round one cycle of load-time imports, or nothing. A package's __init__ may import its own members."""
    graph = {n: sorted(t for t in own_imports(n, sources, False) if t in sources and t != n) for n in sources}
    state: dict[str, int] = {}

    def visit(name: str, trail: list[str]) -> list[str]:
        state[name] = 1
        for target in graph[name]:
            if state.get(target) == 1:
                return [*trail, name, target][[*trail, name].index(target) :]
            if target not in state and (found := visit(target, [*trail, name])):
                return found
        state[name] = 2
        return []

    for name in graph:
        if name not in state and (found := visit(name, [])):
            return found
    return []


def eager(sources: dict[str, str]) -> list[str]:
    """Libraries beyond torch and numpy that a module imports when it is loaded."""
    bad = []
    for name in sources:
        for target in imports(name, sources, everywhere=False):
            top = target.split(".")[0]
            if top not in CORE | EXCEPTIONS.get(name, set()):
                bad.append(f"{name or '__init__'} imports {target}")
    return sorted(bad)


SOURCES = modules(ROOT)


def test_the_tree_is_read():
    assert {"", "models", "models.paths", "models.denoiser", "samplers"} <= set(SOURCES)
    assert "models.paths" in own_imports("models.denoiser", SOURCES, everywhere=False)


def test_no_import_runs_to_the_right():
    assert rightward(SOURCES) == []


def test_a_rightward_import_is_seen():
    for line in (
        "from ..samplers import sample",
        "def f():\n    from fewstep.samplers.loop import sample",
        "import fewstep.samplers",
        "from .. import samplers",
    ):
        wrong = {"": "", "models": "", "models.new": line, "samplers": "", "samplers.loop": ""}
        assert len(rightward(wrong)) == 1, line
        assert rightward({**wrong, "models.new": "", "samplers.loop": "from ..models import new"}) == []


def test_no_imports_in_a_circle():
    assert circle(SOURCES) == []


def test_a_circle_is_seen():
    ring = {"models.a": "from .b import x", "models.b": "from . import c", "models.c": "from .a import y"}
    ring |= {"": "", "models": ""}
    assert set(circle(ring)) == {"models.a", "models.b", "models.c"}
    lazy = {**ring, "models.c": "def f():\n    from .a import y"}
    assert circle(lazy) == []
    home = {"": "", "models": "from .a import x", "models.a": "from ..models import y"}
    assert set(circle(home)) == {"models", "models.a"}


def test_nothing_optional_is_imported_early():
    assert eager(SOURCES) == []


def test_an_early_import_is_seen():
    assert eager({"": "", "models": "import diffusers"}) == ["models imports diffusers"]
    assert (
        eager({"": "", "models": "try:\n    from sklearn import x\nexcept ImportError:\n    x = None"}) != []
    )
    assert eager({"": "", "models": "class A:\n    import triton.language as tl"}) != []
    assert eager({"": "", "models": "def f():\n    import diffusers"}) == []
    assert (
        eager({"": "", "models": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers"})
        == []
    )
    assert eager({"": "", "samplers": "", "samplers.scheduler": "from diffusers import ConfigMixin"}) == []


# -- in a process of its own -------------------------------------------------------------------------------------------

BLOCK = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("no module named " + name, name=name)
sys.meta_path.insert(0, Absent())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=110)


def test_imports_without_the_optional_libraries():
    # torch itself asks for some of these by `try: import`, and must be told no in the way it expects
    code = BLOCK.format(blocked=set(OPTIONAL)) + "import fewstep.models, fewstep.samplers, fewstep.eval\n"
    done = python(code + f"late = set({OPTIONAL}) & set(sys.modules)\nassert not late, late")
    assert done.returncode == 0, done.stderr


def test_a_missing_library_would_be_seen():
    done = python(BLOCK.format(blocked={"numpy"}) + "import fewstep.models")
    assert done.returncode != 0 and "no module named numpy" in done.stderr


def test_the_package_itself_is_light():
    done = python(
        "import fewstep, sys; assert not {'torch', 'numpy'} & set(sys.modules); print(fewstep.__version__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == fewstep.__version__


def test_version_is_a_plain_string():
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z0-9.+-]*)", fewstep.__version__)


# -- stray paths -------------------------------------------------------------------------------------------------------

# Spelled in pieces, so that this file does not name what it looks for.
TOPS = ("root", "work", r"ho" r"me/\w+", r"Use" r"rs/\w+", r"op" r"t/\w+", r"tm" r"p/\w+", r"mn" r"t/\w+")
HOME = re.compile(rf"(?<![\w.~$}}/])/(?:{'|'.join(TOPS)})(?:/|\b)")


def tracked() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def stray(text: str) -> list[str]:
    return [match.group() for match in HOME.finditer(text)]


def test_no_tracked_file_names_a_path_of_one_machine():
    bad = {}
    for path in tracked():
        if not path.is_file() or path.suffix in {".safetensors", ".png", ".npz"}:
            continue
        if found := stray(path.read_text(encoding="utf-8", errors="replace")):
            bad[str(path.relative_to(ROOT))] = found
    assert bad == {}


def test_a_stray_path_is_seen():
    assert (
        stray("see " + "/ho" + "me/ann/x")
        and stray("'" + "/wo" + "rk/main'")
        and stray("# " + "/tm" + "p/out.png")
    )
    assert not stray("docs/ho" + "me/ann, ../wo" + "rk, ~/ro" + "ot, a/tm" + "p/b, $HOME/op" + "t/x")
