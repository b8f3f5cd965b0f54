"""Several workers, each a process: what one waits for, every other does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fairseq_run import (
    CARRY,
    USER_DIR,
    load,
    preprocess_pairs,
    train,
    train_arguments,
    write_text,
)
from test_odd_inputs import binarise

# The first worker takes longer than torch's workers wait for each other.
SLOW = """
import sys, time
from datetime import timedelta
import numpy as np, torch
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.workers import count_workers, table_of_first_worker

rank, store = int(sys.argv[1]), torch.distributed.FileStore(sys.argv[2], 2)
torch.distributed.init_process_group(
    "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2)
)
assert count_workers(rank == 0) == 1
def make():
    assert rank == 0
    time.sleep(5)
    if sys.argv[3] == "fails":
        raise SystemExit("no table")
    return WordTable.from_cells(np.array([3, 1, 2, 0, 5]), (2, 3))
for _ in range(2):
    table = table_of_first_worker(make, 5, (2, 3), "cpu")
    assert table.cells.tolist() == [3, 1, 2, 0, 5]
group = torch.ones(1)
torch.distributed.all_reduce(group)  # the workers' own group is as it was
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("outcome", ["succeeds", "fails"])
def test_workers_wait_for_the_first_as_long_as_it_takes(tmp_path: Path, outcome: str) -> None:
    """And no longer than it lives."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW, str(rank), str(tmp_path / "store"), outcome],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    codes = [worker.returncode for worker in workers]
    if outcome == "succeeds":
        assert codes == [0, 0], errors
    else:
        assert all(codes) and errors[0].strip() == "no table"


def start(workers: int, data: Path, save_dir: Path, *arguments: Any, **flags: Any) -> Any:
    """Trains with some workers and returns what the last checkpoint holds."""
    save_dir.mkdir(parents=True)
    command: list[Any] = [Path(sys.executable).parent / "fairseq-train"]
    command += train_arguments(data, save_dir, *arguments, max_epoch=2, **flags)
    command += ["--distributed-world-size", workers, "--ddp-backend", "legacy_ddp"]
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return load(save_dir / "checkpoint_last.pt")


# Prints whether threads of process groups are left when a training is over.
TO_THE_END = """
import os, sys
import fairseq_compat
fairseq_compat.install()
from fairseq_cli.train import cli_main

cli_main()
names = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
print("left:", sorted(name.strip() for name in names if "gloo" in name))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads have no names here")
@pytest.mark.parametrize("backend", ["pytorch_ddp", "legacy_ddp"])
def test_threads_of_process_groups_end_before_python_does(tmp_path: Path, backend: str) -> None:
    """One that lets go of a tensor while Python ends aborts a worker that has done its work."""
    text = write_text(tmp_path / "text.txt", 20, 1)
    data = binarise(tmp_path, train=text, valid=text)
    common = train_arguments(data, tmp_path / "out", CARRY, batch_size=1, reallocate_epochs=1)
    common += ["--distributed-world-size", 2, "--ddp-backend", backend, "--distributed-no-spawn",
               "--distributed-init-method", f"file://{tmp_path / 'store'}"]  # fmt: skip
    (tmp_path / "out").mkdir()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TO_THE_END, *map(str, common), "--distributed-rank", str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told[0][1][-3000:]
    assert [output.splitlines()[-1] for output, _ in told] == ["left: []"] * 2


class TestMoreWorkersThanWork:
    """Every collective is reached by every worker, whatever its share: none hangs."""

    @pytest.fixture
    def tiny(self, tmp_path: Path) -> Path:
        """Two words and the end of their line, to train on and to validate on."""
        (tmp_path / "text.txt").write_text("a b\n")
        return binarise(tmp_path, train=tmp_path / "text.txt", valid=tmp_path / "text.txt")

    def test_one_lane_each(self, tmp_path: Path) -> None:
        text = write_text(tmp_path / "text.txt", 10, 1)
        data = binarise(tmp_path, train=text, valid=text)
        saved = start(2, data, tmp_path / "out", CARRY, batch_size=1, reallocate_epochs=1)
        assert saved["model"]["decoder.carried_state.states"].shape == (2, 1, 2, 8)
        report = json.loads((tmp_path / "out" / "reallocations.jsonl").read_text())
        assert report["tokens"] == len(text.read_text().split()) + 10

    @pytest.mark.slow
    def test_more_lanes_than_words(self, tiny: Path, tmp_path: Path) -> None:
        saved = start(3, tiny, tmp_path / "out", CARRY, batch_size=2, reallocate_epochs=1)
        assert saved["model"]["decoder.reallocations.round"] == 1

    @pytest.mark.slow
    def test_more_workers_than_batches(self, tiny: Path, tmp_path: Path) -> None:
        saved = start(
            3, tiny, tmp_path / "out", arch="lightrnn_lm_gated", reallocate_epochs=1,
            label_smoothing=0.1, regularise="awd",
        )  # fmt: skip
        assert saved["model"]["decoder.reallocations.round"] == 1

    @pytest.mark.slow
    def test_more_workers_than_pairs_of_texts(self, tmp_path: Path) -> None:
        data = preprocess_pairs(tmp_path, sentences=2)
        saved = start(
            3, data, tmp_path / "out", "--user-dir", "fairseq_lightrnn", "--task",
            "lightrnn_translation", arch="lightrnn_translation", reallocate_epochs=1,
            tokens_per_sample=None, source_table="own",
        )  # fmt: skip
        assert saved["model"]["decoder.reallocations.round"] == 1


def test_what_several_workers_evaluate_is_all_of_the_text(data: Path, tmp_path: Path) -> None:
    """Also where there are fewer batches than workers, or none for one of them."""
    train(data, tmp_path / "plain", max_epoch=1)
    train(data, tmp_path / "carried", CARRY, max_epoch=1)
    common = ["--user-dir", USER_DIR, "--task", "lightrnn_language_modeling", "--cpu"]
    common += ["--tokens-per-sample", 12, "--batch-size", 8, "--num-workers", 0]
    for name in ("plain", "carried"):
        command: list[Any] = [data, *common, "--path", tmp_path / name / "checkpoint_last.pt"]
        for tool, found in (
            ("eval-lm", r"Loss \(base 2\): ([0-9.]+)"),
            ("validate", r"\| loss ([0-9.]+) \|"),
        ):
            losses = []
            for workers in (1, 2):
                result = subprocess.run(
                    [str(Path(sys.executable).parent / f"fairseq-{tool}")]
                    + [*map(str, command), "--distributed-world-size", str(workers)],
                    capture_output=True, text=True, timeout=120,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                assert result.returncode == 0, result.stderr[-3000:]
                losses.append(float(re.findall(found, result.stdout + result.stderr)[0]))
            assert losses[1] == pytest.approx(losses[0], abs=2e-3), (name, tool)
