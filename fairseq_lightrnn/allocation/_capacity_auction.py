"""Auction of places with capacities: the compiled loops of balanced assignment.

Each word bids for its cheapest place at current prices; a place keeps its highest bids and its
price is the lowest bid it keeps (Bertsekas and Castanon, "The auction algorithm for the
transportation problem", 1989, with similar objects). Bids are handled one after the other, so the
result does not depend on threads.
"""

from __future__ import annotations

import numba
import numpy as np

from fairseq_lightrnn.allocation._minimum import smaller

__all__ = ["auction", "cheapest", "seat", "settle"]

_FLAGS = {"nnan", "nsz", "reassoc"}  # lets minima be vectorised; infinities keep their meaning


@numba.njit(nogil=True, cache=True, fastmath=_FLAGS)
def _least(row, prices, start, stop):
    """Returns the least of ``row + prices`` between two places; infinity where there is none."""
    best = np.inf
    for j in range(start, stop):
        best = smaller(best, row[j] + prices[j])
    return best


@numba.njit(nogil=True, cache=True)
def _best_two(row, prices):
    """Returns (cheapest place, its value, value of the next cheapest)."""
    m = prices.shape[0]
    best = _least(row, prices, 0, m)
    place = 0
    while row[place] + prices[place] != best:
        place += 1
    second = smaller(_least(row, prices, 0, place), _least(row, prices, place + 1, m))
    return place, best, second


@numba.njit(nogil=True, cache=True, inline="always")
def _less(bid_a, word_a, bid_b, word_b):
    """Whether bid a leaves a place before bid b: the lower; of equals that of the higher id."""
    return bid_a < bid_b or (bid_a == bid_b and word_a > word_b)


@numba.njit(nogil=True, cache=True)
def _sift_up(bids, words, base, at):
    while at > 0:
        parent = (at - 1) >> 1
        if not _less(bids[base + at], words[base + at], bids[base + parent], words[base + parent]):
            return
        bids[base + at], bids[base + parent] = bids[base + parent], bids[base + at]
        words[base + at], words[base + parent] = words[base + parent], words[base + at]
        at = parent


@numba.njit(nogil=True, cache=True)
def _sift_down(bids, words, base, size):
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and _less(
            bids[base + child + 1], words[base + child + 1], bids[base + child], words[base + child]
        ):
            child += 1
        if not _less(bids[base + child], words[base + child], bids[base + at], words[base + at]):
            return
        bids[base + at], bids[base + child] = bids[base + child], bids[base + at]
        words[base + at], words[base + child] = words[base + child], words[base + at]
        at = child


@numba.njit(nogil=True, cache=True, inline="always")
def seat(word, place, raise_by, prices, offsets, sizes, bids, words, places):
    """Seats a word that outbids the price of a place; returns who has to leave it, or -1."""
    bid = max(prices[place] + raise_by, np.nextafter(prices[place], np.inf))
    base = offsets[place]
    capacity = offsets[place + 1] - base
    loser = np.int64(-1)
    places[word] = place
    if sizes[place] < capacity:
        at = sizes[place]
        bids[base + at], words[base + at] = bid, word
        sizes[place] = at + 1
        _sift_up(bids, words, base, at)
    else:
        loser = np.int64(words[base])
        bids[base], words[base] = bid, word
        _sift_down(bids, words, base, capacity)
        places[loser] = -1
    if sizes[place] == capacity:
        prices[place] = bids[base]
    return loser


@numba.njit(nogil=True, cache=True)
def auction(costs, prices, offsets, sizes, bids, words, places, queue, state, epsilon, max_bids):
    """Runs the auction until every word has a place or ``max_bids`` bids are made.

    Args:
      costs: (n, m) costs.
      prices: (m,) float64 prices, raised in place.
      offsets: (m + 1,) first slot of each place; its capacity is the difference.
      sizes: (m,) bids each place holds.
      bids, words: (sum of capacities,) a heap of the kept bids for each place, and who made them.
      places: (n,) place of each word, -1 while it has none.
      queue: (n,) ring of the words without a place.
      state: (2,) head of the ring and its length.
      epsilon: least raise of a bid over the price.
      max_bids: bids after which to return.

    Returns:
      The number of bids made.
    """
    n = costs.shape[0]
    made = 0
    head, waiting = state[0], state[1]
    while waiting > 0 and made < max_bids:
        word = queue[head]
        head = head + 1 if head + 1 < n else 0
        waiting -= 1
        made += 1
        place, best, second = _best_two(costs[word], prices)
        # A raise by the whole difference leaves the word just as content here as with its second
        # choice.
        raise_by = max(second - best, epsilon) if second < np.inf else epsilon
        loser = seat(word, place, raise_by, prices, offsets, sizes, bids, words, places)
        if loser >= 0:
            tail = head + waiting
            queue[tail - n if tail >= n else tail] = loser
            waiting += 1
    state[0], state[1] = head, waiting
    return made


@numba.njit(nogil=True, cache=True)
def cheapest(costs, prices, values, places, slack):
    """Finds the cheapest place of each word.

    Args:
      costs: (n, m) costs.
      prices: (m,) prices.
      values: (n,) least cost plus price, written.
      places: (n,) place of each word; kept where it is the cheapest up to ``slack``, else the first
        cheapest is written.
      slack: rounding error of a value.
    """
    for word in range(costs.shape[0]):
        row = costs[word]
        best = _least(row, prices, 0, prices.shape[0])
        values[word] = best
        here = places[word]
        if here >= 0 and row[here] + prices[here] <= best + slack:
            continue
        place = 0
        while row[place] + prices[place] != best:
            place += 1
        places[word] = place


@numba.njit(nogil=True, cache=True)
def settle(costs, prices, room, places):
    """Gives each word without a place, in the order of ids, the cheapest place that has room."""
    for word in range(costs.shape[0]):
        if places[word] >= 0:
            continue
        best = -1
        least = np.inf
        for j in range(prices.shape[0]):
            value = costs[word, j] + prices[j]
            if room[j] > 0 and (best < 0 or value < least):
                best = j
                least = value
        places[word] = best
        room[best] -= 1
