"""Statistics of a reallocation, gathered over batches and over workers that own some words each."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from fairseq_lightrnn.allocation.cell_costs import CellLosses
from fairseq_lightrnn.allocation.occurrences import Occurrences
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.workers import rank, world_size

__all__ = [
    "Storage",
    "gather_cell_losses",
    "gather_occurrences",
    "gather_statistics",
    "measure_loss",
    "Shares",
    "sample_shares",
    "statistics_storage",
    "word_range",
]

logger = logging.getLogger(__name__)

# Words whose statistics are sent at once; bounds the memory of the exchange.
_SENT_WORDS = 1 << 14
_GIB = 1 << 30
# Words by which a new table is measured: a gain of 0.01 nats a word comes with an error of 0.001.
CHECKED = 1 << 17


def word_range(num_words: int, worker: int) -> tuple[int, int]:
    """Returns the words whose statistics a worker adds up."""
    return num_words * worker // world_size(), num_words * (worker + 1) // world_size()


@torch.no_grad()
def gather_statistics(
    outputs: Iterable[tuple[Tensor, Tensor]],
    num_words: int,
    num_components: int,
    dim: int,
    device: torch.device | str,
    storage: dict[str, Any] | None = None,
) -> AllocationStatistics:
    """Sums hidden outputs over batches.

    Every worker adds up the outputs of its own words only, batch after batch in the order in which
    one worker would have read them, so that the sums are the same for any number of workers. The
    first worker, which is to solve, then collects them.

    Args:
        outputs: of each of this worker's batches, from a model in evaluation mode: the words (N,)
            that were to be predicted, and the hidden outputs (N, k, d) that predict their
            components.
        num_words: V.
        num_components: k.
        dim: d.
        device: through which workers exchange tensors.
        storage: further arguments of :class:`AllocationStatistics`.

    Returns:
        Sums and counts over the text of all workers; of all words on the first worker, of its own
        words on any other.
    """
    own = word_range(num_words, rank())
    kept = (0, num_words) if rank() == 0 else own
    statistics = AllocationStatistics(
        num_words, num_components, dim, word_range=kept, **storage or {}
    )
    for words, hidden in _exchange(iter(outputs), (num_components, dim), device):
        if kept != own:  # the first worker holds all words, but adds up its own
            mine = words < own[1]
            words, hidden = words[mine], hidden[mine]
        statistics.add(words, hidden)
    if world_size() > 1:
        _collect(statistics, device)
    return statistics


@torch.no_grad()
def measure_loss(
    log_probs: Iterable[Tensor], num_components: int, device: torch.device | str
) -> Tensor:
    """Averages the losses of all workers' batches.

    Args:
        log_probs: of the components of the words of each of this worker's batches, (N, k).
        num_components: k.
        device: through which workers exchange tensors.

    Returns:
        The loss of each component in nats a word, float64 of shape (k,).
    """
    totals = torch.zeros(num_components + 1, dtype=torch.float64, device=device)
    for scores in log_probs:
        totals[:-1] -= scores.sum(0, dtype=torch.float64)
        totals[-1] += len(scores)
    if world_size() > 1:
        torch.distributed.all_reduce(totals)
    return totals[:-1] / totals[-1]


@torch.no_grad()
def gather_cell_losses(
    batches: Iterable[tuple[int, Tensor, Context]],
    losses: CellLosses,
    occurrences: Occurrences | None,
    device: torch.device | str,
) -> None:
    """Adds up what cells cost words, over the batches of all workers.

    Args:
        batches: of this worker: a number that is the batch's own among all workers', the words (N,)
            that were to be predicted, and the contexts before them, from a model in evaluation
            mode.
        losses: receives the sums of all workers, on the first.
        occurrences: receives a sample, on the first worker; None if it is not needed.
        device: through which workers exchange tensors.
    """
    chosen = []
    for number, words, context in batches:
        draws = _draws(number, words)
        losses.add(words, context, draws[0])
        if occurrences is not None:
            chosen.append(occurrences.choose(words, context, draws[1]))
    if world_size() > 1:
        for tensor in (losses.losses, losses.kept):
            for block in tensor.split(_SENT_WORDS):
                sent = block.to(device)
                torch.distributed.reduce(sent, 0)
                block.copy_(sent)
    if occurrences is not None:
        _collect_occurrences(chosen, occurrences, device)


@torch.no_grad()
def gather_occurrences(
    batches: Iterable[tuple[int, Tensor, Context]],
    occurrences: Occurrences,
    device: torch.device | str,
) -> None:
    """Samples occurrences from the batches of all workers; see :func:`gather_cell_losses`."""
    chosen = [
        occurrences.choose(words, context, _draws(number, words)[1])
        for number, words, context in batches
    ]
    _collect_occurrences(chosen, occurrences, device)


def _draws(number: int, words: Tensor) -> Tensor:
    """Returns (2, N) numbers from 0 to 1 for a batch, however batches are dealt to workers."""
    generator = torch.Generator().manual_seed(number)
    return torch.rand(2, len(words), generator=generator).to(words.device)


def _collect_occurrences(
    chosen: list[tuple[Tensor, Tensor]], occurrences: Occurrences, device: torch.device | str
) -> None:
    """Brings what all workers chose to the first, and empties the list."""
    every = list(_exchange(iter(chosen), (occurrences.row_size,), device, occurrences.dtype))
    chosen.clear()
    if rank() == 0:
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        none = nothing, torch.empty(0, occurrences.row_size, device=device)
        occurrences.set(every or [none])


def _exchange(
    outputs: Iterator[tuple[Tensor, Tensor]],
    size: tuple[int, ...],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the words and outputs of all workers, batch by batch in the order of the text.

    Workers may have different numbers of batches, and batches different numbers of words.
    """
    if world_size() == 1:
        yield from outputs
        return
    while True:
        mine = next(outputs, None)
        count = torch.tensor([-1 if mine is None else len(mine[0])], device=device)
        gathered = [torch.empty_like(count) for _ in range(world_size())]
        torch.distributed.all_gather(gathered, count)
        counts = [int(number) for number in gathered]
        if max(counts) < 0:
            return
        # All must send equally much: the length of the longest.
        words = torch.zeros(max(counts), dtype=torch.int64, device=device)
        hidden = torch.zeros(max(counts), *size, device=device, dtype=dtype)
        if mine is not None:
            words[: len(mine[0])], hidden[: len(mine[0])] = mine
        all_words = [torch.empty_like(words) for _ in counts]
        all_hidden = [torch.empty_like(hidden) for _ in counts]
        torch.distributed.all_gather(all_words, words)
        torch.distributed.all_gather(all_hidden, hidden)
        for number, some, states in zip(counts, all_words, all_hidden, strict=True):
            if number > 0:
                yield some[:number], states[:number]


def _collect(statistics: AllocationStatistics, device: torch.device | str) -> None:
    """Sends every worker's sums and counts to the first, block by block."""
    first, _ = statistics.word_range
    for worker in range(1, world_size()):
        if rank() not in (0, worker):
            continue
        low, high = word_range(statistics.num_words, worker)
        for start in range(low, high, _SENT_WORDS):
            some = slice(start - first, min(start + _SENT_WORDS, high) - first)
            for tensor in (*statistics.sums, statistics.counts):
                block = tensor[some].to(device)
                if rank() == 0:
                    torch.distributed.recv(block, worker)
                    tensor[some] = block.to(tensor.device)
                else:
                    torch.distributed.send(block.contiguous(), 0)


@dataclass(frozen=True)
class Shares:
    """Which batches of a text are used for what, by their numbers in ascending order.

    Attributes:
        used: those that words are seated by.
        checked: those that a new table is measured by.
    """

    used: Sequence[int]
    checked: Sequence[int]


def sample_shares(words: int | None, total: int, batches: int, in_order: bool) -> Shares:
    """Chooses batches that hold about a number of words, the first batch always among them.

    A new table is measured by some ``CHECKED`` words. What seats the words by a sample of the text
    fits that sample, so that these are then others, if there are any.

    Args:
        words: about how many words to seat words by; None uses all.
        total: the words of the split.
        batches: its batches.
        in_order: take the first batches, since each goes on where the one before stopped;
            otherwise they are spread evenly.

    Raises:
        ValueError: there are no words.
    """
    if not total or not batches:
        raise ValueError("the text that words are to be seated by has no words")
    words = total if words is None else min(words, total)
    used = _spread(range(batches), math.ceil(Fraction(batches * words, total)), in_order)
    spare = sorted(set(range(batches)).difference(used)) or used
    count = math.ceil(len(used) * min(Fraction(1), Fraction(CHECKED, words)))
    return Shares(used, _spread(spare, min(count, len(spare)), in_order))


def _spread(numbers: Sequence[int], count: int, in_order: bool) -> Sequence[int]:
    """Returns the first few numbers, or a few that are spread evenly."""
    if in_order:
        return numbers[:count]
    return [numbers[place * len(numbers) // count] for place in range(count)]


@dataclass(frozen=True)
class Storage:
    """Where statistics are kept, and what memory that leaves.

    Attributes:
        arguments: further arguments of :class:`AllocationStatistics`.
        memory: bytes that are left.
    """

    arguments: dict[str, Any]
    memory: int


@contextmanager
def statistics_storage(
    memory: float, size: tuple[int, int, int], directory: str | Path
) -> Iterator[Storage]:
    """Shares a budget of memory out to statistics and solver.

    Args:
        memory: GiB.
        size: V, k and d.
        directory: where a memory-mapped file may lie while it is needed.

    Yields:
        Statistics in float64, or in float32 where that is too much, or in a float32 file that goes
        away afterwards, so that they take at most half of the first worker's memory, and alike on
        the others. The solver has the rest.

    Raises:
        ValueError: if not even the counts fit.
    """
    budget = int(memory * _GIB)
    for dtype in (torch.float64, torch.float32):
        taken = AllocationStatistics.bytes_needed(*size, dtype)
        if taken <= budget // 2:
            yield Storage({"dtype": dtype}, budget - taken)
            return
    counts = 8 * size[0]
    if counts > budget // 2:
        raise ValueError(
            f"the counts of {size[0]} words alone take {counts / _GIB:.3g} GiB, which must be at "
            "most half of the memory; allow more"
        )
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="statistics.", dir=directory) as folder:
        logger.info(f"statistics do not fit in {memory / 2:g} GiB, they go to a file in {folder}")
        yield Storage({"dtype": torch.float32, "storage": folder}, budget - counts)
