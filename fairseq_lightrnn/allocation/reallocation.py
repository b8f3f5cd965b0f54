"""Reallocation: moves the words of a table to the cells that minimise the training loss."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.allocation.balanced_assignment import BalancedAssignment, balanced_assignment
from fairseq_lightrnn.allocation.costs import (
    CostSource,
    LowRankCosts,
    WeightedCosts,
    require_finite,
)
from fairseq_lightrnn.allocation.joint_assignment import joint_assignment
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.word_table import WordTable

__all__ = ["OBJECTIVES", "Reallocation", "assign_by_stages", "reallocate"]

logger = logging.getLogger(__name__)

OBJECTIVES = ("row-first", "joint")
Objective = Literal["row-first", "joint"]

_CHECK_BLOCK = 1 << 12


@dataclass(frozen=True)
class Reallocation:
    """A new table and what is known about it. Costs are totals over the statistics, in nats.

    Costs lack the log-normalisers of the occurrences unless the statistics hold them; differences
    of costs are losses either way. They are predictions: what a word pays at a later component was
    measured at its old place.

    Attributes:
      table: the new table.
      moved: number of words whose cell changed.
      cost_before: cost of the old table; of the first component that was assigned for
        ``row-first``, of all components (weighted) for ``joint``.
      cost_after: the same of the new table.
      lower_bound: no table costs less than this by the same measure. With a ``stay_margin``, less
        than ``cost_after`` by as much as the assignment may be off the best that the margin allows.
      component_costs_before: (k,) cost of each component before, never weighted.
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
        """``cost_after - lower_bound``: an upper bound on what a better table could save."""
        return max(0.0, self.cost_after - self.lower_bound)

    @property
    def relative_gap(self) -> float:
        """The gap as a share of what can be gained over the old table."""
        gain = self.cost_before - self.lower_bound
        return self.gap / gain if gain > 0 else 0.0


def reallocate(
    table: WordTable,
    statistics: AllocationStatistics,
    vectors: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    objective: str = "row-first",
    row_weight: float = 1.0,
    fixed_components: int = 0,
    stay_margin: float = 0.0,
    gap: float | None = None,
    time_limit: float | None = None,
    memory: int = 8 << 30,
    symbols: Sequence[str] | None = None,
    num_threads: int | None = None,
) -> Reallocation:
    """Moves the words over the occupied cells of their table so that the predicted loss is least.

    ``row-first`` works component by component: stage i splits every group of words that share
    their first i coordinates over the next coordinate, at least cost of that component alone. The
    first component's costs stay true when words move, the later ones were measured with the old
    coordinates as input; gathering the statistics again and calling once more with
    ``fixed_components=1`` mends that. ``joint`` minimises the sum over all components at once, the
    matching of arXiv 1610.09893, section 3.3.

    Args:
      table: the present table of V words; its empty cells stay empty.
      statistics: gathered with this table over all V words.
      vectors: k output embeddings, (R_i, d).
      biases: k output biases, (R_i,).
      objective: ``row-first`` or ``joint``.
      row_weight: factor on the costs of the first component in ``joint``; the larger, the nearer
        to ``row-first``.
      fixed_components: keep this many leading coordinates of every word (``row-first`` only).
      stay_margin: nats per occurrence and component that a word must gain to change its coordinate.
      gap: share of the gain over a random table at which to stop; default 0 (the optimum) for
        ``row-first``, 1e-4 for ``joint``.
      time_limit: seconds after which to stop with the best found so far; later stages of
        ``row-first`` still run.
      memory: bytes that costs may take besides the statistics; with less they are formed again or
        only the cheapest places are kept.
      symbols: names of the words, for error messages.
      num_threads: threads; the table does not depend on it.

    Returns:
      The new table, its costs and their lower bound.

    Raises:
      ValueError: sizes do not fit together, an option is out of range, or a statistic is NaN or
        infinite (the word is named).
    """
    started = time.monotonic()
    _check(table, statistics, vectors, biases, objective, row_weight, fixed_components, stay_margin)
    _check_finite(statistics, vectors, biases, symbols)
    threads = num_threads or os.cpu_count() or 1
    device = statistics.sums.device
    losses = [
        LowRankCosts(
            statistics.sums[i],
            vectors[i].detach().to(device),
            statistics.counts.to(device),
            biases[i].detach().to(device),
        )
        for i in range(table.num_components)
    ]
    before = _component_costs(losses, table)
    if objective == "joint":
        weights = [row_weight if i == 0 and len(losses) > 1 else 1.0 for i in range(len(losses))]
        costs = _with_margin(losses, weights, table, statistics, stay_margin)
        order = np.sort(table.cells)
        cells = np.stack(np.unravel_index(order, table.shape), axis=1)
        found = joint_assignment(
            costs,
            cells,
            shape=table.shape,
            gap=1e-4 if gap is None else gap,
            time_limit=time_limit,
            memory=memory,
            present=np.searchsorted(order, table.cells),
            symbols=symbols,
            num_threads=threads,
        )
        new = WordTable.from_cells(order[found.assignment], table.shape)
        bound, measured = found.lower_bound, weights
    else:
        costs = _with_margin(losses, [1.0] * len(losses), table, statistics, stay_margin)
        coordinates, bound = assign_by_stages(
            costs,
            table,
            fixed_components=fixed_components,
            gap=0.0 if gap is None else gap,
            time_limit=time_limit,
            memory=memory,
            num_threads=threads,
        )
        new = WordTable(coordinates, table.shape)
        measured = [1.0 if i == fixed_components else 0.0 for i in range(len(losses))]
    after = _component_costs(losses, new)
    cost_after = float(np.dot(measured, after))
    if stay_margin:
        # The bound is that of costs less the bonus of words that stay.
        solved = [
            float(source.chosen(torch.from_numpy(np.array(new.coordinates[:, i]))).sum())
            for i, source in enumerate(costs)
            if measured[i]
        ]
        bound = cost_after - max(0.0, sum(solved) - bound)
    return Reallocation(
        table=new,
        moved=int((new.cells != table.cells).sum()),
        cost_before=float(np.dot(measured, before)),
        cost_after=cost_after,
        lower_bound=min(bound, cost_after),
        component_costs_before=before,
        component_costs_after=after,
        seconds=time.monotonic() - started,
    )


def assign_by_stages(
    costs: Sequence[CostSource],
    table: WordTable,
    *,
    fixed_components: int = 0,
    gap: float = 0.0,
    time_limit: float | None = None,
    memory: int = 8 << 30,
    num_threads: int = 1,
) -> tuple[np.ndarray, float]:
    """Assigns coordinate after coordinate, each stage within the groups of the stages before it.

    Args:
      costs: k cost sources of (V, R_i).
      table: whose occupied cells are to be filled; words that are indifferent keep their
        coordinate where they can.
      fixed_components: leading coordinates that stay.
      gap: see `balanced_assignment`.
      time_limit: seconds for the first stage.
      memory: bytes that costs may take.
      num_threads: groups of later stages that are solved at once.

    Returns:
      The new coordinates, (V, k), and a lower bound on the cost of the first stage, summed over
      its groups.
    """
    shape = table.shape
    occupied = table.words.reshape(shape) >= 0
    coordinates = table.coordinates.copy()
    bound = 0.0
    for stage in range(fixed_components, len(shape)):
        groups = _prefix(coordinates, shape, stage)
        order = np.argsort(groups, kind="stable")
        starts = np.searchsorted(groups[order], np.arange(int(np.prod(shape[:stage])) + 1))
        capacities = occupied.reshape(len(starts) - 1, shape[stage], -1).sum(axis=2)
        limit = time_limit if stage == fixed_components else None

        def solve(
            group: int,
            stage: int = stage,
            order: np.ndarray = order,
            starts: np.ndarray = starts,
            capacities: np.ndarray = capacities,
            limit: float | None = limit,
        ) -> BalancedAssignment:
            words = order[starts[group] : starts[group + 1]]
            whole = len(words) == len(order)
            source = costs[stage]
            found = balanced_assignment(
                source if whole else source.select(torch.from_numpy(words).to(source.device)),
                capacities[group],
                gap=gap,
                time_limit=limit,
                memory=memory,
                present=table.coordinates[words, stage],
            )
            coordinates[words, stage] = found.assignment
            return found

        solved = _each(solve, np.flatnonzero(np.diff(starts)), num_threads, f"component {stage}")
        if stage == fixed_components:
            bound = float(sum(found.lower_bound for found in solved))
    return coordinates, bound


def _each(
    solve: Callable[[int], BalancedAssignment], groups: np.ndarray, num_threads: int, title: str
) -> list[BalancedAssignment]:
    """Solves every group, several at once where there are several."""
    begun = time.monotonic()
    solved: list[BalancedAssignment] = []
    threads = num_threads if len(groups) > 1 else 1
    with ThreadPoolExecutor(threads) as executor:
        for found in executor.map(solve, (int(group) for group in groups)):
            solved.append(found)
            if len(solved) % max(1, len(groups) // 20) == 0:
                seconds = time.monotonic() - begun
                logger.debug(
                    "%s: %d of %d groups, %.1f s", title, len(solved), len(groups), seconds
                )
    return solved


def _prefix(coordinates: np.ndarray, shape: Sequence[int], stage: int) -> np.ndarray:
    """Returns the number of the group of each word: its first ``stage`` coordinates as one."""
    groups = np.zeros(len(coordinates), np.int64)
    for component in range(stage):
        groups = groups * shape[component] + coordinates[:, component]
    return groups


def _component_costs(losses: Sequence[CostSource], table: WordTable) -> tuple[float, ...]:
    """Returns the total cost of each component of a table."""
    coordinates = torch.from_numpy(np.array(table.coordinates))
    return tuple(
        float(loss.chosen(coordinates[:, i].to(loss.device)).sum()) for i, loss in enumerate(losses)
    )


def _with_margin(
    losses: Sequence[LowRankCosts],
    weights: Sequence[float],
    table: WordTable,
    statistics: AllocationStatistics,
    stay_margin: float,
) -> list[CostSource]:
    """Returns the costs weighted, and with a bonus on the present coordinates."""
    result: list[CostSource] = []
    for component, (loss, weight) in enumerate(zip(losses, weights, strict=True)):
        if weight == 1.0 and stay_margin == 0.0:
            result.append(loss)
            continue
        present = torch.from_numpy(np.array(table.coordinates[:, component])).to(loss.device)
        bonus = stay_margin * statistics.counts.to(torch.float64)
        result.append(WeightedCosts(loss, weight, present, bonus))
    return result


def _check(
    table: WordTable,
    statistics: AllocationStatistics,
    vectors: Sequence[Tensor],
    biases: Sequence[Tensor],
    objective: str,
    row_weight: float,
    fixed_components: int,
    stay_margin: float,
) -> None:
    """Raises ValueError where the arguments of `reallocate` do not fit together."""
    k, num_words = table.num_components, table.num_words
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if not (np.isfinite(row_weight) and row_weight > 0):
        raise ValueError(f"row_weight must be positive, got {row_weight}")
    if not (np.isfinite(stay_margin) and stay_margin >= 0):
        raise ValueError(f"stay_margin must not be negative, got {stay_margin}")
    if not 0 <= fixed_components < k or (fixed_components and objective == "joint"):
        raise ValueError(
            f"fixed_components must be 0 for joint and below {k} for row-first, "
            f"got {fixed_components}"
        )
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
    require_finite(statistics.counts, "the count", 0, symbols)
    for component in range(len(vectors)):
        for start in range(0, len(statistics.counts), _CHECK_BLOCK):
            sums = statistics.sums[component, start : start + _CHECK_BLOCK]
            require_finite(sums, f"the summed state of component {component}", start, symbols)
