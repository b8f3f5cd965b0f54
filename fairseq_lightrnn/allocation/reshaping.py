"""Vectors of a table's rows and columns, made from those of another table of the same words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.allocation.clustering import table_of_vectors
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.core.table import WordTable

__all__ = ["reshape_biases", "reshape_vectors", "table_of_statistics"]

_WEIGHT_POWER = 0.75


def table_of_statistics(statistics: AllocationStatistics, shape: Sequence[int]) -> WordTable:
    """Seats words that a model predicts from similar hidden outputs in the same row.

    Args:
        statistics: gathered with the model's present table.
        shape: the sizes of the new table, as many components as wanted.

    Returns:
        A table from the words' mean hidden outputs, scaled to length 1 for each component.
    """
    counts = statistics.counts.cpu().double()
    parts = []
    for sums in statistics.sums:
        mean = sums.cpu().double() / counts.clamp(min=1)[:, None]
        parts.append(mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-12))
    vectors = torch.cat(parts, dim=1).numpy()
    return table_of_vectors(vectors, counts.numpy() ** _WEIGHT_POWER, shape=shape)


def _sources(old: WordTable, new: WordTable) -> list[int]:
    """Returns which old component each new one inherits from: its own, or the first or last."""
    if old.num_components == new.num_components:
        return list(range(new.num_components))
    last = old.num_components - 1
    return [0 if component == 0 else last for component in range(new.num_components)]


def _means(values: Tensor, groups: np.ndarray, weights: np.ndarray, size: int) -> Tensor:
    """Returns the weighted mean (size, …) of the values (V, …) in each group."""
    index = torch.from_numpy(groups)
    # A little for every word, so that groups of words that never occurred have a mean as well.
    weight = torch.from_numpy(weights.astype(np.float64) + 1e-3)
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, index, weight)
    sums = torch.zeros(size, *values.shape[1:], dtype=torch.float64)
    shape = (-1, *[1] * (values.dim() - 1))
    sums.index_add_(0, index, values.double() * weight.view(shape))
    return sums / total.clamp(min=1e-12).view(shape)


def reshape_vectors(vectors: Tensor, old: WordTable, new: WordTable, counts: np.ndarray) -> Tensor:
    """Gives each new row and column the mean of the vectors that its words had.

    Args:
        vectors: of the old table's components, one after the other: (ΣR_i, d).
        old: the table that they belong to.
        new: the table of the same words to make vectors for.
        counts: occurrences of the words, (V,).

    Returns:
        Vectors of the new components, (ΣR'_i, d).
    """
    blocks = vectors.split(list(old.shape))
    parts = []
    for component, source in enumerate(_sources(old, new)):
        values = blocks[source][torch.from_numpy(np.array(old.coordinates[:, source]))]
        groups = np.array(new.coordinates[:, component])
        parts.append(_means(values, groups, counts, new.shape[component]))
    return torch.cat(parts).to(vectors.dtype)


def reshape_biases(biases: Tensor, old: WordTable, new: WordTable, counts: np.ndarray) -> Tensor:
    """Gives each new row and column its words' mean bias, corrected for how often it is right.

    Takes the arguments of :func:`reshape_vectors`, with biases of shape (ΣR_i,). A row twice as
    frequent as the rows that its words came from gets a bias higher by log 2.
    """
    blocks = biases.split(list(old.shape))
    parts = []
    for component, source in enumerate(_sources(old, new)):
        before = np.array(old.coordinates[:, source])
        groups = np.array(new.coordinates[:, component])
        mass = np.bincount(before, counts + 1e-3, minlength=old.shape[source])
        values = blocks[source].double()[torch.from_numpy(before)]
        values = values - torch.from_numpy(np.log(mass[before]))
        now = np.bincount(groups, counts + 1e-3, minlength=new.shape[component])
        means = _means(values, groups, counts, new.shape[component])
        parts.append(means + torch.from_numpy(np.log(now.clip(min=1e-12))))
    return torch.cat(parts).to(biases.dtype)
