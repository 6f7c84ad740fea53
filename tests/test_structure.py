"""The arrows between the rooms, held by reading imports, not by running them."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

LEAVES = {"errors", "checks", "patterns", "config", "compat", "masks"}
PASSES_MAY = LEAVES | {"ops", "plan", "policy", "cost", "rewriting", "naming"}
PIPELINE_MAY = PASSES_MAY | {"passes", "verify"}

# room -> the rooms it may import, itself apart. A room is a module or a folder of sparsefx/.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "checks": {"errors"},
    "schedules": {"errors", "checks"},
    "patterns": {"errors", "checks", "schedules"},
    "config_files": {"errors"},
    "config": {"errors", "checks", "schedules", "patterns", "config_files"},
    "compat": {"errors"},
    "masks": {"errors", "compat"},
    "ops": LEAVES,
    "kernels": LEAVES | {"ops"},
    "plan": {"errors", "config", "patterns"},
    "policy": {"errors", "config", "patterns", "plan"},
    "cost": {"errors", "compat", "config", "patterns", "plan", "policy"},
    "calibration": {"errors", "compat", "config", "plan", "cost"},
    "lowering": {"errors", "config", "plan", "cost", "kernels"},
    "rewriting": LEAVES | {"plan", "ops"},
    "naming": LEAVES | {"plan", "rewriting"},
    "verify": LEAVES | {"ops", "plan", "rewriting"},
    "passes": PASSES_MAY,
    "capture": LEAVES | {"naming", "rewriting"},
    "report": PIPELINE_MAY | {"capture", "pipeline", "lowering"},
    "pipeline": PIPELINE_MAY | {"lowering"},
    "variants": LEAVES | {"schedules", "capture", "rewriting"},
    "backend": PIPELINE_MAY | {"capture", "pipeline", "kernels", "variants"},
    "registration": {"compat", "backend"},
    "onnx": PIPELINE_MAY | {"capture", "pipeline"},
    "distributed": LEAVES | {"ops", "naming", "rewriting", "capture", "report"},
    "diagnostics": PIPELINE_MAY | {"capture", "pipeline", "sparsifiers"},
    "sparsifiers": LEAVES | {"permutation"},
    "packing": LEAVES | {"ops", "sparsifiers"},
    "permutation": LEAVES | {"capture", "naming", "rewriting"},
    "compact": LEAVES | {"permutation"},
}
# These may import every room; no room may import them.
ABOVE_ALL = {"__init__", "testing", "cli", "__main__"}

PRIVATE = re.compile(r"torch(\.\w+)*\._\w+|torch\.fx\.experimental\b")
# Underscored, yet contracts: _check and its kin are documented, operators are called by schema.
PRIVATE_BUT_STABLE = ("torch._check", "torch.ops.", "torch.__version__")

# /name/ where a path can begin: after a quote, a space, an equals sign or a bracket.
MACHINE_PATH = re.compile(
    r"""(?:^|(?<=["'\s=(<`]))(?:/[A-Za-z][\w.-]*/|~/|[A-Z]:\\)""", re.MULTILINE
)


@dataclass(frozen=True)
class Import:
    """One imported dotted name; ``lazy`` when a function imports it as it is called."""

    name: str
    line: int
    lazy: bool


def imports_of(tree: ast.Module) -> Iterator[Import]:
    """Every import of a file, but those that only a type checker sees."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    yield Import(f"{child.module}.{alias.name}", child.lineno, lazy)
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, lazy or inside)

    yield from visit(tree, False)


def room_of(dotted: str) -> str:
    """sparsefx.ops.nm.nm_mm -> ops; a name of the package itself, as sparsefx.Rule, -> __init__."""
    parts = dotted.split(".")
    known = ARROWS.keys() | ABOVE_ALL
    return parts[1] if len(parts) > 1 and parts[1] in known else "__init__"


def broken_rules(path: str, source: str) -> list[str]:
    """What a file breaks. ``path`` as it is imported: sparsefx/passes/x.py."""
    room = Path(path).parts[1].removesuffix(".py")
    if room not in ARROWS and room not in ABOVE_ALL:
        return [f"{path}: a new room: give {room!r} its row in ARROWS"]
    tree = ast.parse(source)
    found = [*wrong_arrows(path, room, tree), *private_torch(path, tree)]
    for match in MACHINE_PATH.finditer(source):
        line = source.count("\n", 0, match.start()) + 1
        found.append(f"{path}:{line}: names a path of one machine, {match.group()!r}")
    return found


def wrong_arrows(path: str, room: str, tree: ast.Module) -> Iterator[str]:
    """Imports of rooms above or beside, and of Triton where or when it may not be."""
    for got in imports_of(tree):
        package = got.name.split(".")[0]
        if package in {"passes", "kernels"}:
            yield f"{path}:{got.line}: imports {got.name}: say sparsefx.{package}"
        if package == "sparsefx" and room not in ABOVE_ALL:
            other = room_of(got.name)
            if other not in ARROWS[room] | {room}:
                yield f"{path}:{got.line}: {room} may not import {other} ({got.name})"
        is_kernel_file = room == "kernels" and (path.endswith("/triton.py") or "/triton/" in path)
        needs_triton = package == "triton" or (
            "sparsefx.kernels" in got.name and ".triton" in got.name
        )
        if package == "triton" and room != "kernels":
            yield f"{path}:{got.line}: imports triton outside kernels/"
        elif needs_triton and not got.lazy and not is_kernel_file:
            yield f"{path}:{got.line}: imports triton before a kernel's first call ({got.name})"


def private_torch(path: str, tree: ast.Module) -> Iterator[str]:
    """Private parts of torch, imported or reached by attribute, outside the one module for them."""
    if path == "sparsefx/compat.py":
        return
    used = {(got.name, got.line) for got in imports_of(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used.add((ast.unparse(node), node.lineno))
    lines: dict[int, str] = {}  # the longest name of a line says it all
    for name, line in used:
        if PRIVATE.match(name) and not name.startswith(PRIVATE_BUT_STABLE):
            lines[line] = max(name, lines.get(line, ""), key=len)
    for line, name in sorted(lines.items()):
        yield f"{path}:{line}: {name} is private: reach it through sparsefx/compat.py"


def sources(root: Path) -> Iterator[tuple[str, str]]:
    """Every Python file that ships, under the name it is imported by."""
    top = {"sparsefx": "sparsefx", "passes": "sparsefx/passes", "kernels": "sparsefx/kernels"}
    for folder, imported in top.items():
        for file in sorted((root / folder).rglob("*.py")):
            inner = file.relative_to(root / folder)
            if folder == "sparsefx" and inner.parts[0] in {"passes", "kernels"}:
                continue  # a Python whose rglob follows links
            yield f"{imported}/{inner}", file.read_text()


def test_every_file_keeps_the_rules(root: Path):
    files = list(sources(root))
    rooms = {Path(path).parts[1] for path, _ in files}
    assert {"config.py", "ops", "passes", "kernels"} <= rooms, rooms
    found = [line for path, source in files for line in broken_rules(path, source)]
    assert not found, "\n" + "\n".join(found)


def test_arrows_make_no_circle():
    TopologicalSorter(ARROWS).prepare()


def test_links_are_relative(root: Path):
    for name in ("passes", "kernels"):
        link = root / "sparsefx" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("config.py", "from sparsefx.ops import nm", "config may not import ops"),
        ("ops/nm.py", "from sparsefx.plan import Site", "ops may not import plan"),
        ("ops/nm.py", "import sparsefx", "ops may not import __init__"),
        ("plan.py", "def f():\n    from sparsefx.policy import x", "plan may not import policy"),
        ("passes/cleanup.py", "from sparsefx import kernels", "passes may not import kernels"),
        ("passes/cleanup.py", "import sparsefx.pipeline", "passes may not import pipeline"),
        ("kernels/__init__.py", "from sparsefx.passes import x", "kernels may not import passes"),
        ("passes/cleanup.py", "import kernels", "say sparsefx.kernels"),
        ("ops/nm.py", "def f():\n    import triton", "triton outside kernels/"),
        ("kernels/__init__.py", "import triton.language as tl", "before a kernel's first call"),
        ("kernels/__init__.py", "from sparsefx.kernels.nm_mm import triton", "first call"),
        ("backend.py", "from torch._dynamo import reset", "torch._dynamo.reset is private"),
        ("ops/nm.py", "import torch.fx.experimental.proxy_tensor", "is private"),
        ("ops/nm.py", "from torch import _C", "torch._C is private"),
        ("ops/nm.py", "import torch\ntorch._inductor.config.x = 1", "torch._inductor.config.x is"),
        ("ops/nm.py", "from torch.utils._pytree import tree_map", "is private"),
        ("report/x.py", 'WHERE = "' + "/home" + '/me/x"', "a path of one machine"),
        ("report/x.py", "# see " + "/data" + "/x.bin", "a path of one machine"),
        ("gadgets.py", "", "a new room"),
    ],
)
def test_a_broken_rule_is_seen(path: str, source: str, message: str):
    (found,) = broken_rules(f"sparsefx/{path}", source)
    assert message in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("compat.py", "from torch._inductor import config"),
        ("ops/nm.py", "import torch\nfrom sparsefx.config import NM\ntorch._check(True)"),
        ("ops/nm.py", "import torch\ntorch.ops.aten._to_copy.default"),
        ("ops/nm.py", "def f(self):\n    return self._x / self.torch._y  # and/or, https://a/b/c"),
        ("passes/cleanup.py", "from sparsefx import ops\nfrom sparsefx.rewriting import Skip"),
        ("config.py", "if TYPE_CHECKING:\n    from sparsefx.plan import Site"),
        ("kernels/nm_mm/triton.py", "import triton\nfrom sparsefx.kernels import _tiles"),
        ("kernels/__init__.py", "def f():\n    from sparsefx.kernels.nm_mm import triton"),
        ("backend.py", "from sparsefx.pipeline import run"),
        ("__init__.py", "from sparsefx.backend import sparsefx"),
        ("testing.py", "from sparsefx.pipeline import run"),
    ],
)
def test_a_kept_rule_is_not_reported(path: str, source: str):
    assert broken_rules(f"sparsefx/{path}", source) == []
