"""One step of reallocation by the true loss: propose a table, measure it, accept what pays."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.allocation.assignment import SolverOptions
from fairseq_lightrnn.allocation.cell_costs import CellLosses, occurrence_shares
from fairseq_lightrnn.allocation.gathering import Gathered, gather_cell_losses, measure_losses
from fairseq_lightrnn.allocation.neighbours import Neighbours
from fairseq_lightrnn.allocation.true_loss import (
    CANDIDATES,
    Market,
    Step,
    candidate_prefixes,
)
from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.workers import numbers_of_first_worker, rank

__all__ = ["Descent", "Text", "lower_loss"]

logger = logging.getLogger(__name__)

_HALVINGS = 4
# Of the predicted gain. Where words are read by the table that moves, a step may lower the loss by
# next to nothing and unsettle what was learnt of reading.
_LEAST_SHARE = 0.25
_FRACTIONS = 1024  # in which workers tell each other a gain in nats


@dataclass(frozen=True)
class Text:
    """A text that can be read again and again; each worker has batches of its own.

    Attributes:
        outputs: reads what :func:`gather_statistics` takes.
        contexts: reads what :func:`gather_cell_losses` takes.
        device: through which workers exchange tensors.
        check: reads outputs of another text, by which a new table is measured; None for the same.
    """

    outputs: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]
    contexts: Callable[[], Iterable[tuple[int, Tensor, Context]]]
    device: torch.device | str
    check: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]] | None = None

    def remembered(self, head: ComponentHead, memory: float) -> Text:
        """Returns the same text, which the network reads once if its contexts fit into memory.

        Args:
            head: predicts words, which are read by another table than the one that moves.
            memory: bytes that contexts may take; a text of more is read again each time.
        """
        contexts = _Remembered(head, self.contexts, memory)
        return Text(contexts.outputs, contexts.read, self.device, self.check)


class _Remembered:
    """Contexts that are kept once they have been read, unless they take too much memory."""

    def __init__(
        self,
        head: ComponentHead,
        contexts: Callable[[], Iterable[tuple[int, Tensor, Context]]],
        memory: float,
    ) -> None:
        self.head = head
        self._contexts = contexts
        self._memory = memory
        self._kept: list[tuple[int, Tensor, Context]] | None = None

    def read(self) -> Iterator[tuple[int, Tensor, Context]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept, left = [], self._memory
        for number, words, context in self._contexts():
            context = self.head.to_extend(context)
            left -= context.num_bytes
            if left >= 0:
                kept.append((number, words, context))
            else:  # too much: the text is read again each time
                kept.clear()
                self._memory = left = -math.inf
            yield number, words, context
        if left >= 0:
            self._kept = kept

    def outputs(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _, words, context in self.read():
            hidden = self.head.hidden_of(context, words)
            yield words, hidden, self.head.softmax(hidden, words)


@dataclass
class Descent:
    """What a step did. Losses are totals over the text, in nats.

    Attributes:
        moved: number of words whose cell changed.
        loss_before: with the old table, measured; by another text, as many words of it.
        loss_after: with the new one, measured; never above ``loss_before``.
        predicted_gain: by how much the loss was predicted to fall; 0 where nothing was moved.
        gap: no assignment to the cells that were looked at was predicted to gain more than this
            beyond the one that was found, a nat less for each word that it moves.
        halvings: how often fewer words were moved, as the loss had not fallen.
        seconds: of the parts of the work.
    """

    moved: int
    loss_before: float
    loss_after: float
    predicted_gain: float
    gap: float
    halvings: int
    seconds: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def lower_loss(
    head: ComponentHead,
    gathered: Gathered,
    text: Text,
    memory: int = SolverOptions.memory,
    seed: int = 0,
) -> Descent:
    """Moves words so that the loss over a text falls, or leaves them where they are.

    Words are assigned to cells at least predicted cost. The loss is measured with the new table; if
    it did not fall by a quarter of what was predicted, half of the words are moved, those that were
    to gain most, and so on.

    Args:
        head: predicts words, in evaluation mode. Its table is changed.
        gathered: statistics and losses of the text with the table in force.
        text: is read once or a few times for the costs of cells, and once for each measurement.
        memory: bytes that losses, samples and costs may take.
        seed: of the cells that words may get by chance; each step should have another.

    Returns:
        What was done, alike on all workers but for the gap, which the first one knows.
    """
    clock = _Clock()
    old = head.table.table()
    with clock.timed("costs"):
        market, tokens = _market(head, gathered, text, memory, seed)
    step: Step | None = None

    def measure() -> float:
        with clock.timed("check"):
            outputs = text.outputs() if text.check is None else text.check()
            losses, words = measure_losses(outputs, len(old.shape), text.device)
        return float(losses.sum()) * (1.0 if text.check is None else tokens / words)

    before = after = float(gathered.losses.sum()) if text.check is None else measure()

    def propose() -> Tensor:
        nonlocal step
        assert market is not None
        chosen = None if step is None else step.moved[: len(step.moved) // 2]
        step = market.solve(chosen)
        gain = torch.tensor([round(step.gain * _FRACTIONS)])
        return torch.cat([torch.from_numpy(np.array(step.table.cells)), gain])

    for halving in range(_HALVINGS + 1):  # noqa: B007 (told afterwards)
        with clock.timed("solve"):
            found = numbers_of_first_worker(propose, (old.num_words + 1,), text.device)
        new = WordTable.from_cells(found[:-1].numpy(), old.shape)
        moved, predicted = int((new.cells != old.cells).sum()), float(found[-1]) / _FRACTIONS
        if not moved:
            break
        head.table.seat(new)
        after = measure()
        logger.debug(f"{moved} words moved: loss {before:.6g} -> {after:.6g}")
        if before - after > _LEAST_SHARE * predicted:
            break
        head.table.seat(old)
        moved, after, predicted = 0, before, 0.0
    gap = 0.0 if step is None else step.gap
    return Descent(moved, before, after, predicted, gap, halving, clock.seconds)


def _market(
    head: ComponentHead, gathered: Gathered, text: Text, memory: int, seed: int
) -> tuple[Market | None, int]:
    """Measures what cells cost words: returns that on the first worker, and the text's words."""
    table, statistics = head.table, gathered.statistics
    prefixes = table.number(table.coordinates[:, :-1].long())
    count = min(CANDIDATES, len(prefixes.unique()))

    def of_first(make: Callable[[], Tensor], *shape: int) -> Tensor:
        return numbers_of_first_worker(make, shape, text.device).to(table.coordinates.device)

    counts = of_first(lambda: statistics.counts.round().long().cpu(), table.num_words)
    words = _that_may_move(counts, memory // 2 // Market.bytes_needed(count, table.shape[-1]))
    candidates = of_first(
        lambda: candidate_prefixes(statistics, head.softmax, words, count, seed), len(words), count
    )
    losses = CellLosses(head, words, candidates, occurrence_shares(counts)[words])
    neighbours = None
    if len(head.softmax.features):
        neighbours = Neighbours(head, counts, memory // 8)
    gather_cell_losses(text.contexts(), losses, neighbours, text.device)
    tokens = int(counts.sum())
    if rank() > 0:
        return None, tokens
    return Market(table.table(), counts.cpu().numpy(), losses, neighbours), tokens


def _that_may_move(counts: Tensor, most: int) -> Tensor:
    """Returns the words that occur, the most frequent ones where they are too many."""
    order = counts.argsort(descending=True, stable=True)[: max(2, most)]
    return order[counts[order] > 0].sort().values


class _Clock:
    """Adds up the seconds of parts of a work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started
