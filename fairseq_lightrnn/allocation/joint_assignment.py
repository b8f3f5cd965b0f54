"""Joint assignment: words to cells of a table, at least total of all component costs, with a certificate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numba
import numpy as np
from scipy.optimize import linear_sum_assignment

from fairseq_lightrnn.allocation import _cell_auction as kernels
from fairseq_lightrnn.allocation.costs import CostSource, require_finite

__all__ = ["JointAssignment", "joint_assignment"]

logger = logging.getLogger(__name__)

_KEEP = 32  # cheapest cells cached for each word
_DENSE_LIMIT = 1 << 22  # entries of the words x cells matrix up to which scipy is quickest
_BIDS_PER_WORD = 60
_UNIT = 2.0**-52


@dataclass(frozen=True)
class JointAssignment:
    """An assignment of words to cells and how far from the best it can be.

    Attributes:
      assignment: (n,) index into ``cells`` of the cell of each word.
      cost: total cost, summed in float64.
      lower_bound: no assignment costs less than this.
      mean_cost: expected cost of an assignment drawn at random, the yardstick of `relative_gap`.
      optimal: whether cost and bound agree to rounding error.
      seconds: time it took.
    """

    assignment: np.ndarray
    cost: float
    lower_bound: float
    mean_cost: float
    optimal: bool
    seconds: float

    @property
    def gap(self) -> float:
        """Cost minus lower bound: an upper bound on what a better assignment could save."""
        return max(0.0, self.cost - self.lower_bound)

    @property
    def relative_gap(self) -> float:
        """The gap as a share of what the best assignment saves over a random one."""
        gain = self.mean_cost - self.lower_bound
        return self.gap / gain if gain > 0 else 0.0


@dataclass
class _Problem:
    """The costs as two factors, (n, R) and (n, C), each row less its least entry."""

    first: np.ndarray
    second: np.ndarray
    lows: float  # what was taken off, over all words
    mean_cost: float
    rounding: float
    flat: np.ndarray  # (n,) row-major number of each cell in (R, C)
    threads: int
    executor: ThreadPoolExecutor | None = field(default=None, repr=False)

    def over_words(self, work: Callable[[np.ndarray], None], words: np.ndarray) -> None:
        """Calls ``work`` on parts of ``words``, in threads; the kernels leave the interpreter lock."""
        parts = np.array_split(words, min(len(words), 4 * self.threads))
        if self.executor is None or len(words) < 64:
            work(words)
        else:
            list(self.executor.map(work, parts))

    def cost(self, cells: np.ndarray) -> float:
        """Returns the total cost of giving word w the cell with flat number ``cells[w]``."""
        words = np.arange(len(cells))
        columns = self.second.shape[1]
        paid = self.first[words, cells // columns].sum() + self.second[words, cells % columns].sum()
        return float(self.lows + paid)


def joint_assignment(
    costs: Sequence[CostSource],
    cells: np.ndarray,
    *,
    shape: Sequence[int],
    gap: float = 1e-4,
    time_limit: float | None = None,
    symbols: Sequence[str] | None = None,
    num_threads: int | None = None,
) -> JointAssignment:
    """Assigns words to cells, one to one, at the least sum of their component costs.

    An auction with one price a cell (Bertsekas, "The auction algorithm", 1988) finds an assignment within a small share
    of the optimum; its prices are the certificate. More than two components are folded into two factors, so that the
    problem solved is the same.

    Args:
      costs: k cost sources of (n, R_i).
      cells: (n, k) coordinates of the cells to be filled, all different.
      shape: the k sizes R_i.
      gap: stop once the gap is this share of what can be saved over a random assignment; 0 asks for the optimum.
      time_limit: seconds after which to stop with what there is.
      symbols: names of the words, for error messages.
      num_threads: threads for looking at all cells; the result does not depend on it.

    Returns:
      The assignment and its certificate.

    Raises:
      ValueError: a cost is NaN or infinite; the word is named.
    """
    started = time.monotonic()
    deadline = None if time_limit is None else started + time_limit
    threads = num_threads or numba.get_num_threads()
    problem = _prepare(costs, np.asarray(cells), tuple(shape), threads, symbols)
    n = len(problem.flat)
    if n * n <= _DENSE_LIMIT:
        flat, bound = _dense(problem)
    else:
        with ThreadPoolExecutor(threads) as executor:
            problem.executor = executor
            flat, bound = _solve(problem, gap, deadline)
    cost = problem.cost(flat)
    index = np.empty(int(np.prod(shape)), np.int64)
    index[problem.flat] = np.arange(n)
    return JointAssignment(
        assignment=index[flat],
        cost=cost,
        lower_bound=min(cost, bound - problem.rounding),
        mean_cost=problem.mean_cost,
        optimal=cost - bound <= 2 * problem.rounding,
        seconds=time.monotonic() - started,
    )


def _prepare(
    costs: Sequence[CostSource],
    cells: np.ndarray,
    shape: tuple[int, ...],
    threads: int,
    symbols: Sequence[str] | None,
) -> _Problem:
    """Forms the two factors and checks them."""
    n = len(cells)
    factors = []
    lows = mean_cost = rounding = 0.0
    for component, source in enumerate(costs):
        matrix = np.empty((n, shape[component]))
        share = np.bincount(cells[:, component], minlength=shape[component]) / max(1, n)
        step = max(1, (1 << 23) // shape[component])
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            block = source.block(rows)
            require_finite(block, f"the cost of component {component}", start, symbols)
            numbers = block.cpu().numpy()
            low = numbers.min(axis=1)
            lows += low.sum()
            mean_cost += float((numbers @ share).sum())
            rounding += _UNIT * (8 + source.terms) * float(np.abs(numbers).max(axis=1, initial=0.0).sum())
            matrix[rows] = numbers - low[:, None]
        factors.append(matrix)
    split = max(1, len(factors) // 2)
    if len(factors) == 1:
        first, second = np.zeros((n, 1)), factors[0]
    else:
        first, second = _fold(factors[:split]), _fold(factors[split:])
    flat = np.ravel_multi_index(tuple(cells.T), shape).astype(np.int64)
    return _Problem(first, second, lows, mean_cost, rounding, flat, threads)


def _fold(factors: list[np.ndarray]) -> np.ndarray:
    """Returns the costs of all combinations of the coordinates of several components, (n, product of sizes)."""
    folded = factors[0]
    for factor in factors[1:]:
        folded = (folded[:, :, None] + factor[:, None, :]).reshape(len(folded), -1)
    return folded


def _dense(problem: _Problem) -> tuple[np.ndarray, float]:
    """Solves a small problem with scipy on the words x cells matrix."""
    columns = problem.second.shape[1]
    matrix = problem.first[:, problem.flat // columns] + problem.second[:, problem.flat % columns]
    _, chosen = linear_sum_assignment(matrix)
    flat = problem.flat[chosen]
    return flat, problem.cost(flat)


def _solve(problem: _Problem, gap: float, deadline: float | None) -> tuple[np.ndarray, float]:
    """Auctions with ever smaller raises until the certificate does."""
    n = len(problem.flat)
    scale = max(problem.mean_cost - problem.lows, 0.0)
    prices = np.full((problem.first.shape[1], problem.second.shape[1]), np.inf)
    prices.reshape(-1)[problem.flat] = 0.0
    epsilon = max(0.5 * gap, 1e-5) * scale / n
    best, best_cost, bound = problem.flat, np.inf, -np.inf
    while True:
        held = _auction(problem, prices, epsilon, deadline)
        cost = problem.cost(held)
        if cost < best_cost:
            best, best_cost = held, cost
        bound = max(bound, _bound(problem, prices))
        logger.debug("raise %.3g: cost %.10g, bound %.10g", epsilon, best_cost, bound)
        if best_cost - bound <= max(gap * (problem.mean_cost - bound), 2 * problem.rounding):
            return best, bound
        late = deadline is not None and time.monotonic() >= deadline
        if late or epsilon <= problem.rounding / n:
            return best, bound
        epsilon /= 8


def _auction(problem: _Problem, prices: np.ndarray, epsilon: float, deadline: float | None) -> np.ndarray:
    """Runs one auction from the given prices; returns the flat cell of each word."""
    n = len(problem.flat)
    keep = min(_KEEP, n)
    cells = np.full((n, keep), -1, np.int64)
    bases = np.full((n, keep), np.inf)
    thresholds = np.full(n, -np.inf)
    flat_prices = prices.reshape(-1)
    owners = np.full(len(flat_prices), -1, np.int64)
    held = np.full(n, -1, np.int64)
    queue = np.arange(n)
    state = np.array([0, n, 0])
    stale = np.empty(max(64, n // 50), np.int64)
    made = 0

    def look(words: np.ndarray) -> None:
        kernels.scan(problem.first, problem.second, prices, words, cells, bases, thresholds)

    while state[1] > 0 or state[2] > 0:
        made += kernels.bid(
            flat_prices, owners, held, cells, bases, thresholds, queue, state, stale, epsilon, 1 << 22
        )
        if deadline is not None and time.monotonic() >= deadline:
            break
        if state[2] > 0 and (state[2] == len(stale) or state[1] == 0):
            words = stale[: state[2]].copy()
            problem.over_words(look, words)
            slots = (state[0] + state[1] + np.arange(len(words))) % n
            queue[slots] = words
            state[1] += len(words)
            state[2] = 0
        if made > _BIDS_PER_WORD * n:
            made, epsilon = 0, 8 * epsilon
    idle = np.flatnonzero(held < 0)
    if len(idle):  # out of time: any free cell will do
        free = problem.flat[owners[problem.flat] < 0]
        held[idle] = free
    return held


def _bound(problem: _Problem, prices: np.ndarray) -> float:
    """Returns the dual value of the prices, a lower bound on the cost of every assignment."""
    values = np.empty(len(problem.flat))

    def work(words: np.ndarray) -> None:
        kernels.sweep(problem.first, problem.second, prices, words, values)

    problem.over_words(work, np.arange(len(values)))
    return float(problem.lows + values.sum() - prices.reshape(-1)[problem.flat].sum())
