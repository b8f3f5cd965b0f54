"""What importing the package costs, and that its parts know of each other in one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fairseq_lightrnn

PACKAGE = "fairseq_lightrnn"
ROOT = Path(fairseq_lightrnn.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
CORE = sorted(f"{PACKAGE}.core.{path.stem}" for path in (ROOT / "core").glob("[!_]*.py"))
# What each part of the package may import besides itself.
BESIDE = {"damage", "errors", "files", "perplexity", "signature", "version", "workers"}
BELOW = {
    "core": {"files", "perplexity"},
    "runtime": {"files", "perplexity"},
    "allocation": {"core", "workers"},
    "data": {"core", *BESIDE},
    "optim": {"core", *BESIDE},
    "models": {"core", *BESIDE},
    "criterions": {"core", "models", *BESIDE},
    "tasks": {"core", "allocation", "data", "models", "criterions", *BESIDE},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yields modules that a file of the package imports from the package, and names from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from ((m, name) for m, name in found if m.split(".")[0] == PACKAGE)


def part_of(module: str) -> str:
    """The part of the package that a module belongs to, or its own name."""
    return (module.split(".") + [""])[1]


def imported(code: str) -> set[str]:
    """All modules that a fresh interpreter knows after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.split())


def test_the_core_needs_neither_fairseq_nor_solvers() -> None:
    modules = [*CORE, f"{PACKAGE}.allocation.statistics", f"{PACKAGE}.allocation.gathering"]
    code = "\n".join(f"import {module}" for module in modules)
    found = {module.split(".")[0] for module in imported(code)}
    assert {"torch", "numpy"} <= found
    assert not found & {"fairseq", "fairseq_cli", "numba", "scipy", "omegaconf", "hydra"}


def test_the_runner_needs_numpy_and_onnxruntime_alone() -> None:
    found = {m.split(".")[0] for m in imported(f"import {PACKAGE}.commands.exported")}
    assert "numpy" in found
    assert not found & {"torch", "fairseq", "numba", "scipy", "onnx", "omegaconf", "tqdm"}


def test_registering_the_plugin_imports_no_solver() -> None:
    code = f"import fairseq_compat\nfairseq_compat.install()\nimport {PACKAGE}.register"
    found = imported(code)
    assert not {module.split(".")[0] for module in found} & {"numba", "llvmlite"}
    allocation = {module for module in found if module.startswith(f"{PACKAGE}.allocation")}
    known = {"", ".statistics", ".gathering", ".cell_costs", ".occurrences"}
    assert allocation <= {f"{PACKAGE}.allocation{name}" for name in known}


def test_nothing_private_crosses_modules() -> None:
    wrong = [
        f"{name_of(path)} imports {name} of {module}"
        for path in SOURCES
        for module, name in imports(path)
        for part in (*module.split(".")[1:], name or "")
        if part.startswith("_") and part != "__version__"
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_point_one_way() -> None:
    """Commands and the modules beside the parts may know all of the package."""
    wrong = []
    for path in SOURCES:
        part = part_of(name_of(path))
        if part in BELOW:
            for module, name in imports(path):
                other = part_of(f"{module}.{name}" if module == PACKAGE else module)
                if other != part and other not in BELOW[part]:
                    wrong.append(f"{name_of(path)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_module_is_part_of_a_circle() -> None:
    """But for the package itself, which registers the plugin where fairseq is in use."""
    graph: dict[str, set[str]] = {name_of(path): set() for path in SOURCES}
    for path in SOURCES:
        for module, name in imports(path):
            target = f"{module}.{name}" if f"{module}.{name}" in graph else module
            if PACKAGE not in (name_of(path), target):
                graph[name_of(path)].add(target)
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " imports ".join([*above, module])
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())
