"""Balanced assignment of words to places with capacities, at least cost, with a certificate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.allocation import kernels
from fairseq_lightrnn.allocation.costs import CostSource, as_costs
from fairseq_lightrnn.allocation.problem import HeldCosts, Problem

__all__ = ["Certified", "Choices", "SolverOptions", "assign", "auction", "scaled_down"]

logger = logging.getLogger(__name__)

# Words times units of capacity up to which an optimum is left to scipy, at once or where an auction
# meets many ties.
_EXACT_LIMIT = 1 << 17
_TIES_LIMIT = 1 << 20
_SQUARE_LIMIT = 1 << 14  # the same where every place takes one word and a gap would do
_SAMPLE_ENTRIES = 1 << 27  # of the sample that gives the first prices of a larger problem
_SAMPLE_WORDS = 64  # for each place; with 8, the costs of a word are formed three times as often
_LEAST_GAP = 1e-6  # that an auction aims at; what it reaches, its certificate says
_BIDS_PER_WORD = 60  # beyond this the raise is too small for an instance with many ties
_BIDS_BEFORE_LARGER = 1 << 18  # that a small instance may make, for they cost little


@dataclass(frozen=True)
class SolverOptions:
    """How far a solver goes.

    Attributes:
      gap: share of what can be saved over a random assignment by which an auction may miss the
        optimum: the larger, the faster. It aims at that; what it reaches, the certificate says. 0
        asks for the optimum, None leaves it to the solver.
      memory: bytes that costs may take.
      num_threads: threads, of which the result does not depend; None takes all processors.
    """

    gap: float | None = None
    memory: int = 8 << 30
    num_threads: int | None = None


@dataclass(frozen=True)
class Certified:
    """An assignment of words and a lower bound on the cost of any.

    Attributes:
      places: (n,) what each word is assigned to.
      cost: total cost, summed in float64.
      bound: no assignment costs less than this.
      mean_cost: expected cost of an assignment drawn at random, the yardstick of `relative_gap`.
      optimal: whether cost and bound agree to rounding error.
      prices: (m,) dual prices of the places, a warm start for similar costs; None where the solver
        knows none.
      seconds: time it took.
    """

    places: np.ndarray
    cost: float
    bound: float
    mean_cost: float
    optimal: bool
    prices: np.ndarray | None
    seconds: float

    @property
    def gap(self) -> float:
        """Cost minus bound: no better assignment saves more."""
        return max(0.0, self.cost - self.bound)

    @property
    def relative_gap(self) -> float:
        """The gap as a share of what the best assignment saves over a random one."""
        gain = self.mean_cost - self.bound
        return self.gap / gain if gain > 0 else 0.0


def assign(
    costs: Tensor | np.ndarray | CostSource,
    capacities: Sequence[int] | np.ndarray | Tensor,
    options: SolverOptions = SolverOptions(),  # noqa: B008 (frozen)
    *,
    prices: np.ndarray | None = None,
    present: np.ndarray | None = None,
    symbols: Sequence[str] | None = None,
) -> Certified:
    """Assigns every word to a place within the capacities of the places, at least total cost.

    The linear-programming dual has one price a place, and any prices p >= 0 give a lower bound,
    ``sum_w min_i (cost[w, i] + p[i]) - sum_i capacity[i] p[i]``. An auction finds prices that are
    nearly right; the optimum of a small problem is found by scipy, with every place repeated. The
    result is deterministic; where words are indifferent, lower ids go first.

    Args:
      costs: (n, m) costs, or a source that forms them block by block.
      capacities: (m,) words that each place takes; their sum is at least n.
      options: without a ``gap``, the optimum is asked for. Beyond 2^17 entries (words times units
        of capacity) an auction comes as near as it can, mostly to 1e-6; beyond 2^20, many words
        alike may leave 1e-4. Where ``memory`` does not hold the matrix, only the cheapest places of
        each word are kept (about 200 bytes a word) besides a sample of at least 8 words a place.
      prices: (m,) prices of a similar problem to start from.
      present: (n,) place of each word now; words that are indifferent stay there where they can.
      symbols: names of the words, for error messages.

    Returns:
      The assignment and its certificate.

    Raises:
      ValueError: a cost is NaN or infinite (the word is named), the capacities do not hold the
        words, or shapes do not fit.
    """
    started = time.monotonic()
    source = as_costs(costs)
    room = _check_capacities(capacities, source.shape)
    num_places, open_places = len(room), np.flatnonzero(room)
    if len(open_places) < num_places:
        source = source.restrict(torch.from_numpy(open_places).to(source.device))
    room = room[open_places]
    problem = Problem(source, room, symbols)
    n, m = source.shape
    gap = options.gap or 0.0
    entries = n * int(np.minimum(room, n).sum())
    limit = _SQUARE_LIMIT if gap and room.max(initial=0) == 1 else 0 if gap else _EXACT_LIMIT
    if entries <= limit:
        found = _exact(problem, HeldCosts(problem, SolverOptions.memory))
    else:
        warm = None if prices is None else np.asarray(prices, np.float64)[open_places]
        held = HeldCosts(problem, options.memory)
        sample = None if held.whole else _first_prices(problem, options, warm)
        avoid_ties = gap == 0 and entries <= _TIES_LIMIT and held.whole
        found = _by_auction(problem, held, gap, sample, warm, avoid_ties)
    places, now = found.places, np.full(n, -1)
    if present is not None:
        index = np.full(num_places, -1, np.int64)
        index[open_places] = np.arange(len(open_places))
        now = index[np.asarray(present)]
    _place_indifferent(room, places, now)
    all_prices = None
    if found.prices is not None:
        all_prices = np.zeros(num_places)
        all_prices[open_places] = found.prices
    cost = float(source.chosen(torch.from_numpy(places).to(source.device)).sum())
    bound = cost if found.bound is None else found.bound
    return Certified(
        places=open_places[places],
        cost=cost,
        bound=min(cost, bound - found.rounding),
        mean_cost=found.mean_cost,
        optimal=cost - bound <= 2 * found.rounding,
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


@dataclass
class _Found:
    """What a solver found; places are -1 for words that are indifferent.

    The bound is None where it is the cost; it is off by no more than ``rounding``.
    """

    places: np.ndarray
    bound: float | None
    rounding: float
    mean_cost: float
    prices: np.ndarray | None


def _first_prices(problem: Problem, options: SolverOptions, warm: np.ndarray | None) -> Certified:
    """Solves a sample of a problem that memory does not hold."""
    # Too few words for each place would give prices that are worse than none.
    entries = max(_SAMPLE_ENTRIES, _SAMPLE_WORDS * len(problem.capacities) ** 2)
    entries = min(entries, options.memory // 16)  # in double precision, and selected from a matrix
    wanted = max(entries // len(problem.capacities), 8 * len(problem.capacities))
    step = max(1, len(problem.active) // wanted)
    sample = problem.active[::step]
    part = problem.source.select(torch.from_numpy(sample).to(problem.source.device))
    capacities = scaled_down(problem.capacities, len(sample) + problem.spare // step)
    options = replace(options, gap=1e-4, memory=SolverOptions.memory)
    return assign(part, capacities, options, prices=warm)


def scaled_down(capacities: np.ndarray, total: int) -> np.ndarray:
    """Scales capacities down to a total, rounding where the least is lost; lower places first."""
    exact = capacities * (total / capacities.sum())
    scaled = np.floor(exact).astype(np.int64)
    scaled[np.argsort(scaled - exact, kind="stable")[: total - int(scaled.sum())]] += 1
    return scaled


def _exact(problem: Problem, costs: HeldCosts) -> _Found:
    """Solves a small problem with scipy, every place repeated for each word that it takes."""
    from scipy.optimize import linear_sum_assignment

    n, m = len(problem.active), len(problem.capacities)
    costs.look_at_all()
    copies = np.repeat(np.arange(m), np.minimum(problem.capacities, n))
    matrix = costs.bases if len(copies) == m else costs.bases[:, copies]
    words, units = linear_sum_assignment(matrix)
    places = np.full(problem.source.shape[0], -1, np.int64)
    places[problem.active[words]] = copies[units]
    rounding, mean_cost = costs.rounding + problem.rounding, costs.mean_cost + problem.constant
    return _Found(places, None, rounding, mean_cost, None)


def _by_auction(
    problem: Problem,
    costs: HeldCosts,
    gap: float,
    sample: Certified | None,
    warm: np.ndarray | None,
    avoid_ties: bool,
) -> _Found:
    """Runs an auction at raises that are small beside what there is to gain.

    Args:
      problem: to be solved.
      costs: of its words.
      gap: see `SolverOptions`.
      sample: the solution of a sample of the words, where costs are not held.
      warm: (m,) prices to start from.
      avoid_ties: leave a problem of many ties to scipy.
    """
    n, prices = len(problem.active), np.zeros(len(problem.capacities))
    if sample is not None:
        warm = sample.prices
        gain, words = sample.mean_cost - sample.bound, len(sample.places)
    else:
        costs.look_at_all()
        gain, words = max(costs.mean_cost - costs.lows.sum(), 0.0), n
        # Prices further apart than costs would only cost precision.
        warm = warm if warm is not None and np.ptp(warm) <= 2 * costs.spread else None
    if warm is not None and problem.spare == 0:  # free units only fit prices of zero
        prices = warm - warm.min()
    raise_least = max(0.5 * gap, _LEAST_GAP) * gain / max(1, words)

    def look(some: np.ndarray) -> float:
        costs.look(some, prices)
        # A sample may have suggested no raise at all, and prices would never get anywhere.
        return 1e-9 * costs.spread / n

    choices = Choices(costs.listed, costs.bases, costs.thresholds, look)
    found, ties = auction(
        *(choices, np.arange(n), problem.capacities, prices, raise_least, not avoid_ties)
    )
    if ties and avoid_ties:
        return _exact(problem, costs)
    places = np.full(problem.source.shape[0], -1, np.int64)
    places[problem.active] = found
    bound, rounding = costs.bound(prices)
    return _Found(places, bound, rounding, costs.mean_cost + problem.constant, prices)


@dataclass
class Choices:
    """What words know of places.

    Attributes:
      listed, bases, thresholds: see `kernels.bid`.
      look: finds the cheapest places of some words anew, at current prices; returns the least raise
        of prices that costs of this size allow.
    """

    listed: np.ndarray
    bases: np.ndarray
    thresholds: np.ndarray
    look: Callable[[np.ndarray], float]


def auction(
    choices: Choices,
    words: np.ndarray,
    capacities: np.ndarray,
    prices: np.ndarray,
    raise_least: float,
    patient: bool = True,
) -> tuple[np.ndarray, bool]:
    """Lets words bid for places until all have one.

    Args:
      choices: of n words.
      words: those that bid.
      capacities: (m,) words that each place takes.
      prices: (m,) prices to start from, raised in place.
      raise_least: least raise of a bid; raised where ties prolong the auction.
      patient: go on with larger raises where ties prolong the auction; stop otherwise.

    Returns:
      The place of each word, (n,), -1 for those that have none; and whether ties prolonged it.
    """
    n = len(words)
    offsets = np.zeros(len(capacities) + 1, np.int64)
    np.cumsum(capacities, out=offsets[1:])
    sizes = np.zeros(len(capacities), np.int64)
    bids, holders = np.zeros(offsets[-1]), np.zeros(offsets[-1], np.int64)
    places, queue = np.full(len(choices.bases), -1, np.int64), words.copy()
    state = np.array([0, n, 0])
    # Small enough that the words of a batch see each other's prices, large enough to share a sweep.
    stale = np.empty(max(64, n // 50), np.int64)
    chunk = max(1024, (1 << 26) // max(1, choices.bases.shape[1]))  # between counts of bids
    chunk = min(chunk, max(_BIDS_PER_WORD * n + 1, _BIDS_BEFORE_LARGER))
    made, ties = 0, False
    while state[1] > 0 or state[2] > 0:
        made += kernels.bid(
            *(prices, offsets, sizes, bids, holders, places),
            *(choices.listed, choices.bases, choices.thresholds),
            *(queue, state, stale, raise_least, chunk),
        )
        if state[2] > 0 and (state[2] == len(stale) or state[1] == 0):
            some = stale[: state[2]].copy()
            raise_least = max(raise_least, choices.look(some))
            queue[(state[0] + state[1] + np.arange(len(some))) % n] = some
            state[1] += len(some)
            state[2] = 0
        if made > _BIDS_PER_WORD * n:
            ties = True
            if not patient:
                break
            made, raise_least = 0, 8 * raise_least
            logger.debug("many ties: bids now raise prices by %.3g", raise_least)
    return places, ties


def _place_indifferent(capacities: np.ndarray, places: np.ndarray, present: np.ndarray) -> None:
    """Gives words that have no place what the others left, their present place first."""
    idle = np.flatnonzero(places < 0)
    room = capacities - np.bincount(places[places >= 0], minlength=len(capacities))
    for place in np.unique(present[idle]):
        if place >= 0:
            staying = idle[present[idle] == place][: room[place]]
            places[staying] = place
            room[place] -= len(staying)
    idle = idle[places[idle] < 0]
    places[idle] = np.repeat(np.arange(len(room)), room)[: len(idle)]
