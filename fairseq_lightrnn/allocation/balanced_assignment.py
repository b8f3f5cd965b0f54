"""Balanced assignment of words to places with capacities, at least cost, with a certificate."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fairseq_lightrnn.allocation import _capacity_auction as kernels
from fairseq_lightrnn.allocation import _shortest_paths
from fairseq_lightrnn.allocation._cached_auction import solve_cached
from fairseq_lightrnn.allocation.certificate import CertifiedAssignment
from fairseq_lightrnn.allocation.costs import CostSource, as_costs, require_finite

__all__ = ["BalancedAssignment", "balanced_assignment"]

logger = logging.getLogger(__name__)

_LINEAR_ASSIGNMENT_LIMIT = 1 << 14  # entries of a capacity-1 matrix up to which scipy is quickest
_FLOAT64_LIMIT = 1 << 27  # entries up to which costs are held in float64
_BLOCK_ENTRIES = 1 << 19  # temporaries stay in the cache
_BLOCK_WORDS = 1 << 11
_SAMPLE_ENTRIES = 1 << 27  # of the sample that gives the first prices of a larger problem
_SAMPLE_WORDS = 64  # for each place; with 8, the costs of a word are formed three times as often
_BIDS_PER_WORD = 60  # beyond this the raise is too small for an instance with many ties
_UNIT = 2.0**-52


@dataclass(frozen=True)
class BalancedAssignment(CertifiedAssignment):
    """An assignment of words to places and how far from the best it can be.

    Attributes:
      prices: (m,) dual prices of the places, a warm start for similar costs; None from the dense
        solver.
    """

    prices: np.ndarray | None


@dataclass
class _Found:
    """What a solver found: the places, their cost, a bound with its rounding error, and prices."""

    places: np.ndarray
    cost: float
    bound: float
    rounding: float
    mean_cost: float
    prices: np.ndarray | None


@dataclass
class _Problem:
    """Costs held in memory: each row less its least entry, and what was lost by that."""

    matrix: np.ndarray  # (n, m), float64 or float32, least entry of each row 0
    lows: np.ndarray  # (n,) the least entries
    capacities: np.ndarray  # (m,)
    mean_cost: float
    rounding: float  # how much the sum over words of any entries may be off
    spread: float  # the largest difference between two costs of one word
    active: np.ndarray  # ids of the words that are not indifferent between places
    source: CostSource

    @property
    def spare(self) -> int:
        """Units that may lie anywhere at no cost: free capacity and indifferent words."""
        return int(self.capacities.sum()) - len(self.active)


def balanced_assignment(
    costs: Tensor | np.ndarray | CostSource,
    capacities: Sequence[int] | np.ndarray | Tensor,
    *,
    gap: float = 0.0,
    time_limit: float | None = None,
    prices: np.ndarray | None = None,
    present: np.ndarray | None = None,
    memory: int = 8 << 30,
    symbols: Sequence[str] | None = None,
    finish: bool = True,
) -> BalancedAssignment:
    """Assigns every word to a place within the capacities of the places, at least total cost.

    The linear-programming dual has one price a place, and any prices p >= 0 give a lower bound,
    ``sum_w min_i (cost[w, i] + p[i]) - sum_i capacity[i] p[i]``. An auction with capacities finds
    prices that are nearly right, shortest paths over the places make the assignment exact. The
    result is deterministic; where words are indifferent, lower ids go first.

    Args:
      costs: (n, m) costs, or a source that forms them block by block.
      capacities: (m,) words that each place takes; their sum is at least n.
      gap: stop once the gap is this share of what can be saved over a random assignment; 0 asks
        for the optimum.
      time_limit: seconds after which to stop with the best assignment and bound so far.
      prices: (m,) prices of a similar problem to start from.
      present: (n,) place of each word now; words that are indifferent stay there where they can.
      memory: bytes that the costs may take. Where the matrix does not fit, only the cheapest places
        of each word are held (about 200 bytes a word) besides a sample of at least 8 words a place,
        and there is no exact finish: the gap is small, not 0.
      symbols: names of the words, for error messages.
      finish: follow the auction by shortest paths where its gap is wider than ``gap``. They are
        exact, and slow where many words want few places; without them the gap is what it is.

    Returns:
      The assignment and its certificate.

    Raises:
      ValueError: a cost is NaN or infinite (the word is named), the capacities do not hold the
        words, or shapes do not fit.
    """
    started = time.monotonic()
    deadline = None if time_limit is None else started + time_limit
    source = as_costs(costs)
    room = _check_capacities(capacities, source.shape)
    open_places = np.flatnonzero(room)
    if present is not None:
        index = np.full(source.shape[1], -1, np.int64)
        index[open_places] = np.arange(len(open_places))
        present = index[np.asarray(present)]
    if len(open_places) < len(room):
        source = source.restrict(torch.from_numpy(open_places).to(source.device))
    room = room[open_places]
    warm = None if prices is None else np.asarray(prices, np.float64)[open_places]
    if source.shape[0] * len(room) * np.dtype(np.float32).itemsize > memory:
        found = _solve_in_parts(source, room, gap, deadline, warm, present, memory, symbols, finish)
    else:
        problem = _prepare(source, room, symbols)
        if room.max(initial=0) == 1 and problem.matrix.size <= _LINEAR_ASSIGNMENT_LIMIT:
            found = _linear_assignment(problem, present)
        else:
            found = _solve(problem, gap, deadline, warm, present, finish)
    all_prices = None
    if found.prices is not None:
        all_prices = np.zeros(len(np.asarray(capacities)))
        all_prices[open_places] = found.prices
    return BalancedAssignment(
        assignment=open_places[found.places],
        cost=found.cost,
        lower_bound=min(found.cost, found.bound - found.rounding),
        mean_cost=found.mean_cost,
        optimal=found.cost - found.bound <= 2 * found.rounding,
        prices=all_prices,
        seconds=time.monotonic() - started,
    )


def _check_capacities(
    capacities: Sequence[int] | np.ndarray | Tensor, shape: tuple[int, int]
) -> np.ndarray:
    room = np.asarray(capacities)
    if room.shape != (shape[1],) or (room.size and room.dtype.kind not in "iu"):
        raise ValueError(
            f"capacities must be {shape[1]} integers, got {room.dtype} of shape {room.shape}"
        )
    if room.size and room.min() < 0:
        raise ValueError(
            f"capacity of place {int(room.argmin())} is {int(room.min())}; it must not be negative"
        )
    if room.sum() < shape[0]:
        raise ValueError(f"places of total capacity {int(room.sum())} cannot take {shape[0]} words")
    return room.astype(np.int64)


def _prepare(source: CostSource, capacities: np.ndarray, symbols: Sequence[str] | None) -> _Problem:
    """Forms the costs block by block, less the least of each word, and bounds the rounding."""
    n, m = source.shape
    dtype = np.float64 if n * m <= _FLOAT64_LIMIT else np.float32
    matrix = np.empty((n, m), dtype)
    lows = np.zeros(n)
    active = np.zeros(n, bool)
    weights = torch.from_numpy(capacities / max(1, capacities.sum())).to(source.device)
    mean_cost = rounding = spread = 0.0
    step = min(max(1, _BLOCK_ENTRIES // max(1, m)), _BLOCK_WORDS)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        block = source.block(rows)
        require_finite(block, "the cost", start, symbols)
        low, high = block.amin(dim=1), block.amax(dim=1)
        mean_cost += float((block @ weights).sum())
        rounding += _UNIT * (8 + source.terms) * float(torch.maximum(low.abs(), high.abs()).sum())
        spread = max(spread, float((high - low).max()))
        block = block - low[:, None]  # not in place: the block may be a view of the matrix
        if dtype is np.float32:
            rounding += 2.0**-24 * float((high - low).sum())
        matrix[rows] = block.cpu().numpy()
        lows[rows] = low.cpu().numpy()
        active[rows] = (high > low).cpu().numpy()
    movable = np.flatnonzero(active)
    return _Problem(matrix, lows, capacities, mean_cost, rounding, spread, movable, source)


def _cost(problem: _Problem, places: np.ndarray) -> float:
    if len(places) == 0:
        return 0.0
    if problem.matrix.dtype == np.float64:
        return float((problem.lows + problem.matrix[np.arange(len(places)), places]).sum())
    chosen = torch.from_numpy(places).to(problem.source.device)
    return float(problem.source.chosen(chosen).sum())


def _linear_assignment(problem: _Problem, present: np.ndarray | None) -> _Found:
    """Solves a problem of capacity 1 with scipy's dense solver."""
    places = np.full(len(problem.lows), -1, np.int64)
    rows, columns = linear_sum_assignment(problem.matrix[problem.active])
    places[problem.active[rows]] = columns
    _place_indifferent(problem.capacities, places, present)
    cost = _cost(problem, places)
    return _Found(places, cost, cost, problem.rounding, problem.mean_cost, None)


def _solve(
    problem: _Problem,
    gap: float,
    deadline: float | None,
    warm: np.ndarray | None,
    present: np.ndarray | None,
    finish: bool,
) -> _Found:
    """Auction, then shortest paths where the auction's certificate does not do."""
    n, m = problem.matrix.shape
    active = problem.active
    matrix = problem.matrix if len(active) == n else problem.matrix[active]
    scale = max(problem.mean_cost - problem.lows.sum(), 0.0)
    prices = np.zeros(m)
    # Free units only fit prices of zero; prices further apart than costs would only cost precision.
    if warm is not None and problem.spare == 0 and np.ptp(warm) <= 2 * problem.spread:
        prices = warm - warm.min()
    epsilon = max(0.5 * gap, 1e-6) * scale / max(1, len(active))
    held = _auction(matrix, problem.capacities, prices, epsilon, deadline)
    places = np.full(n, -1, np.int64)
    places[active] = held
    _place_indifferent(problem.capacities, places, present)
    cost = _cost(problem, places)
    values = np.empty(len(active))
    nearest = held.copy()
    slack = 8 * _UNIT * (problem.spread + prices.max(initial=0.0))
    kernels.cheapest(matrix, prices, values, nearest, slack)
    bound = _bound(problem, values, prices)
    enough = max(gap * (problem.mean_cost - bound), 2 * problem.rounding)
    late = deadline is not None and time.monotonic() >= deadline
    found = _Found(places, cost, bound, problem.rounding, problem.mean_cost, prices)
    if cost - bound <= enough or late or not finish or len(active) == 0:
        return found
    logger.debug("auction left a gap of %.3g in %d words; repairing", cost - bound, len(active))
    exact = prices.copy()
    spare = _lay_spare(problem, nearest, exact)
    if _shortest_paths.repair(matrix, problem.capacities, exact, nearest, spare, n) < 0:
        return found
    exact -= exact.min()
    repaired = np.full(n, -1, np.int64)
    repaired[active] = nearest
    _place_indifferent(problem.capacities, repaired, present)
    kernels.cheapest(matrix, exact, values, nearest.copy(), slack)
    better = _bound(problem, values, exact)
    if better >= bound:
        found.bound, found.prices = better, exact
    if _cost(problem, repaired) < cost:
        found.places, found.cost = repaired, _cost(problem, repaired)
    return found


def _solve_in_parts(
    source: CostSource,
    capacities: np.ndarray,
    gap: float,
    deadline: float | None,
    warm: np.ndarray | None,
    present: np.ndarray | None,
    memory: int,
    symbols: Sequence[str] | None,
    finish: bool,
) -> _Found:
    """Solves a problem too large to hold: a sample gives prices, cached lists do the rest."""
    idle = source.indifferent().cpu().numpy()
    active = np.flatnonzero(~idle)
    # Too few words for each place would give prices that are worse than none.
    entries = max(_SAMPLE_ENTRIES, _SAMPLE_WORDS * len(capacities) ** 2)
    entries = min(entries, memory // 8)
    wanted = max(entries // len(capacities), 8 * len(capacities))
    step = max(1, len(active) // wanted)
    sample = active[::step]
    spare = int(capacities.sum()) - len(active)
    shares = _shares(capacities, len(sample) + spare // step)
    part = source.select(torch.from_numpy(sample).to(source.device))
    first = balanced_assignment(part, shares, gap=1e-4, symbols=symbols, finish=finish)
    gain = (first.mean_cost - first.lower_bound) / max(1, len(sample))
    prices = np.zeros(len(capacities))
    if spare == 0:  # free units only fit prices of zero
        known = first.prices if warm is None else warm
        prices = prices if known is None else known - known.min()
    raise_least = max(0.5 * gap, 1e-6) * gain
    found = solve_cached(source, capacities, active, prices, raise_least, deadline)
    places = found.places
    _place_indifferent(capacities, places, present)
    constant = 0.0
    if idle.any():
        alone = source.select(torch.from_numpy(np.flatnonzero(idle)).to(source.device))
        anywhere = torch.zeros(alone.shape[0], dtype=torch.long, device=source.device)
        paid = alone.chosen(anywhere)
        constant = float(paid.sum())
        found.rounding += _UNIT * (8 + source.terms) * float(paid.abs().sum())
    cost = float(source.chosen(torch.from_numpy(places).to(source.device)).sum())
    bound, mean_cost = found.bound + constant, found.mean_cost + constant
    return _Found(places, cost, bound, found.rounding, mean_cost, found.prices)


def _shares(capacities: np.ndarray, total: int) -> np.ndarray:
    """Scales capacities down to a total, rounding where the least is lost; lower places first."""
    exact = capacities * (total / capacities.sum())
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]] += 1
    return shares


def _auction(
    matrix: np.ndarray,
    capacities: np.ndarray,
    prices: np.ndarray,
    epsilon: float,
    deadline: float | None,
) -> np.ndarray:
    """Runs the auction to its end or the deadline, with a larger raise where ties prolong it."""
    n, m = matrix.shape
    offsets = np.zeros(m + 1, np.int64)
    np.cumsum(capacities, out=offsets[1:])
    sizes = np.zeros(m, np.int64)
    bids, words = np.zeros(offsets[-1]), np.zeros(offsets[-1], np.int64)
    places, queue = np.full(n, -1, np.int64), np.arange(n)
    state = np.array([0, n])
    chunk = max(1024, (1 << 26) // max(1, m))
    made = 0
    while state[1] > 0:
        made += kernels.auction(
            matrix, prices, offsets, sizes, bids, words, places, queue, state, epsilon, chunk
        )
        if deadline is not None and time.monotonic() >= deadline:
            break
        if made > _BIDS_PER_WORD * n:
            made, epsilon = 0, 8 * epsilon
    if state[1] > 0:
        kernels.settle(matrix, prices, capacities - sizes, places)
    return places


def _bound(problem: _Problem, values: np.ndarray, prices: np.ndarray) -> float:
    """Returns the dual value of the prices: a lower bound on the cost of every assignment."""
    # Free units and indifferent words are at the cheapest price.
    total = problem.lows.sum() + values.sum() + problem.spare * prices.min(initial=0.0)
    return float(total - (problem.capacities * prices).sum())


def _lay_spare(problem: _Problem, nearest: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """Lays the free units at the places of least price, first where there is room."""
    m = len(prices)
    spare = np.zeros(m, np.int64)
    left = problem.spare
    load = np.bincount(nearest, minlength=m)
    cheapest = np.flatnonzero(prices == prices.min())
    for place in cheapest:
        spare[place] = min(left, max(0, problem.capacities[place] - load[place]))
        left -= spare[place]
    spare[cheapest[0]] += left
    return spare


def _place_indifferent(
    capacities: np.ndarray, places: np.ndarray, present: np.ndarray | None
) -> None:
    """Gives the words that are indifferent what the others left, their present place first."""
    idle = np.flatnonzero(places < 0)
    if len(idle) == 0:
        return
    room = capacities - np.bincount(places[places >= 0], minlength=len(capacities))
    if present is not None:
        for place in np.unique(present[idle]):
            staying = idle[present[idle] == place][: room[place] if place >= 0 else 0]
            places[staying] = place
            room[place] -= len(staying)
        idle = idle[places[idle] < 0]
    places[idle] = np.repeat(np.arange(len(room)), room)[: len(idle)]
