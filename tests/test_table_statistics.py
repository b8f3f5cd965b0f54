from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.core.table_statistics import (
    class_mutual_information,
    compare,
    quality,
    same_cell_part,
)


def random_table(words: int, shape: tuple[int, ...], seed: int) -> WordTable:
    cells = np.random.default_rng(seed).permutation(int(np.prod(shape)))[:words]
    return WordTable.from_cells(cells, shape)


def test_quality() -> None:
    table = WordTable(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), (2, 3))
    figures = quality(table, np.array([2, 2, 4, 0]))
    assert (figures.empty_cells, figures.smallest_row, figures.largest_row) == (2, 2, 2)
    assert figures.word_entropy == pytest.approx(1.5)
    assert figures.row_entropy == pytest.approx(1.0)
    assert figures.entropy_in_row == pytest.approx(0.5)
    assert figures.heaviest_row_share == 0.5


def test_quality_needs_counts() -> None:
    table = random_table(4, (2, 2), 0)
    with pytest.raises(ValueError, match="4 counts are needed"):
        quality(table, np.ones(3))
    with pytest.raises(ValueError, match="the text is empty"):
        quality(table, np.zeros(4))


def test_rows_that_alternate_tell_one_bit() -> None:
    table = WordTable(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), (2, 2))
    text = np.array([0, 2, 1, 3, 0, 3, 1, 2, 0])  # rows 0 1 0 1 …
    of_rows, of_columns = class_mutual_information(table, [text])
    assert of_rows == pytest.approx(1.0)
    assert 0 <= of_columns < 0.5
    with pytest.raises(ValueError, match="no two neighbouring"):
        class_mutual_information(table, [np.array([1])])


def test_one_component_takes_no_square_of_the_vocabulary() -> None:
    words = 300_000
    table = WordTable(np.arange(words)[:, None], (words,))
    text = np.random.default_rng(0).integers(words, size=1000)
    (figure,) = class_mutual_information(table, [text, text])
    assert 0 < figure <= np.log2(1000)


def test_comparison_with_itself() -> None:
    table = random_table(10, (4, 3), 0)
    found = compare(table, table)
    assert (found.moved, found.changed, found.kept_pairs) == (0, [0, 0], 1.0)
    assert (found.row_shares[~np.isnan(found.row_shares)] == 1).all()


def test_rows_that_only_change_their_number_stay_together() -> None:
    table = random_table(12, (4, 3), 0)
    coordinates = table.coordinates.copy()
    coordinates[:, 0] = (coordinates[:, 0] + 1) % 4
    found = compare(table, WordTable(coordinates, (4, 3)))
    assert (found.moved, found.changed, found.kept_pairs) == (12, [12, 0], 1.0)


@given(st.integers(1, 20), st.integers(0, 100))
def test_comparison_word_by_word(words: int, seed: int) -> None:
    first, second = random_table(words, (5, 4), seed), random_table(words, (4, 6), seed + 1)
    found = compare(first, second)
    rows = [first.coordinates[:, 0], second.coordinates[:, 0]]
    pairs = [(i, j) for i, j in itertools.combinations(range(words), 2) if rows[0][i] == rows[0][j]]
    kept = sum(rows[1][i] == rows[1][j] for i, j in pairs)
    assert found.kept_pairs == pytest.approx(kept / len(pairs) if pairs else 1.0)
    different = first.coordinates != second.coordinates
    assert found.moved == sum(map(any, different))
    for row in range(5):
        members = np.flatnonzero(rows[0] == row)
        if len(members):
            largest = max(np.bincount(rows[1][members]))
            assert found.row_shares[row] == pytest.approx(largest / len(members))
        else:
            assert np.isnan(found.row_shares[row])


def test_tables_of_other_vocabularies() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(random_table(4, (2, 2), 0), random_table(5, (3, 2), 0))


def test_neighbours() -> None:
    table = random_table(11, (4, 3), 1)
    mates = same_cell_part(table, 5, 0)
    assert 5 not in mates
    assert all(table.coordinates[mate, 0] == table.coordinates[5, 0] for mate in mates)
