"""All compiled code of the package: one file, so that numba's cache has one key.

numba compiles a function again when its own file changes, not when a function that it inlines from
another file does; so nothing here calls compiled code of another file.

An auction (Bertsekas and Castanon, "The auction algorithm for the transportation problem", 1989)
serves every assignment. Each word bids for its cheapest place at current prices; a place keeps its
highest bids, and its price is the lowest bid that it keeps. Bids are handled one after the other,
so that the result does not depend on threads. A word knows what all places cost, or the few
cheapest ones with a threshold that no other falls below: since prices only rise, such a list stays
right until its best entry passes the threshold.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

__all__ = ["bid", "least_values", "scan", "sweep"]

_FLAGS = {"nnan", "nsz", "reassoc"}  # lets minima be vectorised; infinities keep their meaning
_CHUNK = 32  # cells that are passed over at once when none is cheap
_TOGETHER = 8  # words whose costs stay in the first cache while the prices stream by


@intrinsic
def _smaller_intrinsic(typing_context, a, b):  # type: ignore[no-untyped-def]
    """Returns the smaller of two numbers of one float type, neither of them NaN.

    The compiler turns a loop over ``min`` or ``if`` into one comparison at a time, because it
    cannot know that there is no NaN; this makes such loops six to ten times as fast.
    """
    if not isinstance(a, types.Float) or a != b:
        return None

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind = arguments[0].type
        function = ir.FunctionType(kind, [kind, kind])
        minimum = builder.module.declare_intrinsic("llvm.minimum", [kind], function)
        return builder.call(minimum, arguments, fastmath=("nnan", "nsz", "reassoc"))

    return a(a, a), generate


_smaller: Any = _smaller_intrinsic  # the decorator takes the first argument away; no type says so


@numba.njit(nogil=True, cache=True, fastmath=_FLAGS)
def _least(row, prices, start, stop):
    """Returns the least of ``row + prices`` between two places; infinity where there is none."""
    best = np.inf
    for j in range(start, stop):
        best = _smaller(best, row[j] + prices[j])
    return best


@numba.njit(nogil=True, cache=True)
def _best_of_all(row, prices):
    """Returns (cheapest place, its value, the value of the next cheapest)."""
    m = prices.shape[0]
    best = _least(row, prices, 0, m)
    place = np.int64(0)
    while row[place] + prices[place] != best:
        place += 1
    second = _smaller(_least(row, prices, 0, place), _least(row, prices, place + 1, m))
    return place, best, second


@numba.njit(nogil=True, cache=True)
def _best_of_listed(listed, bases, threshold, prices):
    """Returns (cheapest listed place, its value, a value that no other place falls below)."""
    best = np.inf
    other = threshold
    target = np.int64(-1)
    for at in range(listed.shape[0]):
        place = np.int64(listed[at])
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
def _seat(word, place, raise_by, prices, offsets, sizes, bids, words, places):
    """Seats a word that outbids the price of a place; returns who has to leave it, or -1."""
    offer = max(prices[place] + raise_by, np.nextafter(prices[place], np.inf))
    base = offsets[place]
    capacity = offsets[place + 1] - base
    loser = np.int64(-1)
    places[word] = place
    if sizes[place] < capacity:
        at = sizes[place]
        bids[base + at], words[base + at] = offer, word
        sizes[place] = at + 1
        _sift_up(bids, words, base, at)
    else:
        loser = np.int64(words[base])
        bids[base], words[base] = offer, word
        _sift_down(bids, words, base, capacity)
        places[loser] = -1
    if sizes[place] == capacity:
        prices[place] = bids[base]
    return loser


@numba.njit(nogil=True, cache=True)
def bid(
    prices,
    offsets,
    sizes,
    bids,
    words,
    places,
    listed,
    bases,
    thresholds,
    queue,
    state,
    stale,
    raise_least,
    max_bids,
):
    """Lets waiting words bid until none is left, ``stale`` is full or ``max_bids`` bids are made.

    Args:
      prices: (m,) float64 prices, raised in place.
      offsets: (m + 1,) first slot of each place; its capacity is the difference.
      sizes: (m,) bids that each place holds.
      bids, words: (sum of capacities,) a heap of the kept bids for each place, and who made them.
      places: (n,) place of each word, -1 while it has none.
      listed: (n, K) places that each word knows, -1 for none; (n, 0) if it knows them all.
      bases: (n, K) or (n, m) their costs.
      thresholds: (n,) what every other place costs at least, with its price.
      queue: ring of the words without a place.
      state: (3,) head of the ring, its length, and the number of words in ``stale``.
      stale: words whose cheapest places must be found again, written.
      raise_least: least raise of a bid over the price.
      max_bids: bids after which to return.

    Returns:
      The number of bids made.
    """
    n = queue.shape[0]
    whole = listed.shape[1] == 0
    head, waiting, outdated = state[0], state[1], state[2]
    made = 0
    while waiting > 0 and outdated < stale.shape[0] and made < max_bids:
        word = queue[head]
        head = head + 1 if head + 1 < n else 0
        waiting -= 1
        if whole:
            place, best, other = _best_of_all(bases[word], prices)
        else:
            place, best, other = _best_of_listed(
                listed[word], bases[word], thresholds[word], prices
            )
            if place < 0 or best > thresholds[word]:
                stale[outdated] = word
                outdated += 1
                continue
        made += 1
        # A raise by the whole difference leaves the word just as content as with its second choice.
        raise_by = max(other - best, raise_least) if other < np.inf else raise_least
        loser = _seat(word, place, raise_by, prices, offsets, sizes, bids, words, places)
        if loser >= 0:
            tail = head + waiting
            queue[tail - n if tail >= n else tail] = loser
            waiting += 1
    state[0], state[1], state[2] = head, waiting, outdated
    return made


@numba.njit(nogil=True, cache=True)
def least_values(listed, bases, thresholds, prices, values):
    """Writes a lower bound on each word's least cost plus price; see `bid` for the arguments."""
    for word in range(bases.shape[0]):
        if listed.shape[1] == 0:
            values[word] = _least(bases[word], prices, 0, prices.shape[0])
        else:
            _, best, _ = _best_of_listed(listed[word], bases[word], thresholds[word], prices)
            values[word] = min(best, thresholds[word])


# The cells of a table as places: a cell costs a word a row cost and a column cost, so that looking
# at all of them is a tropical matrix product of the word's column costs with the prices.


@numba.njit(nogil=True, cache=True, fastmath=_FLAGS)
def _least_sum(costs, prices):
    least = costs.dtype.type(np.inf)
    for j in range(costs.shape[0]):
        least = _smaller(least, costs[j] + prices[j])
    return least


@numba.njit(nogil=True, cache=True)
def _row_minima(first, second, prices, start, stop, minima):
    """Writes ``first[w, i] + min_j (second[w, j] + prices[i, j])`` to ``minima[w - start, i]``."""
    for i in range(prices.shape[0]):
        for word in range(start, stop):
            minima[word - start, i] = first[word, i] + _least_sum(second[word], prices[i])


@numba.njit(nogil=True, cache=True)
def _heap_replace(values, cells, value, cell):
    """Replaces the largest entry of a heap."""
    size = values.shape[0]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and values[child + 1] > values[child]:
            child += 1
        if values[child] <= value:
            break
        values[at], cells[at] = values[child], cells[child]
        at = child
    values[at], cells[at] = value, cell


@numba.njit(nogil=True, cache=True)
def _cheapest_cells(first, second, prices, minima, values, kept):
    """Fills a heap with the cheapest cells of one word; returns the least value of all others."""
    rows, columns = prices.shape
    keep = values.shape[0]
    infinite = values.dtype.type(np.inf)
    cutoff = np.partition(minima, keep - 1)[keep - 1] if rows > keep else infinite
    values[:] = infinite
    kept[:] = -1
    rest = infinite
    for i in range(rows):
        if minima[i] > cutoff or minima[i] >= values[0]:
            rest = _smaller(rest, minima[i])
            continue
        for start in range(0, columns, _CHUNK):
            stop = min(start + _CHUNK, columns)
            least = first[i] + _least_sum(second[start:stop], prices[i, start:stop])
            if least > cutoff or least >= values[0]:
                rest = _smaller(rest, least)
                continue
            for j in range(start, stop):
                value = first[i] + (second[j] + prices[i, j])
                if value <= cutoff and value < values[0]:
                    rest = _smaller(rest, values[0])
                    _heap_replace(values, kept, value, i * columns + j)
                else:
                    rest = _smaller(rest, value)
    return rest


@numba.njit(nogil=True, cache=True)
def scan(first, second, prices, slack, words, cells, bases, thresholds):
    """Finds the cheapest cells of some words at the present prices.

    All numbers are at least 0, so sums are off by no more than a share of themselves.

    Args:
      first: (b, R) row costs of the words.
      second: (b, C) column costs, of the same type.
      prices: (R, C) prices, of the same type; infinite where a cell is not to be had.
      slack: rounding error of a sum, as a share of it.
      words: (b,) ids of the words.
      cells: (n, K) the cheapest cells of each word, written; -1 where there are fewer.
      bases: (n, K) the costs of these cells without the price, written.
      thresholds: (n,) a value that every other cell reaches, written.
    """
    rows, columns = prices.shape
    keep = cells.shape[1]
    minima = np.empty((_TOGETHER, rows), first.dtype)
    values = np.empty(keep, first.dtype)
    kept = np.empty(keep, np.int64)
    for start in range(0, len(words), _TOGETHER):
        stop = min(start + _TOGETHER, len(words))
        _row_minima(first, second, prices, start, stop, minima)
        for at in range(start, stop):
            word = words[at]
            rest = _cheapest_cells(first[at], second[at], prices, minima[at - start], values, kept)
            best = np.inf
            for k in range(keep):
                cell = kept[k]
                cells[word, k] = cell
                bases[word, k] = np.inf
                if cell >= 0:
                    row, column = cell // columns, cell % columns
                    base = np.float64(first[at, row]) + np.float64(second[at, column])
                    bases[word, k] = base
                    best = min(best, base + prices[row, column])
            # A word may always bid for the best that it has just seen, or it would look for ever.
            thresholds[word] = max(rest * (1.0 - slack), best * (1.0 + slack))


@numba.njit(nogil=True, cache=True)
def sweep(first, second, prices, values):
    """Writes the least of cost plus price over all cells to ``values``, (b,)."""
    minima = np.empty((_TOGETHER, prices.shape[0]), first.dtype)
    for start in range(0, len(values), _TOGETHER):
        stop = min(start + _TOGETHER, len(values))
        _row_minima(first, second, prices, start, stop, minima)
        for at in range(start, stop):
            values[at] = minima[at - start].min()
