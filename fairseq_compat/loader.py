"""The loader that mends a module: rewrites of its syntax tree, then patches of its contents."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

__all__ = ["MendingLoader", "mended_spec", "rewrite"]

Rewrite = Callable[[ast.Module], None]


def rewrite(fix: Rewrite) -> Rewrite:
    """Marks a fix that edits the module's syntax tree before the module is executed.

    Other fixes get the module after it was executed; a rewrite is for what would be too late then.
    """
    fix.edits_syntax_tree = True  # type: ignore[attr-defined]
    return fix


class MendingLoader(SourceFileLoader):
    """Loads a module from its source file and applies fixes to it.

    Args:
        name: full name of the module.
        path: its source file.
        fixes: functions of a syntax tree (marked by :func:`rewrite`) or of the executed module.
    """

    def __init__(self, name: str, path: str, fixes: Iterable[Callable[[Any], None]]) -> None:
        super().__init__(name, path)
        fixes = list(fixes)
        self.rewrites = [fix for fix in fixes if hasattr(fix, "edits_syntax_tree")]
        self.patches = [fix for fix in fixes if not hasattr(fix, "edits_syntax_tree")]

    def get_code(self, fullname: str) -> CodeType | None:
        # ``python -m`` asks for the code too, so rewrites reach a command however it is started.
        if not self.rewrites:
            return super().get_code(fullname)
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        for fix in self.rewrites:
            fix(tree)
        # Compiled past the bytecode cache, which belongs to the file as it is on disk.
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for fix in self.patches:
            fix(module)


def mended_spec(
    name: str,
    path: Any,
    target: Any,
    finders: Iterable[Any],
    fixes: Iterable[str],
) -> ModuleSpec | None:
    """Finds a module as usual and gives it a :class:`MendingLoader`.

    Args:
        name, path, target: as for ``find_spec`` of a finder.
        finders: the finders to ask, in order.
        fixes: ``"module:function"`` within this package, in the order of application.

    Returns:
        The specification, or None where no finder knows the module.  A module that does not come
        from a plain source file is left as it is.
    """
    for finder in finders:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec(name, path, target) if find_spec else None
        if spec is not None:
            break
    else:
        return None
    if type(spec.loader) is SourceFileLoader:
        functions = [_function(fix) for fix in fixes]
        spec.loader = MendingLoader(spec.loader.name, spec.loader.path, functions)
    return spec


def _function(fix: str) -> Callable[[Any], None]:
    module, _, function = fix.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), function)
