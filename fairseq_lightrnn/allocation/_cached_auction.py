"""Capacity auction on the cheapest places of each word, for cost matrices that memory cannot hold.

Each word keeps its few cheapest places with a threshold that all others reach. Prices only rise, so
the list stays right until its best entry passes the threshold; only then are the costs of the word
formed again. Forming them is a matrix product, wherever the cost factors live, CPU or GPU.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numba
import numpy as np
import torch

from fairseq_lightrnn.allocation._capacity_auction import seat
from fairseq_lightrnn.allocation.costs import CostSource

__all__ = ["CachedSolution", "solve_cached"]

logger = logging.getLogger(__name__)

_KEEP = 24
_BLOCK_WORDS = 2048
_BIDS_PER_WORD = 60
_UNIT = 2.0**-52
_SINGLE = 2.0**-23


@dataclass
class CachedSolution:
    """What the auction found; places are -1 for the words that took no part."""

    places: np.ndarray
    prices: np.ndarray
    bound: float
    mean_cost: float
    rounding: float


@numba.njit(nogil=True, cache=True)
def _listed(cells, bases, threshold, prices):
    """Returns (cheapest listed place, its value, a value that no other place falls below)."""
    best = np.inf
    other = threshold
    target = np.int64(-1)
    for at in range(cells.shape[0]):
        place = np.int64(cells[at])
        if place < 0:
            continue
        value = bases[at] + prices[place]
        if value < best or (value == best and place < target):
            other = min(other, best)
            best = value
            target = place
        else:
            other = min(other, value)
    return target, best, other


@numba.njit(nogil=True, cache=True)
def _bid(
    prices,
    offsets,
    sizes,
    bids,
    words,
    places,
    lists,
    bases,
    thresholds,
    queue,
    state,
    stale,
    raise_least,
):
    """Lets waiting words bid until none is left or ``stale`` is full; returns the bids made."""
    n = queue.shape[0]
    head, waiting, outdated = state[0], state[1], state[2]
    made = 0
    while waiting > 0 and outdated < stale.shape[0]:
        word = queue[head]
        head = head + 1 if head + 1 < n else 0
        waiting -= 1
        place, best, other = _listed(lists[word], bases[word], thresholds[word], prices)
        if place < 0 or best > thresholds[word]:
            stale[outdated] = word
            outdated += 1
            continue
        made += 1
        raise_by = max(other - best, raise_least) if other < np.inf else raise_least
        loser = seat(word, place, raise_by, prices, offsets, sizes, bids, words, places)
        if loser >= 0:
            tail = head + waiting
            queue[tail - n if tail >= n else tail] = loser
            waiting += 1
    state[0], state[1], state[2] = head, waiting, outdated
    return made


@numba.njit(nogil=True, cache=True)
def _dual(lists, bases, thresholds, prices, values):
    """Writes a lower bound on each word's least cost plus price."""
    for word in range(lists.shape[0]):
        _, best, _ = _listed(lists[word], bases[word], thresholds[word], prices)
        values[word] = min(best, thresholds[word])


class _Lists:
    """The cheapest places of each word."""

    def __init__(self, source: CostSource, active: np.ndarray, capacities: np.ndarray) -> None:
        n, m = len(active), source.shape[1]
        keep = min(_KEEP, m)
        self.source, self.active = source, active
        self.places = np.full((n, keep), -1, np.int32)
        self.bases = np.full((n, keep), np.inf, np.float32)
        self.thresholds = np.full(n, -np.inf)
        self.lows = np.full(n, np.nan)
        self.share = torch.from_numpy(capacities / capacities.sum()).to(source.device)
        self.mean_cost = 0.0
        self.rounding = 0.0
        self.spread = 0.0

    def look(self, words: np.ndarray, prices: np.ndarray) -> None:
        """Forms the costs of some words afresh and lists their cheapest places."""
        price = torch.from_numpy(prices).to(self.source.device)
        for start in range(0, len(words), _BLOCK_WORDS):
            some = words[start : start + _BLOCK_WORDS]
            block = self.source.block(torch.from_numpy(self.active[some]).to(self.source.device))
            low, high = block.amin(dim=1), block.amax(dim=1)
            self.spread = max(self.spread, float((high - low).max()))
            new = np.isnan(self.lows[some])
            if new.any():
                fresh = torch.from_numpy(new).to(self.source.device)
                self.mean_cost += float((block[fresh] @ self.share).sum())
                largest = torch.maximum(low.abs(), high.abs())[fresh]
                self.rounding += _UNIT * (8 + self.source.terms) * float(largest.sum())
                self.lows[some[new]] = low[fresh].cpu().numpy()
            low = torch.from_numpy(self.lows[some]).to(self.source.device)
            block = (block - low[:, None]).clamp_(min=0.0)
            self._list(some, block, price)

    def _list(self, some: np.ndarray, block: torch.Tensor, price: torch.Tensor) -> None:
        keep = self.places.shape[1]
        values, places = (block + price).topk(min(keep + 1, block.shape[1]), dim=1, largest=False)
        rest = values[:, keep] if values.shape[1] > keep else torch.full_like(values[:, 0], np.inf)
        # A word may always bid for the best it has just seen, or it would look for ever.
        rest = torch.maximum(rest, values[:, 0] * (1 + 4 * _SINGLE))
        self.places[some] = places[:, :keep].to(torch.int32).cpu().numpy()
        self.bases[some] = block.gather(1, places[:, :keep]).to(torch.float32).cpu().numpy()
        self.thresholds[some] = rest.cpu().numpy()

    def bound(self, prices: np.ndarray, capacities: np.ndarray) -> tuple[float, float]:
        """Returns the dual value of the prices and its rounding error."""
        values = np.empty(len(self.active))
        _dual(self.places, self.bases, self.thresholds, prices, values)
        spare = int(capacities.sum()) - len(self.active)
        dual = np.nansum(self.lows) + values.sum() + spare * prices.min(initial=0.0)
        rounding = self.rounding + 8 * _SINGLE * float(np.abs(values).sum())
        return float(dual - (capacities * prices).sum()), rounding


def solve_cached(
    source: CostSource,
    capacities: np.ndarray,
    active: np.ndarray,
    prices: np.ndarray,
    raise_least: float,
    deadline: float | None,
) -> CachedSolution:
    """Assigns the active words by an auction on cached lists.

    Args:
      source: forms the costs of words, on whatever device.
      capacities: (m,) capacities, none of them 0.
      active: ids of the words that are not indifferent.
      prices: (m,) prices to start from; 0 where there are more places than active words.
      raise_least: least raise of a bid.
      deadline: time at which to stop.
    """
    n, m = len(active), len(capacities)
    lists = _Lists(source, active, capacities)
    offsets = np.zeros(m + 1, np.int64)
    np.cumsum(capacities, out=offsets[1:])
    sizes = np.zeros(m, np.int64)
    bids, words = np.zeros(offsets[-1]), np.zeros(offsets[-1], np.int64)
    places, queue = np.full(n, -1, np.int64), np.arange(n)
    state = np.array([0, n, 0])
    stale = np.empty(max(64, n // 50), np.int64)
    prices = prices.copy()
    made = looked = 0
    while state[1] > 0 or state[2] > 0:
        made += _bid(
            *(prices, offsets, sizes, bids, words, places),
            *(lists.places, lists.bases, lists.thresholds, queue, state, stale, raise_least),
        )
        if deadline is not None and time.monotonic() >= deadline:
            break
        if state[2] > 0 and (state[2] == len(stale) or state[1] == 0):
            some = stale[: state[2]].copy()
            lists.look(some, prices)
            looked += len(some)
            queue[(state[0] + state[1] + np.arange(len(some))) % n] = some
            state[1] += len(some)
            state[2] = 0
            # A sample may have suggested no raise at all, and then prices would never get anywhere.
            raise_least = max(raise_least, 1e-9 * lists.spread / n)
        if made > _BIDS_PER_WORD * n:
            made, raise_least = 0, 8 * raise_least
    logger.debug("formed the costs of %.2f times as many words as there are", looked / max(1, n))
    unseen = np.flatnonzero(np.isnan(lists.lows))
    if len(unseen):  # out of time: without their costs there is no bound
        lists.look(unseen, prices)
    idle = np.flatnonzero(places < 0)
    if len(idle):
        room = np.repeat(np.arange(m), capacities - sizes)
        places[idle] = room[: len(idle)]
    bound, rounding = lists.bound(prices, capacities)
    everywhere = np.full(source.shape[0], -1, np.int64)
    everywhere[active] = places
    return CachedSolution(everywhere, prices, bound, lists.mean_cost, rounding)
