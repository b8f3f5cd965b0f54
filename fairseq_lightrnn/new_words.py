"""Words that a trained model never saw get cells; words that nobody needs give theirs up.

Nothing else of the model changes, and nothing is trained. A new word is seated where the text it
comes from is the most probable: for some rows that its contexts make probable, the loss of its
occurrences in each empty cell, and what its presence there takes from the words of that row. Where
empty cells are too few, the table gets more columns, which start as the mean of the others. Old
words keep their probabilities, but for the share of their row that new ones take.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.features import FurtherTables, WordBias, find_feature
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.search import component_log_probs
from fairseq_lightrnn.language_model import LanguageModel
from fairseq_lightrnn.resizing import widened

__all__ = ["Seated", "count_new_words", "seat_new_words"]

# Occurrences of a word that are looked at, rows that it might go to, and positions of the text that
# stand for all others.
_OCCURRENCES = 16
_CANDIDATES = 16
_POSITIONS = 256
_SENTENCES = 64
_REMEMBERED_ROWS = 1024
# A new word's bias lies within ± this; halvings of that range.
_MOST_BIAS = 20.0
_HALVINGS = 30


class Seated(NamedTuple):
    """Where N new words sit.

    Attributes:
        cells: of the new words in the grown table, (N,).
        further_cells: in each further table, (M, N).
        biases: of the words, (N,); 0 where the model has none.
        column_biases: of the new columns, (columns,).
    """

    cells: np.ndarray
    further_cells: np.ndarray
    biases: np.ndarray
    column_biases: np.ndarray


def count_new_words(model: LanguageModel, lines: Iterable[str]) -> Counter[str]:
    """Counts the words of a text that a model does not know, the most frequent first."""
    known = model.dictionary.indices
    counts = Counter(word for line in lines for word in line.split() if word not in known)
    return Counter(dict(counts.most_common()))


@torch.no_grad()
def seat_new_words(
    model: LanguageModel,
    words: Sequence[str],
    lines: Sequence[str],
    shape: Sequence[int],
    occupied: np.ndarray,
    further_occupied: Sequence[np.ndarray],
) -> Seated:
    """Seats new words by the loss of the text that they come from.

    Args:
        model: that does not know them.
        words: the new ones, those that choose first before others.
        lines: the text, a sentence each.
        shape: of the grown table.
        occupied: the cells in it that are taken.
        further_occupied: those of each further table.
    """
    places, positions = _contexts(model, set(words), lines)
    search = _Search(model, shape, positions)
    free = np.ones(math.prod(shape), dtype=bool)
    free[occupied] = False
    further_free = [np.ones(math.prod(shape), dtype=bool) for _ in further_occupied]
    for flags, cells in zip(further_free, further_occupied, strict=True):
        flags[cells] = False
    counts = Counter(word for line in lines for word in line.split())
    cells_of, further_of, biases = [], [], []
    for word in words:
        context = places[word]
        others = [search.further_cell(context, t, flags) for t, flags in enumerate(further_free)]
        for flags, other in zip(further_free, others, strict=True):
            flags[other] = False
        cell, bias = search.cell(context, counts[word], free, others)
        free[cell] = False
        cells_of.append(cell)
        further_of.append(others)
        biases.append(bias)
    further: np.ndarray = np.array(further_of, dtype=np.int64).reshape(len(words), -1).T
    cells_found = np.array(cells_of, dtype=np.int64)
    columns = search.column_biases(cells_found, [places[word] for word in words], counts, words)
    return Seated(cells_found, further, np.array(biases), columns)


def _contexts(
    model: LanguageModel, new: set[str], lines: Sequence[str]
) -> tuple[dict[str, Context], tuple[Context, float]]:
    """Reads a text.

    Returns:
        The contexts of some occurrences of each new word, to extend; and those of some positions of
        the text, with the number of positions that each stands for.
    """
    texts = [line.split() for line in lines]
    total = sum(len(text) + 1 for text in texts)
    generator = np.random.default_rng(0)
    share = min(1.0, _POSITIONS / max(total, 1))
    found: dict[str, list[Context]] = {word: [] for word in new}
    sampled: list[Context] = []
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    for begin in range(0, len(order), _SENTENCES):
        batch = [texts[number] for number in order[begin : begin + _SENTENCES]]
        start = torch.tensor([model.start] * len(batch))
        context = model.decoder.read(start)
        for step in range(len(batch[0]) + 1):
            to_extend = model.decoder.head.to_extend(context)
            for row, text in enumerate(batch):
                if step > len(text):
                    continue
                word = text[step] if step < len(text) else None
                here = to_extend.select(torch.tensor([row]))
                if word in found and len(found[cast(str, word)]) < _OCCURRENCES:
                    found[cast(str, word)].append(here)
                if generator.random() < share or not sampled:
                    sampled.append(here)
            ids = [
                model.dictionary.index(text[step]) if step < len(text) else model.dictionary.eos()
                for text in batch
            ]
            context = model.decoder.read(torch.tensor(ids)[:, None], context)
    joined = {word: _join(contexts) for word, contexts in found.items()}
    return joined, (_join(sampled), total / len(sampled))


def _join(contexts: Sequence[Context]) -> Context:
    result = contexts[0]
    for context in contexts[1:]:
        result = result.join(context)
    return result


class _Row(NamedTuple):
    """What predicts the last component of N contexts after a prefix.

    Attributes:
        hidden: (N, d).
        normaliser: logarithm of the words' exponentiated logits, summed, (N,).
        log_prob: of the prefix, (N,).
    """

    hidden: Tensor
    normaliser: Tensor
    log_prob: Tensor


class _Search:
    """Looks for cells of new words.

    Args:
        model: that does not know them.
        shape: of the grown table.
        positions: some contexts of the text, and how many each stands for.
    """

    def __init__(
        self, model: LanguageModel, shape: Sequence[int], positions: tuple[Context, float]
    ) -> None:
        self.head: ComponentHead = model.decoder.head
        self.shape = tuple(shape)
        self.positions, self.scale = positions
        softmax = self.head.softmax
        vectors, biases = softmax.component(len(shape) - 1)
        columns = shape[-1] - len(vectors)
        self.vectors, self.column_bias = (
            widened(vectors, (len(vectors),), columns),
            widened(biases, (len(biases),), columns),
        )
        self.old_columns = len(vectors)
        self.has_bias = find_feature(softmax.features, WordBias) is not None
        self.further = find_feature(softmax.features, FurtherTables)
        if self.further is not None:
            self.further_place = list(softmax.features).index(self.further)
            old = (*self.shape[:-1], self.old_columns)
            self.further_vectors = widened(self.further.output_vectors, old, columns)
        # The new words of a row so far: their columns, biases, and cells in further tables.
        self.seated: dict[tuple[int, ...], list[tuple[int, float, Sequence[int]]]] = {}
        self._rows: dict[tuple[int, ...], _Row] = {}

    def _row_of_positions(self, prefix: tuple[int, ...]) -> _Row:
        if prefix not in self._rows:
            if len(self._rows) >= _REMEMBERED_ROWS:
                self._rows.clear()
            self._rows[prefix] = self._row(self.positions, prefix)
        return self._rows[prefix]

    def seat(
        self, prefix: tuple[int, ...], column: int, bias: float, further: Sequence[int]
    ) -> None:
        """Notes where a word sits, for those that come after it."""
        self.seated.setdefault(prefix, []).append((column, bias, further))
        self._rows.pop(prefix, None)

    def _row(self, context: Context, prefix: tuple[int, ...], without: int = -1) -> _Row:
        """Returns what predicts the columns of a row; of new words all but that of a column."""
        size = len(context.output)
        coordinates = torch.tensor(prefix, dtype=torch.long).expand(size, len(prefix))
        log_prob = torch.zeros(size)
        for component, value in enumerate(prefix):
            scores = component_log_probs(self.head, context, coordinates[:, :component])
            log_prob = log_prob + scores[:, value]
            context = self.head.extend(context, component, coordinates[:, component])
        logits = self.head.softmax.logits(len(prefix), context.output, coordinates, context.queries)
        of_further = self._further_scores(context)
        others = [
            context.output @ self.vectors[column]
            + (self.column_bias[column] + bias)
            + self._of_further(of_further, further)
            for column, bias, further in self.seated.get(prefix, ())
            if column != without
        ]
        every = torch.cat([logits, *(one[:, None] for one in others)], dim=1)
        return _Row(context.output, torch.logsumexp(every, dim=1), log_prob)

    def _prefixes(self, context: Context, free: np.ndarray) -> list[tuple[int, ...]]:
        """Returns the most probable prefixes in the contexts that have an empty cell."""
        empty = torch.from_numpy(free.reshape(*self.shape))
        beam: list[tuple[int, ...]] = [()]
        contexts: dict[tuple[int, ...], Context] = {(): context}
        scores: dict[tuple[int, ...], Tensor] = {(): torch.zeros(len(context.output))}
        for component in range(len(self.shape) - 1):
            longer = {}
            room = empty.flatten(component + 1).any(dim=-1)
            for prefix in beam:
                coordinates = torch.tensor(prefix, dtype=torch.long).expand(
                    len(context.output), component
                )
                found = component_log_probs(self.head, contexts[prefix], coordinates)
                total = (scores[prefix][:, None] + found).sum(dim=0)
                total = total.masked_fill(~room[prefix], -math.inf)
                best = total.topk(min(_CANDIDATES, len(total)))
                for score, value in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    if score > -math.inf:
                        longer[(*prefix, value)] = (score, scores[prefix] + found[:, value], prefix)
            beam = sorted(longer, key=lambda prefix: -longer[prefix][0])[:_CANDIDATES]
            scores = {prefix: longer[prefix][1] for prefix in beam}
            contexts = {
                prefix: self.head.extend(
                    contexts[longer[prefix][2]],
                    component,
                    torch.full((len(context.output),), prefix[-1]),
                )
                for prefix in (beam if component + 2 < len(self.shape) else [])
            }
        # Rows that no word had until now have no probability: any that has room, if there is none.
        return beam or [tuple(int(i) for i in np.argwhere(free.reshape(self.shape))[0][:-1])]

    def further_cell(self, context: Context, table: int, free: np.ndarray) -> int:
        """Returns the empty cell of a further table whose vectors say the most for a word."""
        tables = len(self.further.tables)
        scores = self._further_scores(context).sum(dim=0).split([*self.shape] * tables)
        start = table * len(self.shape)
        total = torch.zeros(())
        for part in scores[start : start + len(self.shape)]:
            total = total[..., None] + part
        best = total.flatten().masked_fill(torch.from_numpy(~free), -math.inf)
        return int(best.argmax())

    def _further_scores(self, context: Context) -> Tensor:
        """Returns the scores of all rows and columns of the grown further tables, (N, M·ΣR)."""
        if self.further is None:
            return context.output[:, :0]
        query = cast(Tensor, context.queries[self.further_place])
        return F.linear(query, self.further_vectors)

    @cached_property
    def _further_of_positions(self) -> Tensor:
        return self._further_scores(self.positions)

    def _of_further(self, scores: Tensor, cells: Sequence[int]) -> Tensor:
        """Returns what a word's cells in further tables add to its logit: (N,)."""
        total = torch.zeros(len(scores))
        start = 0
        for cell in cells:
            for value, size in zip(np.unravel_index(cell, self.shape), self.shape, strict=True):
                total = total + scores[:, start + int(value)]
                start += size
        return total

    def cell(
        self, context: Context, count: int, free: np.ndarray, further: Sequence[int]
    ) -> tuple[int, float]:
        """Returns the empty cell of least loss for a word, and its bias there."""
        ours = self._of_further(self._further_scores(context), further)
        theirs = self._of_further(self._further_of_positions, further)
        best: tuple[float, tuple[int, ...], int, float] | None = None
        weight = count / len(context.output)
        empty = free.reshape(-1, self.shape[-1])
        for prefix in self._prefixes(context, free):
            number = int(np.ravel_multi_index(prefix, self.shape[:-1])) if prefix else 0
            columns = torch.from_numpy(np.flatnonzero(empty[number]))
            here, others = self._row(context, prefix), self._row_of_positions(prefix)
            # Log-odds of the word against all others of the row, without its bias: (columns, N).
            odds = self._odds(here, columns) + ours
            of_others = self._odds(others, columns) + theirs
            presence = others.log_prob.exp() * self.scale
            bias = torch.zeros(len(columns))
            if self.has_bias:
                bias = _best_bias(odds, of_others, weight, presence)
            losses = _loss(odds, of_others, bias, weight, presence) - weight * here.log_prob.sum()
            place = int(losses.argmin())
            found = float(losses[place]), prefix, int(columns[place]), float(bias[place])
            # Of a row without words the loss is not known: it has no probability.
            if best is None or found[0] < best[0]:
                best = found
        assert best is not None
        _, prefix, column, chosen = best
        self.seat(prefix, column, chosen, further)
        return int(np.ravel_multi_index((*prefix, column), self.shape)), chosen

    def _odds(self, row: _Row, columns: Tensor) -> Tensor:
        logits = F.linear(row.hidden, self.vectors[columns], self.column_bias[columns])
        return (logits - row.normaliser[:, None]).T

    def column_biases(
        self,
        cells: np.ndarray,
        contexts: Sequence[Context],
        counts: Counter[str],
        words: Sequence[str],
    ) -> np.ndarray:
        """Returns biases for the new columns, which no old word has, where words have none."""
        biases = self.column_bias[self.old_columns :].clone().double()
        if self.has_bias:
            return biases.numpy()
        for column in range(self.old_columns, self.shape[-1]):
            odds, weights, of_others, presences = [], [], [], []
            for place in np.flatnonzero(cells % self.shape[-1] == column).tolist():
                prefix = tuple(int(i) for i in np.unravel_index(cells[place], self.shape)[:-1])
                here = self._row(contexts[place], prefix, without=column)
                others = self._row(self.positions, prefix, without=column)
                index = torch.tensor([column])
                further = next(cells for at, _, cells in self.seated[prefix] if at == column)
                ours = self._of_further(self._further_scores(contexts[place]), further)
                theirs = self._of_further(self._further_of_positions, further)
                odds.append(self._odds(here, index) + ours)
                count = counts[words[place]] / len(here.hidden)
                weights.append(torch.full((1, len(here.hidden)), count))
                of_others.append(self._odds(others, index) + theirs)
                presences.append(others.log_prob.exp()[None] * self.scale)
            if odds:
                bias = _best_bias(
                    *(torch.cat(part, dim=1) for part in (odds, of_others, weights, presences))
                )
                biases[column - self.old_columns] += float(bias[0])
        return biases.numpy()


def _loss(
    odds: Tensor, of_others: Tensor, bias: Tensor, weight: float | Tensor, presence: Tensor
) -> Tensor:
    """Returns the loss in nats of words with a bias, given their log-odds in their row.

    Args:
        odds: where the words stand, (columns, N).
        of_others: at positions of the text, (columns, P).
        bias: of each, (columns,).
        weight: of each occurrence.
        presence: how many words of the row each position stands for.
    """
    own = F.softplus(-(odds + bias[:, None])) * weight
    taken = F.softplus(of_others + bias[:, None]) * presence
    return own.sum(dim=1) + taken.sum(dim=1)


def _best_bias(odds: Tensor, of_others: Tensor, weight: float | Tensor, presence: Tensor) -> Tensor:
    """Returns the biases of least :func:`_loss`, which is convex in them, by halving.

    0 in a row without words: it has no probability, so that every bias would be too small.
    """
    if not (presence > 0).any():
        return torch.zeros(len(odds))
    low = torch.full((len(odds),), -_MOST_BIAS)
    high = -low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        gain = (torch.sigmoid(-(odds + middle[:, None])) * weight).sum(dim=1)
        cost = (torch.sigmoid(of_others + middle[:, None]) * presence).sum(dim=1)
        rises = gain > cost
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    return (low + high) / 2
