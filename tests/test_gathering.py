"""Statistics gathered by several workers, each a process: the same as those of one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lightrnn.allocation.gathering import sample_shares

WORKER = """
import sys
import numpy as np, torch
from fairseq_lightrnn.allocation.assignment import SolverOptions
from fairseq_lightrnn.allocation.gathering import (
    gather_statistics, measure_loss, statistics_storage,
)
from fairseq_lightrnn.allocation.paper import reallocate
from fairseq_lightrnn.core.table import WordTable, default_shape
from fairseq_lightrnn.workers import table_of_first_worker

rank, world, folder, memory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
memory = float(memory)
torch.set_num_threads(1)
if world > 1:
    store = torch.distributed.FileStore(f"{folder}/store{world}", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
num_words, padding = 64, 1
shape = default_shape(num_words)
random = torch.Generator().manual_seed(1)
vectors = [torch.randn(size, 16, generator=random) for size in shape]
biases = [torch.randn(size, generator=random) for size in shape]
cells = torch.randperm(num_words, generator=random).numpy()
batches, scores = [], []
for length in [5, 3, 8, 2, 7, 4, 6]:  # seven batches: workers have different numbers of them
    words = torch.randint(4, num_words, (3, length), generator=random)
    words[0, -2:] = padding
    words = words[words != padding]
    hidden = torch.randn(len(words), 2, 16, generator=random)
    batches.append((words, hidden))
    scores.append(-torch.rand(len(words), 2, generator=random))
size = (num_words, 2, 16)
table = table_of_first_worker(
    lambda: WordTable.from_cells(cells, shape), num_words, shape, "cpu"
)
assert np.array_equal(table.cells, cells)
with statistics_storage(memory, size, f"{folder}/spill{rank}") as storage:
    statistics = gather_statistics(batches[rank::world], *size, "cpu", storage.arguments)
    losses = measure_loss(scores[rank::world], 2, "cpu")
    if rank == 0:
        options = SolverOptions(memory=storage.memory)
        found = reallocate(table, statistics, vectors, biases, options=options)
        np.savez(
            f"{folder}/result{world}.npz", sums=statistics.sums.numpy(),
            counts=statistics.counts.numpy(), losses=losses.numpy(),
            cells=found.table.cells, dtype=str(statistics.sums.dtype),
        )
    else:
        low, high = statistics.word_range
        assert high - low <= -(-num_words // world), "a worker keeps its own words only"
if world > 1:
    torch.distributed.destroy_process_group()  # or its threads may abort the end of the process
"""

GIB = 1 << 30


def gather(folder: Path, world: int, memory: float) -> dict[str, np.ndarray]:
    if world == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["", "0", "1", str(folder), str(memory)])
            exec(WORKER, {})
        with np.load(folder / "result1.npz") as result:
            return dict(result)
    command = [sys.executable, "-c", WORKER]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), str(memory)], env=environment
        )
        for rank in range(world)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0] * world
    with np.load(folder / f"result{world}.npz") as result:
        return dict(result)


# float64 in memory; float32 in memory; float32 in a file
@pytest.mark.parametrize(
    ("memory", "dtype"),
    [(1.0, "float64"), (2 * 64 * 160 / GIB, "float32"), (2 * 64 * 20 / GIB, "float32")],
)
def test_any_number_of_workers_makes_the_same_table(
    tmp_path: Path, memory: float, dtype: str
) -> None:
    alone = gather(tmp_path, 1, memory)
    assert str(alone["dtype"]) == f"torch.{dtype}"
    assert alone["counts"].sum() == 3 * 35 - 7 * 2  # padding does not count
    for world in (3,) if memory == 1 else (2,):
        together = gather(tmp_path, world, memory)
        for name in ("sums", "counts", "cells"):
            np.testing.assert_array_equal(together[name], alone[name])
        np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-12)
    assert not [path for path in tmp_path.glob("spill*/*") if path.is_dir()], "left behind"
    assert torch.isfinite(torch.from_numpy(alone["sums"])).all()


@given(
    words=st.none() | st.integers(1, 60),
    batches=st.integers(1, 30),
    in_order=st.booleans(),
)
def test_samples_are_checked_by_other_batches(
    words: int | None, batches: int, in_order: bool
) -> None:
    shares = sample_shares(words, 50, batches, in_order)
    used, checked = list(shares.used), list(shares.checked)
    assert used[0] == 0 and checked
    if words is None or words >= 50:
        assert used == checked == list(range(batches))
        return
    assert len(used) == math.ceil(batches * words / 50 - 1e-9)
    if len(used) == batches:
        assert checked == used
    else:
        assert not set(used) & set(checked)
        assert len(checked) == min(len(used), batches - len(used))
    if in_order:
        assert used == list(range(len(used)))


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("words", [None, 25, 45])
def test_a_few_words_of_a_long_text_measure_a_table(
    words: int | None, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairseq_lightrnn.allocation.gathering.CHECKED", 10)
    shares = sample_shares(words, 50, 20, in_order)
    used, checked = list(shares.used), list(shares.checked)
    assert len(used) == 20 * (words or 50) // 50
    # A fifth of the words, in as large a share of the batches, if so many are left.
    assert len(checked) == (2 if words == 45 else 4)
    assert words is None or not set(used) & set(checked)
    if in_order:
        assert checked == list(range(checked[0], checked[0] + len(checked)))
    else:
        assert checked[-1] - checked[0] >= 8


def test_a_text_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="no words"):
        sample_shares(None, 0, 0, False)
