"""The scripts that set everything up, and what the package puts into an environment."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    "LICENSE", "MANIFEST.in", "constraints.txt", "pyproject.toml", "requirements-dev.txt",
    "requirements.txt", "setup.py", "fairseq_compat", "fairseq_lightrnn", "scripts",
]  # fmt: skip
BOOT = "fairseq_compat.pth"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, in a folder with a blank in its name."""
    copy = tmp_path / "a checkout"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def setup(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "scripts/setup.sh", *arguments],
        cwd=checkout,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def pretend_environment(checkout: Path, pip: str) -> Path:
    """A .venv with this Python, whose pip is a script: it sees the arguments in "$*"."""
    log = checkout / "pip.log"
    script = (
        f'if [ "${{1-}} ${{2-}}" = "-m pip" ]; then\n'
        f'    shift 2; echo "$*" >>"{log}"\n{pip}\n    exit 0\nfi\n'
        'case "${2-}" in "import fairseq"*) exit 0 ;; esac\n'  # it takes seconds
        f'exec "{sys.executable}" "$@"'
    )
    executable(checkout / ".venv" / "bin" / "python", script)
    return log


def test_help_names_the_settings(checkout: Path) -> None:
    result = setup(checkout, "--help")
    assert result.returncode == 0
    assert "PYTHON" in result.stdout and "PIP_" in result.stdout


def test_an_unknown_flag_is_refused(checkout: Path) -> None:
    result = setup(checkout, "--development")
    assert result.returncode == 2
    assert "Usage" in result.stderr


def test_a_python_that_is_none_is_refused(checkout: Path) -> None:
    result = setup(checkout, PYTHON="/bin/false")
    assert result.returncode == 1
    assert "PYTHON=/bin/false is not a Python 3.11, 3.12 or 3.13" in result.stderr
    assert not (checkout / ".venv").exists()


def test_no_suitable_python_is_said(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "dirname", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    executable(tools / "python3", "exit 1")
    result = subprocess.run(
        [tools / "bash", "scripts/setup.sh"],
        cwd=checkout,
        capture_output=True,
        text=True,
        env={"PATH": str(tools)},
    )
    assert result.returncode == 1, result
    assert "found no Python 3.11, 3.12 or 3.13" in result.stderr


def test_a_broken_environment_is_not_deleted(checkout: Path) -> None:
    executable(checkout / ".venv" / "bin" / "python", "exit 1")
    result = setup(checkout)
    assert result.returncode == 1
    assert "delete the folder and run this again" in result.stderr
    assert (checkout / ".venv").exists()


def test_the_second_run_installs_nothing(checkout: Path) -> None:
    log = pretend_environment(checkout, "")
    assert setup(checkout, "--dev").returncode == 0
    commands = log.read_text().splitlines()
    assert [line for line in commands if "requirements.txt" in line]
    assert [line for line in commands if "--editable" in line]
    assert [line for line in commands if "requirements-dev.txt" in line]

    log.unlink()
    result = setup(checkout, "--dev")
    assert result.returncode == 0
    assert set(log.read_text().splitlines()) == {"--version"}
    assert "all is installed" in result.stdout


@pytest.mark.parametrize("name", ["requirements.txt", "constraints.txt", "setup.py"])
def test_changed_requirements_are_installed(checkout: Path, name: str) -> None:
    log = pretend_environment(checkout, "")
    assert setup(checkout).returncode == 0
    log.unlink()
    with open(checkout / name, "a") as file:
        file.write("# changed\n")
    assert setup(checkout).returncode == 0
    assert "install" in log.read_text()


@pytest.mark.parametrize(
    ("command", "step"),
    [
        ("-r requirements.txt", "installing requirements.txt"),
        ("--editable", "installing the plugin"),
    ],
)
def test_a_failed_step_is_named_and_repeated(checkout: Path, command: str, step: str) -> None:
    log = pretend_environment(checkout, f'case "$*" in *"{command}"*) echo no luck; exit 1;; esac')
    result = setup(checkout)
    assert result.returncode == 1
    assert f"this step failed: {step}" in result.stderr
    assert "no luck" in result.stdout + result.stderr
    assert not list((checkout / ".venv").glob(".setup-stamp*"))

    log.unlink()
    pretend_environment(checkout, "")
    assert setup(checkout).returncode == 0
    assert "-r requirements.txt" in log.read_text()


def test_kenlm_may_fail_to_build(checkout: Path) -> None:
    log = pretend_environment(checkout, 'case "$*" in *kenlm*) echo no cmake; exit 1;; esac')
    result = setup(checkout, "--dev")
    assert result.returncode == 0
    assert "kenlm does not build here" in result.stdout
    assert "no cmake" not in result.stdout + result.stderr
    assert "kenlm" in log.read_text()

    # Its tests are skipped from now on; nothing is tried at every run.
    log.unlink()
    assert setup(checkout, "--dev").returncode == 0
    assert "kenlm" not in log.read_text()


def test_requirements_of_the_package_are_in_requirements_txt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import setuptools

    described: dict = {}
    monkeypatch.setattr(setuptools, "setup", described.update)
    runpy.run_path(str(ROOT / "setup.py"))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(described["install_requires"]) <= set(lines)
    assert not [line for line in lines if line.startswith("fairseq")]
    assert described["python_requires"] == ">=3.11"


def test_every_requirement_has_a_tested_version() -> None:
    def names(file: str) -> set[str]:
        lines = (ROOT / file).read_text().lower().replace("_", "-").splitlines()
        return {re.split("[=<>]", line)[0] for line in lines if line and line[0] != "#"}

    tested = names("constraints.txt")
    assert names("requirements.txt") <= tested
    assert names("requirements-dev.txt") <= tested
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.mark.slow
def test_the_package_brings_and_takes_its_pth_file(checkout: Path, tmp_path: Path) -> None:
    """Regular, from a wheel, editable: the interpreter starts with fairseq_compat in place."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"

    def run(*arguments: str | Path) -> str:
        result = subprocess.run(
            [str(python), *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    site_packages = Path(
        run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    booted = "import sys; print('fairseq_compat' in sys.modules)"

    def assert_installed() -> None:
        assert (site_packages / BOOT).exists()
        assert run("-c", booted) == "True\n"
        hidden = (
            "import fairseq_compat; print(fairseq_compat._finder in __import__('sys').meta_path)"
        )
        assert run("-c", hidden) == "True\n"

    def uninstall() -> None:
        run("-m", "pip", "uninstall", "--yes", "fairseq-lightrnn")
        assert not list(site_packages.glob("*fairseq*"))
        assert run("-c", booted) == "False\n"

    run("-m", "pip", "install", "--no-deps", checkout)
    assert_installed()
    assert (site_packages / "fairseq_lightrnn" / "version.py").exists()
    uninstall()

    wheels = tmp_path / "wheels"
    run("-m", "pip", "wheel", "--no-deps", "--wheel-dir", wheels, checkout)
    (wheel,) = wheels.iterdir()
    assert wheel.name == "fairseq_lightrnn-0.1.0-py3-none-any.whl"
    run("-m", "pip", "install", "--no-deps", wheel)
    assert_installed()
    uninstall()

    run("-m", "pip", "install", "--no-deps", "--editable", checkout)
    assert_installed()
    (editable,) = site_packages.glob("__editable__*.pth")
    assert sorted([BOOT, editable.name]) == [editable.name, BOOT]
    uninstall()


def test_the_source_distribution_has_what_its_tests_need(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        about = next(member for member in file.getmembers() if member.name.endswith("/PKG-INFO"))
        metadata = file.extractfile(about).read().decode()  # type: ignore[union-attr]
    assert 'Requires-Dist: hydra-core<1.4,>=1.3; extra == "fairseq"' in metadata
    assert "Requires-Dist: numba>=0.59\n" in metadata
    tracked = subprocess.run(
        ["git", "ls-files", "tests", "scripts", "examples", "fairseq_lightrnn", "fairseq_compat"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert {name for name in tracked if (ROOT / name).exists()} - names == set()
