"""Joint assignment of words to cells: least sum of all component costs, with a certificate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from fairseq_lightrnn.allocation import kernels
from fairseq_lightrnn.allocation.assignment import Certified, Choices, SolverOptions, auction
from fairseq_lightrnn.allocation.costs import CostSource, require_finite
from fairseq_lightrnn.allocation.threads import available_processors

__all__ = ["joint_assignment"]

logger = logging.getLogger(__name__)

_KEEP = 16  # cheapest cells cached for each word; more cost more than they save
_DENSE_LIMIT = 1 << 18  # entries of the words x cells matrix up to which scipy is quickest
_FLOAT64_LIMIT = 1 << 25  # entries of both factors up to which they are float64
_BLOCK_WORDS = 1024
_GAP = 1e-4  # where none is asked for
_LOOKS_PER_CELL = 4  # after which lowering prices to an exact certificate is given up
_FEW_CELLS = 4096  # so many are looked at one by one, more in a sweep over all
_UNIT = 2.0**-52


@dataclass
class _Problem:
    """Costs as two factors, (n, R) and (n, C), each row of them less its least entry."""

    sources: Sequence[CostSource]
    lows: list[np.ndarray]  # (n,) what was taken off, for each component
    dtype: type  # of the factors
    mean_cost: float
    rounding: float  # how much the sum of any n entries may be off
    flat: np.ndarray  # (n,) row-major number of each cell in (R, C)
    shape: tuple[int, int]
    threads: int
    stored: tuple[np.ndarray, np.ndarray] | None = None
    executor: ThreadPoolExecutor | None = None

    @property
    def low(self) -> float:
        return float(sum(low.sum() for low in self.lows))

    @property
    def slack(self) -> float:
        """Rounding error of a sum of costs and prices, as a share of it."""
        return 2.0**-21 if self.dtype is np.float32 else 2.0**-49

    def factors(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the factors of some words."""
        if self.stored is not None:
            return self.stored[0][words], self.stored[1][words]
        return self.form(words)

    def form(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Computes the factors of some words."""
        blocks = []
        for source in self.sources:
            block = source.block(torch.from_numpy(words).to(source.device))
            blocks.append(block.cpu().numpy())
        return self.centre(words, blocks)

    def centre(self, words: np.ndarray, blocks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Takes the least costs off and folds the components into two factors."""
        parts = []
        for block, low in zip(blocks, self.lows, strict=True):
            # The same product in another block may round otherwise, and nothing may be negative.
            parts.append(np.maximum(block - low[words, None], 0.0).astype(self.dtype))
        if len(parts) == 1:
            return np.zeros((len(words), 1), self.dtype), parts[0]
        return _fold(parts[: len(parts) // 2]), _fold(parts[len(parts) // 2 :])

    def over_blocks(self, work: Callable[[np.ndarray], None], words: np.ndarray) -> None:
        """Calls ``work`` on blocks of ``words`` in threads, as the kernels release the lock."""
        size = max(8, min(_BLOCK_WORDS, -(-len(words) // self.threads)))
        blocks = [words[start : start + size] for start in range(0, len(words), size)]
        if self.executor is None or len(words) < 64:
            for block in blocks:
                work(block)
        else:
            list(self.executor.map(work, blocks))

    def cost(self, index: np.ndarray, cells: np.ndarray) -> float:
        """Returns the total cost of giving word w the cell ``cells[index[w]]``, in float64."""
        total = 0.0
        for component, source in enumerate(self.sources):
            places = torch.from_numpy(cells[index, component])
            total += float(source.chosen(places.to(source.device)).sum())
        return total


def joint_assignment(
    costs: Sequence[CostSource],
    cells: np.ndarray,
    shape: Sequence[int],
    options: SolverOptions = SolverOptions(),  # noqa: B008 (frozen)
    *,
    present: np.ndarray | None = None,
    symbols: Sequence[str] | None = None,
) -> Certified:
    """Assigns words to cells, one to one, at the least sum of their component costs.

    An auction with one price a cell (Bertsekas, "The auction algorithm", 1988) finds an assignment
    within a small share of the optimum; its prices are the certificate. More than two components
    are folded into two factors, so that the problem solved is the same.

    Args:
      costs: k cost sources of (n, R_i).
      cells: (n, k) coordinates of the cells to be filled, all different.
      shape: the k sizes R_i.
      options: without a ``gap``, 1e-4 of what can be saved over a random assignment will do. Costs
        that ``memory`` does not hold are formed whenever they are needed.
      present: (n,) index into ``cells`` of the cell of each word now, returned where nothing
        better is found.
      symbols: names of the words, for error messages.

    Returns:
      The assignment, by index into ``cells``, and its certificate.

    Raises:
      ValueError: a cost is NaN or infinite; the word is named.
    """
    started = time.monotonic()
    gap = _GAP if options.gap is None else options.gap
    cells = np.asarray(cells)
    present = None if present is None else np.asarray(present)
    threads = options.num_threads or available_processors()
    problem = _prepare(costs, cells, tuple(shape), gap, options.memory, threads, symbols)
    n = len(cells)
    if n * n <= _DENSE_LIMIT:
        chosen = _dense(problem)
        cost = problem.cost(chosen, cells)
        bound, rounding = cost, problem.rounding
    else:
        with ThreadPoolExecutor(threads) as problem.executor:
            chosen, cost, bound, rounding = _solve(problem, cells, gap, present)
    if present is not None:
        cost_now = problem.cost(present, cells)
        if cost_now <= cost:
            chosen, cost = present, cost_now
    return Certified(
        places=chosen,
        cost=cost,
        bound=min(cost, bound - rounding),
        mean_cost=problem.mean_cost,
        optimal=cost - bound <= 2 * rounding,
        prices=None,
        seconds=time.monotonic() - started,
    )


def _prepare(
    costs: Sequence[CostSource],
    cells: np.ndarray,
    shape: tuple[int, ...],
    gap: float,
    memory: int,
    threads: int,
    symbols: Sequence[str] | None,
) -> _Problem:
    """Forms all costs once to check them and to find the least ones; stores what fits."""
    n, split = len(cells), len(shape) // 2
    sides = (int(np.prod(shape[:split])), int(np.prod(shape[split:])))
    exact = n * sum(sides) <= _FLOAT64_LIMIT or gap < 1e-6
    dtype: type = np.float64 if exact else np.float32
    lows, mean_cost, rounding = [np.empty(n) for _ in shape], 0.0, 0.0
    flat = np.ravel_multi_index(tuple(cells.T), shape).astype(np.int64)
    problem = _Problem(costs, lows, dtype, 0.0, 0.0, flat, sides, threads)
    stored: tuple[np.ndarray, np.ndarray] | None = None
    if n * sum(sides) * np.dtype(dtype).itemsize <= memory:
        stored = np.empty((n, sides[0]), dtype), np.empty((n, sides[1]), dtype)
    shares = [np.bincount(cells[:, i], minlength=size) / max(1, n) for i, size in enumerate(shape)]
    for start in range(0, n, _BLOCK_WORDS):
        words = np.arange(start, min(start + _BLOCK_WORDS, n))
        blocks = []
        for component, source in enumerate(costs):
            block = source.block(torch.from_numpy(words).to(source.device))
            require_finite(block, f"the cost of component {component}", words, symbols)
            numbers = block.cpu().numpy()
            blocks.append(numbers)
            low, high = numbers.min(axis=1), numbers.max(axis=1)
            lows[component][words] = low
            mean_cost += float((numbers @ shares[component]).sum())
            rounding += _UNIT * (8 + source.terms) * float(np.maximum(abs(low), abs(high)).sum())
            if dtype is np.float32:
                rounding += 2.0**-24 * float((high - low).sum())
        if stored is not None:
            stored[0][words], stored[1][words] = problem.centre(words, blocks)
    problem.mean_cost, problem.rounding, problem.stored = mean_cost, rounding, stored
    return problem


def _fold(factors: list[np.ndarray]) -> np.ndarray:
    """Returns the costs of all combinations of several coordinates, (n, product of sizes)."""
    folded = factors[0]
    for factor in factors[1:]:
        folded = (folded[:, :, None] + factor[:, None, :]).reshape(len(folded), -1)
    return folded


def _dense(problem: _Problem) -> np.ndarray:
    """Solves a small problem with scipy on the words x cells matrix."""
    from scipy.optimize import linear_sum_assignment

    first, second = problem.factors(np.arange(len(problem.flat)))
    columns = problem.shape[1]
    matrix = first[:, problem.flat // columns] + second[:, problem.flat % columns]
    return linear_sum_assignment(matrix)[1]


def _solve(
    problem: _Problem,
    cells: np.ndarray,
    gap: float,
    present: np.ndarray | None,
) -> tuple[np.ndarray, float, float, float]:
    """Auctions with ever smaller raises until the certificate does.

    Returns:
      The assignment, its cost, a lower bound and the rounding error of the bound.
    """
    n = len(problem.flat)
    index = np.empty(int(np.prod(problem.shape)), np.int64)
    index[problem.flat] = np.arange(n)
    scale = max(problem.mean_cost - problem.low, 0.0)
    active = _active(problem)
    prices = np.full(problem.shape, np.inf)
    prices.reshape(-1)[problem.flat] = 0.0
    epsilon = max(0.5 * gap, 1e-6) * scale / n
    best, best_cost, bound, rounding = np.arange(n), np.inf, -np.inf, 0.0
    while True:
        if len(active) < n:  # cells that no active word takes must be free
            prices.reshape(-1)[problem.flat] = 0.0
        found = index[_auction(problem, active, prices, epsilon, present)]
        cost = problem.cost(found, cells)
        if cost < best_cost:
            best, best_cost = found, cost
        certificates = [_bound(problem, prices)]
        if gap == 0 and cost - certificates[0][0] > 2 * certificates[0][1]:
            certificates.append(_bound(problem, _tightened(problem, prices, found)))
        for some_bound, some_rounding in certificates:
            if some_bound - some_rounding > bound - rounding:
                bound, rounding = some_bound, some_rounding
        logger.debug("raise %.3g: cost %.10g, bound %.10g", epsilon, best_cost, bound)
        enough = max(gap * (problem.mean_cost - bound), 2 * rounding)
        if best_cost - bound <= enough or epsilon <= problem.rounding / n:
            return best, best_cost, bound, rounding
        epsilon /= 8


def _active(problem: _Problem) -> np.ndarray:
    """Returns the words that do not pay the same everywhere.

    The others would only outbid each other for ever; they get the cells that are left.
    """
    idle = np.ones(len(problem.flat), bool)
    for source in problem.sources:
        idle &= source.indifferent().cpu().numpy()
    return np.flatnonzero(~idle)


def _auction(
    problem: _Problem,
    active: np.ndarray,
    prices: np.ndarray,
    epsilon: float,
    present: np.ndarray | None,
) -> np.ndarray:
    """Runs one auction of the active words from the given prices.

    Returns:
      The flat cell of each word; words that are not active have what is left.
    """
    n = len(problem.flat)
    keep = min(_KEEP, n)
    cells = np.full((n, keep), -1, np.int32)
    bases = np.full((n, keep), np.inf)
    thresholds = np.full(n, -np.inf)
    flat_prices = prices.reshape(-1)

    def look(words: np.ndarray) -> float:
        _look(problem, prices, words, cells, bases, thresholds)
        return 0.0

    choices = Choices(cells, bases, thresholds, look)
    capacities = np.isfinite(flat_prices).astype(np.int64)
    held, _ = auction(choices, active, capacities, flat_prices, epsilon)
    idle = np.flatnonzero(held < 0)
    # Words that are indifferent: any free cell will do, best the one they have.
    free = np.isin(problem.flat, held, invert=True)
    if present is not None:
        staying = idle[free[present[idle]]]
        held[staying] = problem.flat[present[staying]]
        free[present[staying]] = False
        idle = np.flatnonzero(held < 0)
    held[idle] = problem.flat[free]
    return held


def _look(
    problem: _Problem,
    prices: np.ndarray,
    words: np.ndarray,
    cells: np.ndarray,
    bases: np.ndarray,
    thresholds: np.ndarray,
) -> None:
    """Finds the cheapest cells of some words afresh."""
    rounded: np.ndarray = prices.astype(problem.dtype)

    def work(block: np.ndarray) -> None:
        first, second = problem.factors(block)
        kernels.scan(first, second, rounded, problem.slack, block, cells, bases, thresholds)

    problem.over_blocks(work, words)


def _tightened(problem: _Problem, prices: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Returns prices at which each word's cell is its cheapest, where lowering some suffices.

    An auction leaves the prices of even the best assignment off by its raise. Lowering that of
    each cell to where its word is content, round by round (Bellman and Ford), ends at prices whose
    dual value is the cost, unless the assignment can be improved.
    """
    n, shape = len(assignment), prices.shape
    flat_prices, held = prices.reshape(-1).copy(), problem.flat[assignment]
    own = np.empty(n)  # what a word pays for its cell
    content = np.empty(n)  # the price of a word's cell at which it is the word's cheapest

    def look_at_all(block: np.ndarray) -> None:
        first, second = problem.factors(block)
        cheapest, order = np.empty(len(block)), np.arange(len(block))
        rows, columns = np.unravel_index(held[block], shape)
        kernels.sweep(first, second, rounded, cheapest)
        own[block] = first[order, rows] + second[order, columns]
        content[block] = cheapest - own[block]

    def look_at_changed(block: np.ndarray) -> None:
        first, second = problem.factors(block)
        rows, columns = np.unravel_index(changed, shape)
        cheapest = (first[:, rows] + second[:, columns] + flat_prices[changed]).min(axis=1)
        content[block] = np.minimum(content[block], cheapest - own[block])

    looked, changed = 0, held
    while looked < _LOOKS_PER_CELL * n:
        some = len(changed) <= _FEW_CELLS
        rounded: np.ndarray = flat_prices.reshape(shape).astype(problem.dtype)
        problem.over_blocks(look_at_changed if some and looked else look_at_all, np.arange(n))
        looked += len(changed) if some else n
        unhappy = np.flatnonzero(content < flat_prices[held])
        if len(unhappy) == 0:
            break
        changed = held[unhappy]
        flat_prices[changed] = content[unhappy]
    return flat_prices.reshape(shape)


def _bound(problem: _Problem, prices: np.ndarray) -> tuple[float, float]:
    """Returns the dual value of the prices, which bounds every assignment from below, and its
    rounding.
    """
    n = len(problem.flat)
    values = np.empty(n)
    rounded: np.ndarray = prices.astype(problem.dtype)

    def work(block: np.ndarray) -> None:
        first, second = problem.factors(block)
        part = np.empty(len(block))
        kernels.sweep(first, second, rounded, part)
        values[block] = part

    problem.over_blocks(work, np.arange(n))
    paid = prices.reshape(-1)[problem.flat].sum()
    dual = problem.low + values.sum() - paid
    return float(dual), problem.rounding + problem.slack * float(values.sum())
