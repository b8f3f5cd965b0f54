"""Where the tables of a training come from, when it begins."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fairseq_lightrnn.allocation.clustering import table_of_vectors, unexplained
from fairseq_lightrnn.allocation.cooccurrence import CoOccurrence
from fairseq_lightrnn.allocation.initial_table import (
    WordVectors,
    cooccurrence_vectors,
    initial_table,
)
from fairseq_lightrnn.errors import UsageError, usage_errors
from fairseq_lightrnn.models._table import further_files, table_shape
from fairseq_lightrnn.word_table import WordTable

__all__ = ["TableMaker", "read_further_tables"]


def read_further_tables(cfg: Any, dictionary: Any) -> list[WordTable]:
    """Loads the files that ``--further-tables`` names.

    Args:
        cfg: of the model, its shape known.
        dictionary: of the words.

    Raises:
        UsageError: if a file is no table of these words, or of another shape than the first table.
    """
    files = further_files(cfg)
    if not all(os.path.isfile(file) for file in files):
        raise UsageError(
            f"--further-tables {cfg.further_tables}: neither a number of tables nor files joined "
            "by commas"
        )
    tables = []
    for file in files:
        with usage_errors("--further-tables"):
            table = WordTable.load(file, dictionary.symbols)
            shape = table_shape(cfg, len(dictionary))
            if table.shape != shape:
                raise ValueError(
                    f"{file} is a table of shape {table.shape}, the first table has {shape}; "
                    "make them equal"
                )
        tables.append(table)
    return tables


class TableMaker:
    """Makes the tables of a dictionary's words; those from co-occurrence share their word vectors.

    Args:
        dictionary: of the words.
        text: returns text of these words.
        seed: of the first table; other ones follow from it for further tables.
    """

    def __init__(
        self, dictionary: Any, text: Callable[[], Iterable[np.ndarray]], seed: int
    ) -> None:
        self.dictionary = dictionary
        self.text = text
        self.seed = seed

    @cached_property
    def _words(self) -> WordVectors:
        return cooccurrence_vectors(self.text(), len(self.dictionary), CoOccurrence(), self.seed)

    def make(self, kind: str, shape: Sequence[int], before: Sequence[WordTable] = ()) -> WordTable:
        """Makes a table.

        Args:
            kind: one of `INITIAL_TABLES`.
            shape: of the table.
            before: of a further table, all tables before it: one from co-occurrence seats words by
                what these do not say of them.
        """
        seed = self.seed
        if before:  # one that nobody gives a first table, which this one would repeat
            seed = int(np.random.SeedSequence(seed).generate_state(len(before))[-1])
        if kind == "cooccurrence":
            return table_of_vectors(*self._left(before), shape=shape, seed=seed)
        counts = np.array(self.dictionary.count, dtype=np.int64)
        return initial_table(kind, len(self.dictionary), shape, seed=seed, counts=counts)

    def _left(self, before: Sequence[WordTable]) -> WordVectors:
        """Returns the words' vectors, less what tables say of them."""
        if not before:
            return self._words
        vectors, weights, columns = self._words
        return WordVectors(
            unexplained(vectors, weights, before), weights, unexplained(columns, weights, before)
        )
