"""Assignment of words to cells where each word knows the costs of a few cells only."""

from __future__ import annotations

import logging
import time

import numpy as np

from fairseq_lightrnn.allocation import kernels
from fairseq_lightrnn.allocation.assignment import Certified, Choices, SolverOptions, auction

__all__ = ["assign_listed"]

logger = logging.getLogger(__name__)

_GAP = 1e-4  # of what there is to save, if no other is asked for
_FIRST_RAISE = 0.1  # of the mean spread of costs; prices are found faster by large raises first
_SCALE = 5.0  # by which the raise falls from auction to auction


def assign_listed(
    cells: np.ndarray,
    costs: np.ndarray,
    present: np.ndarray,
    options: SolverOptions = SolverOptions(),  # noqa: B008 (frozen)
    *,
    prices: np.ndarray | None = None,
) -> Certified:
    """Gives every word one of its listed cells, one word a cell, at least total cost.

    The present cells of the words are a solution, so there is one; none but these cells are given
    away. Auctions with ever smaller raises of prices (Bertsekas, "The auction algorithm", 1988)
    start from each other's prices; the prices p are the certificate, ``Σ_w min_c (cost[w, c] +
    p[c]) - Σ_c p[c]`` being a lower bound. Deterministic.

    Args:
      cells: (n, L) cells that each word may get, each at most once a word; -1 for none.
      costs: (n, L) what the word pays there, finite.
      present: (n,) the cell of each word now, all different; each must be among the word's.
      options: without a ``gap``, 1e-4 of what can be saved will do. ``time_limit`` is heeded,
        ``memory`` and ``num_threads`` are not.
      prices: of cells, (at least the highest cell + 1,), of a similar problem to start from.

    Returns:
      The cell of each word and its certificate. ``mean_cost`` is the cost of the present cells.

    Raises:
      ValueError: shapes do not fit, a cost is NaN or infinite, two words have one cell now, or a
        word's present cell is not among its cells.
    """
    started = time.monotonic()
    cells, costs, present = np.asarray(cells), np.asarray(costs), np.asarray(present)
    now = _check(cells, costs, present)
    size = int(max(cells.max(initial=-1), present.max(initial=-1))) + 1
    owned = np.zeros(size + 1, bool)  # the last one is for -1
    owned[present] = True
    known = owned[cells]
    # A word that may stay only leaves the market, and its cell with it.
    while True:
        stays = known.sum(axis=1) <= 1
        taken = np.zeros(size + 1, bool)
        taken[present[stays]] = True
        lost = known & taken[cells]
        lost[stays] = False
        if not lost.any():
            break
        known &= ~lost
    active = np.flatnonzero(~stays)
    before = costs[np.arange(len(cells)), now].astype(np.float64)
    places = np.array(present, np.int64)
    place_of = np.full(size + 1, -1, np.int64)
    place_of[present[active]] = np.arange(len(active))
    listed = np.where(known[active], place_of[cells[active]], -1).astype(np.int32)
    bases = np.where(listed >= 0, costs[active], np.inf).astype(np.float64)
    first = np.zeros(len(active)) if prices is None else np.array(prices)[present[active]]
    found, bound, last = _auctions(listed, bases, before[active], first, options, started)
    places[active] = present[active][found]
    fixed = float(before[stays].sum())
    cost = fixed + float(_paid(listed, bases, found).sum())
    all_prices = np.zeros(size) if prices is None else np.array(prices, np.float64)
    all_prices[present[active]] = last
    return Certified(
        places=places,
        cost=cost,
        bound=min(cost, fixed + bound),
        mean_cost=float(before.sum()),
        optimal=cost - fixed - bound <= 1e-9 * max(1.0, abs(cost)),
        prices=all_prices,
        seconds=time.monotonic() - started,
    )


def _check(cells: np.ndarray, costs: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Returns where in its list the present cell of each word stands; (n,)."""
    if cells.ndim != 2 or costs.shape != cells.shape or present.shape != cells.shape[:1]:
        raise ValueError(
            f"cells {cells.shape}, costs {costs.shape} and present cells {present.shape} do not "
            "fit; expected (n, L), (n, L) and (n,)"
        )
    if not np.isfinite(costs[cells >= 0]).all():
        word = int((~np.isfinite(costs) & (cells >= 0)).any(axis=1).argmax())
        raise ValueError(f"a cost of word {word} is NaN or infinite")
    if len(np.unique(present)) < len(present) or present.min(initial=0) < 0:
        raise ValueError("each word must have a cell of its own now")
    here = cells == present[:, None]
    if not here.any(axis=1).all():
        word = int((~here.any(axis=1)).argmax())
        raise ValueError(f"the present cell {present[word]} of word {word} is not among its cells")
    return here.argmax(axis=1)


def _auctions(
    listed: np.ndarray,
    bases: np.ndarray,
    before: np.ndarray,
    prices: np.ndarray,
    options: SolverOptions,
    started: float,
) -> tuple[np.ndarray, float, np.ndarray]:
    """Returns the places found, a lower bound and the prices behind it."""
    n = len(listed)
    present = np.arange(n)
    if n == 0:
        return present, 0.0, prices
    deadline = None if options.time_limit is None else started + options.time_limit
    gap = _GAP if options.gap is None else options.gap
    thresholds = np.full(n, np.inf)
    choices = Choices(listed, bases, thresholds, lambda some: 0.0)
    least = bases.min(axis=1)
    gain = float((before - least).sum())  # no table saves more
    best, best_cost = present, float(before.sum())
    bound, best_prices = float(least.sum()), np.zeros(n)
    raise_least = _FIRST_RAISE * gain / n
    capacities = np.ones(n, np.int64)
    while gain > 0:
        prices = prices - prices.min()
        found, _ = auction(choices, present, capacities, prices, raise_least, deadline)
        if (found < 0).any():  # out of time
            break
        cost = float(_paid(listed, bases, found).sum())
        if cost < best_cost:
            best, best_cost = found, cost
        values = np.empty(n)
        kernels.least_values(listed, bases, thresholds, prices, values)
        dual = float(values.sum() - prices.sum())
        if dual > bound:
            bound, best_prices = dual, prices
        saved = float(before.sum()) - bound
        logger.debug(f"raise {raise_least:.3g}: cost {best_cost:.8g}, bound {bound:.8g}")
        rounding = 1e-12 * float(np.abs(before).sum() + prices.sum())
        if best_cost - bound <= max(gap * saved, rounding) or raise_least < 1e-9 * gain / n:
            break
        raise_least /= _SCALE
    return best, bound, best_prices


def _paid(listed: np.ndarray, bases: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns what each word pays at its place."""
    here = listed == places[:, None]
    return np.where(here, bases, 0.0).sum(axis=1)
