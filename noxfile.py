"""The tests on every Python that the plugin supports: ``nox``, or ``nox -s tests-3.12`` for one.

Each version has an environment of its own below ``.nox``, with the same requirements, in the same
versions, as ``scripts/setup.sh`` installs into ``.venv``; it is made at the first run and kept.
A version whose interpreter is not installed is skipped, with ``--error-on-missing-interpreters``
it fails. Further arguments go to pytest: ``nox -- tests/test_compat.py -x``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).resolve().parent


def fairseq_requirement() -> str:
    """Reads from scripts/setup.sh which fairseq is installed."""
    found = re.search(r"^fairseq_version=(\S+)$", (ROOT / "scripts/setup.sh").read_text(), re.M)
    assert found, "scripts/setup.sh names no fairseq_version"
    return f"fairseq=={found[1]}"


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Runs the tests that scripts/test.sh runs, in an environment of this Python."""
    constrained = ("-c", "constraints.txt")
    session.install("-r", "requirements.txt", "-r", "requirements-dev.txt", *constrained)
    # Its own requirements no longer resolve; see scripts/setup.sh.
    session.install("--no-deps", fairseq_requirement())
    session.install("--no-deps", "--editable", ".")
    # Tests that need kenlm are skipped where it does not build.
    session.run("python", "-m", "pip", "install", "kenlm", *constrained,
                success_codes=range(256), silent=True)  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    session.run(
        "python", "-m", "pytest", "-n", str(min(8, cores)) if cores > 1 else "0",
        "--dist", "loadfile", *session.posargs,
        env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )  # fmt: skip
