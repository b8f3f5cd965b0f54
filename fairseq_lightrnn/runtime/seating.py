"""Which words of an exported model sit where."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["Seating", "nearest_empty"]


def nearest_empty(free: np.ndarray, cell: int) -> int:
    """Returns the empty cell that is the nearest to a cell in row-major order.

    There a new word is read, in a table for reading alone, that is predicted in the cell.

    Args:
        free: which cells are empty, booleans.
        cell: returned if it is empty itself.
    """
    empty = np.flatnonzero(free)
    return int(empty[np.abs(empty - cell).argmin()])


class Seating:
    """Where V words sit, for reading them and for predicting them.

    Args:
        shape: the k sizes of each table.
        cells: of the words in the table that they are predicted by, integers of shape (V,).
        input_cells: in the table that they are read by; by default the same.
        further_cells: in further tables, integers of shape (M, V).
        further_input_cells: in those that they are read by; by default the same.

    Attributes:
        coordinates: of the words in the table that they are predicted by, int32 (V, k).
        words: the word of each cell, int32 of shape (prefixes, R_k), -1 where there is none.
        seats: where the vectors of further tables are that words are predicted with, int32
            (V, M·k).
        places: where the vectors are that words are read by, those of further tables behind those
            of the first, int32 (V, (1 + M)·k).
    """

    def __init__(
        self,
        shape: Sequence[int],
        cells: np.ndarray,
        input_cells: np.ndarray | None = None,
        further_cells: np.ndarray | None = None,
        further_input_cells: np.ndarray | None = None,
    ) -> None:
        self.shape = tuple(shape)
        starts, size = self._starts, len(self.shape)
        further = np.zeros((0, len(cells)), np.int32) if further_cells is None else further_cells
        predicted = self._places([cells, *further])
        self.coordinates = predicted[:, :size] - starts[:-1]
        self.seats: np.ndarray = predicted[:, size:] - starts[-1]
        words = np.full(math.prod(self.shape), -1, dtype=np.int32)
        words[cells] = np.arange(len(cells), dtype=np.int32)
        self.words = words.reshape(-1, self.shape[-1])
        self._reads_apart = further_input_cells is not None
        read_by = further if further_input_cells is None else further_input_cells
        self.places = self._places([cells if input_cells is None else input_cells, *read_by])

    @property
    def further(self) -> int:
        """M, the number of further tables."""
        return self.seats.shape[1] // len(self.shape)

    @property
    def tables(self) -> int:
        """T, how many cells a word has: see :meth:`empty`."""
        return 2 + self.further * (1 + self._reads_apart)

    @property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *self.shape], dtype=np.int32)

    def _places(self, tables: Sequence[np.ndarray]) -> np.ndarray:
        """Returns where the vectors of words' cells are, table by table, int32."""
        starts, places = self._starts, []
        for number, cells in enumerate(tables):
            coordinates = np.stack(np.unravel_index(cells, self.shape), axis=1).astype(np.int32)
            places.append(coordinates + starts[:-1] + number * starts[-1])
        return np.concatenate(places, axis=1)

    def number(self, prefix: np.ndarray) -> np.ndarray:
        """Numbers prefixes (N, i) in row-major order: (N,)."""
        number = np.zeros(len(prefix), dtype=np.int64)
        for component in range(prefix.shape[1]):
            number = number * self.shape[component] + prefix[:, component]
        return number

    def empty(self) -> np.ndarray:
        """Tells which cells are empty, bool (T, cells).

        In the table that words are predicted by, in that they are read by, which may be the same,
        in each further one; and in each further one that they are read by, if those are others.
        """
        starts, size = self._starts, len(self.shape)
        places = [self.coordinates + starts[:-1], self.places[:, :size], self.seats]
        if self._reads_apart:
            places.append(self.places[:, size:])
        every = np.concatenate(places, axis=1) % starts[-1]
        result = np.ones((self.tables, self.words.size), dtype=bool)
        for number, of_table in enumerate(result):
            coordinates = every[:, number * size : (number + 1) * size] - starts[:-1]
            of_table[self.number(coordinates)] = False
        return result

    def with_words(self, cells: np.ndarray) -> Seating:
        """Returns a seating with N more words, whose cells are in the order of :meth:`empty`.

        Args:
            cells: integers of shape (T, N); (2 + M, N) of words that are not read.
        """
        end = 2 + self.further
        read_by = cells[end:] if len(cells) > end else None
        more = Seating(self.shape, cells[0], cells[1], cells[2:end], read_by)
        result = copy.copy(self)
        for name in ("coordinates", "places", "seats"):
            both = np.concatenate([getattr(self, name), getattr(more, name)])
            setattr(result, name, both)
        result.words = np.where(more.words < 0, self.words, more.words + len(self.coordinates))
        return result

    def with_one_everywhere(self, further_cells: Sequence[int]) -> Seating:
        """Returns a seating with one more word, which sits in all empty cells at once.

        So a single prediction tells what the word would be worth in any of them.

        Args:
            further_cells: of the word in further tables.
        """
        empty = int((self.words < 0).argmax())
        result = self.with_words(np.array([empty, empty, *further_cells])[:, None])
        result.words = np.where(self.words < 0, np.int32(len(self.coordinates)), self.words)
        return result
