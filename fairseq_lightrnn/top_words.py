"""The K most probable next words, found without looking at most of the vocabulary.

A prefix (some first coordinates of a word, for two components its row) is at least as probable as
each of its words. So prefixes are expanded best first, and the search ends when no unexpanded one
is as probable as the K-th best word found: the result is that of sorting the whole vocabulary. All
texts of a batch are searched at once, some of the best prefixes of each in a round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fairseq_lightrnn.components import ComponentSoftmax, at_least_float32

if TYPE_CHECKING:
    from fairseq_lightrnn.composition import Context, Prediction
    from fairseq_lightrnn.table_lookup import TableLookup

__all__ = ["TopWords", "component_log_probs", "top_words"]

# Prefixes of a text expanded in the first round; each round takes twice as many as that before.
_FIRST_ROUND = 4
_LAST_ROUND = 256
# Prefixes of all texts expanded at once; bounds the memory of their contexts and words.
_EXPANSIONS = 4096
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


class _Open(NamedTuple):
    """N prefixes that are not expanded yet: expanded ones of one length, longer by a value.

    Attributes:
        text: which text of the batch each continues, shape (N,).
        bound: the log-probability of each, shape (N,).
        node: which of the expanded prefixes each is longer than, shape (N,).
        value: by which it is longer, shape (N,).
    """

    text: Tensor
    bound: Tensor
    node: Tensor
    value: Tensor

    def where(self, chosen: Tensor) -> _Open:
        """Picks prefixes by a mask or an index."""
        return _Open(*(part[chosen] for part in self))


class _Level:
    """All prefixes of i components that were expanded, and those of i + 1 that are open."""

    def __init__(self) -> None:
        self.expanded: tuple[Context, Tensor] | None = None  # contexts of N prefixes (N, i)
        self.open: _Open | None = None

    def add(self, context: Context, prefix: Tensor, text: Tensor, scores: Tensor) -> None:
        """Adds expanded prefixes (N, i) and the log-probabilities (N, R) of the longer ones."""
        node, value = (scores > _IMPOSSIBLE).nonzero(as_tuple=True)
        new = _Open(text[node], scores[node, value], node, value)
        if self.expanded is None or self.open is None:
            self.expanded, self.open = (context, prefix), new
            return
        new = new._replace(node=node + len(self.expanded[1]))
        old_context, old_prefix = self.expanded
        self.expanded = old_context.join(context), torch.cat([old_prefix, prefix])
        self.open = _Open(*map(torch.cat, zip(self.open, new, strict=True)))


class _Best:
    """The best words so far of B texts, K of each.

    Attributes:
        worst: the K-th best log-probability of each text, shape (B,); words below it are out.
    """

    def __init__(self, table: TableLookup, batch: int, count: int, scores: Tensor) -> None:
        self.table = table
        self.count = count
        self.worst = scores.new_full((batch,), _IMPOSSIBLE)
        self._text = torch.empty(0, dtype=torch.long, device=scores.device)
        self._word = self._text
        self._score = scores.new_empty(0)

    def add(self, text: Tensor, prefix: Tensor, scores: Tensor) -> None:
        """Offers the words, with scores (N, C), of some prefixes (N, k - 1) of texts (N,)."""
        # Of one prefix no more than K words can count, but for ties.
        least = scores.topk(min(self.count, scores.size(1)), dim=1).values[:, -1]
        least = torch.maximum(least, self.worst[text])[:, None]
        row, column = ((scores >= least) & (scores > _IMPOSSIBLE)).nonzero(as_tuple=True)
        cells = self.table.flatten(prefix)[row] * scores.size(1) + column
        text = torch.cat([self._text, text[row]])
        word = torch.cat([self._word, self.table.words[cells]])
        score = torch.cat([self._score, scores[row, column]])
        by_word = word.argsort()
        order, rank = _rank(text[by_word], score[by_word], len(self.worst))
        order = by_word[order][rank < self.count]
        self._text, self._word, self._score = text[order], word[order], score[order]
        last = rank[rank < self.count] == self.count - 1
        self.worst[self._text[last]] = self._score[last]

    def result(self) -> tuple[Tensor, Tensor]:
        """Returns words and log-probabilities, both (B, K); to be called when all are found."""
        return self._word.view(-1, self.count), self._score.view(-1, self.count)


def _rank(text: Tensor, score: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Sorts by text, then from the highest score on; equal ones stay in order.

    Returns:
        The order, and each one's rank in it among those of its text, both of shape (N,).
    """
    order = score.argsort(descending=True, stable=True)
    order = order[text[order].argsort(stable=True)]
    counts = torch.bincount(text, minlength=batch)
    before = counts.cumsum(0) - counts
    return order, torch.arange(len(text), device=text.device) - before[text[order]]


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
    if not composition.reads_components:
        # Or they would be copied for every prefix.
        context = context._replace(state=None, source=None)
    table = softmax.table
    text = torch.arange(len(context.output), device=context.output.device)
    prefix = text.new_empty(len(text), 0)
    scores = component_log_probs(softmax, context, prefix)
    best = _Best(table, len(text), min(count, table.num_words), scores)
    expanded = torch.zeros_like(text)
    levels = [_Level() for _ in table.shape[1:]]

    def expand(context: Context, prefix: Tensor, text: Tensor, scores: Tensor) -> None:
        if prefix.size(1) < len(levels):
            levels[prefix.size(1)].add(context, prefix, text, scores)
        else:
            best.add(text, prefix, scores)

    expand(context, prefix, text, scores)
    width = _FIRST_ROUND
    while any(level.open is not None and len(level.open.text) for level in levels):
        for component, picked in enumerate(_pick(levels, best.worst, width)):
            expanded += torch.bincount(picked.text, minlength=len(expanded))
            for some in torch.arange(len(picked.text), device=text.device).split(_EXPANSIONS):
                pick = picked.where(some)
                known, known_prefix = levels[component].expanded  # type: ignore[misc]
                longer = composition.extend(known.select(pick.node), component, pick.value)
                prefix = torch.cat([known_prefix[pick.node], pick.value[:, None]], dim=1)
                scores = component_log_probs(softmax, longer, prefix) + pick.bound[:, None]
                expand(longer, prefix, pick.text, scores)
        width = min(2 * width, _LAST_ROUND)
    return TopWords(*best.result(), expanded)


def _pick(levels: list[_Level], worst: Tensor, width: int) -> list[_Open]:
    """Takes from the open prefixes those that a round expands: the best ``width`` of each text.

    Prefixes that cannot hold a word of the top K are dropped. Returns those of each level.
    """
    opened = [level.open for level in levels if level.open is not None]
    sizes = [len(part.text) for part in opened]
    every = _Open(*map(torch.cat, zip(*opened, strict=True)))
    level = torch.arange(len(opened), device=worst.device)
    level = level.repeat_interleave(torch.tensor(sizes, device=worst.device))
    good = every.bound >= worst[every.text]
    every, level = every.where(good), level[good]
    order, rank = _rank(every.text, every.bound, len(worst))
    every, level = every.where(order), level[order]
    for number in range(len(opened)):
        levels[number].open = every.where((rank >= width) & (level == number))
    return [every.where((rank < width) & (level == number)) for number in range(len(opened))]
