"""The word table: every word of a vocabulary has a cell, and a cell is k coordinates.

The LightRNN paper (Li et al., NIPS 2016, arXiv 1610.09893, section 3.1) seats the words in a table
of two components, row and column. Here a table has any number k >= 1 of components; k = 1 is an
ordinary vocabulary, k = 2 the paper.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_lightrnn.core import table_files

__all__ = [
    "INITIAL_TABLES",
    "WordTable",
    "balanced_cells",
    "check_shape",
    "component_names",
    "default_shape",
    "prefix_number",
]

INITIAL_TABLES = ("random", "frequency", "cooccurrence")
"""How a table can be made before training; see `allocation.initial_table`."""


class WordTable:
    """An immutable one-to-one map between words and the occupied cells of a table.

    Args:
        coordinates: integers of shape (V, k); row w holds the coordinates of word w.
        shape: the k sizes of the table, with ``prod(shape) >= V``.

    Raises:
        ValueError: if the shape does not hold the words, a coordinate lies outside the shape, or
            two words have the same cell; the first offending word is named.
    """

    def __init__(self, coordinates: np.ndarray, shape: Sequence[int]) -> None:
        coordinates = np.asarray(coordinates)
        if coordinates.ndim != 2 or coordinates.dtype.kind not in "iu":
            raise ValueError(
                "coordinates must be integers of shape (words, components), "
                f"got {coordinates.dtype} of shape {coordinates.shape}"
            )
        self.shape = check_shape(shape, len(coordinates))
        if coordinates.shape[1] != len(self.shape):
            raise ValueError(
                f"coordinates have {coordinates.shape[1]} components, the shape {self.shape} "
                f"has {len(self.shape)}"
            )
        coordinates = coordinates.astype(np.int64)
        outside = ((coordinates < 0) | (coordinates >= np.array(self.shape))).any(axis=1)
        if outside.any():
            word = int(outside.argmax())
            raise ValueError(
                f"word {word} has coordinates {coordinates[word].tolist()}, outside a table of "
                f"shape {self.shape}"
            )
        self.coordinates = coordinates
        self.cells = np.ravel_multi_index(tuple(coordinates.T), self.shape).astype(np.int64)
        self.words = np.full(self.num_cells, -1, dtype=np.int64)
        # Written backwards, so that of several words of one cell the first stays and is named.
        self.words[self.cells[::-1]] = np.arange(self.num_words)[::-1]
        doubled = self.words[self.cells] != np.arange(self.num_words)
        if doubled.any():
            word = int(doubled.argmax())
            raise ValueError(
                f"words {int(self.words[self.cells[word]])} and {word} have the same cell "
                f"{coordinates[word].tolist()}"
            )
        for array in (self.coordinates, self.cells, self.words):
            array.flags.writeable = False

    @classmethod
    def from_cells(cls, cells: np.ndarray, shape: Sequence[int]) -> WordTable:
        """Builds a table from flat, row-major cell numbers.

        Args:
            cells: integers of shape (V,), the cell of each word.
            shape: the k sizes of the table.
        """
        cells = np.asarray(cells, dtype=np.int64)
        shape = check_shape(shape, len(cells))
        outside = (cells < 0) | (cells >= np.prod(shape))
        if outside.any():
            word = int(outside.argmax())
            raise ValueError(
                f"word {word} has cell {cells[word]}, outside a table of shape {shape}"
            )
        return cls(np.stack(np.unravel_index(cells, shape), axis=1), shape)

    @property
    def num_words(self) -> int:
        """V, the number of words."""
        return len(self.coordinates)

    @property
    def num_components(self) -> int:
        """k, the number of coordinates of a word."""
        return len(self.shape)

    @property
    def num_cells(self) -> int:
        """The number of cells, occupied and empty."""
        return int(np.prod(self.shape))

    def coordinates_of(self, words: np.ndarray) -> np.ndarray:
        """Returns the coordinates, shape (..., k), of word ids of shape (...)."""
        return self.coordinates[np.asarray(words)]

    def occupied(self, component: int) -> np.ndarray:
        """Tells which values of a component lead to a word, given the coordinates before it.

        Returns:
            Booleans of shape (prefixes, R_i). A distribution over the component is normalised over
            the true entries of its row.
        """
        return self.counts(component) > 0

    def counts(self, component: int) -> np.ndarray:
        """Counts the words that each value of a component leads to.

        Returns:
            Integers of shape (prefixes, R_i), one row for each prefix: the coordinates before the
            component, numbered in row-major order (:func:`prefix_number`).
        """
        prefixes = math.prod(self.shape[:component])
        occupied = self.words.reshape(prefixes, self.shape[component], -1) >= 0
        return np.asarray(occupied.sum(axis=2))

    def digest(self) -> str:
        """Returns twelve hexadecimal digits that name this table in logs."""
        content = hashlib.sha256(repr(self.shape).encode())
        content.update(self.cells.astype("<i8").tobytes())
        return content.hexdigest()[:12]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WordTable):
            return NotImplemented
        return self.shape == other.shape and np.array_equal(self.cells, other.cells)

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.shape))
        return f"WordTable({self.num_words} words, {shape}, {self.digest()})"

    def save(self, path: str | Path, symbols: Sequence[str]) -> None:
        """Writes the table as text: a header, then a line "word coordinate …" for each word.

        Args:
            path: the file; it appears whole or not at all.
            symbols: the V words, in the order of their ids.
        """
        table_files.write(path, symbols, self.coordinates, self.shape)

    @classmethod
    def load(cls, path: str | Path, symbols: Sequence[str]) -> WordTable:
        """Reads a table that :meth:`save` wrote, for a vocabulary in the same order.

        Raises:
            ValueError: if the file is damaged or its words are not ``symbols`` in their order; the
                file, line and word are named.
        """
        found, table = cls.load_with_symbols(path)
        for word, symbol in enumerate(found):
            if word >= len(symbols) or symbol != symbols[word]:
                expected = repr(symbols[word]) if word < len(symbols) else "no further word"
                raise ValueError(
                    f"{path}: line {word + 2} holds {symbol!r} where the dictionary has "
                    f"{expected}; the table belongs to another dictionary"
                )
        if len(found) < len(symbols):
            raise ValueError(
                f"{path}: the dictionary's word {symbols[len(found)]!r} (id {len(found)}) is "
                "missing; the table belongs to another dictionary"
            )
        return table

    @classmethod
    def load_with_symbols(cls, path: str | Path) -> tuple[list[str], WordTable]:
        """Reads a table that :meth:`save` wrote, with its words in the order of their ids.

        Raises:
            ValueError: if the file is damaged; the file and line are named.
        """
        symbols, coordinates, shape = table_files.read(path)
        try:
            return symbols, cls(coordinates, shape)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save_cntk(
        self,
        directory: str | Path,
        symbols: Sequence[str],
        specials: Mapping[str, str] | None = None,
    ) -> None:
        """Writes CNTK's ``vocab.txt`` and ``word-0.location`` into a directory.

        CNTK's tables are square with two components; a table of another shape is written into the
        smallest square that holds it, with its empty cells as -1.

        Args:
            directory: made if it does not exist.
            symbols: the V words, in the order of their ids.
            specials: our word to CNTK's, for words named otherwise there (``{"<unk>": "UNK"}``).
        """
        if self.num_components != 2:
            raise ValueError(
                f"CNTK's table files have two components, this table has {self.num_components}"
            )
        table_files.write_cntk(directory, symbols, self.coordinates, specials or {})

    @classmethod
    def load_cntk(
        cls,
        directory: str | Path,
        symbols: Sequence[str],
        shape: Sequence[int] | None = None,
        specials: Mapping[str, str] | None = None,
        round: int | None = None,
    ) -> WordTable:
        """Reads CNTK's ``vocab.txt`` and ``word-N.location`` from a directory.

        Args:
            directory: holds the two files.
            symbols: the V words, in the order of their ids. CNTK's own order does not matter, but
                both must hold the same words once ``specials`` are mapped.
            shape: keep only this part of CNTK's square (default: the whole square).
            specials: our word to CNTK's. Words of ours that are mapped to ``""`` do not exist in
                CNTK's vocabulary: they are given the first empty cells, or new rows below a full
                square.
            round: N, the number of reallocations that the table comes after (default: the last).

        Raises:
            ValueError: if a word is missing on either side, appears twice or has no cell.
        """
        coordinates, whole = table_files.read_cntk(directory, symbols, specials or {}, round)
        try:
            return cls(coordinates, shape or whole)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error


def prefix_number(coordinates: Any, shape: Sequence[int]) -> Any:
    """Numbers prefixes, the first coordinates of words, in row-major order.

    Args:
        coordinates: of the first i components, integers of shape (..., i), an array or a tensor.
        shape: the sizes of the table.

    Returns:
        Integers of shape (...); of whole words (i = k) these are their cells.
    """
    number = coordinates[..., :0].sum(-1)
    for component in range(coordinates.shape[-1]):
        number = number * shape[component] + coordinates[..., component]
    return number


def component_names(num_components: int) -> list[str]:
    """Returns the components' names in logs: row and column, or component1 … of other tables."""
    if num_components == 2:
        return ["row", "column"]
    return [f"component{number + 1}" for number in range(num_components)]


def default_shape(num_words: int, num_components: int = 2) -> tuple[int, ...]:
    """Returns the smallest near-cubic shape: for two components ⌈√V⌉ rows, ⌈V / rows⌉ columns.

    Raises:
        ValueError: if there is no word or no component.
    """
    if num_components < 1:
        raise ValueError(f"a table needs at least 1 component, got {num_components}")
    if num_words < 1:
        raise ValueError(f"a table needs at least 1 word, got {num_words}")
    shape = []
    rest = num_words
    for remaining in range(num_components, 0, -1):
        size = _ceil_root(rest, remaining)
        shape.append(size)
        rest = -(-rest // size)
    return tuple(shape)


def _ceil_root(number: int, degree: int) -> int:
    """Returns the smallest integer whose power of that degree is at least the number."""
    root = max(1, round(number ** (1.0 / degree)))
    while root**degree < number:
        root += 1
    while root > 1 and (root - 1) ** degree >= number:
        root -= 1
    return root


def check_shape(shape: Sequence[int], num_words: int) -> tuple[int, ...]:
    """Returns the shape as a tuple of ints, or raises ValueError if it cannot hold the words."""
    sizes = tuple(int(size) for size in shape)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"a table's shape needs one positive size per component, got {sizes}")
    cells = math.prod(sizes)
    if not num_words <= cells <= table_files.MOST_CELLS:
        suggestion = "x".join(map(str, default_shape(num_words, len(sizes))))
        raise ValueError(
            f"a table of shape {'x'.join(map(str, sizes))} has {cells} cells, too "
            f"{'few' if cells < num_words else 'many'} for {num_words} words; {suggestion} would do"
        )
    return sizes


def balanced_cells(num_words: int, shape: Sequence[int]) -> np.ndarray:
    """Chooses the occupied cells of a table so that every group is filled as evenly as possible.

    Of a full table these are all cells. Otherwise the empty cells are spread evenly over the rows,
    so that no row is empty while there is a word for it (and so on for each later component).

    Returns:
        Ascending flat cell numbers of shape (V,).
    """
    shape = check_shape(shape, num_words)
    sizes = np.array([num_words])  # words in every group so far
    cells = np.array([0])  # number of every group so far
    for size in shape:
        share, extra = np.divmod(sizes, size)
        # (groups, size): the first `extra` members of a group hold one word more
        counts = share[:, None] + (np.arange(size) < extra[:, None])
        cells = (cells[:, None] * size + np.arange(size)).reshape(-1)
        sizes = counts.reshape(-1)
        cells, sizes = cells[sizes > 0], sizes[sizes > 0]
    return cells.astype(np.int64)
