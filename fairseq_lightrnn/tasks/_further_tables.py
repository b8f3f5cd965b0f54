"""Where the further tables of a training come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fairseq_lightrnn.allocation.cooccurrence import CoOccurrence
from fairseq_lightrnn.allocation.initial_table import (
    cooccurrence_vectors,
    initial_table,
    table_of_vectors,
)
from fairseq_lightrnn.errors import usage_errors
from fairseq_lightrnn.models._table import further_files, table_shape
from fairseq_lightrnn.word_table import WordTable

__all__ = ["further_tables", "read_further_tables"]


def read_further_tables(cfg: Any, dictionary: Any) -> list[WordTable]:
    """Loads the files that ``--further-tables`` names.

    Args:
        cfg: of the model, its shape known.
        dictionary: of the words.

    Raises:
        UsageError: if a file is no table of these words, or of another shape than the first table.
    """
    tables = []
    for file in further_files(cfg):
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


def further_tables(
    kind: str,
    count: int,
    dictionary: Any,
    shape: Sequence[int],
    seed: int,
    text: Callable[[], Iterable[np.ndarray]],
    given: Sequence[WordTable] = (),
) -> Iterator[WordTable]:
    """Yields further tables, each made only when it is asked for.

    Args:
        kind: ``random`` or ``cooccurrence``; those of the latter share their word vectors.
        count: of tables.
        dictionary: of the words.
        shape: of the tables.
        seed: of the first table; these have the next ones.
        text: returns the training text.
        given: the tables, if they are not to be made.
    """
    if given:
        yield from given
    elif kind == "random":
        for number in range(1, count + 1):
            yield initial_table(kind, len(dictionary), shape, seed=seed + number)
    else:
        words = cooccurrence_vectors(text(), len(dictionary), CoOccurrence(), seed)
        for number in range(1, count + 1):
            yield table_of_vectors(*words, shape, seed=seed + number)
