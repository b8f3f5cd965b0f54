"""The K most probable next words, found without looking at most of the vocabulary.

A prefix (some first coordinates of a word, for two components its row) is at least as probable as
each of its words. So prefixes are expanded best first, and the search ends when no unexpanded one
is as probable as the K-th best word found: the result is that of sorting the whole vocabulary. All
texts of a batch are searched at once, some of the best prefixes of each in a round.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.seats import PredictedTable
from fairseq_lightrnn.core.softmax import Queries, at_least_float32

__all__ = ["EXPANSIONS", "TopWords", "component_log_probs", "require_numbers", "top_words"]

# Prefixes of a text expanded in the first round; each round takes twice as many as that before.
_FIRST_ROUND = 4
_LAST_ROUND = 256
# Prefixes of all texts expanded at once; bounds the memory of their contexts and words.
EXPANSIONS = 4096
_IMPOSSIBLE = float("-inf")
_NO_NUMBERS = "the model's predictions are no numbers: its parameters are nan or infinite"


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
    head: ComponentHead, context: Context, prefix: Tensor, featured: Tensor | None = None
) -> Tensor:
    """Computes log P(value | prefix) of the component that a context predicts.

    Args:
        head: predicts words.
        context: of N texts, conditioned on the prefix.
        prefix: the coordinates before the component, shape (N, i).
        featured: see :meth:`ComponentSoftmax.logits`.

    Returns:
        Log-probabilities in nats, shape (N, R_i), -inf where a value leads to no word.
    """
    logits = head.softmax.logits(prefix.size(1), context.output, prefix, context.queries, featured)
    return torch.log_softmax(at_least_float32(logits), dim=1)


class _Pick(NamedTuple):
    """N prefixes to be expanded: expanded ones of one length, longer by a value.

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

    def where(self, chosen: Tensor) -> _Pick:
        """Picks prefixes by a mask or an index."""
        return _Pick(*(part[chosen] for part in self))


class _Level:
    """N expanded prefixes of i components, and those longer by a value that are not expanded.

    Args:
        context: conditioned on the prefixes.
        prefix: their coordinates, shape (N, i).
        text: which text of the batch each continues, shape (N,).
        bounds: log-probabilities of the longer ones, shape (N, R); -inf once they are expanded.
    """

    def __init__(self, context: Context, prefix: Tensor, text: Tensor, bounds: Tensor) -> None:
        self.context = context
        self.prefix = prefix
        self.text = text
        self.bounds = bounds

    def join(self, other: _Level) -> _Level:
        """Puts further prefixes behind these."""
        pairs = (
            (self.prefix, other.prefix),
            (self.text, other.text),
            (self.bounds, other.bounds),
        )
        return _Level(self.context.join(other.context), *map(torch.cat, pairs))

    def candidates(self, worst: Tensor, width: int) -> _Pick:
        """Returns the best ``width`` longer ones of each prefix that may hold a word of the top K.

        Those of a text are among them, whichever prefixes they are longer than.
        """
        bounds, values = self.bounds.topk(min(width, self.bounds.size(1)), dim=1)
        good = (bounds >= worst[self.text, None]) & (bounds > _IMPOSSIBLE)
        node, place = good.nonzero(as_tuple=True)
        return _Pick(self.text[node], bounds[node, place], node, values[node, place])


class _Best:
    """The best words so far of B texts, K of each.

    Attributes:
        worst: the K-th best log-probability of each text, shape (B,); words below it are out.
    """

    def __init__(self, table: PredictedTable, batch: int, count: int, scores: Tensor) -> None:
        self.table = table
        self.count = count
        self.worst = scores.new_full((batch,), _IMPOSSIBLE)
        self._text = torch.empty(0, dtype=torch.long, device=scores.device)
        self._word = self._text
        self._score = scores.new_empty(0)

    def add(self, text: Tensor, prefix: Tensor, scores: Tensor) -> None:
        """Offers the words, with scores (N, C), of some prefixes (N, k - 1) of texts (N,)."""
        least = self.worst[text]
        if bool((least == _IMPOSSIBLE).any()):
            # Of one prefix no more than K words can count, but for ties.
            best = scores.topk(min(self.count, scores.size(1)), dim=1).values
            least = torch.maximum(least, best[:, -1])
        good = (scores >= least[:, None]) & (scores > _IMPOSSIBLE)
        row, column = good.nonzero(as_tuple=True)
        cells = self.table.number(prefix)[row] * scores.size(1) + column
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
        """Returns words and log-probabilities, both (B, K); to be called when all are found.

        Raises:
            FloatingPointError: if some are not to be found.
        """
        if len(self._word) != len(self.worst) * self.count:
            raise FloatingPointError(_NO_NUMBERS)
        return self._word.view(-1, self.count), self._score.view(-1, self.count)


def require_numbers(predictions: Tensor) -> None:
    """Refuses predictions of a model whose parameters are NaN or infinite.

    No word is more probable than one of probability NaN, and none is expanded: such a model would
    look certain of every word.

    Raises:
        FloatingPointError: if one of them is NaN.
    """
    if predictions.isnan().any():
        raise FloatingPointError(_NO_NUMBERS)


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


@overload
def top_words(head: ComponentHead, context: Context, count: int) -> TopWords: ...


@overload
def top_words(
    head: ComponentHead, context: Context, count: int, budget: int
) -> TopWords | None: ...


def top_words(
    head: ComponentHead,
    context: Context,
    count: int,
    budget: int | None = None,
) -> TopWords | None:
    """Finds the K most probable next words, exactly.

    Args:
        head: predicts words.
        context: of B texts, before any component of the next word is known.
        count: K; of a smaller vocabulary all words are returned.
        budget: give up once more than so many prefixes of a text, on average, would be expanded.

    Returns:
        The words, or None if the search was given up.

    Raises:
        ValueError: if ``count`` is below 1.
        FloatingPointError: if a prediction is not a number.
    """
    if count < 1:
        raise ValueError(f"count {count}: at least 1 word must be asked for")
    context, table = head.to_extend(context), head.table
    projected = head.softmax.project(context.queries)  # once a text, not for each of its prefixes
    text = torch.arange(len(context.output), device=context.output.device)
    prefix = text.new_empty(len(text), 0)
    scores = component_log_probs(head, context, prefix)
    best = _Best(table, len(text), min(count, table.num_words), scores)
    expanded = torch.zeros_like(text)
    levels: list[_Level] = []
    if table.num_components > 1:
        # What features add is projected; prefixes need not copy what it was projected from.
        levels.append(_Level(context._replace(queries=()), prefix, text, scores))
    else:
        best.add(text, prefix, scores)
    width = _FIRST_ROUND
    while picked := _pick(levels, best.worst, width):
        total = int(expanded.sum()) + sum(len(pick.text) for _, pick in picked)
        if budget is not None and total > budget * len(text):
            return None
        for component, pick in picked:
            expanded += torch.bincount(pick.text, minlength=len(expanded))
            for some in torch.arange(len(pick.text), device=text.device).split(EXPANSIONS):
                deeper = _expand(head, levels[component], pick.where(some), projected)
                if component + 2 == table.num_components:
                    best.add(deeper.text, deeper.prefix, deeper.bounds)
                elif component + 1 == len(levels):
                    levels.append(deeper)
                else:
                    levels[component + 1] = levels[component + 1].join(deeper)
        width = min(2 * width, _LAST_ROUND)
    return TopWords(*best.result(), expanded)


def _expand(head: ComponentHead, level: _Level, pick: _Pick, projected: Queries) -> _Level:
    """Conditions contexts on prefixes of a level that are longer by a value.

    Args:
        head: predicts words.
        level: of the prefixes.
        pick: which, and the values.
        projected: of all texts; see :meth:`ComponentSoftmax.project`.
    """
    component = level.prefix.size(1)
    context = head.extend(level.context.select(pick.node), component, pick.value)
    prefix = torch.cat([level.prefix[pick.node], pick.value[:, None]], dim=1)
    featured = None
    if len(head.softmax.features) and component + 2 == head.table.num_components:
        own = tuple(None if part is None else part[pick.text] for part in projected)
        featured = head.softmax.projected_logits(own, prefix)
    bounds = component_log_probs(head, context, prefix, featured) + pick.bound[:, None]
    return _Level(context, prefix, pick.text, bounds)


def _pick(levels: list[_Level], worst: Tensor, width: int) -> list[tuple[int, _Pick]]:
    """Takes the best ``width`` prefixes of each text that may hold a word of the top K.

    Returns those of each level that has any, with its number.
    """
    candidates = [level.candidates(worst, width) for level in levels]
    every = _Pick(*map(torch.cat, zip(*candidates, strict=True))) if levels else None
    if every is None or not len(every.text):
        return []
    rank = torch.empty_like(every.text)
    order, ranks = _rank(every.text, every.bound, len(worst))
    rank[order] = ranks
    picked = []
    sizes = [len(some.text) for some in candidates]
    for number, (some, of_level) in enumerate(zip(candidates, rank.split(sizes), strict=True)):
        pick = some.where(of_level < width)
        levels[number].bounds[pick.node, pick.value] = _IMPOSSIBLE
        if len(pick.text):
            picked.append((number, pick))
    return picked
