"""Assignment of words to cells where each word knows the costs of a few cells only."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np

from fairseq_lightrnn.allocation import kernels
from fairseq_lightrnn.allocation.assignment import Certified, Choices, SolverOptions, auction

__all__ = ["assign_listed"]

logger = logging.getLogger(__name__)

_GAP = 1e-3  # of what there is to save, if no other is asked for
_FIRST_RAISE = 1.0  # of the mean spread of costs; prices are found faster by large raises first
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
      options: without a ``gap``, a thousandth of what can be saved will do; ``memory`` and
        ``num_threads`` are not heeded.
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
    cells, active = _market(cells, present)
    paid_now = costs[np.arange(len(cells)), now].astype(np.float64)
    size = int(max(cells.max(initial=-1), present.max(initial=-1))) + 1
    market = _Market(cells, costs, present, active, size)
    gap = _GAP if options.gap is None else options.gap
    first = np.zeros(size)
    if prices is not None:
        first[: len(prices)] = prices[:size]
    places, bound, last = _auctions(market, paid_now, first, gap)
    stays = float(np.delete(paid_now, active).sum())
    cost = stays + float(market.paid(places).sum())
    return Certified(
        places=places.astype(np.int64),
        cost=cost,
        bound=min(cost, stays + bound),
        mean_cost=float(paid_now.sum()),
        optimal=cost - stays - bound <= 1e-9 * max(1.0, abs(cost)),
        prices=last,
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


def _market(cells: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Takes words that may stay only off the market, and their cells with them.

    Returns:
      The cells (n, L) that can be had, others being -1, and the words that are left, ascending.
    """
    owned = np.zeros(int(max(cells.max(initial=-1), present.max(initial=-1))) + 2, bool)
    owned[present] = True  # the last one is for -1
    while True:
        known = owned[cells]
        stays = (known.sum(axis=1) <= 1) & owned[present]
        if not known.all():
            cells = np.where(known, cells, -1)
        if not stays.any():
            return np.ascontiguousarray(cells, np.int32), np.flatnonzero(owned[present])
        owned[present[stays]] = False


@dataclass(frozen=True)
class _Market:
    """Words and the cells that they can have; see :func:`assign_listed`."""

    cells: np.ndarray
    costs: np.ndarray
    present: np.ndarray
    active: np.ndarray  # the words that may move
    size: int  # above every cell

    def paid(self, places: np.ndarray) -> np.ndarray:
        """Returns what the words that may move pay, in float64."""
        here = self.cells[self.active] == places[self.active, None]
        return np.where(here, self.costs[self.active], 0.0).sum(axis=1, dtype=np.float64)

    def least(self, prices: np.ndarray) -> np.ndarray:
        """Returns the least cost plus price of the words that may move."""
        values = np.empty(len(self.cells))
        free = np.full(len(self.cells), np.inf)
        kernels.least_values(self.cells, self.costs, free, prices, values)
        return values[self.active]


def _auctions(
    market: _Market,
    paid_now: np.ndarray,
    prices: np.ndarray,
    gap: float,
) -> tuple[np.ndarray, float, np.ndarray]:
    """Returns the places of all words, a lower bound on what the active ones pay, and prices."""
    active, present = market.active, market.present
    least = float(market.least(np.zeros(market.size)).sum())
    before = float(paid_now[active].sum())
    best, best_cost, bound, best_prices = present, before, least, np.zeros(market.size)
    gain = before - least  # no table saves more
    raise_least = _FIRST_RAISE * gain / max(1, len(active))
    least_raise = 1e-9 * raise_least
    free = np.full(len(market.cells), np.inf)
    choices = Choices(market.cells, market.costs, free, lambda some: 0.0)
    on_sale = present[active]
    capacities = np.zeros(market.size, np.int64)
    capacities[on_sale] = 1
    while gain > 0:
        prices = np.where(capacities > 0, prices - prices[on_sale].min(), 0.0)
        found, _ = auction(choices, active, capacities, prices, raise_least)
        cost = float(market.paid(found).sum())
        if cost < best_cost:
            best, best_cost = np.where(found < 0, present, found), cost
        dual = float(market.least(prices).sum() - prices[on_sale].sum())
        if dual > bound:
            bound, best_prices = dual, prices
        logger.debug(f"raise {raise_least:.3g}: cost {best_cost:.8g}, bound {bound:.8g}")
        enough = max(gap * (before - bound), 1e-12 * (abs(before) + prices.sum()))
        if best_cost - bound <= enough or raise_least < least_raise:
            break
        raise_least /= _SCALE
    return best, bound, best_prices
