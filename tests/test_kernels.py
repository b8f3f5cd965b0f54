"""Compiled code: an upgrade in place must not leave old machine code behind."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_lightrnn.allocation import kernels

PACKAGE = Path(kernels.__file__).parents[1]

CHILD = """
import numpy as np
from package.kernels import bid
prices, places = np.zeros(2), np.full(2, -1)
costs = np.array([[0.0, 5.0], [1.0, 2.0]])
bid(prices, np.arange(3), np.zeros(2, int), np.zeros(2), np.zeros(2, int), places,
    np.full((2, 0), -1, np.int32), costs, np.full(2, np.inf), np.arange(2), np.array([0, 2, 0]),
    np.zeros(2, int), 0.1, 100)
print(*places, *prices)
"""


def test_compiled_code_calls_none_of_another_file() -> None:
    """numba compiles a function again when its own file changes, not one that it calls."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == "kernels.py":
            assert not re.search(r"(from|import) fairseq_lightrnn", text)
        else:
            assert not re.search(r"\bimport numba|\bfrom numba|njit", text), path


@pytest.mark.slow
def test_changed_code_is_compiled_again(tmp_path: Path) -> None:
    """What `bid` inlines is changed after it was compiled and kept, the calendar set back too."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    code = Path(kernels.__file__).read_text(encoding="utf-8")
    assert importlib.util.find_spec("numba") and code.count("places[word] = place\n") == 1

    def run() -> str:
        return subprocess.run(
            [sys.executable, "-c", CHILD], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    (package / "kernels.py").write_text(code, encoding="utf-8")
    before = run()
    assert before.split()[:2] == ["0", "1"] and list((package / "__pycache__").glob("*.nbc"))
    assert run() == before
    changed = code.replace("places[word] = place\n", "places[word] = 1 - place\n")
    (package / "kernels.py").write_text(changed, encoding="utf-8")
    assert run().split()[:2] == ["1", "0"]
