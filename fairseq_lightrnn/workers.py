"""The processes of a training: which one this is, and a table that all of them have."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from fairseq_lightrnn.core.table import WordTable

__all__ = [
    "count_workers",
    "numbers_of_first_worker",
    "rank",
    "table_of_first_worker",
    "world_size",
]

# A table of many words takes longer than torch lets workers wait for each other: 10 minutes with
# nccl, 30 with gloo. A worker that dies ends the wait of the others all the same.
_PATIENCE = timedelta(days=30)
_patient: tuple[Any, Any] | None = None  # weakly: the group of all workers, its like for long waits


def rank() -> int:
    """Returns the number of this worker."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Returns the number of workers."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _patient_group() -> Any:
    """Returns a group of all workers for long waits; all must ask for it at about the same time."""
    global _patient
    world = torch.distributed.group.WORLD
    # Only torch holds the groups, so that they end with it and not while Python does.
    known, group = (None, None) if _patient is None else (one() for one in _patient)
    if group is None or known is not world:
        backend = "gloo" if torch.distributed.is_gloo_available() else None
        group = torch.distributed.new_group(timeout=_PATIENCE, backend=backend)
        _patient = weakref.ref(world), weakref.ref(group)
    return group


def count_workers(yes: bool) -> int:
    """Returns how many workers say yes; all must ask at about the same time."""
    if world_size() == 1:
        return int(yes)
    group = _patient_group()
    at = "cpu" if torch.distributed.get_backend(group) == "gloo" else "cuda"
    number = torch.tensor(int(yes), device=at)
    torch.distributed.all_reduce(number, group=group)
    return int(number)


def table_of_first_worker(
    make: Callable[[], WordTable],
    num_words: int,
    shape: Sequence[int],
    device: torch.device | str,
) -> WordTable:
    """Returns on every worker the table that the first one makes, however long that takes.

    Args:
        make: is called on the first worker alone.
        num_words: V, of the table.
        shape: of the table.
        device: of the model; workers exchange tensors on it where torch comes without gloo.
    """
    if world_size() == 1:
        return make()

    def cells() -> Tensor:
        return torch.from_numpy(np.array(make().cells))

    found = numbers_of_first_worker(cells, (num_words,), device)
    return WordTable.from_cells(found.numpy(), shape)


def numbers_of_first_worker(
    make: Callable[[], Tensor], shape: Sequence[int], device: torch.device | str
) -> Tensor:
    """Returns on every worker the int64 numbers that the first one makes, however long that takes.

    Args:
        make: is called on the first worker alone.
        shape: of what it makes.
        device: of the model; workers exchange tensors on it where torch comes without gloo.
    """
    if world_size() == 1:
        return make().long()
    # Before the first worker is busy: workers meet to form a group, and for that none waits long.
    group = _patient_group()
    at = "cpu" if torch.distributed.get_backend(group) == "gloo" else device
    numbers = torch.empty(*shape, dtype=torch.int64, device=at)
    if rank() == 0:
        numbers.copy_(make())
    torch.distributed.broadcast(numbers, 0, group=group)
    return numbers.cpu()
