"""Seats words that an exported model does not know, by the loss of the text that they come from.

This is what :mod:`fairseq_lightrnn.new_words` does to a checkpoint, with fewer contexts and in
numpy. Graphs cannot grow, so new words get empty cells and no more columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fairseq_lightrnn.runtime.learnt import Learnt
from fairseq_lightrnn.runtime.network import Network, Position
from fairseq_lightrnn.runtime.seating import nearest_empty

__all__ = ["with_new_words"]

# Occurrences of a word that are looked at, rows that it might go to, and positions of the text that
# stand for all others.
_OCCURRENCES = 8
_CANDIDATES = 8
_POSITIONS = 128
# A new word's bias lies within ± this; halvings of that range.
_MOST_BIAS = 20.0
_HALVINGS = 20


def with_new_words(
    shipped: Network, learnt: Learnt, places: Mapping[str, Sequence[int]], position: Position
) -> tuple[Learnt, list[str]]:
    """Seats new words one after the other.

    Only rows that have words already are taken, so that all rows keep their probabilities.

    Args:
        shipped: the network, which has learnt nothing.
        learnt: so far.
        places: which words of the text each new word is; those that choose first before others.
        position: of the text's n words: where each of them is predicted.

    Returns:
        What is learnt then, and the words that no empty cell was left for.
    """
    total = len(position.output)
    sampled = np.unique(np.linspace(0, total - 1, _POSITIONS).round().astype(np.int64))
    others, scale = position.select(sampled), total / len(sampled)
    network, left = shipped.with_learnt(learnt), []
    for word, occurrences in places.items():
        some = occurrences[:_OCCURRENCES]
        weight = len(occurrences) / len(some)
        found = _best_seat(network, position.select(list(some)), weight, others, scale)
        if found is None:
            left.append(word)
            continue
        learnt = replace(
            learnt,
            words=(*learnt.words, word),
            cells=np.concatenate([learnt.cells, np.array(found.cells)[:, None]], axis=1),
            biases=np.append(learnt.biases, np.float32(found.bias)),
        )
        network = shipped.with_learnt(learnt)
    return learnt, left


class _Seat(NamedTuple):
    """Where a word may sit: its cells in the order of :meth:`Seating.empty`, and its bias."""

    cells: list[int]
    bias: float


def _best_seat(
    network: Network, here: Position, weight: float, others: Position, scale: float
) -> _Seat | None:
    """Returns the seat of least loss for a word.

    Args:
        network: that does not know the word.
        here: where it occurs.
        weight: how many occurrences each of those stands for.
        others: some positions of the text.
        scale: how many each of those stands for.
    """
    empty, end = network.seating.empty(), 2 + network.seating.further
    if not empty[0].any():
        return None
    further = _further_cells(network, here, empty[2:end])
    trial = network.with_one_everywhere(further)
    prefixes = _prefixes(trial, here, empty[0])
    if not len(prefixes):
        return None
    free = empty[0].reshape(network.seating.words.shape)[network.seating.number(prefixes)]
    row, column = np.nonzero(free)
    log_prefix, odds = _odds(trial, here, prefixes, free)
    of_others, odds_of_others = _odds(trial, others, prefixes, free)
    presence = scale * np.exp(of_others[:, row])
    bias = _best_bias(odds, odds_of_others, weight, presence)
    losses = _loss(odds, odds_of_others, bias, weight, presence)
    losses -= weight * log_prefix[:, row].sum(axis=0)
    best = int(losses.argmin())
    prefix = prefixes[row[best]]
    cell = int(np.ravel_multi_index((*prefix.tolist(), int(column[best])), network.seating.shape))
    read_by = nearest_empty(empty[1], cell)
    # No rows are left if words are read by the further tables that they are predicted by.
    beside = [nearest_empty(*one) for one in zip(empty[end:], further, strict=False)]
    return _Seat([cell, read_by, *further, *beside], float(bias[best]))


def _further_cells(network: Network, here: Position, empty: np.ndarray) -> list[int]:
    """Returns the empty cell of each further table whose vectors say the most for a word."""
    if not len(empty):
        return []
    scores, start, cells = network.first(here).carried["scores"].sum(axis=0), 0, []
    for free in empty:
        total = np.zeros(())
        for size in network.seating.shape:
            total = total[..., None] + scores[start : start + size]
            start += size
        cells.append(int(np.where(free, total.reshape(-1), -np.inf).argmax()))
    return cells


def _after(
    network: Network, position: Position, prefixes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns log-probabilities of prefixes (B, i) at n positions, (n, B); and of the component
    after them, (n, B, R_i)."""
    texts, count = len(position.output), len(prefixes)
    context = network.first(position)
    text, prefix = np.repeat(np.arange(texts), count), np.tile(prefixes, (texts, 1))
    every = np.arange(len(text))
    log_probs, carried = context.log_probs[text], context.carried
    log_prefix = np.zeros(len(text))
    for component in range(prefixes.shape[1]):
        log_prefix += log_probs[every, prefix[:, component]]
        context = network.extend(carried, text, prefix[:, : component + 1])
        log_probs, carried, text = context.log_probs, context.carried, every
    shape = texts, count
    return log_prefix.reshape(shape), log_probs.astype(np.float64).reshape(*shape, -1)


def _prefixes(network: Network, here: Position, empty: np.ndarray) -> np.ndarray:
    """Returns the most probable prefixes (B, k - 1) that have words and an empty cell."""
    shape = network.seating.shape
    found = np.zeros((1, 0), dtype=np.int32)
    for component in range(len(shape) - 1):
        log_prefix, log_probs = _after(network, here, found)
        total = (log_prefix[:, :, None] + log_probs).sum(axis=0)
        room = empty.reshape(math.prod(shape[: component + 1]), -1).any(axis=1)
        total[~room.reshape(-1, shape[component])[network.seating.number(found)]] = -np.inf
        best = np.argsort(-total, axis=None, kind="stable")[:_CANDIDATES]
        best = best[total.reshape(-1)[best] > -np.inf]
        before, value = np.unravel_index(best, total.shape)
        found = np.concatenate([found[before], value[:, None].astype(np.int32)], axis=1)
    return found


def _odds(
    network: Network, position: Position, prefixes: np.ndarray, free: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns log-probabilities of prefixes, (n, B); and a word's log-odds against all others.

    Args:
        network: with the word in all empty cells; see :meth:`Network.with_one_everywhere`.
        position: n of them.
        prefixes: (B, k - 1).
        free: which of their cells are empty, (B, C); the odds are those in these E, (n, E).
    """
    log_prefix, log_probs = _after(network, position, prefixes)
    of_words = np.logaddexp.reduce(np.where(free, -np.inf, log_probs), axis=2)
    return log_prefix, (log_probs - of_words[:, :, None])[:, free]


def _loss(
    odds: np.ndarray, of_others: np.ndarray, bias: np.ndarray, weight: float, presence: np.ndarray
) -> np.ndarray:
    """Returns the loss in nats of a word with a bias in each of E cells, (E,).

    Args:
        odds: the word's log-odds in its row where it stands, without its bias, (n, E).
        of_others: likewise at positions of the text, (P, E).
        bias: (E,).
        weight: of each occurrence.
        presence: how many words of the row each position stands for, (P, E).
    """
    own = weight * np.logaddexp(0, -(odds + bias)).sum(axis=0)
    return np.asarray(own + (presence * np.logaddexp(0, of_others + bias)).sum(axis=0))


def _best_bias(
    odds: np.ndarray, of_others: np.ndarray, weight: float, presence: np.ndarray
) -> np.ndarray:
    """Returns the biases of least :func:`_loss`, which is convex in them, by halving."""
    high = np.full(odds.shape[1], _MOST_BIAS)
    low = -high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        gain = weight * _sigmoid(-(odds + middle)).sum(axis=0)
        cost = (presence * _sigmoid(of_others + middle)).sum(axis=0)
        low, high = np.where(gain > cost, middle, low), np.where(gain > cost, high, middle)
    return np.asarray((low + high) / 2)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -values))
