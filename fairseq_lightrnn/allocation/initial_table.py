"""The word table that training starts from."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fairseq_lightrnn.allocation.clustering import table_of_vectors
from fairseq_lightrnn.allocation.cooccurrence import (
    CoOccurrence,
    Neighbours,
    Occurrences,
    positive_information,
    word_vectors,
)
from fairseq_lightrnn.allocation.threads import thread_pool
from fairseq_lightrnn.core.table import INITIAL_TABLES, WordTable, balanced_cells

__all__ = [
    "FREQUENT",
    "TableMaker",
    "WordVectors",
    "cooccurrence_vectors",
]

logger = logging.getLogger(__name__)

FREQUENT = 100_000
"""Words that further tables seat by the text; of rarer ones it says little beyond one table."""


class WordVectors(NamedTuple):
    """What a table is made from.

    Attributes:
      vectors: (V, d) in half precision.
      weights: (V,) weight of each word.
      row_dims: the dimensions, the first of them, by which words are seated in rows; the words of
        a row are seated in columns by the others. All count for both if None.
    """

    vectors: np.ndarray
    weights: np.ndarray
    row_dims: int | None


def cooccurrence_vectors(
    tokens: Iterable[np.ndarray],
    num_words: int,
    how: CoOccurrence,
    seed: int = 1,
    num_threads: int | None = None,
) -> WordVectors:
    """Describes words by their neighbours in a text.

    Args:
      tokens: the text as 1-D arrays of word ids.
      num_words: V, size of the dictionary.
      how: what is counted and weighed.
      seed: of the decomposition.
      num_threads: threads; the vectors do not depend on it.

    Returns:
      What `table_of_vectors` takes. Further tables of the same words can be made from it with other
      seeds.
    """
    started = time.monotonic()
    windows = [how.window] if how.column_window == how.window else [how.window, how.column_window]
    with thread_pool(num_threads) as executor:
        words = Occurrences.of(tokens, num_words, max(windows))
        weights = words.counts.astype(np.float64) ** how.weight_power
        information = [
            positive_information(Neighbours(words, how.num_contexts, window), executor)
            for window in windows
        ]
        del words  # the text takes as much as the vectors
    # Half precision: they take most of the memory, and make tables as good (test_clustering).
    vectors = np.empty((num_words, how.dim * len(windows)), np.float16)
    for part in reversed(range(len(windows))):
        own = vectors[:, part * how.dim : (part + 1) * how.dim]
        with thread_pool(num_threads) as executor:
            word_vectors(information.pop(), how.dim, seed, executor, own)
    logger.info("word vectors of %d words took %.1f s", num_words, time.monotonic() - started)
    return WordVectors(vectors, weights, how.dim if len(windows) > 1 else None)


class TableMaker:
    """Builds the tables of a vocabulary before any training.

    ``random`` permutes the words, as in arXiv 1610.09893. ``frequency`` fills the table row by row
    from the most frequent word to the rarest. ``cooccurrence`` puts words with similar neighbours
    into a row, and within the rows words that differ from their row in the same way into a column,
    for which neighbours further away count too: balanced k-means on word vectors; in the end each
    is chosen again by what the other does not explain (`table_of_vectors`). The vectors are rounded
    by the linear algebra library, so that another number of its threads (``OMP_NUM_THREADS``) may
    give another table for the same seed. All such tables of a maker share their word vectors.

    Args:
      num_words: V, size of the vocabulary.
      counts: (V,) occurrences, for ``frequency``.
      text: returns text of these words as 1-D arrays of word ids, for ``cooccurrence``; called once
        and only where it is needed.
      seed: of the first table; those of further tables follow from it.
      names: of the words, for further tables of more than `FREQUENT` of them.

    Raises:
      ValueError: the counts are not those of V words.
    """

    def __init__(
        self,
        num_words: int,
        counts: np.ndarray,
        text: Callable[[], Iterable[np.ndarray]],
        seed: int = 1,
        names: Sequence[str] = (),
    ) -> None:
        if counts.shape != (num_words,) or not np.isfinite(counts).all():
            raise ValueError(f"counts must be {num_words} finite numbers, got shape {counts.shape}")
        self.num_words, self.counts, self.text, self.seed = num_words, counts, text, seed
        self.names = names

    @cached_property
    def _words(self) -> WordVectors:
        return cooccurrence_vectors(self.text(), self.num_words, CoOccurrence(), self.seed)

    def make(self, kind: str, shape: Sequence[int], before: Sequence[WordTable] = ()) -> WordTable:
        """Makes a table.

        Args:
          kind: one of `INITIAL_TABLES`.
          shape: k sizes of the table, with at least V cells.
          before: of a further table, all tables before it: one from co-occurrence seats words by
            what these do not say of them.

        Returns:
          The table; the occupied cells are those of `balanced_cells`.

        Raises:
          ValueError: the kind is unknown, the shape too small, or the text not of these words.
        """
        seed = self.seed
        if before:  # one that nobody gives a first table, which this one would repeat
            seed = int(np.random.SeedSequence(seed).generate_state(len(before))[-1])
        if kind == "cooccurrence" and max(shape) >= self.num_words:
            kind = "frequency"  # each word has a component vector of its own wherever it is
        if kind == "cooccurrence":
            table = self._cooccurrence(shape, seed, before)
            return _spelt(table, self.names) if before else table
        if kind == "random":
            order = np.random.default_rng(seed).permutation(self.num_words)
        elif kind == "frequency":
            order = np.empty(self.num_words, np.int64)
            order[np.argsort(-self.counts, kind="stable")] = np.arange(self.num_words)
        else:
            kinds = ", ".join(INITIAL_TABLES)
            raise ValueError(f"initial table must be one of {kinds}, got {kind!r}")
        return WordTable.from_cells(balanced_cells(self.num_words, shape)[order], shape)

    def _cooccurrence(
        self, shape: Sequence[int], seed: int, before: Sequence[WordTable]
    ) -> WordTable:
        started = time.monotonic()
        words = self._words
        table = table_of_vectors(
            words.vectors,
            words.weights,
            row_dims=words.row_dims,
            shape=shape,
            before=before,
            seed=seed,
        )
        logger.info("co-occurrence table took %.1f s", time.monotonic() - started)
        return table


def _spelt(table: WordTable, names: Sequence[str]) -> WordTable:
    """Seats rare words anew in their cells, in the order of their names, row by row.

    So words that begin alike share rows, and an exported model need not store the cells
    (`runtime.cells`). Words of a dictionary are in the order of their frequency.
    """
    rare = sorted(range(FREQUENT, len(names)), key=names.__getitem__)
    cells = table.cells.copy()
    cells[rare] = np.sort(cells[rare])
    return WordTable.from_cells(cells, table.shape)
