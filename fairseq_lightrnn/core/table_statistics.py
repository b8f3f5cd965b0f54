"""Figures about word tables: how good one is, how two differ, which words are near each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fairseq_lightrnn.core.table import WordTable

__all__ = [
    "TableComparison",
    "TableQuality",
    "class_mutual_information",
    "compare",
    "quality",
    "same_cell_part",
]


class TableQuality(NamedTuple):
    """How a table divides the words of a text.

    Attributes:
        empty_cells: cells without a word.
        smallest_row: words in the row with fewest.
        largest_row: words in the row with most.
        word_entropy: of words drawn from the text, in bits; ``row_entropy`` plus
            ``entropy_in_row``.
        row_entropy: of their rows, in bits.
        entropy_in_row: of words given their row, in bits.
        heaviest_row_share: share of the text that falls into one row, at most.
    """

    empty_cells: int
    smallest_row: int
    largest_row: int
    word_entropy: float
    row_entropy: float
    entropy_in_row: float
    heaviest_row_share: float


class TableComparison(NamedTuple):
    """How one table differs from another of the same words.

    Attributes:
        moved: words with another cell.
        changed: for each component, words with another coordinate.
        kept_pairs: of all pairs of words that shared a row, the share that still does, wherever
            that row is now.
        row_shares: for each row of the first table, the share of its words that are together in
            one row of the second; shape (R,), nan for an empty row.
    """

    moved: int
    changed: list[int]
    kept_pairs: float
    row_shares: np.ndarray


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def quality(table: WordTable, counts: np.ndarray) -> TableQuality:
    """Computes how a table divides words that occur so often.

    Args:
        table: of V words.
        counts: of shape (V,).

    Raises:
        ValueError: if there is not a count for each word, or none is above 0.
    """
    counts = np.asarray(counts)
    if counts.shape != (table.num_words,):
        raise ValueError(f"{table.num_words} counts are needed, got shape {counts.shape}")
    if counts.sum() <= 0:
        raise ValueError("no word has a count: the text is empty")
    rows = table.coordinates[:, 0]
    sizes = np.bincount(rows, minlength=table.shape[0])
    masses = np.bincount(rows, weights=counts, minlength=table.shape[0])
    words, of_rows = _entropy(counts), _entropy(masses)
    return TableQuality(
        table.num_cells - table.num_words,
        int(sizes.min()),
        int(sizes.max()),
        words,
        of_rows,
        words - of_rows,
        float(masses.max() / masses.sum()),
    )


def class_mutual_information(table: WordTable, texts: Iterable[np.ndarray]) -> list[float]:
    """Computes how much a word's coordinate tells of the next word's, in bits.

    This is what Brown et al. (Computational Linguistics 1992) maximise when they cluster words:
    the mutual information of neighbouring classes, here the values of a component.

    Args:
        table: the word table.
        texts: word ids of consecutive text each.

    Returns:
        A figure for each component.

    Raises:
        ValueError: if no text has two words.
    """
    pairs = [_PairCounts(size) for size in table.shape]
    for text in texts:
        coordinates = table.coordinates_of(text)
        for component, counts in enumerate(pairs):
            counts.add(coordinates[:, component])
    if not len(pairs[0].codes):
        raise ValueError("the text has no two neighbouring words")
    return [counts.mutual_information() for counts in pairs]


class _PairCounts:
    """How often which two values are neighbours; only pairs that occur take memory.

    Args:
        size: of the component.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.codes: np.ndarray = np.empty(0, dtype=np.int64)
        self.counts: np.ndarray = np.empty(0)

    def add(self, values: np.ndarray) -> None:
        """Counts the pairs of neighbours in a text."""
        new, counts = np.unique(values[:-1] * self.size + values[1:], return_counts=True)
        codes = np.concatenate([self.codes, new])
        self.codes, place = np.unique(codes, return_inverse=True)
        self.counts = np.bincount(place, np.concatenate([self.counts, counts]))

    def mutual_information(self) -> float:
        """Returns the mutual information of the two values of a pair, in bits."""
        first, second = np.divmod(self.codes, self.size)
        sides = _entropy(np.bincount(first, self.counts)) + _entropy(
            np.bincount(second, self.counts)
        )
        return sides - _entropy(self.counts)


def compare(first: WordTable, second: WordTable) -> TableComparison:
    """Compares two tables of the same words.

    Raises:
        ValueError: if they have different numbers of words or components.
    """
    if (first.num_words, first.num_components) != (second.num_words, second.num_components):
        raise ValueError(
            f"tables of {first.num_words} words and {first.num_components} components and of "
            f"{second.num_words} words and {second.num_components} components cannot be compared"
        )
    moved = (first.coordinates != second.coordinates).any(axis=1)
    changed = (first.coordinates != second.coordinates).sum(axis=0)
    # Words of row i of the first table in row j of the second: only the occurring (i, j).
    width = second.shape[0]
    pairs = first.coordinates[:, 0] * width + second.coordinates[:, 0]
    cells, together = np.unique(pairs, return_counts=True)
    rows = cells // width
    sizes = np.bincount(first.coordinates[:, 0], minlength=first.shape[0])
    largest = np.zeros(first.shape[0])
    np.maximum.at(largest, rows, together)
    with np.errstate(invalid="ignore"):
        shares = np.where(sizes > 0, largest / sizes, np.nan)
    before = (sizes * (sizes - 1) / 2).sum()
    after = (together * (together - 1) / 2).sum()
    kept = float(after / before) if before else 1.0
    return TableComparison(int(moved.sum()), changed.tolist(), kept, shares)


def same_cell_part(table: WordTable, word: int, component: int) -> np.ndarray:
    """Returns the other words that have the same coordinate as a word, ascending ids."""
    values = table.coordinates[:, component]
    same = np.flatnonzero(values == values[word])
    return same[same != word]
