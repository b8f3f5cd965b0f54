"""Packages fairseq_lightrnn, and fairseq_compat with the ``.pth`` file that activates it."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "fairseq_lightrnn" / "version.py"))["__version__"]

# Read by ``site`` when the interpreter starts.  Files of this kind are read in the order of their
# names, and in an editable install fairseq_compat can be imported only after __editable__*.pth.
BOOT_NAME = "fairseq_compat.pth"
BOOT_TEXT = "import fairseq_compat; fairseq_compat.install()\n"


class BuildWithBoot(build_py):
    """Puts the ``.pth`` file beside the packages, hence into wheels and regular installs."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, BOOT_NAME).write_text(BOOT_TEXT, encoding="utf-8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib, BOOT_NAME))]


class EditableWithBoot(editable_wheel):
    """Puts the ``.pth`` file into the small wheel that an editable install consists of."""

    def _select_strategy(self, *args, **kwargs):
        return _StrategyWithBoot(super()._select_strategy(*args, **kwargs))


class _StrategyWithBoot:
    def __init__(self, strategy) -> None:
        self.strategy = strategy

    def __call__(self, wheel, files, mapping) -> None:
        self.strategy(wheel, files, mapping)
        wheel.writestr(BOOT_NAME, BOOT_TEXT.encode())

    def __enter__(self):
        self.strategy.__enter__()
        return self

    def __exit__(self, *error):
        return self.strategy.__exit__(*error)


def requirements(name: str) -> list[str]:
    """The requirements in a file, without its comments."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


INSTALL_REQUIRES = ["torch>=2.0", "numpy>=1.24", "scipy>=1.10", "numba>=0.59", "tqdm>=4.60"]
# What fairseq 0.12.2 needs besides, on Pythons on which its own requirements no longer resolve.
FAIRSEQ_REQUIRES = [one for one in requirements("requirements.txt") if one not in INSTALL_REQUIRES]
# To write models for other devices; to run them there numpy and onnxruntime will do.
EXPORT_REQUIRES = ["torch>=2.5"]
EXPORT_REQUIRES += [one for one in requirements("requirements-dev.txt") if one.startswith("onnx")]

readme = ROOT / "README.md"

setup(
    name="fairseq-lightrnn",
    version=VERSION,
    description="LightRNN word tables, models and reallocation for fairseq",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="fairseq_lightrnn contributors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["fairseq_lightrnn*", "fairseq_compat*"]),
    package_data={"fairseq_lightrnn.export": ["web/*"]},
    # Neither fairseq, which has to be installed without its own requirements since they no longer
    # resolve, nor what fairseq needs: where it works, all of that is there.
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "fairseq": FAIRSEQ_REQUIRES,
        "dev": requirements("requirements-dev.txt"),
        "export": EXPORT_REQUIRES,
        "kenlm": ["kenlm"],
    },
    entry_points={
        "console_scripts": [
            # name = fairseq_lightrnn.commands.module:function; -run and -table need no fairseq
            "lightrnn-export = fairseq_lightrnn.commands.start:export",
            "lightrnn-extend = fairseq_lightrnn.commands.start:extend",
            "lightrnn-flags = fairseq_lightrnn.commands.start:flags",
            "lightrnn-reallocate = fairseq_lightrnn.commands.start:reallocate",
            "lightrnn-rescore = fairseq_lightrnn.commands.start:rescore",
            "lightrnn-run = fairseq_lightrnn.commands.exported:main",
            "lightrnn-score = fairseq_lightrnn.commands.start:score",
            "lightrnn-table = fairseq_lightrnn.commands.table:main",
        ],
    },
    cmdclass={"build_py": BuildWithBoot, "editable_wheel": EditableWithBoot},
)
