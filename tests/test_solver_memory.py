"""The solver keeps to its memory: a process that may take little more of the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHILD = """
import mmap, os, resource, sys
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:2])  # every thread has a stack
import torch
from fairseq_lightrnn.allocation.assignment import SolverOptions, assign

def problem(words, places):
    costs = torch.rand(words, places, generator=torch.Generator().manual_seed(0))
    costs[1 : words : 3] = 0.5  # indifferent
    capacities = [0] + [words // (places - 1) + 1] * (places - 1)
    return costs, capacities

assign(*problem(900, 300), SolverOptions(gap=0.1))  # loads what is compiled
assign(*problem(900, 300), SolverOptions(gap=0.1, memory=1 << 18))
costs, capacities = problem(40_000, 600)
memory = int(float(sys.argv[1]) * costs.numel())
room = memory + memory // 4 + (56 << 20)
limit = 0
while True:  # what a system counts besides, it does not tell
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        mmap.mmap(-1, room).close()
        break
    except OSError:
        limit += 1 << 20
found = assign(costs, capacities, SolverOptions(gap=0.1, memory=memory))
assert 0 <= found.relative_gap < 0.2, found.relative_gap
print("solved")
"""


@pytest.mark.parametrize("bytes_of_cost", [8, 4, 3.9, 2])
def test_a_limit_of_the_system_just_above_is_enough(bytes_of_cost: float) -> None:
    """Costs held in double precision, in single precision, and only the cheapest of them."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(bytes_of_cost)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert child.stdout == "solved\n", child.stderr[-2000:]
