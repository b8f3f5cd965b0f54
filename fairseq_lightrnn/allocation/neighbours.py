"""What the presence of a word costs those that it sits beside: the third part of a cell's cost.

See :mod:`fairseq_lightrnn.allocation.cell_costs` for the derivation. It is measured on
occurrences of the words that have a prefix now, for every word that might get it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from fairseq_lightrnn.allocation.cell_costs import (
    occurrence_shares,
    prefix_coordinates,
)
from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.softmax import Queries, at_least_float32

__all__ = ["Neighbours"]

# Of each word, whatever its row: it is a few words of a row that a new one is taken for, and a
# sample that misses them makes the row look better than it is to all that are like them.
_OCCURRENCES = 64
_MOST_LOGIT = 30.0  # exp of more would leave nothing of what it is added to


class Neighbours:
    """Occurrences of the words that have each prefix now, of frequent words a sample.

    Args:
        head: predicts words.
        counts: (V,) occurrences of the words.
        memory: bytes that the sample may take.
    """

    def __init__(self, head: ComponentHead, counts: Tensor, memory: float = math.inf) -> None:
        self.head = head
        self._prefixes = cast(Tensor, head.table.number(head.table.coordinates[:, :-1].long()))
        cap = _OCCURRENCES
        while cap > 1 and counts.clamp(max=cap).sum() * 4 * self.row_size > memory:
            cap //= 2
        self._chances = occurrence_shares(counts, cap)
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
        index = (draws < self._chances[words]).nonzero().squeeze(1)
        words, context = words[index], self.head.to_extend(context).select(index)
        hidden = self.head.hidden_of(context, words)[:, -1]
        known = [hidden, *(query for query in context.queries if query is not None)]
        return words, torch.cat(known, dim=1).to(self.dtype)

    def set(self, words: Tensor, rows: Tensor) -> None:
        """Takes what :meth:`choose` chose of the whole text, in the order of the text."""
        order = self._prefixes[words].argsort(stable=True)
        self._words, self._rows = words[order], rows[order]
        number = math.prod(self.head.table.shape[:-1])
        sizes = torch.bincount(self._prefixes[words], minlength=number)
        self._starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

    @torch.no_grad()
    def costs(self, prefix: int, words: Tensor) -> Tensor:
        """Returns what words cost others that have a prefix now, in each of its cells.

        Args:
            prefix: its number.
            words: (W,).

        Returns:
            Nats over the whole text, (W, R_k) in float64 on the CPU; 0 in empty cells.
        """
        assert self._starts is not None
        words = words.to(self._words.device)
        some = slice(int(self._starts[prefix]), int(self._starts[prefix + 1]))
        seen = self._words[some]
        if not len(seen):
            return torch.zeros(len(words), self.head.table.shape[-1], dtype=torch.float64)
        hidden, queries = self._split(self._rows[some])
        numbers = seen.new_full((len(seen),), prefix)
        coordinates = prefix_coordinates(numbers, self.head.table.shape)
        softmax, last = self.head.softmax, self.head.table.num_components - 1
        base = at_least_float32(softmax.vector_logits(last, hidden, coordinates))
        logits = base + at_least_float32(softmax.feature_logits(queries, coordinates))
        norm = torch.logsumexp(logits, dim=1, keepdim=True)
        own = at_least_float32(softmax.feature_logits_of(queries, words))
        mistaken = own.clamp(max=_MOST_LOGIT).exp().expand(len(seen), -1)  # (n, W)
        taken = (base - norm).exp() / self._chances[seen].to(base)[:, None]
        # A feature that is the same in all contexts needs no product.
        costs = mistaken[:1].T * taken.sum(0) if len(own) == 1 else mistaken.T @ taken
        # No word is taken for itself.
        place = words.new_full((self.head.table.num_words,), -1)
        place[words] = torch.arange(len(words), device=words.device)
        itself = (place[seen] >= 0).nonzero().squeeze(1)
        which = place[seen[itself]]
        costs.index_add_(0, which, mistaken[itself, which][:, None] * taken[itself], alpha=-1)
        return costs.double().cpu()

    def _split(self, rows: Tensor) -> tuple[Tensor, Queries]:
        rows = rows.to(self.head.softmax.bias.dtype)
        hidden, *parts = rows.split([self.head.softmax.vectors.dim, *self._query_sizes()], dim=1)
        return hidden, tuple(part if part.size(1) else None for part in parts)
