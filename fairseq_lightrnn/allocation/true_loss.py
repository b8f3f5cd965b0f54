"""Reallocation by the loss that training minimises: candidates, their costs, and the new table.

:mod:`fairseq_lightrnn.allocation.cell_costs` tells what it costs to seat a word in a cell, and why.
Here each word gets a few candidate prefixes (rows, for two components), of what their cells cost
the cheapest are kept, and the words are assigned to these cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.allocation.assignment import Certified, SolverOptions
from fairseq_lightrnn.allocation.cell_costs import RESOLUTION, CellLosses
from fairseq_lightrnn.allocation.costs import LowRankCosts
from fairseq_lightrnn.allocation.listed import assign_listed
from fairseq_lightrnn.allocation.neighbours import Neighbours
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.core.softmax import ComponentSoftmax
from fairseq_lightrnn.core.table import WordTable

__all__ = ["CellList", "Step", "candidate_prefixes"]

CANDIDATES = 8  # prefixes of a word, the present one among them
LISTED = 128  # of the cells of these that an assignment knows
_BLOCK = 1 << 10  # words


@torch.no_grad()
def candidate_prefixes(
    statistics: AllocationStatistics, softmax: ComponentSoftmax, count: int = CANDIDATES
) -> Tensor:
    """Chooses the prefixes that words may get: the present one, and those that cost least.

    Prefixes are ranked by the costs that arXiv 1610.09893 assigns by, which for two components
    are the true ones of rows.

    Args:
        statistics: of the text, with the words where they sit now.
        softmax: predicts words.
        count: K, at most.

    Returns:
        Numbers of prefixes, int32 of shape (V, K), the present one first; -1 for none. Words that
        never occur have no other.
    """
    table = softmax.table
    present = table.number(table.coordinates[:, :-1].long())
    taken = torch.zeros(math.prod(table.shape[:-1]), dtype=torch.bool, device=present.device)
    taken[present] = True
    device = statistics.sums.device
    sources = []
    for component in range(table.num_components - 1):
        vectors, biases = (part.to(device) for part in softmax.component(component))
        counts = statistics.counts.to(device)
        sources.append(LowRankCosts(statistics.sums[component], vectors, counts, biases))
    count = min(count, int(taken.sum()))
    found = torch.full((table.num_words, count), -1, dtype=torch.int32)
    found[:, 0] = present.int()
    if count == 1:
        return found
    for some in torch.arange(table.num_words).split(_BLOCK):
        costs = sources[0].block(some.to(device))
        for source in sources[1:]:
            costs = (costs[:, :, None] + source.block(some.to(device))[:, None]).flatten(1)
        costs = costs.masked_fill(~taken.to(device), math.inf)
        costs.scatter_(1, present[some].to(device)[:, None], math.inf)
        found[some, 1:] = costs.topk(count - 1, dim=1, largest=False).indices.int().cpu()
    found[(statistics.counts == 0).cpu(), 1:] = -1
    return found


@dataclass(frozen=True)
class Step:
    """A proposed table.

    Attributes:
      table: the new table.
      moved: (n,) the words whose cell changed, those that gain most first.
      gain: nats over the whole text by which the loss is predicted to fall.
      gap: no assignment to the listed cells gains more than this beyond ``gain``.
    """

    table: WordTable
    moved: np.ndarray
    gain: float
    gap: float


class CellList:
    """The cheapest cells of every word, and what they cost.

    Args:
        table: in force.
        counts: (V,) occurrences of the words.
        listed: L, how many cells of a word are kept; the present one is always among them.
    """

    def __init__(self, table: WordTable, counts: np.ndarray, listed: int = LISTED) -> None:
        self.table = table
        self.counts = counts
        self.cells = np.full((table.num_words, listed), -1, np.int32)
        self.cells[:, 0] = table.cells
        self.costs = np.zeros((table.num_words, listed), np.float32)  # less that of the present
        self._prices: np.ndarray | None = None

    @staticmethod
    def bytes_needed(num_words: int, listed: int = LISTED) -> int:
        """Returns the bytes that the list takes, and its assignment."""
        return num_words * listed * 24

    def add(self, losses: CellLosses, neighbours: Neighbours | None) -> None:
        """Lists the cheapest cells of a range of words.

        Args:
            losses: over the whole text.
            neighbours: what presence costs others, or None where words have no features.
        """
        low, high = losses.word_range
        for start in range(low, high, _BLOCK):
            words = torch.arange(start, min(start + _BLOCK, high))
            costs = self._costs(losses, words)
            candidates = losses.candidates[words].cpu()
            if neighbours is not None:
                _add_neighbours(costs, words, candidates, neighbours)
            self._list(words, candidates, costs)

    def _costs(self, losses: CellLosses, words: Tensor) -> Tensor:
        """Returns the first two parts of costs (n, K, R_k) in float64, infinite where unknown."""
        index = words - losses.word_range[0]
        kept = losses.kept[index].cpu().double()
        scale = torch.from_numpy(self.counts[words.numpy()]).double() / kept.clamp(min=1)
        costs = losses.losses[index].cpu().double() * (scale / RESOLUTION)[:, None, None]
        return costs.masked_fill_((kept == 0)[:, None, None], math.inf)

    def _list(self, words: Tensor, candidates: Tensor, costs: Tensor) -> None:
        columns = self.table.shape[-1]
        cells = candidates.long()[:, :, None] * columns + torch.arange(columns)
        empty = torch.from_numpy(self.table.words < 0)
        costs = costs.masked_fill(empty[cells.clamp(min=0)], math.inf)
        costs = costs.masked_fill((candidates < 0)[:, :, None], math.inf).flatten(1)
        cells = cells.flatten(1)
        present = torch.from_numpy(self.table.coordinates[words.numpy(), -1])[:, None]
        costs = costs - costs.gather(1, present)  # of the first candidate
        costs = costs.masked_fill(~torch.isfinite(costs), math.inf)
        ranked = costs.scatter(1, present, -math.inf)
        keep = min(self.cells.shape[1], costs.shape[1])
        best = ranked.topk(keep, dim=1, largest=False).indices
        found, paid = cells.gather(1, best).int(), costs.gather(1, best)
        unknown = ~torch.isfinite(paid)
        unknown[:, 0] = False
        rows = words.numpy()
        self.cells[rows, :keep] = found.masked_fill(unknown, -1).numpy()
        self.costs[rows, :keep] = paid.masked_fill(~torch.isfinite(paid), 0.0).float().numpy()

    def solve(self, words: np.ndarray | None = None) -> Step:
        """Assigns words to their listed cells.

        Args:
            words: the only ones that may move, and only to each other's cells; all by default.
        """
        present, cells = np.array(self.table.cells), self.cells
        if words is not None:
            cells = np.where(np.isin(cells, present[words]), cells, -1)
            others = np.setdiff1d(np.arange(len(present)), words)
            cells[others] = -1
            cells[:, 0] = present
        found: Certified = assign_listed(
            cells, self.costs, present, SolverOptions(), prices=self._prices
        )
        self._prices = found.prices
        moved = np.flatnonzero(found.places != present)
        here = self.cells[moved] == found.places[moved, None]
        gains = -np.where(here, self.costs[moved], 0.0).sum(axis=1)
        return Step(
            WordTable.from_cells(found.places, self.table.shape),
            moved[np.argsort(-gains, kind="stable")],
            float(gains.sum()),
            found.gap,
        )


def _add_neighbours(
    costs: Tensor, words: Tensor, candidates: Tensor, neighbours: Neighbours
) -> None:
    """Adds the third part to costs (n, K, R_k)."""
    order = candidates.flatten().argsort(stable=True)
    numbers, sizes = torch.unique_consecutive(candidates.flatten()[order], return_counts=True)
    flat = costs.flatten(0, 1)
    for number, index in zip(numbers.tolist(), order.split(sizes.tolist()), strict=True):
        if number >= 0:
            some = words[index // candidates.size(1)]
            flat[index] += neighbours.costs(number, some)
