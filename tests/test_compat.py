"""Each fix of fairseq_compat is tested by the failure that it mends.

The cases run twice: in this process, where fairseq is mended, and in one where it is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import compat_cases
import numpy as np
import pytest
import torch

from fairseq_compat import fixes

# What each case returns when mended, and how it ends in fairseq 0.12.2 as it is.
EXPECTED: dict[str, tuple[Any, Any]] = {
    "old_checkpoint": ({"epoch": 3}, "UnpicklingError: Weights only load failed"),
    "checkpoint_with_scores": (
        [12.5, [0, 1, 2], 2.0],
        "UnpicklingError: Weights only load failed",
    ),
    "broadcast_configuration": ({"epoch": 3}, "UnpicklingError: Weights only load failed"),
    "blocks_of_sentences": ([[5, 6, 2], [7, 2]], "has no attribute 'compat'"),
    "block_of_one_word": ([[2], [5], [1, 2]], [[2], [5], [1, 2, 5]]),
    "bucketed_pairs": ([2, 4], "unexpected keyword argument 'interpolation'"),
    "span_mask": ([True, True], "has no attribute 'int'"),
    "conditional_random_field": ([True], "has no attribute 'float'"),
    "index_beyond_two_gigabytes": (
        [0, 1_200_000_000, 2_400_000_000],
        [0, 1_200_000_000, 2_400_000_000 - 2**32],
    ),
    "encoder_inference": ([3, 1, 8], "Mask Type should be defined"),
    "sacrebleu_of_files": (["BLEU", "=", "100.00"], "should be a sequence of strings"),
    # "No such type" where torch is built without CUDA, "no driver" where it is built with it.
    "objects_gathered_on_cpu": ([[{"loss": 1.5}], 5000], ""),
    "bf16_without_a_tpu": ([True, False], [True, True]),
    "pytorch_ddp_on_cpu": ([1, 3], "device_ids and output_device arguments only work"),
}


@pytest.fixture(scope="module")
def unmended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the cases return or raise in a process without the fixes."""
    folder = tmp_path_factory.mktemp("unmended")
    run = subprocess.run(
        [sys.executable, compat_cases.__file__, str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_every_case_is_expected() -> None:
    assert set(EXPECTED) | {"configuration_remarks"} == set(compat_cases.CASES)


@pytest.mark.parametrize("name", EXPECTED)
def test_fix_mends_what_fails_without_it(
    name: str, unmended: dict[str, Any], tmp_path: Path
) -> None:
    mended, broken = EXPECTED[name]
    assert compat_cases.CASES[name](tmp_path) == mended

    outcome = unmended[name]
    if outcome.get("returned") == mended:
        pytest.skip("the libraries installed here do not show the problem")
    if isinstance(broken, str):
        assert broken in outcome["raised"]
    else:
        assert outcome["returned"] == broken


def test_stock_commands_print_no_remarks_of_hydra(unmended: dict[str, Any], tmp_path: Path) -> None:
    if not unmended["configuration_remarks"]["returned"]:
        pytest.skip("the hydra installed here makes no remarks")
    program = (
        "import compat_cases, pathlib, sys;"
        "print(compat_cases.configuration_remarks(pathlib.Path(sys.argv[1])))"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import fairseq_compat; fairseq_compat.install(); {program}", "."],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(compat_cases.__file__).parent,
    )
    assert run.stdout.splitlines()[-1] == "[]"


def test_fairseq_cannot_be_imported_without_hashes() -> None:
    program = (
        "import fairseq_compat\n"
        "fairseq_compat.FIXES.pop('fairseq.dataclass.configs')\n"
        "fairseq_compat.install()\n"
        "import fairseq\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1
    assert "mutable default" in run.stderr


def test_users_may_nest_configurations() -> None:
    from fairseq.dataclass import FairseqDataclass

    @dataclasses.dataclass
    class Inner(FairseqDataclass):
        width: int = 3

    @dataclasses.dataclass
    class Outer(FairseqDataclass):
        inner: Inner = Inner()  # noqa: RUF009

    assert Outer().inner.width == 3
    assert Outer() == Outer()

    @dataclasses.dataclass
    class Hashed(FairseqDataclass):
        def __hash__(self) -> int:
            return 7

    assert hash(Hashed()) == 7


class _RunsCode:
    def __reduce__(self) -> Any:
        return os.getcwd, ()


def test_a_checkpoint_still_cannot_run_code(tmp_path: Path) -> None:
    from fairseq import checkpoint_utils

    path = compat_cases.write_checkpoint(tmp_path / "bad.pt", surprise=_RunsCode())
    with pytest.raises(pickle.UnpicklingError, match="getcwd"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_torch_load_trusts_no_more_elsewhere(tmp_path: Path) -> None:
    compat_cases.old_checkpoint(tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "old.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_scores_written_by_numpy_1_are_loaded(tmp_path: Path) -> None:
    from fairseq import checkpoint_utils

    path = compat_cases.write_checkpoint(tmp_path / "one.pt", bleu=np.float64(2), n=np.arange(2))
    content = path.read_bytes()
    # Neither name holds a length before it: pickle's protocol 2 ends names by a line feed.  The
    # archive's checksums are of no concern to torch, but its offsets are: keep the length.
    assert content.count(b"numpy._core.multiarray") > 0
    unpickler = _archive_with(content, b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(unpickler)
    loaded = checkpoint_utils.load_checkpoint_to_cpu(str(path))["extra_state"]
    assert loaded["bleu"] == 2 and loaded["n"].tolist() == [0, 1]


def _archive_with(content: bytes, old: bytes, new: bytes) -> bytes:
    """The zip archive of a checkpoint with one string replaced in its pickle."""
    import io
    import zipfile

    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(written, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, data.replace(old, new))
    return written.getvalue()


def test_numpy_itself_stays_as_it_is() -> None:
    import fairseq.data.token_block_dataset as mended

    if mended.np is np:
        pytest.skip("the numpy installed here lacks nothing")
    assert not hasattr(np, "compat")
    assert mended.np.compat.long is int
    assert mended.np.zeros is np.zeros
    assert mended.np.testing is np.testing  # made on demand by numpy
    with pytest.raises(AttributeError):
        mended.np.no_such_name  # noqa: B018


def test_percentile_takes_both_names_of_its_argument() -> None:
    from fairseq.data import data_utils

    values = np.arange(4)
    for argument in ({"interpolation": "lower"}, {"method": "lower"}):
        assert data_utils.np.percentile(values, 50, **argument) == 1
    assert data_utils.np.percentile(values, q=50) == 1.5


@pytest.mark.parametrize(
    "fix",
    [
        fixes.avoid_encoder_fast_path,
        fixes.restore_numpy_names,
        fixes.sign_block_indices,
        fixes.trust_checkpoint_globals,
        fixes.widen_index_sizes,
    ],
)
def test_fixes_leave_a_module_without_the_trouble_alone(fix: Any) -> None:
    module = ModuleType("another_version")
    before = dict(vars(module))
    fix(module)
    assert vars(module) == before


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_briefly_unless_told_otherwise(
    chosen: dict[str, str], spins: str | None
) -> None:
    known = {name: value for name, value in os.environ.items()
             if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}  # fmt: skip
    program = (
        "import fairseq_compat; fairseq_compat.install(); import fairseq_cli, os, sys;"
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], env={**known, **chosen},
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert told.split() == [str(spins), "False"]


@pytest.fixture
def precision() -> Iterator[None]:
    """Gives torch its way of multiplying matrices back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
class TestProducts:
    def test_stay_those_of_single_precision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On whichever processor: what rounds to bfloat16 is taken back."""
        monkeypatch.setattr(fixes, "_mkl_takes_it_for_older", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        fixes.multiply_with_all_lanes(ModuleType("fairseq.trainer"))
        values = torch.rand(300, 200, generator=torch.Generator().manual_seed(1))
        exact = values.double() @ values.double().T
        assert (values @ values.T - exact).abs().max() < 1e-5 * exact.max()

    @pytest.mark.parametrize(("good", "expected"), [(True, "medium"), (False, "highest")])
    def test_are_tried(self, monkeypatch: Any, good: bool, expected: str) -> None:
        monkeypatch.setattr(fixes, "_mkl_takes_it_for_older", lambda: True)
        monkeypatch.setattr(fixes, "_multiplies_in_single_precision", lambda: good)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        fixes.multiply_with_all_lanes(ModuleType("fairseq.trainer"))
        assert torch.get_float32_matmul_precision() == expected

    @pytest.mark.parametrize(("gpu", "chosen"), [(True, "highest"), (False, "high")])
    def test_are_as_chosen(self, monkeypatch: Any, gpu: bool, chosen: str) -> None:
        """With a GPU too, where the same setting would allow less precise products."""
        monkeypatch.setattr(fixes, "_mkl_takes_it_for_older", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        torch.set_float32_matmul_precision(chosen)
        fixes.multiply_with_all_lanes(ModuleType("fairseq.trainer"))
        assert torch.get_float32_matmul_precision() == chosen

    def test_are_as_chosen_by_newer_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse() -> str:
            raise RuntimeError("a mix of the legacy and new APIs")

        monkeypatch.setattr(fixes, "_mkl_takes_it_for_older", lambda: True)
        with monkeypatch.context() as others:
            others.setattr(torch, "get_float32_matmul_precision", refuse)
            fixes.multiply_with_all_lanes(ModuleType("fairseq.trainer"))
        assert torch.get_float32_matmul_precision() == "highest"

    @pytest.mark.parametrize("capability", ["AVX2", None])
    def test_of_other_processors_are_left_alone(
        self, monkeypatch: pytest.MonkeyPatch, capability: str | None
    ) -> None:
        """Of older releases of torch too, which do not tell."""
        if capability is None:
            monkeypatch.setattr(torch.backends, "cpu", None)
        else:
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        fixes.multiply_with_all_lanes(ModuleType("fairseq.trainer"))
        assert torch.get_float32_matmul_precision() == "highest"


def test_filters_silence_their_own_message_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixes.silence_autocast(ModuleType("fairseq.tasks.fairseq_task"))
        fixes.silence_hydra(ModuleType("fairseq.dataclass.initialize"))
        message = "`torch.cuda.amp.autocast(args...)` is deprecated. Please use another."
        warnings.warn_explicit(message, FutureWarning, "a.py", 1, "fairseq.tasks.fairseq_task")
        for other, module in ((message, "users_task"), ("else", "fairseq.tasks.fairseq_task")):
            with pytest.raises(FutureWarning):
                warnings.warn_explicit(other, FutureWarning, "a.py", 1, module)
        with pytest.raises(UserWarning):
            warnings.warn_explicit("'other' is validated", UserWarning, "a.py", 1, "hydra")
