"""Word tables from word vectors: balanced k-means, coordinate after coordinate, then all together.

A table says of a word that it is the sum of one vector for each of its coordinates. Seating words
so that those sums are near their vectors is additive quantisation (Babenko and Lempitsky, 2014)
in which no two words may have the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.allocation.assignment import SolverOptions, assign, scaled_down
from fairseq_lightrnn.allocation.costs import LowRankCosts
from fairseq_lightrnn.allocation.sums import FITS, Rest, Sums, moments, squares, sums_of_tables
from fairseq_lightrnn.allocation.threads import thread_pool
from fairseq_lightrnn.core.table import WordTable, balanced_cells

__all__ = ["table_of_vectors"]

# k-means: rounds at most, and the share of the cost that another one must save.
_ROUNDS = 16
_TOLERANCE = 5e-3
# Words for each centroid that a round assigns at most, the heaviest; all others sit in the end.
_ROUND_WORDS = 64
# Assignments of words to centroids stop at this share of what there is to gain; those of the rounds
# may be rough, since the centroids move after each of them, and so are those of many costs, where
# rare words that are indifferent would take most of the time.
_ROUGH_GAP = 0.05
_GAP = 0.01
_FINE_ENTRIES = 1 << 17
# Coordinates are chosen anew for so many rounds at most, in which so many costs are formed in all;
# each round must save that share of the cost.
_JOINT_ROUNDS = 16
_JOINT_ENTRIES = 1 << 31
_JOINT_TOLERANCE = 1e-3
# Words of a group are assigned in parts of so many costs, or words for each cluster if that is
# more: every n-th word, so that each part is like the whole.
_PART_ENTRIES = 1 << 23
_PART_WORDS = 32


def table_of_vectors(
    vectors: np.ndarray,
    weights: np.ndarray,
    *,
    shape: Sequence[int],
    row_dims: int | None = None,
    before: Sequence[WordTable] = (),
    seed: int = 1,
    num_threads: int | None = None,
) -> WordTable:
    """Clusters the words for one coordinate after the other, on what is not explained yet.

    Then coordinates are chosen again, each by what all others do not explain, as long as that
    brings the sums of centroids nearer. There are no more rounds than form 2^31 costs of a word at
    a row or column: none for a square table of more than a million words.

    Args:
      vectors: (V, d) word vectors, in half, single or double precision.
      weights: (V,) weight of each word.
      shape: k sizes of the table, with at least V cells.
      row_dims: the first coordinate is clustered by so many dimensions of the vectors, the others
        by the rest; all by all of them if None.
      before: other tables of the words: this one is for what they do not say.
      seed: of the k-means.
      num_threads: threads; the table does not depend on it.

    Returns:
      The table; the occupied cells are those of `balanced_cells`.
    """
    num_words = len(vectors)
    filled = WordTable.from_cells(balanced_cells(num_words, shape), shape)
    if max(shape) >= num_words:  # each word has a component vector of its own wherever it is
        return filled
    random = np.random.default_rng(seed)
    groups = np.zeros(num_words, np.int64)
    sums = sums_of_tables(vectors, weights, before)
    rounds = min(_JOINT_ROUNDS, _JOINT_ENTRIES // max(1, num_words * sum(shape)))
    rounds = rounds if len(shape) > 1 else 0
    for stage, size in enumerate(shape):
        dims = slice(row_dims) if stage == 0 else slice(row_dims, None)
        with thread_pool(num_threads) as executor:
            clusters = _balanced_clusters(
                _Split(sums, dims, groups, filled.counts(stage), executor), random
            )
            sums.add(clusters, size)
        groups = groups * size + clusters
    if rounds:
        with thread_pool(num_threads) as executor:
            _settle(sums, filled, rounds, executor)
    return WordTable(np.stack(sums.places[-len(shape) :], axis=1), shape)


class _WeightedRest:
    """Twice the weight of each word times its rest: `LowRankCosts.sums`, formed when asked for."""

    device = torch.device("cpu")

    def __init__(self, rest: Rest, weights: np.ndarray, words: np.ndarray) -> None:
        self.rest, self.weights, self.words = rest, weights, words
        self.shape = len(words), rest.vectors.shape[1]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        words = self.words[rows if isinstance(rows, slice) else rows.numpy()]
        found = self.rest[words]
        found *= (2.0 * self.weights[words, None]).astype(found.dtype)
        return torch.from_numpy(found)


def _settle(sums: Sums, filled: WordTable, rounds: int, executor: Executor) -> None:
    """Chooses each coordinate again by what all others do not explain, until that saves nothing.

    Args:
      sums: whose last groupings are the coordinates; others stay as they are.
      filled: any table with words in the cells that are to have one.
      rounds: at most.
      executor: runs the groups in parallel.
    """
    shape = filled.shape
    stages = range(len(sums.places) - len(shape), len(sums.places))
    sums.fit(FITS)
    best, kept = sums.cost(), list(sums.places)
    for _ in range(rounds):
        groups = np.zeros(len(sums.weights), np.int64)
        for component, (number, size) in enumerate(zip(stages, shape, strict=True)):
            split = _Split(
                sums, slice(None), groups, filled.counts(component), executor, left_out=number
            )
            places, _ = split.assign(sums.centroids[number], _GAP)
            sums.move(number, places)
            groups = groups * size + places
            sums.fit()
        cost = sums.cost()
        if cost < best:
            kept = list(sums.places)
        if cost >= (1 - _JOINT_TOLERANCE) * best:
            break
        best = cost
    sums.places = kept


def _balanced_clusters(split: _Split, random: np.random.Generator) -> np.ndarray:
    """Balanced k-means: splits every group of words over the same centroids, by its capacities.

    Args:
      split: of the words.
      random: picks the first centroids.

    Returns:
      The cluster of each word.
    """
    weights, size = split.weights, split.capacities.shape[1]
    chance = weights + 1e-12 * max(weights.max(initial=0.0), 1.0)
    first = random.choice(len(weights), size, replace=len(weights) < size, p=chance / chance.sum())
    centroids = split.rest[np.asarray(first)].astype(np.float64)
    heavy = np.argsort(-weights, kind="stable")[: _ROUND_WORDS * size]
    rounds = split if len(heavy) == len(weights) else split.of(np.sort(heavy))
    before = math.inf
    for _ in range(_ROUNDS):
        clusters, change = rounds.assign(centroids, _ROUGH_GAP)
        cost = rounds.constant + change
        centroids = rounds.means(clusters, centroids)
        # A cost of nothing is off by its rounding.
        if cost >= (1 - _TOLERANCE) * before - 1e-12 * rounds.constant:
            break
        before = cost
    return split.assign(centroids, _GAP)[0]


class _Split:
    """Words in groups, each of which is to be split over the same centroids by its capacities.

    Args:
      sums: the words, and what is explained of them already.
      dims: the dimensions of vectors that count.
      groups: (V,) group of each word.
      capacities: (groups, R) words of each group that each cluster takes.
      executor: runs the groups in parallel.
      left_out: a grouping that does not count as explaining something.
      words: those that are split, in order; all if None.
    """

    def __init__(
        self,
        sums: Sums,
        dims: slice,
        groups: np.ndarray,
        capacities: np.ndarray,
        executor: Executor,
        left_out: int | None = None,
        words: np.ndarray | None = None,
    ) -> None:
        self.weights, self.rest = sums.weights, sums.rest(left_out, dims)
        self.groups, self.capacities, self.executor = groups, capacities, executor
        self.words = np.arange(len(groups)) if words is None else words
        own = groups[self.words]
        order = self.words[np.argsort(own, kind="stable")]
        starts = np.searchsorted(groups[order], np.arange(len(capacities) + 1))
        self.parts = [
            part
            for group, room in enumerate(capacities)
            for part in _parts(order[starts[group] : starts[group + 1]], room)
        ]
        self.prices: list[np.ndarray | None] = [None] * len(self.parts)
        self._arguments = sums, dims, groups, left_out

    @cached_property
    def constant(self) -> float:
        """The weighted sum of squared lengths."""
        return squares(self.rest, self.weights, self.words)

    def of(self, words: np.ndarray) -> _Split:
        """Returns some of the words, with as large a share of every capacity."""
        sums, dims, groups, left_out = self._arguments
        whole = np.bincount(groups, minlength=len(self.capacities))
        share = np.bincount(groups[words], minlength=len(whole)) / np.maximum(whole, 1)
        capacities = np.ceil(self.capacities * share[:, None]).astype(np.int64)
        return _Split(sums, dims, groups, capacities, self.executor, left_out, words)

    def assign(self, centroids: np.ndarray, gap: float) -> tuple[np.ndarray, float]:
        """Returns the cluster of each word, (V,), and what distances add to :attr:`constant`.

        The weighted sum of squared distances is both together, of which words choose the second:
        weight · |x - c|² = weight · |x|² - (2 · weight · x · c + weight · -|c|²)
        """
        places = torch.from_numpy(centroids)
        biases = -(places * places).sum(dim=1)
        clusters = np.zeros(len(self.groups), np.int64)

        def split(number: int) -> float:
            words, room = self.parts[number]
            weights = torch.from_numpy(self.weights[words])
            weighted = _WeightedRest(self.rest, self.weights, words)
            costs = LowRankCosts(weighted, places, weights, biases)
            entries = len(words) * len(room)
            options = SolverOptions(
                gap if entries <= _FINE_ENTRIES else _ROUGH_GAP, memory=4 * entries
            )
            found = assign(costs, room, options, prices=self.prices[number])
            clusters[words] = found.places
            self.prices[number] = found.prices
            return found.cost

        return clusters, sum(self.executor.map(split, range(len(self.parts))))

    def means(self, clusters: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Returns the weighted mean of each cluster; one without weight keeps its centroid."""
        total, sums = moments(self.rest, self.weights, self.words, clusters, len(previous))
        some = total[:, None] > 0
        return np.where(some, sums / np.where(some, total[:, None], 1.0), previous)


def _parts(words: np.ndarray, capacities: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields all words in parts that can be assigned, each with a share of the capacities."""
    clusters = len(capacities)
    count = math.ceil(len(words) / max(_PART_ENTRIES // clusters, _PART_WORDS * clusters))
    left, waiting = capacities, len(words)
    for number in range(count):
        some = words[number::count]
        room = scaled_down(left, int(left.sum()) * len(some) // waiting)
        yield some, room
        left, waiting = left - room, waiting - len(some)
