"""One step of reallocation by the true loss: propose a table, measure it, accept what pays."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.allocation.assignment import SolverOptions
from fairseq_lightrnn.allocation.cell_costs import CellLosses, FeaturedCells, occurrence_shares
from fairseq_lightrnn.allocation.further_costs import further_costs
from fairseq_lightrnn.allocation.gathering import (
    gather_cell_losses,
    gather_occurrences,
    measure_loss,
)
from fairseq_lightrnn.allocation.neighbours import Neighbours
from fairseq_lightrnn.allocation.occurrences import Occurrences
from fairseq_lightrnn.allocation.reread import Text
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.allocation.true_loss import (
    CANDIDATES,
    Market,
    candidate_prefixes,
    measured_costs,
)
from fairseq_lightrnn.core.features import FurtherTables, find_feature
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.seats import Seats
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.workers import numbers_of_first_worker, rank

__all__ = ["Descent", "lower_loss"]

logger = logging.getLogger(__name__)

_HALVINGS = 4
# Of the predicted gain. Where words are read by the table that moves, a step may lower the loss by
# next to nothing and unsettle what was learnt of reading.
_LEAST_SHARE = 0.25
# Of a word, of which cells of further tables are chosen by: with 64 of them a step lowers the
# validation loss by two thirds of what it does with 256.
_OCCURRENCES = 256
# Nats over the whole text that a move must bring. Further tables have many cells that suit a word
# about as well, and fit a small text too easily.
_WORTH_A_MOVE, _WORTH_A_FURTHER_MOVE = 1.0, 3.0
_FRACTIONS = 1024  # in which workers tell each other a gain in nats


@dataclass
class Descent:
    """What a step did in one table. Losses are in nats a word.

    Attributes:
        moved: number of words whose cell changed.
        loss_before: with the old table, measured.
        loss_after: with the new one, measured; never above ``loss_before``.
        predicted_gain: by how much the loss was predicted to fall; 0 where nothing was moved.
        gap: no assignment to the cells that were looked at was predicted to gain more than this
            beyond the one that was found, less the worth of a move for each word that it moves.
        halvings: how often fewer words were moved, as the loss had not fallen.
    """

    moved: int
    loss_before: float
    loss_after: float
    predicted_gain: float
    gap: float
    halvings: int


@torch.no_grad()
def lower_loss(
    head: ComponentHead,
    statistics: AllocationStatistics,
    text: Text,
    memory: int = SolverOptions.memory,
    seed: int = 0,
    seconds: dict[str, float] | None = None,
) -> list[Descent]:
    """Moves words so that the loss over a text falls, or leaves them where they are.

    Words are assigned to cells at least predicted cost. The loss is measured with the new table; if
    it did not fall by a quarter of what was predicted, half of the words are moved, those that were
    to gain most, and so on. Further tables follow, one after the other, where words are read by
    others than these.

    Args:
        head: predicts words, in evaluation mode. Its tables are changed.
        statistics: of the text, with the table in force.
        text: is read once for the costs of cells, once more for those of further tables, and part
            of it for each measurement.
        memory: bytes that losses, samples and costs may take.
        seed: of the cells that words may get by chance; each step should have another.
        seconds: receives those of the parts of the work.

    Returns:
        What was done in each table, alike on all workers but for the gap, which the first one
        knows.
    """
    counts = numbers_of_first_worker(
        lambda: statistics.counts.round().long().cpu(),
        (head.table.num_words,),
        text.device,
    ).to(head.table.coordinates.device)
    steps = _Steps(head, text, counts, memory, {} if seconds is None else seconds)
    done = [steps.take(head.table, steps.measure(), partial(_market, steps, statistics, seed))]
    further: FurtherTables | None = find_feature(head.softmax.features, FurtherTables)
    if further is None or not len(further.kept_tables):
        return done
    words = steps.movers(CANDIDATES)
    with steps.timed("costs"):
        occurrences = Occurrences(head, counts, _OCCURRENCES, memory // 4, words)
        gather_occurrences(text.contexts(), occurrences, text.device)
    for number, seats in enumerate(further.tables):
        of_table = seed * len(further.tables) + number
        market = partial(_further_market, occurrences, further, number, words, of_table)
        done.append(steps.take(cast(Seats, seats), done[-1].loss_after, market))
    return done


@dataclass(frozen=True)
class _Steps:
    """Steps of words, each in one table, of which those are taken that lower the loss.

    Attributes:
        head: predicts the words.
        text: by which they move.
        counts: (V,) occurrences of the words.
        memory: bytes that costs of cells may take, and what they are made of.
        seconds: of the parts of the work, so far.
    """

    head: ComponentHead
    text: Text
    counts: Tensor
    memory: int
    seconds: dict[str, float]

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the seconds of a block to those of a part."""
        started = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started

    def movers(self, candidates: int, taken: int = 0) -> Tensor:
        """Returns the words that may move to cells of so many prefixes, as memory allows.

        Args:
            candidates: prefixes of each.
            taken: bytes that something else takes at the same time.
        """
        size = Market.bytes_needed(candidates, self.head.table.shape[-1])
        return _that_may_move(self.counts, (self.memory - taken) // 2 // size)

    def measure(self) -> float:
        """Returns the loss with the tables in force, in nats a word."""
        components = self.head.table.num_components
        with self.timed("check"):
            return float(measure_loss(self.text.check(), components, self.text.device).sum())

    def take(
        self, seats: Seats, before: float, open_market: Callable[[], Market | None]
    ) -> Descent:
        """Moves words in one table, fewer and fewer until the loss falls, or none.

        Args:
            seats: the table in force, which is changed.
            before: the loss with it.
            open_market: tells on the first worker what cells cost; on the others None.
        """
        with self.timed("costs"):
            market = open_market()
        old, step, tokens = seats.table(), None, int(self.counts.sum())

        def propose() -> Tensor:
            nonlocal step
            assert market is not None
            chosen = None if step is None else step.moved[: len(step.moved) // 2]
            step = market.solve(chosen)
            gain = torch.tensor([round(step.gain * _FRACTIONS)])
            return torch.cat([torch.from_numpy(np.array(step.table.cells)), gain])

        moved, after, predicted = 0, before, 0.0
        for halving in range(_HALVINGS + 1):  # noqa: B007 (told afterwards)
            with self.timed("solve"):
                size = (old.num_words + 1,)
                found = numbers_of_first_worker(propose, size, self.text.device)
            new = WordTable.from_cells(found[:-1].numpy(), old.shape)
            moved = int((new.cells != old.cells).sum())
            predicted = float(found[-1]) / _FRACTIONS / tokens
            if not moved:
                break
            seats.seat(new)
            after = self.measure()
            logger.debug(f"{moved} words moved: loss {before:.6g} -> {after:.6g}")
            if before - after > _LEAST_SHARE * predicted:
                break
            seats.seat(old)
            moved, after, predicted = 0, before, 0.0
        gap = 0.0 if step is None else step.gap / tokens
        return Descent(moved, before, after, predicted, gap, halving)


def _market(steps: _Steps, statistics: AllocationStatistics, seed: int) -> Market | None:
    """Measures what cells of the first table cost words: returns that on the first worker."""
    head, counts, text = steps.head, steps.counts, steps.text
    count = min(CANDIDATES, int(head.table.taken_prefixes.sum()))
    for_cells = steps.memory // 4
    words = steps.movers(count, FeaturedCells.bytes_kept(head, for_cells))
    candidates = numbers_of_first_worker(
        lambda: candidate_prefixes(statistics, head.softmax, words, count, seed),
        (len(words), count),
        text.device,
    ).to(words.device)
    losses = CellLosses(head, words, candidates, occurrence_shares(counts)[words], for_cells)
    neighbours = None
    if len(head.softmax.features):
        neighbours = Neighbours(head, counts, steps.memory // 8)
    seen = None if neighbours is None else neighbours.occurrences
    gather_cell_losses(text.contexts(), losses, seen, text.device)
    if rank() > 0:
        return None
    table = head.table.table()
    costs = measured_costs(table, counts, losses, neighbours)
    return Market(table, words.cpu().numpy(), candidates.cpu(), costs, _WORTH_A_MOVE)


def _further_market(
    occurrences: Occurrences, further: FurtherTables, number: int, words: Tensor, seed: int
) -> Market | None:
    """Does so for a further table, by a sample of the occurrences, which the first worker has."""
    if rank() > 0:
        return None
    candidates, costs = further_costs(occurrences, further, number, words, seed=seed)
    table = cast(Seats, further.tables[number]).table()
    return Market(table, words.cpu().numpy(), candidates, costs, _WORTH_A_FURTHER_MOVE)


def _that_may_move(counts: Tensor, most: int) -> Tensor:
    """Returns the words that occur, the most frequent ones where they are too many."""
    order = counts.argsort(descending=True, stable=True)[: max(2, most)]
    return order[counts[order] > 0].sort().values
