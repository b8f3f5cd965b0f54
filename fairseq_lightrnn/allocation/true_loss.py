"""Reallocation by the loss that training minimises: candidates, their costs, and the new table.

:mod:`fairseq_lightrnn.allocation.cell_costs` tells what it costs to seat a word in a cell, and why.
Here each word gets a few candidate prefixes (rows, for two components), and the words are assigned
to the cells of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.allocation.cell_costs import RESOLUTION, CellLosses, prefix_sums
from fairseq_lightrnn.allocation.costs import LowRankCosts
from fairseq_lightrnn.allocation.listed import assign_listed
from fairseq_lightrnn.allocation.neighbours import Neighbours
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.core.softmax import ComponentSoftmax
from fairseq_lightrnn.core.table import WordTable

__all__ = [
    "CANDIDATES",
    "Market",
    "Step",
    "candidate_prefixes",
    "choose_prefixes",
    "measured_costs",
]

CANDIDATES = 12  # prefixes of a word, the present one among them
_BLOCK = 1 << 10  # words


@torch.no_grad()
def candidate_prefixes(
    statistics: AllocationStatistics,
    softmax: ComponentSoftmax,
    words: Tensor,
    count: int = CANDIDATES,
    seed: int = 0,
) -> Tensor:
    """Chooses the prefixes that words may get.

    The present one, of the others half those that cost least by the costs that arXiv 1610.09893
    assigns by, which for two components are the true ones of rows, and half by chance: it is in
    its last component that a word may gain most, and repeated steps come to all.

    Args:
        statistics: of the text, with the words where they sit now.
        softmax: predicts words.
        words: (n,) that may move.
        count: K, at most.
        seed: of chance.

    Returns:
        Numbers of prefixes, int32 of shape (n, K), the present one first.
    """
    table = softmax.table
    taken = table.taken_prefixes
    device = statistics.sums.device
    sources = []
    for component in range(table.num_components - 1):
        vectors, biases = (part.to(device) for part in softmax.component(component))
        counts = statistics.counts.to(device)
        sources.append(LowRankCosts(statistics.sums[component], vectors, counts, biases))
    count = min(count, int(taken.sum()))
    present = table.prefixes[words].cpu()
    found = torch.empty(len(words), count, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    for some in torch.arange(len(words)).split(_BLOCK):
        chosen = words[some].to(device)
        costs = prefix_sums([source.block(chosen) for source in sources])
        costs = costs.masked_fill(~taken.to(device), math.inf).cpu()
        found[some] = choose_prefixes(costs, present[some], count, generator).int()
    return found


def choose_prefixes(
    costs: Tensor, present: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Chooses prefixes for words: their present ones, the cheapest, and as many by chance.

    Args:
        costs: of each prefix, (n, P), infinite where it cannot be had; changed.
        present: (n,).
        count: K, how many can be had at least.
        generator: of chance, on the CPU.

    Returns:
        Their numbers, (n, K), the present ones first.
    """
    now = present[:, None]
    costs.scatter_(1, now, math.inf)
    order = torch.rand(costs.shape, generator=generator).to(costs.device)
    order.masked_fill_(costs.isinf(), 1.0)
    order.scatter_(1, costs.topk((count - 1) // 2, dim=1, largest=False).indices, -1.0)
    order.scatter_(1, now, 2.0)
    return torch.cat([now, order.topk(count - 1, dim=1, largest=False).indices], dim=1)


@dataclass(frozen=True)
class Step:
    """A proposed table.

    Attributes:
      table: the new table.
      moved: (n,) the words whose cell changed, those that gain most first.
      gain: nats over the whole text by which the loss is predicted to fall.
      gap: no assignment to the listed cells gains more than this beyond ``gain``, less the worth
        of a move for each word that it moves.
    """

    table: WordTable
    moved: np.ndarray
    gain: float
    gap: float


class Market:
    """Words that may move, the cells that each may get, and what it costs the loss.

    Args:
        table: in force.
        words: (n,) that may move.
        candidates: numbers of the prefixes that each may get, integers of shape (n, K), -1 for
            none; the first is its present one.
        costs: nats over the whole text that a word pays in each of their cells beyond what it pays
            where it is now, float32 of shape (n, K, R_k); not finite where that is not known.
        worth: nats over the whole text that a move must bring. What brings less is chance, and
            brings nothing on other text.
    """

    def __init__(
        self,
        table: WordTable,
        words: np.ndarray,
        candidates: Tensor,
        costs: Tensor,
        worth: float,
    ) -> None:
        n, count, columns = costs.shape
        self.table = table
        self.worth = worth
        self.words = words
        self.cells = np.empty((n, count * columns), np.int32)
        self.costs = costs.flatten(1).numpy()
        self._prices: np.ndarray | None = None
        taken = np.zeros(table.num_cells, bool)
        taken[table.cells[words]] = True
        mine = torch.from_numpy(taken)
        for some in torch.arange(n).split(_BLOCK):
            prefixes = candidates[some][:, :, None]
            cells = prefixes * columns + torch.arange(columns)
            known = mine[cells.clamp(min=0)] & (prefixes >= 0) & torch.isfinite(costs[some])
            self.cells[some] = cells.int().masked_fill(~known, -1).flatten(1).numpy()

    @staticmethod
    def bytes_needed(candidates: int, columns: int) -> int:
        """Returns the bytes that are needed for a word, its measured losses included."""
        return candidates * columns * (3 * 4 + 1) + 256

    def solve(self, words: np.ndarray | None = None) -> Step:
        """Assigns words to cells.

        Args:
            words: the only ones that may move, and only to each other's cells; all by default.
        """
        chosen = slice(None) if words is None else np.isin(self.words, words)
        movers, cells, costs = self.words[chosen], self.cells[chosen], self.costs[chosen]
        present = self.table.cells[movers]
        now = np.arange(len(movers)), self.table.coordinates[movers, -1]
        costs[now] = -self.worth
        found = assign_listed(cells, costs, present, prices=self._prices)
        costs[now] = 0.0
        self._prices = found.prices
        new = np.array(self.table.cells)
        new[movers] = found.places
        moved = np.flatnonzero(found.places != present)
        here = cells[moved] == found.places[moved, None]
        gains = -np.where(here, costs[moved], 0.0).sum(axis=1)
        return Step(
            WordTable.from_cells(new, self.table.shape),
            movers[moved[np.argsort(-gains, kind="stable")]],
            float(gains.sum()),
            found.gap,
        )


def measured_costs(
    table: WordTable, counts: Tensor, losses: CellLosses, neighbours: Neighbours | None
) -> Tensor:
    """Returns what cells cost words beyond their present ones, as :class:`Market` takes it.

    Args:
        table: in force.
        counts: (V,) occurrences of the words.
        losses: of the words that may move, over the whole text.
        neighbours: what presence costs others, or None where words have no features.
    """
    costs = _presence(losses, neighbours)
    words, counts = losses.words.cpu(), counts.cpu()
    now = torch.from_numpy(table.coordinates[words.numpy(), -1].astype(np.int64))
    for some in torch.arange(len(words)).split(_BLOCK):
        paid = _own_costs(losses, some, counts[words[some]]) + costs[some]
        costs[some] = (paid - paid[torch.arange(len(some)), 0, now[some]][:, None, None]).float()
    return costs


def _own_costs(losses: CellLosses, some: Tensor, counts: Tensor) -> Tensor:
    """Returns the first two parts of costs, (n, K, R_k) in float64 nats."""
    kept = losses.kept[some].cpu().double()
    scale = counts.double() / kept.clamp(min=1) / RESOLUTION
    return losses.losses[some].cpu().double() * scale[:, None, None]


def _presence(losses: CellLosses, neighbours: Neighbours | None) -> Tensor:
    """Returns the third part of costs, (n, K, R_k) in float32 nats."""
    costs = torch.zeros(losses.losses.shape)
    if neighbours is None:
        return costs
    words, candidates = losses.words.cpu(), losses.candidates.cpu()
    order = candidates.flatten().argsort(stable=True)
    numbers, sizes = torch.unique_consecutive(candidates.flatten()[order], return_counts=True)
    flat = costs.flatten(0, 1)
    for number, index in zip(numbers.tolist(), order.split(sizes.tolist()), strict=True):
        if number >= 0:
            flat[index] = neighbours.costs(number, words[index // candidates.size(1)]).float()
    return costs
