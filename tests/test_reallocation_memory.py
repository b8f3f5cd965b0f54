"""A whole reallocation under a limit that the operating system enforces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMITED = """
import resource, sys
import numpy as np, torch
from fairseq_lightrnn.allocation.assignment import SolverOptions
from fairseq_lightrnn.allocation.gathering import statistics_storage
from fairseq_lightrnn.allocation.paper import reallocate
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.core.table import WordTable, default_shape

objective, gib, folder = sys.argv[1], float(sys.argv[2]), sys.argv[3]

def run(num_words, dim, memory, limit=None):
    random = torch.Generator().manual_seed(0)
    table = WordTable.from_cells(torch.randperm(num_words, generator=random).numpy(),
                                 default_shape(num_words))
    vectors = [torch.randn(size, dim, generator=random) for size in table.shape]
    biases = [torch.randn(size, generator=random) for size in table.shape]
    if limit is not None:
        status = open("/proc/self/status").read()
        held = int(status.split("VmData:")[1].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (held + limit, held + limit))
    with statistics_storage(memory, (num_words, 2, dim), folder) as storage:
        statistics = AllocationStatistics(num_words, 2, dim, **storage.arguments)
        for words in torch.arange(num_words).split(512):
            statistics.add(words, torch.randn(len(words), 2, dim, generator=random))
        options = SolverOptions(gap=1e-2, num_threads=1, memory=storage.memory)
        return reallocate(table, statistics, vectors, biases, objective=objective, options=options)

run(900, 4, gib)  # compiles, for costs held and for costs formed anew
run(900, 4, 2 * 900 * 8 / (1 << 30))
bytes_a_word = 600  # lists, queues and the like
found = run(22500, 128, gib, limit=int(gib * (1 << 30)) + 22500 * bytes_a_word + (24 << 20))
print(found.gap / (found.cost_before - found.lower_bound))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_DATA")
@pytest.mark.parametrize("objective", ["row-first", "joint"])
def test_the_bound_holds_for_statistics_and_solver(objective: str, tmp_path: Path) -> None:
    def run(mib: float) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, objective, str(mib / 1024), str(tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    bounded = run(8)  # statistics of 44 MiB in float64, costs of 26 or 51 MiB
    assert bounded.returncode == 0, bounded.stderr
    assert float(bounded.stdout) <= 1e-2
    assert not list(tmp_path.iterdir()), "a file was left behind"
