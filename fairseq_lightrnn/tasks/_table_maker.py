"""Where the further tables of a training come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fairseq_lightrnn.allocation.cooccurrence import CoOccurrence
from fairseq_lightrnn.allocation.initial_table import (
    cooccurrence_vectors,
    initial_table,
    table_of_vectors,
)
from fairseq_lightrnn.errors import UsageError, usage_errors
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
        seed: of the first table, from which other ones follow.
        text: returns the training text.
        given: the tables, if they are not to be made.
    """
    if given:
        yield from given
    elif kind == "random":
        for own_seed in _seeds(seed, count):
            yield initial_table(kind, len(dictionary), shape, seed=own_seed)
    else:
        words = cooccurrence_vectors(text(), len(dictionary), CoOccurrence(), seed)
        for own_seed in _seeds(seed, count):
            yield table_of_vectors(*words, shape, seed=own_seed)


def _seeds(seed: int, count: int) -> list[int]:
    """Returns seeds that nobody gives a first table, which a further one would repeat."""
    return [int(s) for s in np.random.SeedSequence(seed).generate_state(count)]
