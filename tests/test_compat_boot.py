"""How fairseq_compat comes into a process, and what it does to the import system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fairseq_compat
from fairseq_compat.loader import MendingLoader, mended_spec, rewrite

ROOT = str(Path(fairseq_compat.__file__).parent.parent)


def python(program: str, *path: str) -> str:
    """Runs a program in an interpreter that reads no ``.pth`` file; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    run = subprocess.run(
        [sys._base_executable, "-s", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(sys.prefix),
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_boot_imports_nothing_else() -> None:
    program = (
        "import sys, __future__; before = set(sys.modules)\n"
        "import fairseq_compat; fairseq_compat.install()\n"
        "print(sorted(set(sys.modules) - before))"
    )
    assert python(program, ROOT).strip() == "['fairseq_compat']"


def test_install_by_hand_where_no_pth_file_is_read() -> None:
    packages = [path for path in sys.path if path.endswith("site-packages")]
    program = "import fairseq_compat; fairseq_compat.install(); import fairseq; print(fairseq)"
    assert "fairseq" in python(program, ROOT, *packages)


def test_installing_twice_changes_nothing() -> None:
    before = list(sys.meta_path)
    fairseq_compat.install()
    assert sys.meta_path == before


def test_installing_too_late_is_said() -> None:
    program = (
        "import sys, types, warnings, fairseq_compat\n"
        "sys.modules['fairseq.checkpoint_utils'] = types.ModuleType('late')\n"
        "with warnings.catch_warnings(record=True) as caught: fairseq_compat.install()\n"
        "print(caught[0].message)"
    )
    printed = python(program, ROOT)
    assert "fairseq.checkpoint_utils was imported before fairseq_compat.install()" in printed


def test_uninstall_takes_the_finder_away() -> None:
    program = (
        "import sys, fairseq_compat; before = list(sys.meta_path)\n"
        "fairseq_compat.install(); fairseq_compat.uninstall(); fairseq_compat.uninstall()\n"
        "print(sys.meta_path == before)"
    )
    assert python(program, ROOT).strip() == "True"


def test_only_the_named_modules_are_touched() -> None:
    import fairseq
    import fairseq.checkpoint_utils
    import fairseq.data.dictionary

    assert isinstance(fairseq.checkpoint_utils.__spec__.loader, MendingLoader)
    for other in (fairseq, fairseq.data.dictionary):
        assert not isinstance(other.__spec__.loader, MendingLoader)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "patient.py").write_text("STATE = 'ill'\n\nprint(STATE)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("patient", None)


def test_rewrites_come_before_execution_and_patches_after(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    @rewrite
    def cure(tree):
        tree.body[0].value.value = "well"

    def discharge(module):
        module.STATE += ", at home"

    spec = PathFinder.find_spec("patient")
    spec.loader = MendingLoader("patient", spec.origin, [discharge, cure])
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.STATE == "well, at home"
    assert capsys.readouterr().out == "well\n"
    # The file's bytecode cache must not remember the rewritten code.
    assert not list(package.glob("__pycache__/*"))
    assert not hasattr(spec.loader.get_code("patient"), "cure")


def test_module_that_nobody_finds() -> None:
    assert mended_spec("no.such.module", None, None, [object()], []) is None


@pytest.mark.parametrize("fix", sorted({fix for fs in fairseq_compat.FIXES.values() for fix in fs}))
def test_every_fix_named_exists(fix: str) -> None:
    import importlib

    module, function = fix.split(":")
    assert callable(getattr(importlib.import_module(f"fairseq_compat.{module}"), function))


@pytest.mark.parametrize("module", sorted(fairseq_compat.FIXES))
def test_every_module_named_exists(module: str) -> None:
    import importlib.util

    assert importlib.util.find_spec(module) is not None
