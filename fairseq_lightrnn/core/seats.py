"""Word tables as parts of a model: where words sit, and which words share a prefix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_lightrnn.core.table import WordTable, balanced_cells, prefix_number

__all__ = ["PredictedTable", "Seats"]


class Seats(nn.Module):
    """Where the words sit in a table: a buffer, which travels with checkpoints.

    Starts as an arbitrary balanced table; :meth:`seat` puts another one in.

    Args:
        num_words: V.
        shape: the k sizes of the table.

    Attributes:
        coordinates: int32 buffer of shape (V, k).
    """

    coordinates: Tensor

    def __init__(self, num_words: int, shape: Sequence[int]) -> None:
        super().__init__()
        table = WordTable.from_cells(balanced_cells(num_words, shape), shape)
        self.shape = table.shape
        coordinates = torch.from_numpy(table.coordinates.astype(np.int32))
        self.register_buffer("coordinates", coordinates)

    @property
    def num_words(self) -> int:
        """V, the number of words."""
        return len(self.coordinates)

    @property
    def num_components(self) -> int:
        """k, the number of coordinates of a word."""
        return len(self.shape)

    @property
    def prefixes(self) -> Tensor:
        """The number of the prefix of each word, all its coordinates but the last: int64 (V,)."""
        return cast(Tensor, prefix_number(self.coordinates[:, :-1].long(), self.shape))

    @property
    def taken_prefixes(self) -> Tensor:
        """Which prefixes any word has: booleans, one for each."""
        taken = torch.zeros(
            math.prod(self.shape[:-1]), dtype=torch.bool, device=self.coordinates.device
        )
        taken[self.prefixes] = True
        return taken

    def table(self) -> WordTable:
        """Returns the word table in force."""
        return WordTable(self.coordinates.cpu().numpy(), self.shape)

    def seat(self, table: WordTable) -> None:
        """Puts a table of the same words and shape into force.

        Raises:
            ValueError: if the table has another number of words or another shape.
        """
        if table.shape != self.shape or table.num_words != self.num_words:
            raise ValueError(
                f"the model needs a table of {self.num_words} words and shape {self.shape}, "
                f"got {table.num_words} words and shape {table.shape}"
            )
        self.coordinates.copy_(torch.from_numpy(np.array(table.coordinates)))
        self._derive(table)

    def _derive(self, table: WordTable) -> None:
        """Computes what else is needed of a table."""

    def _load_from_state_dict(self, *args: Any) -> None:
        before = self.coordinates.clone()
        super()._load_from_state_dict(*args)
        if not torch.equal(self.coordinates, before):  # a moving average loads them at every step
            self._derive(self.table())

    def forward(self, words: Tensor) -> Tensor:
        """Returns the coordinates, int64 of shape (..., k), of words of shape (...)."""
        return F.embedding(words, self.coordinates).long()


class PredictedTable(Seats):
    """The table by which words are predicted; it also knows which words share a prefix.

    A prefix is the first coordinates of a word, for two components its row. Prefixes of a length
    are numbered in row-major order.

    Args:
        num_words: V.
        shape: the k sizes of the table.

    Attributes:
        cells: int64 of shape (V,), the row-major cell of each word; derived.
        words: int64 of shape (cells,), the word in each cell, 0 where empty; derived.
    """

    cells: Tensor
    words: Tensor

    def __init__(self, num_words: int, shape: Sequence[int]) -> None:
        super().__init__(num_words, shape)
        derived = [f"{name}{i}" for i in range(len(shape)) for name in ("_counts", "_occupied")]
        for name in ("cells", "words", *derived):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64), persistent=False)
        self._derive(self.table())

    def _derive(self, table: WordTable) -> None:
        def put(name: str, values: np.ndarray) -> None:
            setattr(self, name, torch.from_numpy(values).to(self.cells.device))

        put("cells", np.array(table.cells))
        put("words", table.words.clip(min=0))
        # Integers, since a model in half precision would round shares of words.
        for component in range(table.num_components):
            put(f"_counts{component}", table.counts(component).astype(np.int32))
            put(f"_occupied{component}", table.occupied(component))
        self._full = [bool(table.occupied(i).all()) for i in range(table.num_components)]

    def number(self, prefix: Tensor) -> Tensor:
        """Returns the numbers, shape (...), of prefixes of shape (..., i)."""
        return cast(Tensor, prefix_number(prefix, self.shape))

    @property
    def members(self) -> Tensor:
        """The words that share all coordinates but the last, shape (prefixes, R_k)."""
        return self.words.view(-1, self.shape[-1])

    def occupied(self, component: int, prefix: Tensor) -> Tensor | None:
        """Tells which values of a component lead to a word.

        Args:
            component: i.
            prefix: the coordinates before it, integers of shape (N, i).

        Returns:
            Booleans of shape (N, R_i), or None where all are true.
        """
        if self._full[component]:
            return None
        occupied: Tensor = getattr(self, f"_occupied{component}")
        return occupied[self.number(prefix)]

    def shares(self, component: int, prefix: Tensor) -> Tensor:
        """Tells how the words that share a prefix are spread over the values of a component.

        Args:
            component: i.
            prefix: the coordinates before it, integers of shape (N, i).

        Returns:
            The share of these words that each value leads to, float32 of shape (N, R_i).
        """
        known: Tensor = getattr(self, f"_counts{component}")
        counts = known[self.number(prefix)].float()
        return counts / counts.sum(1, keepdim=True).clamp(min=1)
