"""Further word tables, in which every word has a cell too.

A word shares its row and its column with others, and a model of one table has nothing else to know
it by. In a second table, made from another start, it shares them with other words: the vectors of
all its cells together are nearly its own, at the cost of 2·√V vectors a table for V words. The
first table alone says how a word's probability is factored. Vectors of the others are added to what
words are read by, and their products with an output to the logits of the words' last component. So
probabilities sum to 1 as ever, and a word has no number of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from fairseq_lightrnn.table_lookup import TableLookup

__all__ = ["FurtherTables"]


class FurtherTables(nn.Module):
    """Further tables of the same words and shape; they travel with checkpoints.

    Their vectors belong to those who use them: one for each value of each component of each table,
    in one matrix of ``num_vectors`` rows.

    Args:
        count: M, the number of tables.
        num_words: V.
        shape: the k sizes of each table.

    Attributes:
        tables: M of :class:`TableLookup`, arbitrary balanced ones until they are seated.
        num_vectors: M·ΣR_i.
    """

    def __init__(self, count: int, num_words: int, shape: Sequence[int]) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"{count} further tables: expected at least 1")
        self.tables = nn.ModuleList(TableLookup(num_words, shape) for _ in range(count))
        self._sizes = count * list(shape)
        self.num_vectors = sum(self._sizes)

    def _coordinates(self, words: Tensor) -> Iterator[Tensor]:
        """Yields words' coordinates, table by table and component by component."""
        for table in self.tables:
            yield from table(words).unbind(-1)

    def forward(self, words: Tensor) -> Tensor:
        """Returns the rows of the matrix, integers (..., M·k), that words (...) have."""
        offsets = accumulate(self._sizes[:-1], initial=0)
        placed = zip(offsets, self._coordinates(words), strict=True)
        return torch.stack([offset + coordinate for offset, coordinate in placed], dim=-1)

    def sum_scores(self, scores: Tensor, words: Tensor) -> Tensor:
        """Sums the scores of each word's rows and columns.

        Args:
            scores: of all rows of the matrix, shape (N, num_vectors).
            words: integers of shape (N, C), or of shape (C,) for the same in each of the N.

        Returns:
            Shape (N, C).
        """
        # A gather's gradient is as large as what it gathers from: of each component its own scores.
        total: Tensor | None = None
        parts = zip(scores.split(self._sizes, dim=1), self._coordinates(words), strict=True)
        for part, index in parts:
            one = part.gather(1, index) if index.dim() > 1 else part.index_select(1, index)
            total = one if total is None else total + one
        return cast(Tensor, total)
