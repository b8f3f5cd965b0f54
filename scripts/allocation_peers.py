"""The other ways of allocating words to cells, for `benchmark_allocation.py` to compare with.

Every solver takes an instance and returns the flat cell of each word. None of them is used by the
plugin.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numba
import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from fairseq_lightrnn.allocation.costs import LowRankCosts
from fairseq_lightrnn.allocation.kernels import scan
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.core.table import WordTable

_BLOCK = 4096


@dataclass
class Instance:
    """One reallocation: the table before it, the statistics and the output vectors (two
    components).
    """

    table: WordTable
    sums: torch.Tensor  # (2, V, d)
    counts: torch.Tensor  # (V,)
    vectors: list[torch.Tensor]
    biases: list[torch.Tensor]

    @property
    def costs(self) -> list[LowRankCosts]:
        return [
            LowRankCosts(self.sums[i], self.vectors[i], self.counts, self.biases[i]) for i in (0, 1)
        ]

    @property
    def statistics(self) -> AllocationStatistics:
        """The statistics object, around the same memory."""
        _, num_words, dim = self.sums.shape
        statistics = AllocationStatistics(1, 2, dim)
        statistics.num_words, statistics.word_range = num_words, (0, num_words)
        statistics.sums, statistics.counts = self.sums, self.counts
        return statistics

    def cost(self, cells: np.ndarray) -> tuple[float, float]:
        """Returns the row cost and the column cost of giving each word a flat cell."""
        rows, columns = np.divmod(cells, self.table.shape[1])
        return tuple(
            float(costs.chosen(torch.from_numpy(places)).sum())
            for costs, places in zip(self.costs, (rows, columns), strict=True)
        )


def dense_costs(instance: Instance) -> np.ndarray:
    """Returns the V x V matrix of words and occupied cells, in the order of the cells."""
    cells = np.sort(instance.table.cells)
    rows, columns = np.divmod(cells, instance.table.shape[1])
    first, second = (costs.block(slice(None)).numpy() for costs in instance.costs)
    return np.asarray(first[:, rows] + second[:, columns])


def scipy_dense(instance: Instance) -> np.ndarray:
    """scipy's `linear_sum_assignment` on the V x V matrix: exact."""
    return np.sort(instance.table.cells)[linear_sum_assignment(dense_costs(instance))[1]]


def scipy_dense_rows(instance: Instance) -> np.ndarray:
    """scipy's `linear_sum_assignment` for the rows, each repeated for each of its cells: exact for
    the rows.
    """
    cells = np.sort(instance.table.cells)
    rows = cells // instance.table.shape[1]
    matrix = instance.costs[0].block(slice(None)).numpy()[:, rows]
    return cells[linear_sum_assignment(matrix)[1]]


def cheapest_arcs(instance: Instance, keep: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (words, flat cells, costs less the mean of the word) of the cheapest cells of each
    word.
    """
    num_words, keep = instance.table.num_words, min(keep, instance.table.num_words)
    prices = np.full(instance.table.shape, np.inf)
    prices.reshape(-1)[instance.table.cells] = 0.0
    cells = np.empty((num_words, keep), np.int32)
    values = np.empty((num_words, keep))
    for start in range(0, num_words, _BLOCK):
        words = np.arange(start, min(start + _BLOCK, num_words))
        blocks = [costs.block(torch.from_numpy(words)).numpy() for costs in instance.costs]
        lows = [block.min(axis=1, keepdims=True) for block in blocks]
        first, second = (block - low for block, low in zip(blocks, lows, strict=True))
        some = np.empty((len(words), keep), np.int32)
        costs = np.empty((len(words), keep))
        scan(
            *(first, second, prices, 0.0, np.arange(len(words)), some, costs, np.empty(len(words)))
        )
        centre = first.mean(axis=1) + second.mean(axis=1)
        cells[words], values[words] = some, costs - centre[:, None]
    return (
        np.repeat(np.arange(num_words), keep),
        cells.reshape(-1).astype(np.int64),
        values.reshape(-1),
    )


def fill_up(instance: Instance, held: np.ndarray) -> np.ndarray:
    """Gives the words without a cell (-1) the free cells in order."""
    free = np.setdiff1d(instance.table.cells, held[held >= 0])
    held[held < 0] = free
    return held


def _pruned(instance: Instance, keep: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (words, columns, costs) of the cheapest arcs, with the present cell of each word.

    Columns number the occupied cells in order. The arcs to the present cells make a full matching
    possible; they cost more than any other arc unless they are among the cheapest anyway.
    """
    words, cells, values = cheapest_arcs(instance, keep)
    num_words = instance.table.num_words
    index = np.full(instance.table.num_cells, -1)
    index[np.sort(instance.table.cells)] = np.arange(num_words)
    present = np.arange(num_words) * num_words + index[instance.table.cells]
    keys = np.concatenate([words * num_words + index[cells], present])
    values = np.concatenate([values, np.full(num_words, values.max() + 1.0)])
    keys, first = np.unique(keys, return_index=True)
    return keys // num_words, keys % num_words, values[first] - values.min()


def scipy_sparse(instance: Instance, keep: int = 200) -> np.ndarray:
    """scipy's `min_weight_full_bipartite_matching` on the 200 cheapest cells of each word."""
    words, columns, values = _pruned(instance, keep)
    size = (instance.table.num_words,) * 2
    arcs = sparse.csr_matrix((values + 1.0, (words, columns)), shape=size)
    matched = sparse.csgraph.min_weight_full_bipartite_matching(arcs)[1]
    return np.sort(instance.table.cells)[matched]


def ortools_flow(instance: Instance, keep: int = 200) -> np.ndarray:
    """OR-tools' linear assignment (cost scaling) on the 200 cheapest cells of each word."""
    from ortools.graph.python import linear_sum_assignment as solver

    words, columns, values = _pruned(instance, keep)
    assignment = solver.SimpleLinearSumAssignment()
    # Whole numbers, as exact as its prices allow: they may reach the square of the words times a
    # cost.
    scale = min(1e3, 1e18 / (instance.table.num_words**2 * values.max()))
    assignment.add_arcs_with_cost(words, columns, np.round(values * scale).astype(np.int64))
    if assignment.solve() != assignment.OPTIMAL:
        raise RuntimeError("OR-tools found no assignment")
    matched = [assignment.right_mate(word) for word in range(instance.table.num_words)]
    return np.sort(instance.table.cells)[matched]


@numba.njit(cache=True)
def _take(order, words, cells, held, owners):
    for arc in order:
        word, cell = words[arc], cells[arc]
        if held[word] < 0 and owners[cell] < 0:
            held[word] = cell
            owners[cell] = word


def dominant_greedy(instance: Instance, keep: int = 200) -> np.ndarray:
    """The paper's 1/2-approximate matching, locally dominant greedy, on costs less the mean of
    each word.

    Taking arcs in the order of their costs takes locally dominant arcs; words whose 200 cheapest
    cells are gone get what is left.
    """
    words, cells, values = cheapest_arcs(instance, keep)
    held = np.full(instance.table.num_words, -1)
    owners = np.full(instance.table.num_cells, -1)
    _take(np.argsort(values, kind="stable"), words, cells, held, owners)
    return fill_up(instance, held)


def _regret_greedy(costs: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Assigns the word that would lose most by its second choice first, to its cheapest place with
    room.
    """
    room = room.copy()
    order = np.argsort(costs, axis=1, kind="stable")
    at = np.zeros(len(costs), np.int64)
    places = np.full(len(costs), -1)

    def push(word: int) -> None:
        choices = order[word]
        while room[choices[at[word]]] == 0:
            at[word] += 1
        second = at[word] + 1
        while second < len(choices) and room[choices[second]] == 0:
            second += 1
        best = costs[word, choices[at[word]]]
        regret = costs[word, choices[second]] - best if second < len(choices) else np.inf
        heapq.heappush(queue, (-regret, word))

    queue: list[tuple[float, int]] = []
    for word in range(len(costs)):
        push(word)
    while queue:
        _, word = heapq.heappop(queue)
        place = order[word, at[word]]
        if room[place] == 0:
            push(word)
            continue
        places[word] = place
        room[place] -= 1
    return places


def regret_greedy(instance: Instance) -> np.ndarray:
    """The greedy of the authors' release without its bug: rows, then columns within rows, by a
    regret queue.
    """
    occupied = instance.table.words.reshape(instance.table.shape) >= 0
    num_words = instance.table.num_words
    rows = _regret_greedy(instance.costs[0].block(slice(None)).numpy(), occupied.sum(axis=1))
    columns = np.empty(num_words, np.int64)
    for row in range(len(occupied)):
        words = np.flatnonzero(rows == row)
        costs = instance.costs[1].block(torch.from_numpy(words)).numpy()
        columns[words] = _regret_greedy(costs, occupied[row].astype(np.int64))
    return rows * instance.table.shape[1] + columns


def alternating(instance: Instance, passes: int = 20) -> np.ndarray:
    """Exact columns within rows and exact rows within columns in turn, from the present table,
    until it stalls.
    """
    coordinates = np.array(instance.table.coordinates)
    before = sum(instance.cost(instance.table.cells))
    for _ in range(passes):
        for fixed in (0, 1):
            moving = 1 - fixed
            for group in range(instance.table.shape[fixed]):
                words = np.flatnonzero(coordinates[:, fixed] == group)
                if len(words) == 0:
                    continue
                places = coordinates[words, moving]
                costs = instance.costs[moving].block(torch.from_numpy(words)).numpy()
                chosen = linear_sum_assignment(costs[:, places])[1]
                coordinates[words, moving] = places[chosen]
        cells = coordinates[:, 0] * instance.table.shape[1] + coordinates[:, 1]
        after = sum(instance.cost(cells))
        if before - after <= 1e-6 * abs(before):
            break
        before = after
    return cells


# name: (solver, largest V it is run at)
PEERS = {
    "scipy dense": (scipy_dense, 12_000),
    "scipy dense, rows only": (scipy_dense_rows, 12_000),
    "scipy sparse, 200 cheapest": (scipy_sparse, 12_000),
    "OR-tools, 200 cheapest": (ortools_flow, 110_000),
    "dominant greedy (1/2-approximation)": (dominant_greedy, 450_000),
    "regret greedy (authors', mended)": (regret_greedy, 450_000),
    "alternating": (alternating, 110_000),
}
