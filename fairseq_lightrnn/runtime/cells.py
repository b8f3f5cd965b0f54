"""Cells of words in further tables, of which those that follow the words' own order need no bytes.

Rare words sit in further tables as they are spelt (:class:`TableMaker`), in the cells that the
other words leave. So for most words of a large vocabulary one bit says all of their cells.
Words that moved since sit elsewhere where they are predicted, but are read by the cells that they
had: of these words alone both cells are stored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

import numpy as np

__all__ = ["code_cells", "decode_cells"]


def code_cells(
    cells: np.ndarray, size: int, input_cells: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Codes the cells of words in several tables.

    Args:
        cells: of V words in their order, in M tables, integers of shape (M, V).
        size: cells of a table.
        input_cells: in the tables that they are read by, (M, V); by default the same.

    Returns:
        Of the tables that words are read by: ``in_order``, 1 for the words that have in every table
        the next one of the cells that are left, (V,); ``further_cells``, the cells of the other
        words, (M, S); ``empty_cells``, those of no word, (M, size - V). If words moved since:
        ``moved``, 1 for those of each table, (M, V); ``moved_cells``, where they are predicted,
        table by table.
    """
    read = cells if input_cells is None else input_cells
    in_order = np.ones(read.shape[1], dtype=bool)
    for of_table in read:
        in_order &= _rising(of_table)
    empty = [np.setdiff1d(np.arange(size), of_table) for of_table in read]
    coded = {
        "in_order": in_order.astype(np.uint8),
        "further_cells": read[:, ~in_order],
        "empty_cells": np.stack(empty),
    }
    moved = cells != read
    if moved.any():
        coded |= {"moved": moved.astype(np.uint8), "moved_cells": cells[moved]}
    return coded


def decode_cells(
    arrays: Mapping[str, np.ndarray], size: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns what :func:`code_cells` coded.

    Returns:
        The cells of words, (M, V), of no tables if there are none; and those that they are read
        by, or None if no word moved.
    """
    if "in_order" not in arrays:
        return np.zeros((0, len(arrays["cells"])), dtype=np.int32), None
    in_order = arrays["in_order"].astype(bool)
    stored, empty = arrays["further_cells"], arrays["empty_cells"]
    result = np.zeros((len(stored), len(in_order)), dtype=np.int32)
    for of_table, some, without_word in zip(result, stored, empty, strict=True):
        left = np.ones(size, dtype=bool)
        left[some] = left[without_word] = False
        of_table[~in_order] = some
        of_table[in_order] = np.flatnonzero(left)
    if "moved" not in arrays:
        return result, None
    cells = result.copy()
    cells[arrays["moved"].astype(bool)] = arrays["moved_cells"]
    return cells, result


def _rising(values: np.ndarray) -> np.ndarray:
    """Marks a longest rising subsequence of different integers (V,)."""
    ends: list[int] = []  # the lowest value that a rising sequence of each length ends with
    length = np.zeros(len(values), dtype=np.int64)
    for place, value in enumerate(values.tolist()):
        length[place] = at = bisect_left(ends, value)
        ends[at : at + 1] = [value]
    marked = np.zeros(len(values), dtype=bool)
    wanted, below = len(ends) - 1, np.inf
    for place in range(len(values) - 1, -1, -1):
        if length[place] == wanted and values[place] < below:
            marked[place], below, wanted = True, values[place], wanted - 1
    return marked
