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
    found = decode_cells(unpack(pack({"cells": cells[0], **coded})), size)
    assert found.tolist() == cells.tolist()


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


def test_without_further_tables() -> None:
    assert decode_cells({"cells": np.arange(5)}, 6).shape == (0, 5)
