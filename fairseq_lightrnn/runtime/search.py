"""Exact answers about the next word: the most probable ones, all of them, or one at random.

A prefix of coordinates (for two components a row) is at least as probable as each of its words. So
prefixes are opened best first, until none that is left can hold one of the most probable words.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fairseq_lightrnn.runtime.network import Context, Network, Position

__all__ = ["draw", "draw_words", "every_word", "top_words"]

# Prefixes of a text that are opened in the first round, at most in any, and of all texts at once.
_FIRST_ROUND = 4
_LAST_ROUND = 256
_AT_ONCE = 1024


class _Nodes(NamedTuple):
    """N prefixes that are not opened.

    Attributes:
        text: which text each continues, (N,).
        bound: the log-probability of each, (N,).
        prefix: (N, i).
        parent: which of the texts that ``carried`` has each continues, (N,).
        carried: of their context.
    """

    text: np.ndarray
    bound: np.ndarray
    prefix: np.ndarray
    parent: np.ndarray
    carried: dict[str, np.ndarray]

    def where(self, chosen: np.ndarray) -> _Nodes:
        text, bound, prefix, parent = (part[chosen] for part in self[:4])
        return _Nodes(text, bound, prefix, parent, self.carried)


def _rank(text: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Ranks scores among those of the same text, from 0; of equal ones the first is before."""
    order = np.lexsort((-score, text))
    first = np.searchsorted(text[order], text[order])
    rank = np.empty(len(text), dtype=np.int64)
    rank[order] = np.arange(len(text)) - first
    return rank


class _Best:
    """The best words so far of some texts."""

    def __init__(self, texts: int, count: int) -> None:
        self.count = count
        self.worst = np.full(texts, -np.inf)
        self.text = np.zeros(0, dtype=np.int64)
        self.word = np.zeros(0, dtype=np.int64)
        self.score = np.zeros(0)

    def add(self, text: np.ndarray, word: np.ndarray, score: np.ndarray) -> None:
        good = (score >= self.worst[text]) & (score > -np.inf)
        text = np.concatenate([self.text, text[good]])
        word = np.concatenate([self.word, word[good]])
        score = np.concatenate([self.score, score[good].astype(np.float64)])
        order = word.argsort(kind="stable")
        text, word, score = text[order], word[order], score[order]
        rank = _rank(text, score)
        kept = rank < self.count
        self.text, self.word, self.score = text[kept], word[kept], score[kept]
        last = rank[kept] == self.count - 1
        self.worst[self.text[last]] = self.score[last]


def top_words(
    network: Network, position: Position, count: int, within: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Finds the most probable next words of some texts, exactly.

    Args:
        network: predicts words.
        position: of the texts.
        count: how many words of each.
        within: find the most probable of these words only, integers of shape (W,).

    Returns:
        For each text, the words and their log-probabilities in nats, the most probable first; of
        equally probable ones the lower number.

    Raises:
        ValueError: if ``count`` is below 1.
        FloatingPointError: if a prediction is not a number.
    """
    if count < 1:
        raise ValueError(f"count {count}: at least 1 word must be asked for")
    texts = len(position.output)
    seating = network.seating
    total, wanted = len(seating.coordinates), None
    if within is not None:
        wanted = np.zeros(total, dtype=bool)
        wanted[within] = True
        total = len(within)
    best = _Best(texts, min(count, total))
    if not total:
        return [(best.word, best.score)] * texts
    context = network.first(position)
    if np.isnan(context.log_probs).any():
        raise FloatingPointError("the model's predictions are no numbers")
    every = np.arange(texts)
    levels: list[_Nodes] = []
    _open(network, wanted, best, levels, context, every, np.zeros((texts, 0), np.int32))
    width = _FIRST_ROUND
    while levels:
        level = [nodes.where(nodes.bound >= best.worst[nodes.text]) for nodes in levels]
        text = np.concatenate([nodes.text for nodes in level])
        rank = _rank(text, np.concatenate([nodes.bound for nodes in level]))
        ranks = np.split(rank, np.cumsum([len(nodes.text) for nodes in level])[:-1])
        levels = []
        for nodes, of_level in zip(level, ranks, strict=True):
            chosen = np.flatnonzero(of_level < width)
            rest = nodes.where(of_level >= width)
            if len(rest.text):
                levels.append(rest)
            for start in range(0, len(chosen), _AT_ONCE):
                some = nodes.where(chosen[start : start + _AT_ONCE])
                deeper = network.extend(some.carried, some.parent, some.prefix)
                bounds = some.bound[:, None] + deeper.log_probs
                context = Context(bounds, deeper.carried)
                _open(network, wanted, best, levels, context, some.text, some.prefix)
        width = min(2 * width, _LAST_ROUND)
    result = []
    for number in range(texts):
        mine = best.text == number
        order = np.lexsort((best.word[mine], -best.score[mine]))
        result.append((best.word[mine][order], best.score[mine][order]))
    return result


def _open(
    network: Network,
    wanted: np.ndarray | None,
    best: _Best,
    levels: list[_Nodes],
    context: Context,
    text: np.ndarray,
    prefix: np.ndarray,
) -> None:
    """Offers the words of prefixes (N, i), or notes the prefixes that are longer by one value.

    ``wanted`` tells which of the V words are looked for, (V,), or is None for all.
    """
    scores = context.log_probs
    seating = network.seating
    if prefix.shape[1] + 1 == network.components:
        words = seating.words[seating.number(prefix)]
        good = words >= 0
        if wanted is not None:
            good &= wanted[words]
        good &= scores >= best.worst[text][:, None]
        node, value = np.nonzero(good)
        best.add(text[node], words[node, value].astype(np.int64), scores[node, value])
        return
    good = np.isfinite(scores)
    if wanted is not None:
        good &= _leading_to(network, wanted, prefix)
    node, value = np.nonzero(good)
    longer = np.concatenate([prefix[node], value[:, None].astype(np.int32)], axis=1)
    levels.append(_Nodes(text[node], scores[node, value], longer, node, context.carried))


def _leading_to(network: Network, wanted: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """Tells which values after prefixes (N, i) lead to one of the wanted words: (N, R_i)."""
    seating, component = network.seating, prefix.shape[1]
    size = seating.shape[component]
    prefixes = seating.coordinates[wanted, : component + 1]
    leading = np.zeros(math.prod(seating.shape[: component + 1]), dtype=bool)
    leading[seating.number(prefixes)] = True
    return leading.reshape(-1, size)[seating.number(prefix)]


def every_word(network: Network, position: Position) -> np.ndarray:
    """Returns the log-probabilities of all words as the next ones of N texts, float32 (N, V)."""
    seating = network.seating
    texts = len(position.output)
    context = network.first(position)
    prefix = np.zeros((texts, 0), dtype=np.int32)
    text, carried, scores = np.arange(texts), context.carried, context.log_probs
    for component in range(1, network.components):
        node, value = np.nonzero(np.isfinite(scores))
        prefix = np.concatenate([prefix[node], value[:, None].astype(np.int32)], axis=1)
        text, bounds = text[node], scores[node, value]
        parts = [
            network.extend(
                carried, node[start : start + _AT_ONCE], prefix[start : start + _AT_ONCE]
            )
            for start in range(0, len(node), _AT_ONCE)
        ]
        scores = bounds[:, None] + np.concatenate([part.log_probs for part in parts])
        if component + 1 < network.components:
            names = parts[0].carried
            carried = {name: np.concatenate([p.carried[name] for p in parts]) for name in names}
    result = np.full((texts, len(seating.coordinates)), -np.inf, dtype=np.float32)
    words = seating.words[seating.number(prefix)]
    node, value = np.nonzero(words >= 0)
    result[text[node], words[node, value]] = scores[node, value]
    return result


def draw(log_weights: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws a column of each row of log-weights (N, M), which need not be normalised: (N,)."""
    # The largest of them with independent Gumbel noise added is such a draw.
    noise = generator.gumbel(size=log_weights.shape)
    return np.asarray((log_weights.astype(np.float64) + noise).argmax(axis=1))


def draw_words(network: Network, position: Position, generator: np.random.Generator) -> np.ndarray:
    """Draws a next word for each text, component by component: (N,)."""
    context = network.first(position)
    every = np.arange(len(position.output))
    prefix = draw(context.log_probs, generator)[:, None].astype(np.int32)
    for _ in range(1, network.components):
        context = network.extend(context.carried, every, prefix)
        value = draw(context.log_probs, generator)[:, None].astype(np.int32)
        prefix = np.concatenate([prefix, value], axis=1)
    words = network.seating.words.reshape(-1)[network.seating.number(prefix)]
    return words.astype(np.int64)
