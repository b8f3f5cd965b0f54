"""Auction of the cells of a table: the compiled loops of joint assignment.

A word values a cell at ``row cost + column cost + price``. Its cheapest cells are cached with a threshold below which
no other cell can be: prices only rise, so the cache stays right until its best entry passes the threshold. Only then are
all cells looked at again, a tropical matrix product of the word's column costs with the prices.
"""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["bid", "scan", "sweep"]

_FLAGS = {"nnan", "nsz"}


@numba.njit(nogil=True, cache=True, fastmath=_FLAGS)
def _row_minima(first, second, prices, minima):
    """Writes ``first[i] + min_j (second[j] + prices[i, j])`` for every row i."""
    for i in range(prices.shape[0]):
        row = prices[i]
        least = np.inf
        for j in range(row.shape[0]):
            least = min(least, second[j] + row[j])
        minima[i] = first[i] + least


@numba.njit(nogil=True, cache=True)
def _heap_replace(values, cells, size, value, cell):
    """Replaces the largest of ``size`` entries of a heap."""
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
def scan(first, second, prices, words, cells, bases, thresholds):
    """Finds the cheapest cells of each of ``words`` at the present prices.

    Args:
      first: (n, R) row costs.
      second: (n, C) column costs.
      prices: (R, C) prices; infinite where a cell is not to be had.
      words: (b,) words to look after.
      cells: (n, K) their cheapest cells, written; -1 where there are fewer.
      bases: (n, K) the costs of these cells without the price, written.
      thresholds: (n,) a value that every other cell reaches, written.
    """
    rows, columns = prices.shape
    keep = cells.shape[1]
    minima = np.empty(rows, np.float64)
    values = np.empty(keep, np.float64)
    kept = np.empty(keep, np.int64)
    for word in words:
        _row_minima(first[word], second[word], prices, minima)
        cutoff = np.partition(minima, keep - 1)[keep - 1] if rows > keep else np.inf
        threshold = np.inf
        values[:] = np.inf
        kept[:] = -1
        for i in range(rows):
            if minima[i] > cutoff or minima[i] >= values[0]:
                threshold = min(threshold, minima[i])
                continue
            for j in range(columns):
                value = (second[word, j] + prices[i, j]) + first[word, i]
                if value < values[0]:
                    threshold = min(threshold, values[0])
                    _heap_replace(values, kept, keep, value, i * columns + j)
                else:
                    threshold = min(threshold, value)
        thresholds[word] = threshold
        for at in range(keep):
            cell = kept[at]
            cells[word, at] = cell
            bases[word, at] = np.inf
            if cell >= 0:
                bases[word, at] = first[word, cell // columns] + second[word, cell % columns]


@numba.njit(nogil=True, cache=True)
def sweep(first, second, prices, words, values):
    """Writes the least of cost plus price over all cells to ``values`` for each of ``words``."""
    minima = np.empty(prices.shape[0], np.float64)
    for word in words:
        _row_minima(first[word], second[word], prices, minima)
        values[word] = minima.min()


@numba.njit(nogil=True, cache=True)
def bid(prices, owners, held, cells, bases, thresholds, queue, state, stale, epsilon, max_bids):
    """Lets waiting words bid until none is left, ``stale`` is full or ``max_bids`` bids are made.

    Args:
      prices: (cells,) prices, raised in place.
      owners: (cells,) word at each cell, -1 for none.
      held: (n,) cell of each word, -1 for none.
      cells, bases, thresholds: the cheapest cells of each word, see `scan`.
      queue: (n,) ring of words without a cell.
      state: (3,) head of the ring, its length, and the number of words in ``stale``.
      stale: words whose cheapest cells must be found again, written.
      epsilon: least raise over what the word would pay elsewhere.
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
        target = -1
        for at in range(keep):
            cell = cells[word, at]
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
        raised = price + epsilon
        if other < np.inf:
            raised += other - best
        prices[target] = max(raised, np.nextafter(price, np.inf))
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
