"""The word table as part of a model: where words sit, and which words share a prefix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_lightrnn.frequent_words import WordLists
from fairseq_lightrnn.word_table import WordTable, balanced_cells

__all__ = ["TableLookup"]


class TableLookup(nn.Module):
    """The word table as part of a model: its coordinates are a buffer and travel with checkpoints.

    Starts as an arbitrary balanced table; :meth:`seat` puts another one in.

    Args:
        num_words: V.
        shape: the k sizes of the table.

    Attributes:
        coordinates: int32 buffer of shape (V, k).
        cells: int64 of shape (V,), the flat, row-major cell of each word; derived.
        words: int64 of shape (cells,), the word in each cell, 0 where empty; derived.
    """

    coordinates: Tensor
    cells: Tensor
    words: Tensor

    def __init__(self, num_words: int, shape: Sequence[int]) -> None:
        super().__init__()
        table = WordTable.from_cells(balanced_cells(num_words, shape), shape)
        self.shape = table.shape
        self.register_buffer("coordinates", torch.empty(num_words, len(shape), dtype=torch.int32))
        self.register_buffer("cells", torch.empty(num_words, dtype=torch.int64), False)
        self.register_buffer("words", torch.empty(table.num_cells, dtype=torch.int64), False)
        for component in range(len(shape)):
            self.register_buffer(f"_occupied{component}", None, False)
            self.register_buffer(f"_shares{component}", None, False)
        self._lists: dict[tuple[int, torch.device], WordLists] = {}
        self.seat(table)
        self.register_load_state_dict_post_hook(lambda module, _: module.seat(module.table()))

    @property
    def num_words(self) -> int:
        """V, the number of words."""
        return len(self.coordinates)

    @property
    def num_components(self) -> int:
        """k, the number of coordinates of a word."""
        return len(self.shape)

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
        self.cells.copy_(torch.from_numpy(np.array(table.cells)))
        self.words.copy_(torch.from_numpy(table.words.clip(min=0)))
        self._lists.clear()
        for component in range(self.num_components):
            occupied = table.occupied(component)
            # None: every value leads to a word, nothing needs a mask.
            mask = None if occupied.all() else torch.from_numpy(occupied)
            setattr(self, f"_occupied{component}", _to_device(mask, self.coordinates.device))
            shares = _shares(table, component) if component + 1 < self.num_components else None
            setattr(self, f"_shares{component}", _to_device(shares, self.coordinates.device))

    def forward(self, words: Tensor) -> Tensor:
        """Returns the coordinates, int64 of shape (..., k), of words of shape (...)."""
        return F.embedding(words, self.coordinates).long()

    def occupied(self, component: int, prefix: Tensor) -> Tensor | None:
        """Tells which values of a component lead to a word.

        Args:
            component: i.
            prefix: the coordinates before it, integers of shape (N, i).

        Returns:
            Booleans of shape (N, R_i), or None where all are true.
        """
        mask: Tensor | None = getattr(self, f"_occupied{component}")
        return None if mask is None else mask[self.flatten(prefix)]

    def shares(self, component: int, prefix: Tensor) -> Tensor:
        """Tells how the words that share a prefix are spread over the values of a component.

        Args:
            component: i.
            prefix: the coordinates before it, integers of shape (N, i).

        Returns:
            The share of these words that each value leads to, shape (N, R_i) or (1, R_i).
        """
        if component + 1 < self.num_components:
            of_groups: Tensor = getattr(self, f"_shares{component}")
            return of_groups[self.flatten(prefix)]
        occupied = self.occupied(component, prefix)
        if occupied is None:
            size = self.shape[component]
            return torch.full((1, size), 1 / size, device=prefix.device)
        return occupied / occupied.sum(1, keepdim=True)

    def frequent(self, count: int, prefix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lists the first words of the dictionary among those that share a prefix.

        Args:
            count: M, how many words of the dictionary.
            prefix: all coordinates but the last, integers of shape (N, k - 1).

        Returns:
            The words, which of the N prefixes each has, and their last coordinates, all (T,).
        """
        key = (count, self.cells.device)
        if key not in self._lists:
            size = self.shape[-1]
            self._lists[key] = WordLists(self.cells[:count], len(self.words) // size, size)
        return self._lists[key].of(self.flatten(prefix))

    def flatten(self, coordinates: Tensor) -> Tensor:
        """Numbers groups of cells in row-major order.

        Args:
            coordinates: of the first i components, integers of shape (..., i).

        Returns:
            Integers of shape (...); of whole words (i = k) these are their cells.
        """
        number = torch.zeros_like(coordinates[..., :1].sum(-1))
        for size, coordinate in zip(self.shape, coordinates.unbind(-1), strict=False):
            number = number * size + coordinate
        return number


def _to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _shares(table: WordTable, component: int) -> Tensor:
    """Returns the share of each value (groups, R_i) in the words of each prefix."""
    below = table.num_cells // int(np.prod(table.shape[: component + 1]))
    counts = np.bincount(table.cells // below, minlength=table.num_cells // below)
    counts = counts.reshape(-1, table.shape[component])
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    return torch.from_numpy(shares.astype(np.float32))
