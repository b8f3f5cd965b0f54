"""Auction of the cells of a table: the compiled loops of joint assignment.

A word values a cell at row cost + column cost + price. Its cheapest cells are cached with a
threshold below which no other cell can be: prices only rise, so the cache stays right until its
best entry passes the threshold. Only then are all cells looked at again, a tropical matrix product
of the word's column costs with the prices.
"""

from __future__ import annotations

import numba
import numpy as np

from fairseq_lightrnn.allocation._minimum import smaller

__all__ = ["bid", "scan", "sweep"]

_FLAGS = {"nnan", "nsz", "reassoc"}
_CHUNK = 32  # cells that are passed over at once when none is cheap
_TOGETHER = 8  # words whose costs stay in the first cache while the prices stream by


@numba.njit(nogil=True, cache=True, fastmath=_FLAGS)
def _least_sum(costs, prices):
    least = costs.dtype.type(np.inf)
    for j in range(costs.shape[0]):
        least = smaller(least, costs[j] + prices[j])
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
            rest = smaller(rest, minima[i])
            continue
        for start in range(0, columns, _CHUNK):
            stop = min(start + _CHUNK, columns)
            least = first[i] + _least_sum(second[start:stop], prices[i, start:stop])
            if least > cutoff or least >= values[0]:
                rest = smaller(rest, least)
                continue
            for j in range(start, stop):
                value = first[i] + (second[j] + prices[i, j])
                if value <= cutoff and value < values[0]:
                    rest = smaller(rest, values[0])
                    _heap_replace(values, kept, value, i * columns + j)
                else:
                    rest = smaller(rest, value)
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


@numba.njit(nogil=True, cache=True)
def bid(prices, owners, held, cells, bases, thresholds, queue, state, stale, epsilon, max_bids):
    """Lets waiting words bid until none is left or ``stale`` is full.

    Args:
      prices: (cells,) float64 prices, raised in place.
      owners: (cells,) word at each cell, -1 for none.
      held: (n,) cell of each word, -1 for none.
      cells, bases, thresholds: the cheapest cells of each word, see `scan`.
      queue: (n,) ring of words without a cell.
      state: (3,) head of the ring, its length, and the number of words in ``stale``.
      stale: words whose cheapest cells must be found again, written.
      epsilon: least raise of a bid over the price.
      max_bids: bids after which to return.

    Returns:
      The number of bids made.
    """
    n = queue.shape[0]
    keep = cells.shape[1]
    head, waiting, outdated = state[0], state[1], state[2]
    made = 0
    while waiting > 0 and outdated < stale.shape[0] and made < max_bids:
        word = queue[head]
        head = head + 1 if head + 1 < n else 0
        waiting -= 1
        best = np.inf
        other = thresholds[word]
        target = np.int64(-1)
        for at in range(keep):
            cell = np.int64(cells[word, at])
            if cell < 0:
                continue
            value = bases[word, at] + prices[cell]
            if value < best or (value == best and cell < target):
                other = min(other, best)
                best = value
                target = cell
            else:
                other = min(other, value)
        if target < 0 or best > thresholds[word]:
            stale[outdated] = word
            outdated += 1
            continue
        made += 1
        price = prices[target]
        # A raise by the whole difference leaves the word just as content as with its second choice.
        raise_by = max(other - best, epsilon) if other < np.inf else epsilon
        prices[target] = max(price + raise_by, np.nextafter(price, np.inf))
        loser = owners[target]
        owners[target] = word
        held[word] = target
        if loser >= 0:
            held[loser] = -1
            tail = head + waiting
            queue[tail - n if tail >= n else tail] = loser
            waiting += 1
    state[0], state[1], state[2] = head, waiting, outdated
    return made
