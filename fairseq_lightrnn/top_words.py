"""The K most probable next words, found without looking at most of the vocabulary.

A prefix (some first coordinates of a word, for two components its row) is at least as probable as
each of its words. So prefixes are expanded best first, and the search ends when no unexpanded one
is as probable as the K-th best word found: the result is that of sorting the whole vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.components import ComponentSoftmax, at_least_float32

if TYPE_CHECKING:
    from fairseq_lightrnn.composition import Context, Prediction

__all__ = ["TopWords", "component_log_probs", "top_words"]

# Prefixes of a text expanded in the first round; each round takes twice as many as that before.
_FIRST_ROUND = 4
_LAST_ROUND = 256
_IMPOSSIBLE = float("-inf")


class TopWords(NamedTuple):
    """The most probable next words of B texts.

    Attributes:
        words: shape (B, K), the most probable first; of equally probable words the lower id.
        log_probs: shape (B, K), in nats.
        expanded: integers of shape (B,): how many prefixes (for two components: rows) were
            conditioned on.
    """

    words: Tensor
    log_probs: Tensor
    expanded: Tensor


def component_log_probs(
    softmax: ComponentSoftmax, context: Context, prefix: Tensor, own: Tensor | None = None
) -> Tensor:
    """Computes log P(value | prefix) of the component that a context predicts.

    Args:
        softmax: predicts components.
        context: of N texts, conditioned on the prefix.
        prefix: the coordinates before the component, shape (N, i).
        own: see :meth:`ComponentSoftmax.logits`.

    Returns:
        Log-probabilities in nats, shape (N, R_i), -inf where a value leads to no word.
    """
    logits = softmax.logits(prefix.size(1), context.output, prefix, own)
    return torch.log_softmax(at_least_float32(logits), dim=1)


class _Level:
    """Some expanded prefixes of the same length, not yet whole but for the last coordinate."""

    def __init__(self, context: Context, prefix: Tensor, scores: Tensor) -> None:
        self.context = context
        self.prefix = prefix
        bounds, values = scores.sort(dim=1, descending=True)
        self.bounds = bounds.cpu().numpy()  # (N, R_i) log-probabilities of the longer prefixes
        self.values = values.cpu().numpy()


class _Pick(NamedTuple):
    """A value by which to lengthen a prefix of a level."""

    level: _Level
    node: int
    value: int
    bound: float


class _Search:
    """The search for one text: what is open, and the best words so far."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.expanded = 0
        self.worst = _IMPOSSIBLE  # the K-th best log-probability; words below it are out
        self._words = np.empty(0, dtype=np.int64)
        self._log_probs = np.empty(0)
        # The most probable unexpanded value of every open prefix, the most probable of all first.
        self._open: list[tuple[float, int, int, int, _Level]] = []
        self._serial = 0

    def open(self, level: _Level, node: int, cursor: int = 0) -> None:
        """Adds a prefix whose values from ``cursor`` on, in order of probability, are to come."""
        if cursor < level.bounds.shape[1] and level.bounds[node, cursor] >= self.worst:
            bound = float(level.bounds[node, cursor])
            if bound > _IMPOSSIBLE:
                self._serial += 1
                heapq.heappush(self._open, (-bound, self._serial, node, cursor, level))

    def pick(self, width: int) -> Iterator[_Pick]:
        """Yields up to ``width`` prefixes that may hold a word of the top K."""
        for _ in range(width):
            if not self._open or -self._open[0][0] < self.worst:
                return
            bound, _, node, cursor, level = heapq.heappop(self._open)
            self.open(level, node, cursor + 1)
            self.expanded += 1
            yield _Pick(level, node, int(level.values[node, cursor]), -bound)

    def add(self, words: np.ndarray, log_probs: np.ndarray) -> None:
        """Offers words, each for the first time."""
        good = np.flatnonzero((log_probs >= self.worst) & (log_probs > _IMPOSSIBLE))
        self._words = np.concatenate([self._words, words[good]])
        self._log_probs = np.concatenate([self._log_probs, log_probs[good]])
        if len(self._words) >= self.count:
            order = np.lexsort((self._words, -self._log_probs))[: self.count]
            self._words, self._log_probs = self._words[order], self._log_probs[order]
            self.worst = float(self._log_probs[-1])

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        return self._words, self._log_probs


def top_words(
    composition: Prediction, softmax: ComponentSoftmax, context: Context, count: int
) -> TopWords:
    """Finds the K most probable next words, exactly.

    Args:
        composition: conditions a context on components of the next word.
        softmax: predicts components.
        context: of B texts, as ``composition.read`` returned it.
        count: K; of a smaller vocabulary all words are returned.

    Raises:
        ValueError: if ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count {count}: at least 1 word must be asked for")
    count = min(count, softmax.table.num_words)
    batch, device = len(context.output), context.output.device
    searches = [_Search(count) for _ in range(batch)]
    prefix = torch.empty(batch, 0, dtype=torch.long, device=device)
    _expand(softmax, context, prefix, torch.zeros(batch, device=device), searches)
    width = _FIRST_ROUND
    while picks := [(search, pick) for search in searches for pick in search.pick(width)]:
        for level, chosen in _by_level(picks):
            index = torch.tensor([pick.node for _, pick in chosen], device=device)
            value = torch.tensor([pick.value for _, pick in chosen], device=device)
            bound = torch.tensor(
                [pick.bound for _, pick in chosen], device=device, dtype=torch.float64
            )
            component = level.prefix.size(1)
            longer = composition.extend(level.context.select(index), component, value)
            prefix = torch.cat([level.prefix[index], value[:, None]], dim=1)
            _expand(softmax, longer, prefix, bound, [search for search, _ in chosen])
        width = min(2 * width, _LAST_ROUND)
    words, log_probs = zip(*(search.result() for search in searches), strict=True)
    dtype = at_least_float32(context.output).dtype
    return TopWords(
        torch.from_numpy(np.stack(words)).to(device),
        torch.from_numpy(np.stack(log_probs)).to(device, dtype),
        torch.tensor([search.expanded for search in searches], device=device),
    )


def _by_level(
    picks: Iterable[tuple[_Search, _Pick]],
) -> Iterable[tuple[_Level, list[tuple[_Search, _Pick]]]]:
    groups: dict[int, tuple[_Level, list[tuple[_Search, _Pick]]]] = {}
    for search, pick in picks:
        groups.setdefault(id(pick.level), (pick.level, []))[1].append((search, pick))
    return groups.values()


def _expand(
    softmax: ComponentSoftmax,
    context: Context,
    prefix: Tensor,
    log_probs: Tensor,
    searches: list[_Search],
) -> None:
    """Shows the searches what follows a prefix each: words, or prefixes longer by a value."""
    scores = component_log_probs(softmax, context, prefix)
    scores = scores + log_probs[:, None].to(scores.dtype)
    table = softmax.table
    if prefix.size(1) + 1 < table.num_components:
        level = _Level(context, prefix, scores)
        for node, search in enumerate(searches):
            search.open(level, node)
        return
    words = table.words.reshape(-1, table.shape[-1])[table.flatten(prefix)].cpu().numpy()
    for search, row_words, row_scores in zip(searches, words, scores.cpu().numpy(), strict=True):
        search.add(row_words, row_scores)
