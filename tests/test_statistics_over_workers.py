"""Statistics gathered by several workers, each a process: the same as those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

WORKER = """
import sys
from types import SimpleNamespace
import numpy as np, torch
import fairseq_compat; fairseq_compat.install()
import fairseq_lightrnn.register
from fairseq.data import Dictionary
from fairseq_lightrnn.allocation import reallocate
from fairseq_lightrnn.models.lightrnn_lm import *
from fairseq_lightrnn.tasks._statistics import gather_statistics, statistics_storage

rank, world, folder, memory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
memory = None if memory == "None" else float(memory)
torch.set_num_threads(1)
if world > 1:
    store = torch.distributed.FileStore(f"{folder}/store{world}", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
dictionary = Dictionary()
for word in range(60):
    dictionary.add_symbol(f"w{word}")
torch.manual_seed(0)
config = LightRNNLanguageModelConfig(embed_dim=16, hidden_size=16)
model = LightRNNLanguageModel(LightRNNDecoder(config, dictionary))
for parameter in model.parameters():
    torch.nn.init.normal_(parameter)
random = torch.Generator().manual_seed(1)
batches = []
for length in [5, 3, 8, 2, 7, 4, 6]:  # seven batches: workers have different numbers of them
    words = torch.randint(4, len(dictionary), (3, length + 1), generator=random)
    words[0, -2:] = dictionary.pad()
    source, target = words[:, :-1], words[:, 1:]
    inputs = {"prev_output_tokens": source, "target_tokens": target}
    batches.append({"target": target, "net_input": inputs})
model.forward = model.decoder.forward
size = (len(dictionary), 2, 16)
with statistics_storage(memory, size, f"{folder}/spill{rank}") as storage:
    gathered = gather_statistics(model, batches[rank::world], storage.arguments)
    if rank == 0:
        table, softmax = model.decoder.table.table(), model.decoder.softmax
        vectors, biases = zip(*(softmax.vectors(i) for i in range(2)))
        found = reallocate(table, gathered.statistics, vectors, biases, **storage.solver_memory)
        np.savez(
            f"{folder}/result{world}.npz", sums=gathered.statistics.sums.numpy(),
            counts=gathered.statistics.counts.numpy(), losses=gathered.losses.numpy(),
            cells=found.table.cells, dtype=str(gathered.statistics.sums.dtype),
        )
    else:
        low, high = gathered.statistics.word_range
        assert high - low <= -(-len(dictionary) // world), "a worker keeps its own words only"
"""

GIB = 1 << 30


def gather(folder: Path, world: int, memory: float | None) -> dict[str, np.ndarray]:
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
    [(None, "float64"), (2 * 64 * 160 / GIB, "float32"), (2 * 64 * 20 / GIB, "float32")],
)
def test_any_number_of_workers_makes_the_same_table(
    tmp_path: Path, memory: float | None, dtype: str
) -> None:
    alone = gather(tmp_path, 1, memory)
    assert str(alone["dtype"]) == f"torch.{dtype}"
    assert alone["counts"].sum() == 3 * 35 - 7 * 2  # padding does not count
    for world in (2, 3) if memory is None else (3,):
        together = gather(tmp_path, world, memory)
        for name in ("sums", "counts", "cells"):
            np.testing.assert_array_equal(together[name], alone[name])
        np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-12)
    assert not [path for path in tmp_path.glob("spill*/*") if path.is_dir()], "left behind"
    assert torch.isfinite(torch.from_numpy(alone["sums"])).all()
