"""Successive shortest paths over places: the compiled loops that make a balanced assignment exact.

Given any prices, every word sits at its cheapest place, which leaves some places too full and
others with room. Words then move along shortest paths of the residual graph from full places to
places with room. The graph has one node a place, so it stays small however many words there are.
(Ahuja, Magnanti and Orlin, "Network Flows", 1993, ch. 9.)
"""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["repair"]


@numba.njit(nogil=True, cache=True)
def _rescan(costs, place, first, following, spare, arc, mover):
    """Computes the cheapest move from ``place`` to every other place, and who makes it (-2: free
    capacity).
    """
    m = costs.shape[1]
    for j in range(m):
        arc[place, j] = 0.0 if spare[place] > 0 else np.inf
        mover[place, j] = -2 if spare[place] > 0 else -1
    word = first[place]
    while word >= 0:
        _offer(costs, word, place, arc, mover)
        word = following[word]


@numba.njit(nogil=True, cache=True)
def _offer(costs, word, place, arc, mover):
    row = costs[word]
    here = np.float64(row[place])
    for j in range(row.shape[0]):
        move = row[j] - here
        if move < arc[place, j] or (move == arc[place, j] and 0 <= word < mover[place, j]):
            arc[place, j] = move
            mover[place, j] = word


@numba.njit(nogil=True, cache=True)
def _link(word, place, first, following, preceding):
    following[word] = first[place]
    preceding[word] = -1
    if first[place] >= 0:
        preceding[first[place]] = word
    first[place] = word


@numba.njit(nogil=True, cache=True)
def _unlink(word, place, first, following, preceding):
    if preceding[word] >= 0:
        following[preceding[word]] = following[word]
    else:
        first[place] = following[word]
    if following[word] >= 0:
        preceding[following[word]] = preceding[word]


@numba.njit(nogil=True, cache=True)
def _dijkstra(arc, prices, load, capacities, distance, parent, done):
    """Finds the nearest place with room from any overfull place; returns it, or -1."""
    m = prices.shape[0]
    for i in range(m):
        done[i] = False
        parent[i] = -1
        distance[i] = 0.0 if load[i] > capacities[i] else np.inf
    while True:
        node = -1
        for i in range(m):
            if not done[i] and distance[i] < np.inf and (node < 0 or distance[i] < distance[node]):
                node = i
        if node < 0:
            return -1
        if load[node] < capacities[node]:
            return node
        done[node] = True
        base = distance[node] - prices[node]
        row = arc[node]
        for j in range(m):
            reached = base + (row[j] + prices[j])
            if reached < distance[node]:
                reached = distance[node]  # rounding must not make an arc negative
            if not done[j] and reached < distance[j]:
                distance[j] = reached
                parent[j] = node


@numba.njit(nogil=True, cache=True)
def repair(costs, capacities, prices, places, spare, max_paths):
    """Moves words until no place is too full, keeping every word at its cheapest place.

    Args:
      costs: (n, m) costs.
      capacities: (m,) words each place takes.
      prices: (m,) float64 prices, raised in place.
      places: (n,) cheapest place of each word at these prices, changed in place.
      spare: (m,) units of free capacity lying at each place (all of them at the cheapest price),
        changed in place.
      max_paths: paths after which to give up.

    Returns:
      The number of paths, or -1 where ``max_paths`` did not do.
    """
    n, m = costs.shape
    first = np.full(m, -1, np.int64)
    following = np.empty(n, np.int64)
    preceding = np.empty(n, np.int64)
    load = spare.copy()
    for word in range(n - 1, -1, -1):
        _link(word, places[word], first, following, preceding)
        load[places[word]] += 1
    arc = np.empty((m, m), np.float64)
    mover = np.empty((m, m), np.int64)
    excess = 0
    for i in range(m):
        excess += max(0, load[i] - capacities[i])
    if excess == 0:
        return 0
    if excess > max_paths:
        return -1
    for i in range(m):
        _rescan(costs, i, first, following, spare, arc, mover)
    distance = np.empty(m, np.float64)
    parent = np.empty(m, np.int64)
    done = np.empty(m, np.bool_)
    stale = np.zeros(m, np.bool_)
    paths = 0
    while excess > 0:
        target = _dijkstra(arc, prices, load, capacities, distance, parent, done)
        if target < 0:
            return -1
        reach = distance[target]
        for i in range(m):
            if done[i]:
                prices[i] += reach - distance[i]
        load[target] += 1
        node = target
        while parent[node] >= 0:
            source = parent[node]
            word = mover[source, node]
            if word == -2:
                spare[source] -= 1
                spare[node] += 1
            else:
                _unlink(word, source, first, following, preceding)
                _link(word, node, first, following, preceding)
                places[word] = node
            stale[source] = True
            stale[node] = True
            node = source
        load[node] -= 1
        excess -= 1
        paths += 1
        for i in range(m):
            if stale[i]:
                stale[i] = False
                _rescan(costs, i, first, following, spare, arc, mover)
    return paths
