"""Reallocation as the paper did it, and row-first: costs as they were measured before any move."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.allocation.assignment import Certified, SolverOptions, assign
from fairseq_lightrnn.allocation.costs import CostSource, LowRankCosts, require_finite
from fairseq_lightrnn.allocation.joint import joint_assignment
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.allocation.threads import thread_pool
from fairseq_lightrnn.core.table import WordTable, prefix_number

__all__ = ["OBJECTIVES", "Reallocation", "reallocate"]

logger = logging.getLogger(__name__)

OBJECTIVES = ("row-first", "joint")

_CHECK_BLOCK = 1 << 12


@dataclass(frozen=True)
class Reallocation:
    """A new table and what is known about it. Costs are totals over the statistics, in nats.

    Costs lack the log-normalisers of the occurrences; differences of costs are losses. They are
    predictions: what a word pays at a later component was measured at its old row.

    Attributes:
      table: the new table.
      moved: number of words whose cell changed.
      cost_before: cost of the old table; of the first component for ``row-first``, of all
        components for ``joint``.
      cost_after: the same of the new table.
      lower_bound: no table costs less than this by the same measure.
      component_costs_before: (k,) cost of each component before.
      component_costs_after: the same after.
      seconds: time of the solve.
    """

    table: WordTable
    moved: int
    cost_before: float
    cost_after: float
    lower_bound: float
    component_costs_before: tuple[float, ...]
    component_costs_after: tuple[float, ...]
    seconds: float

    @property
    def gap(self) -> float:
        """``cost_after - lower_bound``: no better table saves more."""
        return max(0.0, self.cost_after - self.lower_bound)


def reallocate(
    table: WordTable,
    statistics: AllocationStatistics,
    vectors: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    objective: str = "row-first",
    options: SolverOptions = SolverOptions(),  # noqa: B008 (frozen)
    symbols: Sequence[str] | None = None,
) -> Reallocation:
    """Moves the words over the occupied cells of their table so that the predicted loss is least.

    ``joint`` minimises the sum over all components at once, the matching of arXiv 1610.09893,
    section 3.3. ``row-first`` works component by component: stage i splits every group of words
    that share their first i coordinates over the next coordinate, at least cost of that component
    alone. The first component's costs stay true when words move, the later ones were measured with
    the old coordinates as input.

    Args:
      table: the present table of V words; its empty cells stay empty.
      statistics: gathered with this table over all V words.
      vectors: k output embeddings, (R_i, d).
      biases: k output biases, (R_i,).
      objective: ``row-first`` or ``joint``.
      options: of `assign` or `joint_assignment`; ``row-first`` limits the time of the first stage,
        and ``memory`` is besides the statistics.
      symbols: names of the words, for error messages.

    Returns:
      The new table, its costs and their lower bound.

    Raises:
      ValueError: sizes do not fit together, the objective is unknown, or a statistic is NaN or
        infinite (the word is named).
    """
    started = time.monotonic()
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    _check_sizes(table, statistics, vectors, biases)
    _check_finite(statistics, vectors, biases, symbols)
    device = statistics.sums.device
    costs = [
        LowRankCosts(
            statistics.sums[i],
            vectors[i].detach().to(device),
            statistics.counts.to(device),
            biases[i].detach().to(device),
        )
        for i in range(table.num_components)
    ]
    solve, measured = (_joint, len(costs)) if objective == "joint" else (_row_first, 1)
    new, bound = solve(costs, table, options, symbols)
    new = _keep_unseen(new, table, statistics.counts.cpu().numpy())
    before, after = _component_costs(costs, table), _component_costs(costs, new)
    cost_after = sum(after[:measured])
    return Reallocation(
        table=new,
        moved=int((new.cells != table.cells).sum()),
        cost_before=sum(before[:measured]),
        cost_after=cost_after,
        lower_bound=min(bound, cost_after),
        component_costs_before=before,
        component_costs_after=after,
        seconds=time.monotonic() - started,
    )


def _keep_unseen(new: WordTable, old: WordTable, counts: np.ndarray) -> WordTable:
    """Returns a table in which words that never occur, and cost nothing, are where they were.

    As far as no word that occurs has taken their cells; failing that, in the same row.
    """
    cells, waiting = np.array(new.cells), np.flatnonzero(counts == 0)
    left = cells[waiting]
    for length in range(len(new.shape), -1, -1):
        size = math.prod(new.shape[length:])  # cells that share so many coordinates
        wanted, free = _numbered(old.cells[waiting] // size), _numbered(left // size)
        _, words, places = np.intersect1d(wanted, free, return_indices=True)
        cells[waiting[words]] = left[places]
        waiting, left = np.delete(waiting, words), np.delete(left, places)
    return WordTable.from_cells(cells, new.shape)


def _numbered(groups: np.ndarray) -> np.ndarray:
    """Returns distinct numbers, those of the members of a group one after the other."""
    order = np.argsort(groups, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    return groups * len(groups) + rank


def _joint(
    costs: Sequence[CostSource],
    table: WordTable,
    options: SolverOptions,
    symbols: Sequence[str] | None,
) -> tuple[WordTable, float]:
    """Returns the table of least cost over all components, and a bound on that cost."""
    order = np.sort(table.cells)
    cells = np.stack(np.unravel_index(order, table.shape), axis=1)
    present = np.searchsorted(order, table.cells)
    found = joint_assignment(costs, cells, table.shape, options, present=present, symbols=symbols)
    return WordTable.from_cells(order[found.places], table.shape), found.bound


def _row_first(
    costs: Sequence[CostSource],
    table: WordTable,
    options: SolverOptions,
    symbols: Sequence[str] | None,
) -> tuple[WordTable, float]:
    """Returns the table of least cost, component after component, and a bound on the first cost."""
    coordinates = table.coordinates.copy()
    bounds = []
    for stage in range(table.num_components):
        groups = prefix_number(coordinates[:, :stage], table.shape)
        capacities = table.counts(stage)
        order = np.argsort(groups, kind="stable")
        starts = np.searchsorted(groups[order], np.arange(len(capacities) + 1))

        def solve(
            group: int,
            stage: int = stage,
            order: np.ndarray = order,
            starts: np.ndarray = starts,
            capacities: np.ndarray = capacities,
        ) -> Certified:
            words = order[starts[group] : starts[group + 1]]
            source = costs[stage]
            if len(words) < len(order):
                source = source.select(torch.from_numpy(words).to(source.device))
            present = table.coordinates[words, stage]
            names = None if symbols is None else [symbols[word] for word in words]
            found = assign(source, capacities[group], options, present=present, symbols=names)
            coordinates[words, stage] = found.places
            return found

        filled = np.flatnonzero(np.diff(starts))
        solved = _each(solve, filled, options.num_threads, f"component {stage}")
        bounds.append(sum(found.bound for found in solved))
    return WordTable(coordinates, table.shape), bounds[0]


def _each(
    solve: Callable[[int], Certified], groups: np.ndarray, num_threads: int | None, title: str
) -> list[Certified]:
    """Solves every group, several at once where there are several."""
    begun = time.monotonic()
    solved: list[Certified] = []
    with thread_pool(num_threads if len(groups) > 1 else 1) as executor:
        for found in executor.map(solve, (int(group) for group in groups)):
            solved.append(found)
            if len(solved) % max(1, len(groups) // 20) == 0:
                seconds = time.monotonic() - begun
                logger.debug(
                    "%s: %d of %d groups, %.1f s", title, len(solved), len(groups), seconds
                )
    return solved


def _component_costs(losses: Sequence[CostSource], table: WordTable) -> tuple[float, ...]:
    """Returns the total cost of each component of a table."""
    coordinates = torch.from_numpy(np.array(table.coordinates))
    return tuple(
        float(loss.chosen(coordinates[:, i].to(loss.device)).sum()) for i, loss in enumerate(losses)
    )


def _check_sizes(
    table: WordTable,
    statistics: AllocationStatistics,
    vectors: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> None:
    """Raises ValueError where the arguments of `reallocate` do not fit together."""
    k, num_words = table.num_components, table.num_words
    if tuple(statistics.sums.shape[:2]) != (k, num_words):
        raise ValueError(
            f"statistics of {statistics.sums.shape[1]} words and {statistics.sums.shape[0]} "
            f"components do not fit a table of {num_words} words and {k} components"
        )
    dim = statistics.sums.shape[2]
    for component in range(k):
        expected = (table.shape[component], dim)
        got = tuple(vectors[component].shape), tuple(biases[component].shape)
        if got != (expected, expected[:1]):
            raise ValueError(
                f"output vectors and biases of component {component} have shapes {got[0]} and "
                f"{got[1]}, expected {expected} and {expected[:1]}"
            )


def _check_finite(
    statistics: AllocationStatistics,
    vectors: Sequence[Tensor],
    biases: Sequence[Tensor],
    symbols: Sequence[str] | None,
) -> None:
    """Refuses NaN and infinite numbers, naming the word or the component."""
    for component, (vector, bias) in enumerate(zip(vectors, biases, strict=True)):
        if not (torch.isfinite(vector).all() and torch.isfinite(bias).all()):
            raise ValueError(
                f"the output vectors or biases of component {component} are NaN or infinite"
            )
    words = np.arange(len(statistics.counts))
    require_finite(statistics.counts, "the count", words, symbols)
    for component in range(len(vectors)):
        for start in range(0, len(statistics.counts), _CHECK_BLOCK):
            some = words[start : start + _CHECK_BLOCK]
            sums = statistics.sums[component, start : start + _CHECK_BLOCK]
            require_finite(sums, f"the summed state of component {component}", some, symbols)
