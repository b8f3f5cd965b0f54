"""Cells that need no bytes, against the cells themselves."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lightrnn.runtime.cells import _rising, code_cells, decode_cells
from fairseq_lightrnn.runtime.folder import pack, unpack


@given(st.integers(1, 40), st.integers(0, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_cells_survive(words: int, empty: int, tables: int, seed: int) -> None:
    random, size = np.random.default_rng(seed), words + empty
    cells = np.stack([random.permutation(size)[:words] for _ in range(tables)])
    rare = random.random(words) < 0.7
    cells[:, rare] = np.sort(cells[:, rare], axis=1)
    coded = code_cells(cells, size)
    assert coded["further_cells"].shape[1] == words - coded["in_order"].sum()
    found, read_by = decode_cells(unpack(pack({"cells": cells[0], **coded})), size)
    assert found.tolist() == cells.tolist()
    assert read_by is None


@given(st.integers(1, 300), st.integers(0, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_words_that_moved_are_read_where_they_were(
    words: int, empty: int, tables: int, seed: int
) -> None:
    random, size = np.random.default_rng(seed), words + empty
    read, cells = (
        np.stack([random.permutation(size)[:words] for _ in range(tables)]) for _ in range(2)
    )
    stay = random.random(tables) < 0.4
    cells[stay] = read[stay]
    coded = code_cells(cells, size, read)
    found, read_by = decode_cells(unpack(pack(coded)), size)
    assert found.tolist() == cells.tolist()
    assert (found if read_by is None else read_by).tolist() == read.tolist()
    assert (read_by is None) == ("moved" not in coded) == bool((cells == read).all())


@given(st.permutations(range(7)))
def test_no_rising_sequence_is_longer(values: list[int]) -> None:
    marked = _rising(np.array(values))
    rising = [value for value, one in zip(values, marked, strict=True) if one]
    assert rising == sorted(rising)
    longer = combinations(values, len(rising) + 1)
    assert not any(list(some) == sorted(some) for some in longer)


def test_words_in_order_take_a_bit() -> None:
    random, words = np.random.default_rng(0), 1 << 16
    cells = np.stack([random.permutation(words) for _ in range(3)])
    rare = random.random(words) < 0.8
    cells[:, rare] = np.sort(cells[:, rare], axis=1)
    frequent = int((~rare).sum())
    assert len(pack(code_cells(cells, words))) < 3 * 16.5 / 8 * frequent + words / 6


def test_words_that_moved_take_their_cells() -> None:
    """All words in one of two tables, and a tenth of them in the other."""
    random, words = np.random.default_rng(0), 1 << 14
    read = np.stack([np.arange(words)] * 2)
    cells = read.copy()
    cells[0] = random.permutation(words)
    some = random.permutation(words)[: words // 10]
    cells[1, some] = cells[1, random.permutation(some)]
    before, after = (len(pack(code_cells(one, words, read))) for one in (read, cells))
    assert after - before < 14.5 / 8 * (words + len(some)) + words / 8


def test_without_further_tables() -> None:
    cells, read_by = decode_cells({"cells": np.arange(5)}, 6)
    assert cells.shape == (0, 5)
    assert read_by is None
