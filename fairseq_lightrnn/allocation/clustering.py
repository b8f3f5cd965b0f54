"""Word tables from word vectors: balanced k-means, coordinate after coordinate, then all together.

A table says of a word that it is the sum of one vector for each of its coordinates. Seating words
so that those sums are near their vectors is additive quantisation (Babenko and Lempitsky, 2014)
in which no two words may have the same code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import torch

from fairseq_lightrnn.allocation.assignment import SolverOptions, assign
from fairseq_lightrnn.allocation.costs import LowRankCosts
from fairseq_lightrnn.core.table import WordTable, balanced_cells

__all__ = ["table_of_vectors", "unexplained"]

# k-means: rounds at most, and the share of the cost that another one must save.
_ROUNDS = 16
_TOLERANCE = 1e-3
# Assignments of words to centroids stop at this share of what there is to gain; those of the rounds
# may be rough, since the centroids move after each of them.
_ROUGH_GAP = 0.05
_GAP = 0.01
# Costs that a round forms at most; beyond, the words of least weight sit only in the end.
_ROUND_ENTRIES = 1 << 28
# Coordinates are chosen anew for so many rounds at most, in which so many costs are formed in all;
# each round must save that share of the cost.
_JOINT_ROUNDS = 16
_JOINT_ENTRIES = 1 << 31
_JOINT_TOLERANCE = 2e-4
_PIECE = 1 << 14  # words
# Passes of alternating means over tables that are there.
_FITS = 4


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

    Then coordinates are chosen again, each by what all others do not explain of both vectors, as
    long as that brings the sums of centroids nearer. There are no more rounds than form 2^31 costs
    of a word at a row or column: none for a square table of more than a million words.

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
    filled = WordTable.from_cells(cells, shape)
    random = np.random.default_rng(seed)
    groups = np.zeros(num_words, np.int64)
    coordinates = np.empty((num_words, len(shape)), np.int64)
    parts = [vectors] if columns is None or columns is vectors else [vectors, columns]
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as executor:
        for stage, size in enumerate(shape):
            capacities = filled.counts(stage)
            clusters, centroids = _balanced_clusters(
                vectors, weights, groups, capacities, random, executor
            )
            coordinates[:, stage] = clusters
            if stage == 0 and len(parts) == 2:
                vectors = parts[1]
                centroids = _centroids(
                    vectors, weights, clusters, np.zeros((size, vectors.shape[1]))
                )
            vectors = vectors - centroids[clusters]
            groups = groups * size + clusters
        rounds = min(_JOINT_ROUNDS, _JOINT_ENTRIES // max(1, num_words * sum(shape)))
        if len(shape) > 1 and rounds:
            del vectors  # what is left of them
            _settle(np.hstack(parts), weights, coordinates, filled, rounds, executor)
    return WordTable(coordinates, shape)


def unexplained(
    vectors: np.ndarray, weights: np.ndarray, tables: Sequence[WordTable]
) -> np.ndarray:
    """Returns what tables do not say of words: vectors less the sums of coordinates' centroids.

    Args:
      vectors: (V, d) word vectors.
      weights: (V,) weight of each word.
      tables: of the words, of any shapes.

    Returns:
      (V, d), of the sums that are nearest to the vectors, which alternating means approach.
    """
    places = [table.coordinates[:, i] for table in tables for i in range(table.num_components)]
    sizes = [size for table in tables for size in table.shape]
    sums = _Sums(vectors, weights, places, sizes)
    sums.fit(_FITS)
    return sums.rest()


class _Sums:
    """Centroids whose sums approach vectors: one of each word's place in each of some groupings.

    Arguments are those of `unexplained`; ``places`` (each (V,), may be changed from outside) number
    the groups of words, ``sizes`` of them.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        weights: np.ndarray,
        places: list[np.ndarray],
        sizes: Sequence[int],
    ) -> None:
        self.vectors, self.weights, self.places = vectors, weights, places
        self.centroids = [np.zeros((size, vectors.shape[1])) for size in sizes]

    def rest(self, left_out: int | None = None) -> np.ndarray:
        """Returns what the sums lack, that of one grouping left out, (V, d)."""
        rest = self.vectors.copy()
        for number, (centroids, places) in enumerate(zip(self.centroids, self.places, strict=True)):
            for words in _slices(len(rest) if number != left_out else 0):
                rest[words] -= centroids[places[words]]
        return rest

    def cost(self) -> float:
        """Returns the weighted sum of squared distances between vectors and sums."""
        return _squares(self.rest(), self.weights)

    def fit(self, passes: int = 1) -> None:
        """Moves the centroids of each grouping in turn to the means of what all others lack."""
        for _ in range(passes):
            for number, places in enumerate(self.places):
                self.centroids[number] = _centroids(
                    self.rest(number), self.weights, places, self.centroids[number]
                )


def _settle(
    vectors: np.ndarray,
    weights: np.ndarray,
    coordinates: np.ndarray,
    filled: WordTable,
    rounds: int,
    executor: Executor,
) -> None:
    """Chooses each coordinate again by what all others do not explain, until that saves nothing.

    Args:
      vectors: (V, d) word vectors.
      weights: (V,) weight of each word.
      coordinates: (V, k) of each word; changed in place.
      filled: any table with words in the cells that are to have one.
      rounds: at most.
      executor: runs the groups in parallel.
    """
    shape = filled.shape
    sums = _Sums(vectors, weights, list(coordinates.T), shape)  # the places are views
    sums.fit(_FITS)
    best, kept = sums.cost(), coordinates.copy()
    for _ in range(rounds):
        groups = np.zeros(len(vectors), np.int64)
        for stage, size in enumerate(shape):
            capacities = filled.counts(stage)
            split = _Split(sums.rest(stage), weights, groups, capacities, executor)
            coordinates[:, stage], _ = split.assign(sums.centroids[stage], _GAP)
            groups = groups * size + coordinates[:, stage]
            sums.fit()
        cost = sums.cost()
        if cost < best:
            kept[:] = coordinates
        if cost >= (1 - _JOINT_TOLERANCE) * best:
            break
        best = cost
    coordinates[:] = kept


def _balanced_clusters(
    vectors: np.ndarray,
    weights: np.ndarray,
    groups: np.ndarray,
    capacities: np.ndarray,
    random: np.random.Generator,
    executor: Executor,
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
        executor: Executor,
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
        self.constant = _squares(vectors, weights)
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
            found = assign(
                costs, self.capacities[group], SolverOptions(gap), prices=self.prices[group]
            )
            clusters[words] = found.places
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
    for words in _slices(len(vectors)):
        np.add.at(sums, clusters[words], weights[words, None] * vectors[words])
    return np.where(total[:, None] > 0, sums / np.where(total > 0, total, 1.0)[:, None], previous)


def _squares(vectors: np.ndarray, weights: np.ndarray) -> float:
    """Returns the weighted sum of the vectors' squared lengths."""
    return sum(
        float((weights[words] * (vectors[words] ** 2).sum(axis=1)).sum())
        for words in _slices(len(vectors))
    )


def _slices(num_words: int) -> Iterator[slice]:
    """Yields all words in pieces, so that temporaries stay small beside the vectors."""
    for start in range(0, num_words, _PIECE):
        yield slice(start, start + _PIECE)
