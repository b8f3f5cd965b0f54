"""Which words of an exported model sit where."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["Seating"]


class Seating:
    """Where V words sit, for reading them and for predicting them.

    Args:
        shape: the k sizes of each table.
        cells: of the words in the table that they are predicted by, integers of shape (V,).
        input_cells: in the table that they are read by; by default the same.
        further_cells: in further tables, integers of shape (M, V).

    Attributes:
        coordinates: of the words in the table that they are predicted by, int32 (V, k).
        words: the word of each cell, int32 of shape (prefixes, R_k), -1 where there is none.
        seats: where words' vectors of further tables are, int32 (V, M·k).
        places: where the vectors are that words are read by, int32 (V, k).
    """

    def __init__(
        self,
        shape: Sequence[int],
        cells: np.ndarray,
        input_cells: np.ndarray | None = None,
        further_cells: np.ndarray | None = None,
    ) -> None:
        self.shape = tuple(shape)
        self.coordinates = self._coordinates(cells)
        words = np.full(math.prod(self.shape), -1, dtype=np.int32)
        words[cells] = np.arange(len(cells), dtype=np.int32)
        self.words = words.reshape(-1, self.shape[-1])
        starts = self._starts
        read_by = self.coordinates if input_cells is None else self._coordinates(input_cells)
        self.places = read_by + starts[:-1]
        further = np.zeros((0, len(cells)), np.int32) if further_cells is None else further_cells
        tables = [
            self._coordinates(of_table) + starts[:-1] + number * starts[-1]
            for number, of_table in enumerate(further)
        ]
        nothing = np.zeros((len(cells), 0), dtype=np.int32)
        self.seats: np.ndarray = np.concatenate([nothing, *tables], axis=1)

    @property
    def tables(self) -> int:
        """How many cells a word has: see :meth:`empty`."""
        return 2 + self.seats.shape[1] // len(self.shape)

    @property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *self.shape], dtype=np.int32)

    def _coordinates(self, cells: np.ndarray) -> np.ndarray:
        return np.stack(np.unravel_index(cells, self.shape), axis=1).astype(np.int32)

    def number(self, prefix: np.ndarray) -> np.ndarray:
        """Numbers prefixes (N, i) in row-major order: (N,)."""
        number = np.zeros(len(prefix), dtype=np.int64)
        for component in range(prefix.shape[1]):
            number = number * self.shape[component] + prefix[:, component]
        return number

    def empty(self) -> np.ndarray:
        """Tells which cells are empty, bool (2 + M, cells).

        In the table that words are predicted by, in that they are read by, which may be the same,
        and in each further one.
        """
        starts, size = self._starts, len(self.shape)
        tables = [self.coordinates, self.places - starts[:-1]]
        for number in range(self.tables - 2):
            seats = self.seats[:, number * size : (number + 1) * size]
            tables.append(seats - starts[:-1] - number * starts[-1])
        result = np.ones((len(tables), self.words.size), dtype=bool)
        for of_table, coordinates in zip(result, tables, strict=True):
            of_table[self.number(coordinates)] = False
        return result

    def with_words(self, cells: np.ndarray) -> Seating:
        """Returns a seating with N more words, whose cells are in the order of :meth:`empty`.

        Args:
            cells: integers of shape (2 + M, N).
        """
        more = Seating(self.shape, cells[0], cells[1], cells[2:])
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
