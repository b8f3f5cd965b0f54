"""The word table that training starts from."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from fairseq_lightrnn.allocation.balanced_assignment import balanced_assignment
from fairseq_lightrnn.allocation.cooccurrence import (
    CoOccurrence,
    neighbour_counts,
    positive_information,
    word_vectors,
)
from fairseq_lightrnn.allocation.costs import LowRankCosts
from fairseq_lightrnn.word_table import WordTable, balanced_cells

__all__ = [
    "INITIAL_TABLES",
    "WordVectors",
    "cooccurrence_vectors",
    "initial_table",
    "table_of_vectors",
]

logger = logging.getLogger(__name__)

INITIAL_TABLES = ("random", "frequency", "cooccurrence")

# k-means: rounds at most, and the share of the cost that another one must save.
_ROUNDS = 16
_TOLERANCE = 1e-3
# Assignments of words to centroids stop at this share of what there is to gain; those of the rounds
# may be rough, since the centroids move after each of them.
_ROUGH_GAP = 0.05
_GAP = 0.01
# Costs that a round forms at most; beyond, the words of least weight sit only in the end.
_ROUND_ENTRIES = 1 << 28


class WordVectors(NamedTuple):
    """What a table is made from.

    Attributes:
      vectors: (V, d), by which words are seated in rows.
      weights: (V,) weight of each word.
      columns: (V, e), by which the words of a row are seated in columns.
    """

    vectors: np.ndarray
    weights: np.ndarray
    columns: np.ndarray


def initial_table(
    kind: str,
    num_words: int,
    shape: Sequence[int],
    *,
    seed: int = 1,
    counts: np.ndarray | None = None,
    tokens: Iterable[np.ndarray] | None = None,
    how: CoOccurrence | None = None,
    num_threads: int | None = None,
) -> WordTable:
    """Builds a word table before any training.

    ``random`` permutes the words, as in arXiv 1610.09893. ``frequency`` fills the table row by row
    from the most frequent word to the rarest. ``cooccurrence`` puts words with similar neighbours
    into a row, and within the rows words that differ from their row in the same way into a column,
    for which neighbours further away count too: balanced k-means on word vectors. Those are rounded
    by the linear algebra library, so that another number of its threads (``OMP_NUM_THREADS``) may
    give another table for the same seed.

    Args:
      kind: one of `INITIAL_TABLES`.
      num_words: V, size of the dictionary.
      shape: k sizes of the table, with at least V cells.
      seed: of the permutation, or of the k-means.
      counts: (V,) occurrences, needed by ``frequency`` unless there are ``tokens``.
      tokens: the training text as 1-D arrays of word ids, needed by ``cooccurrence``.
      how: what ``cooccurrence`` counts and weighs.
      num_threads: threads; the table does not depend on it.

    Returns:
      The table; the occupied cells are those of `balanced_cells`.

    Raises:
      ValueError: the kind is unknown, what it needs is missing, or counts do not fit the
        dictionary.
    """
    if kind not in INITIAL_TABLES:
        raise ValueError(f"initial table must be one of {', '.join(INITIAL_TABLES)}, got {kind!r}")
    shape = tuple(int(size) for size in shape)
    cells = balanced_cells(num_words, shape)
    if kind == "random":
        order = np.random.default_rng(seed).permutation(num_words)
    elif kind == "frequency":
        occurrences = _occurrences(num_words, counts, tokens)
        order = np.empty(num_words, np.int64)
        order[np.argsort(-occurrences, kind="stable")] = np.arange(num_words)
    else:
        if tokens is None:
            raise ValueError("a co-occurrence table needs the training text; give tokens")
        started = time.monotonic()
        words = cooccurrence_vectors(tokens, num_words, how or CoOccurrence(), seed)
        table = table_of_vectors(*words, shape=shape, seed=seed, num_threads=num_threads)
        logger.info("co-occurrence table took %.1f s", time.monotonic() - started)
        return table
    return WordTable.from_cells(cells[order], shape)


def _occurrences(
    num_words: int, counts: np.ndarray | None, tokens: Iterable[np.ndarray] | None
) -> np.ndarray:
    if counts is None:
        if tokens is None:
            raise ValueError(
                "a frequency table needs the occurrences of the words; give counts or tokens"
            )
        counts = np.zeros(num_words, np.int64)
        for piece in tokens:
            counts += np.bincount(np.asarray(piece).reshape(-1), minlength=num_words)
    counts = np.asarray(counts)
    if counts.shape != (num_words,) or not np.isfinite(counts).all():
        raise ValueError(f"counts must be {num_words} finite numbers, got shape {counts.shape}")
    return counts


def table_of_vectors(
    vectors: np.ndarray,
    weights: np.ndarray,
    columns: np.ndarray | None = None,
    *,
    shape: Sequence[int],
    seed: int = 1,
    num_threads: int | None = None,
) -> WordTable:
    """Clusters the words for one coordinate after the other, on what is not explained yet.

    Args:
      vectors: (V, d) word vectors.
      weights: (V,) weight of each word.
      columns: (V, e) other vectors for the coordinates after the first, if these are not to go on
        with the same.
      shape: k sizes of the table, with at least V cells.
      seed: of the k-means.
      num_threads: threads; the table does not depend on it.

    Returns:
      The table; the occupied cells are those of `balanced_cells`.
    """
    num_words = len(vectors)
    cells = balanced_cells(num_words, shape)
    occupied = np.zeros(int(np.prod(shape)), bool)
    occupied[cells] = True
    random = np.random.default_rng(seed)
    groups = np.zeros(num_words, np.int64)
    coordinates = np.empty((num_words, len(shape)), np.int64)
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as executor:
        for stage, size in enumerate(shape):
            capacities = occupied.reshape(-1, size, int(np.prod(shape[stage + 1 :]))).sum(axis=2)
            clusters, centroids = _balanced_clusters(
                vectors, weights, groups, capacities, random, executor
            )
            coordinates[:, stage] = clusters
            if stage == 0 and columns is not None:
                vectors = columns
                centroids = _centroids(
                    columns, weights, clusters, np.zeros((size, vectors.shape[1]))
                )
            vectors = vectors - centroids[clusters]
            groups = groups * size + clusters
    return WordTable(coordinates, shape)


def cooccurrence_vectors(
    tokens: Iterable[np.ndarray], num_words: int, how: CoOccurrence, seed: int = 1
) -> WordVectors:
    """Describes words by their neighbours in a text.

    Args:
      tokens: the text as 1-D arrays of word ids.
      num_words: V, size of the dictionary.
      how: what is counted and weighed.
      seed: of the decomposition.

    Returns:
      What `table_of_vectors` takes. Further tables of the same words can be made from it with other
      seeds.
    """
    started = time.monotonic()
    tokens = list(tokens)

    def vectors(window: int) -> tuple[np.ndarray, np.ndarray]:
        neighbours, counts = neighbour_counts(
            tokens, num_words, how.num_contexts, window, how.sides
        )
        information = positive_information(neighbours)
        return word_vectors(information, how.dim, seed, how.singular_power), counts

    rows, counts = vectors(how.window)
    columns = rows
    if how.column_window not in (None, how.window):
        columns, _ = vectors(how.column_window)
    logger.info("word vectors of %d words took %.1f s", num_words, time.monotonic() - started)
    return WordVectors(rows, counts.astype(np.float64) ** how.weight_power, columns)


def _balanced_clusters(
    vectors: np.ndarray,
    weights: np.ndarray,
    groups: np.ndarray,
    capacities: np.ndarray,
    random: np.random.Generator,
    executor: ThreadPoolExecutor,
) -> tuple[np.ndarray, np.ndarray]:
    """Balanced k-means: splits every group of words over the same centroids, by its capacities.

    Args:
      vectors: (V, d) word vectors.
      weights: (V,) weight of each word.
      groups: (V,) group of each word.
      capacities: (groups, R) words of each group that each cluster takes.
      random: picks the first centroids.
      executor: runs the groups in parallel.

    Returns:
      The cluster of each word and the (R, d) centroids.
    """
    size = capacities.shape[1]
    chance = weights + 1e-12 * max(weights.max(initial=0.0), 1.0)
    first = random.choice(len(vectors), size, replace=len(vectors) < size, p=chance / chance.sum())
    centroids = vectors[first].copy()
    heavy = np.argsort(-weights, kind="stable")[: max(_ROUND_ENTRIES // size, 8 * size)]
    split = _Split(vectors, weights, groups, capacities, executor)
    rounds = split if len(heavy) == len(vectors) else split.of(heavy)
    before = math.inf
    for _ in range(_ROUNDS):
        clusters, cost = rounds.assign(centroids, _ROUGH_GAP)
        centroids = _centroids(rounds.vectors, rounds.weights, clusters, centroids)
        # A cost of nothing is off by its rounding.
        if cost >= (1 - _TOLERANCE) * before - 1e-12 * rounds.constant:
            break
        before = cost
    if rounds is not split:  # the others count once
        clusters, _ = split.assign(centroids, _ROUGH_GAP)
        centroids = _centroids(vectors, weights, clusters, centroids)
    clusters, _ = split.assign(centroids, _GAP)
    return clusters, _centroids(vectors, weights, clusters, centroids)


class _Split:
    """Words in groups, each of which is to be split over the same centroids by its capacities.

    Arguments are those of `_balanced_clusters`.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        weights: np.ndarray,
        groups: np.ndarray,
        capacities: np.ndarray,
        executor: ThreadPoolExecutor,
    ) -> None:
        self.vectors, self.weights = vectors, weights
        self.groups, self.capacities = groups, capacities
        self.executor = executor
        order = np.argsort(groups, kind="stable")
        starts = np.searchsorted(groups[order], np.arange(len(capacities) + 1))
        self.members = [order[starts[g] : starts[g + 1]] for g in range(len(capacities))]
        # weight * |x - c|^2 = weight * |x|^2 - (2 weight x . c + weight * -|c|^2)
        self.weighted = torch.from_numpy(2.0 * weights[:, None] * vectors)
        self.counts = torch.from_numpy(weights)
        self.constant = float((weights * (vectors * vectors).sum(axis=1)).sum())
        self.prices: list[np.ndarray | None] = [None] * len(capacities)

    def of(self, words: np.ndarray) -> _Split:
        """Returns some of the words, with as large a share of every capacity."""
        groups = self.groups[words]
        whole = np.bincount(self.groups, minlength=len(self.capacities))
        share = np.bincount(groups, minlength=len(whole)) / np.maximum(whole, 1)
        capacities = np.ceil(self.capacities * share[:, None]).astype(np.int64)
        return _Split(self.vectors[words], self.weights[words], groups, capacities, self.executor)

    def assign(self, centroids: np.ndarray, gap: float) -> tuple[np.ndarray, float]:
        """Returns the cluster of each word, (V,), and the weighted sum of squared distances."""
        places = torch.from_numpy(centroids)
        biases = -(places * places).sum(dim=1)
        clusters = np.zeros(len(self.vectors), np.int64)

        def split(group: int) -> float:
            words = self.members[group]
            if len(words) == 0:
                return 0.0
            index = torch.from_numpy(words)
            costs = LowRankCosts(self.weighted[index], places, self.counts[index], biases)
            found = balanced_assignment(
                costs, self.capacities[group], gap=gap, prices=self.prices[group], finish=False
            )
            clusters[words] = found.assignment
            self.prices[group] = found.prices
            return found.cost

        cost = self.constant + sum(self.executor.map(split, range(len(self.members))))
        return clusters, cost


def _centroids(
    vectors: np.ndarray, weights: np.ndarray, clusters: np.ndarray, previous: np.ndarray
) -> np.ndarray:
    """Returns the weighted mean of each cluster; a cluster without weight keeps its centroid."""
    total = np.bincount(clusters, weights, minlength=len(previous))
    sums = np.zeros_like(previous)
    np.add.at(sums, clusters, weights[:, None] * vectors)
    return np.where(total[:, None] > 0, sums / np.where(total > 0, total, 1.0)[:, None], previous)
