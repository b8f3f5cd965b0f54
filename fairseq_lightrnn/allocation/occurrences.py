"""A sample of the occurrences of words, by the prefix that each word has now."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_lightrnn.allocation.cell_costs import occurrence_shares, prefix_coordinates
from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.softmax import Queries, at_least_float32

__all__ = ["Occurrences", "Seen"]


class Seen(NamedTuple):
    """Occurrences of the words of one prefix.

    Attributes:
        words: (n,).
        weights: how many occurrences each stands for, (n,).
        queries: of each, what features of words are scored with.
        base: what the vectors alone give the last component, (n, R_k); -inf in empty cells.
        logits: with what features add, (n, R_k).
    """

    words: Tensor
    weights: Tensor
    queries: Queries
    base: Tensor
    logits: Tensor


def _shares_within(counts: Tensor, most: int, rows: float) -> Tensor:
    """Returns shares of words' occurrences (V,) that make at most so many each and rows in all.

    Where there is less room, words have numbers of occurrences as the roots of their counts: a few
    of a frequent word tell as little of it as none of a rare one.
    """
    if rows < 1:
        return torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
    shares, roots = occurrence_shares(counts, most), counts.double().clamp(min=1).sqrt()
    scale = float(roots.max())
    while float((shares * counts).sum()) > rows:
        scale *= 0.8
        shares = torch.minimum(shares, scale / roots)
    return shares


class Occurrences:
    """Occurrences of words, of frequent ones a sample, and what predicts them there.

    Args:
        head: predicts words; what they sit by must stay as it is meanwhile, but further tables.
        counts: (V,) occurrences of the words.
        most: of each word.
        memory: bytes that the sample may take; fewer are kept of each word where it needs more, of
            rare ones perhaps none.
        first: (n,) words of which most are kept: a quarter of the memory is for all others. All
            words by default.

    Attributes:
        chances: (V,) of each of a word's occurrences to be kept.
    """

    def __init__(
        self,
        head: ComponentHead,
        counts: Tensor,
        most: int,
        memory: float = math.inf,
        first: Tensor | None = None,
    ) -> None:
        self.head = head
        self._prefixes = head.table.prefixes
        rows = memory / (4 * self.row_size)
        is_first = torch.ones_like(counts, dtype=torch.bool)
        if first is not None:
            is_first.fill_(False)[first] = True
        rare = counts.masked_fill(is_first, 0)
        others = _shares_within(rare, most, rows / 4)
        rows -= float((others * rare).sum())
        firsts = _shares_within(counts - rare, most, rows)
        self.chances = torch.where(is_first, firsts, others)
        self._words = self._prefixes.new_empty(0)
        self._rows = torch.empty(0, self.row_size)
        self._starts: Tensor | None = None

    @property
    def row_size(self) -> int:
        """Numbers that are kept of an occurrence: its state and its queries."""
        return self.head.softmax.vectors.dim + sum(self._query_sizes())

    @property
    def dtype(self) -> torch.dtype:
        """Of what is kept."""
        return torch.promote_types(self.head.softmax.bias.dtype, torch.float32)

    def _query_sizes(self) -> Iterator[int]:
        for feature in self.head.softmax.features:
            yield 0 if feature.query is None else feature.query.out_features

    @torch.no_grad()
    def choose(self, words: Tensor, context: Context, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses some occurrences.

        Args:
            words: (N,) that were to be predicted.
            context: of the N texts before them.
            draws: (N,) numbers from 0 to 1.

        Returns:
            The words (n,), and what is known of each, (n, row_size).
        """
        index = (draws < self.chances[words]).nonzero().squeeze(1)
        words, context = words[index], self.head.to_extend(context).select(index)
        hidden = self.head.hidden_of(context, words)[:, -1]
        known = [hidden, *(query for query in context.queries if query is not None)]
        return words, torch.cat(known, dim=1).to(self.dtype)

    def set(self, chosen: list[tuple[Tensor, Tensor]]) -> None:
        """Takes what :meth:`choose` chose of the whole text, in its order, and empties the list."""
        words = torch.cat([some for some, _ in chosen])
        order = self._prefixes[words].argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        self._words = words[order]
        self._rows = chosen[0][1].new_empty(len(words), self.row_size)
        start = len(words)
        while chosen:  # there is room for one sample, not for two
            some = chosen.pop()[1]
            start -= len(some)
            self._rows[place[start : start + len(some)]] = some
        number = math.prod(self.head.table.shape[:-1])
        sizes = torch.bincount(self._prefixes[words], minlength=number)
        self._starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

    @torch.no_grad()
    def of(self, prefix: int) -> Seen:
        """Returns those of the words that have a prefix now, by its number."""
        assert self._starts is not None
        some = slice(int(self._starts[prefix]), int(self._starts[prefix + 1]))
        words = self._words[some]
        hidden, queries = self._split(self._rows[some])
        numbers = words.new_full((len(words),), prefix)
        coordinates = prefix_coordinates(numbers, self.head.table.shape)
        softmax, last = self.head.softmax, self.head.table.num_components - 1
        base = at_least_float32(softmax.vector_logits(last, hidden, coordinates))
        of_words = softmax.feature_logits_of(queries, self.head.table.members[prefix])
        logits = base + at_least_float32(of_words)
        weights = (1 / self.chances[words]).to(base)
        return Seen(words, weights, queries, base, logits)

    def _split(self, rows: Tensor) -> tuple[Tensor, Queries]:
        rows = rows.to(self.head.softmax.bias.dtype)
        hidden, *parts = rows.split([self.head.softmax.vectors.dim, *self._query_sizes()], dim=1)
        return hidden, tuple(part if part.size(1) else None for part in parts)
