"""The parts of a reallocation around the solver: statistics of a model, workers, reports."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from fairseq_lightrnn.allocation.reallocation import Reallocation
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.word_table import WordTable

__all__ = [
    "Gathered",
    "broadcast_table",
    "gather_statistics",
    "log_reallocation",
    "rank",
    "reallocation_report",
    "sample_share",
    "statistics_storage",
    "world_size",
]

logger = logging.getLogger(__name__)

# Rows of statistics that workers add up at once; bounds the memory of the exchange.
_REDUCED_ROWS = 1 << 16
_GIB = 1 << 30


def rank() -> int:
    """Returns the number of this worker."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Returns the number of workers."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


@dataclass(frozen=True)
class Gathered:
    """What a pass over text gathered, summed over the workers.

    Attributes:
        statistics: summed hidden outputs and counts.
        losses: the loss in nats of each component, float64 of shape (k,).
    """

    statistics: AllocationStatistics
    losses: Tensor

    @property
    def tokens(self) -> int:
        """The number of words that were predicted."""
        return int(self.statistics.counts.sum())


@torch.no_grad()
def gather_statistics(
    model: nn.Module, batches: Iterable[Any], storage: dict[str, Any] | None = None
) -> Gathered:
    """Sums hidden outputs and losses over batches, in evaluation mode.

    Args:
        model: a model with a LightRNN decoder; its parameters stay as they are.
        batches: this worker's batches.
        storage: further arguments of :class:`AllocationStatistics`.

    Returns:
        The statistics and losses of all workers together.
    """
    decoder: Any = model.decoder
    table, (components, dim) = decoder.table, decoder.statistics_shape()
    device = decoder.softmax.weight.device
    statistics = AllocationStatistics(table.num_words, components, dim, **storage or {})
    losses = torch.zeros(components, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        for sample in batches:
            sample = _to_device(sample, device)
            target = sample["target"]
            features, _ = model(**sample["net_input"])
            real = target.ne(decoder.dictionary.pad())
            words, features = target[real], features[real]
            outputs = features.reshape(len(words), components, -1)
            statistics.add(words, outputs[..., :dim])
            losses -= decoder.component_log_probs(features, words).sum(0, dtype=torch.float64)
    finally:
        model.train(training)
    for tensor in (*statistics.sums, statistics.counts, losses):
        _add_up_workers(tensor, device)
    return Gathered(statistics, losses)


def _to_device(sample: Any, device: torch.device) -> Any:
    if isinstance(sample, Tensor):
        return sample.to(device)
    if isinstance(sample, dict):
        return {key: _to_device(value, device) for key, value in sample.items()}
    return sample


def _add_up_workers(tensor: Tensor, device: torch.device) -> None:
    """Sums a tensor over the workers in place, block by block on the device they talk through."""
    if world_size() == 1:
        return
    for block in tensor.split(_REDUCED_ROWS):
        shared = block.to(device)
        torch.distributed.all_reduce(shared)
        block.copy_(shared)


def broadcast_table(table: WordTable | None, lookup: Any) -> WordTable:
    """Returns the first worker's table on every worker."""
    if world_size() == 1:
        if table is None:
            raise ValueError("the only worker made no table")
        return table
    cells = torch.empty_like(lookup.cells)
    if table is not None:
        cells.copy_(torch.from_numpy(np.array(table.cells)))
    torch.distributed.broadcast(cells, 0)
    return WordTable.from_cells(cells.cpu().numpy(), lookup.shape)


def sample_share(
    words: int | None, total: int, batches: int, in_order: bool
) -> Callable[[int], bool]:
    """Chooses batches that hold about a number of words, the first batch always among them.

    Args:
        words: about how many words to use; None uses all.
        total: the words of the split.
        batches: its batches.
        in_order: take the first batches, since each goes on where the one before stopped;
            otherwise they are spread evenly.

    Returns:
        A function that tells of a batch number whether to use the batch.
    """
    if words is None or words >= total:
        return lambda number: True
    share = Fraction(words, total)
    if in_order:
        return lambda number: number < math.ceil(batches * share)
    return lambda number: math.ceil((number + 1) * share) > math.ceil(number * share)


@contextmanager
def statistics_storage(
    memory: float | None, size: tuple[int, int, int], directory: str | Path
) -> Iterator[dict[str, Any]]:
    """Chooses where statistics are kept so that they take no more memory than allowed.

    Args:
        memory: GiB; None knows no bound.
        size: V, k and d.
        directory: where a memory-mapped file may lie while it is needed.

    Yields:
        Arguments of :class:`AllocationStatistics`: float64 in memory, else float32 in memory, else
        float32 in a file that goes away afterwards.

    Raises:
        UsageError: if not even the counts fit.
    """
    if memory is None:
        yield {}
        return
    needed = AllocationStatistics.bytes_needed
    if needed(*size) <= memory * _GIB:
        yield {}
    elif needed(*size, torch.float32) <= memory * _GIB:
        yield {"dtype": torch.float32}
    elif 8 * size[0] > memory * _GIB:
        raise UsageError(
            f"--reallocation-memory {memory}: the counts of {size[0]} words alone take "
            f"{8 * size[0] / _GIB:.3g} GiB; allow more"
        )
    else:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="statistics.", dir=directory) as folder:
            logger.info(f"statistics do not fit in {memory} GiB, they go to a file in {folder}")
            yield {"dtype": torch.float32, "storage": folder}


def reallocation_report(
    result: Reallocation, gathered: Gathered, objective: str, row_weight: float
) -> dict[str, Any]:
    """Describes a reallocation, costs in nats per word.

    The solver's costs lack the log-normalisers, which no table changes. The measured losses of the
    old table have them, so that the costs reported are losses: of the first component for
    ``row-first``, of all of them (the first weighted) for ``joint``.
    """
    tokens = gathered.tokens
    losses = gathered.losses.tolist()
    if objective == "joint":
        measured = sum(losses) + (row_weight - 1) * losses[0] * (len(losses) > 1)
    else:
        measured = losses[0]
    return {
        "objective": str(objective),
        "moved": result.moved,
        "words": result.table.num_words,
        "tokens": tokens,
        "cost_before": measured / tokens,
        "cost_after": (measured + result.cost_after - result.cost_before) / tokens,
        "lower_bound": (measured + result.lower_bound - result.cost_before) / tokens,
        "gap": result.gap / tokens,
        "table": result.table.digest(),
    }


def log_reallocation(title: str, report: dict[str, Any], table: WordTable) -> None:
    """Logs a report as one line."""
    seconds = report["seconds"]
    share = report.get("share_of_training")
    parts = [
        f"{title} ({report['objective']}): {report['moved']} of {report['words']} words moved, "
        f"cost {report['cost_before']:.5f} -> {report['cost_after']:.5f} nats per word, lower "
        f"bound {report['lower_bound']:.5f}, gap {report['gap']:.2e}",
        f"statistics {seconds['statistics']:.1f} s, solve {seconds['solve']:.1f} s"
        + ("" if share is None else f", {100 * share:.1f} % of the training time so far"),
        str(table),
    ]
    logger.info("; ".join(parts))
