"""Where words sit, and which share a prefix, as parts of a model."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from fairseq_lightrnn.core.seats import PredictedTable, Seats
from fairseq_lightrnn.core.table import WordTable

KINDS = [Seats, PredictedTable]
TABLES = [(9, (9,)), (12, (3, 4)), (10, (4, 3)), (17, (2, 3, 4))]


def random_table(words: int, shape: tuple[int, ...], seed: int = 0) -> WordTable:
    cells = np.random.default_rng(seed).permutation(int(np.prod(shape)))[:words]
    return WordTable.from_cells(cells, shape)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[Seats]:
    return request.param


def test_seats_follow_the_table(kind: type[Seats]) -> None:
    seats = kind(7, (3, 3))
    table = random_table(7, (3, 3))
    seats.seat(table)
    words = torch.tensor([[0, 6], [3, 3]])
    assert (seats(words).numpy() == table.coordinates[words.numpy()]).all()
    assert seats.table() == table
    assert (seats.num_words, seats.num_components, seats.shape) == (7, 2, (3, 3))


def test_cells_follow_the_table() -> None:
    seats = PredictedTable(7, (3, 3))
    table = random_table(7, (3, 3))
    seats.seat(table)
    assert seats.cells.tolist() == table.cells.tolist()
    assert seats.words.tolist() == table.words.clip(min=0).tolist()
    assert seats.members.tolist() == table.words.clip(min=0).reshape(3, 3).tolist()


def test_seats_travel_with_state_dicts(kind: type[Seats]) -> None:
    table = random_table(7, (3, 3))
    seated, other = kind(7, (3, 3)), kind(7, (3, 3))
    seated.seat(table)
    assert list(seated.state_dict()) == ["coordinates"]
    other.load_state_dict(seated.state_dict())
    assert other.table() == table
    if isinstance(other, PredictedTable):
        prefix = torch.tensor([[0], [1], [2]])
        assert (other.occupied(1, prefix).numpy() == table.occupied(1)).all()
        assert other.cells.tolist() == table.cells.tolist()


def test_seats_refuse_other_shapes_and_vocabularies(kind: type[Seats]) -> None:
    seats = kind(7, (3, 3))
    with pytest.raises(ValueError, match=r"shape \(3, 3\), got 7 words and shape \(1, 7\)"):
        seats.seat(random_table(7, (1, 7)))
    with pytest.raises(ValueError, match="got 6 words"):
        seats.seat(random_table(6, (3, 3)))


def test_copies_and_pickles_are_tables_of_their_own(kind: type[Seats]) -> None:
    seats, table, other = kind(7, (3, 3)), random_table(7, (3, 3)), random_table(7, (3, 3), 1)
    seats.seat(table)
    for made in (copy.deepcopy(seats), pickle.loads(pickle.dumps(seats))):
        assert made.table() == table
        made.seat(other)
        assert made.table() == other and seats.table() == table
        if isinstance(made, PredictedTable) and isinstance(seats, PredictedTable):
            assert made.cells.tolist() == other.cells.tolist()
            assert seats.cells.tolist() == table.cells.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_leave_the_table_alone(kind: type[Seats], dtype: torch.dtype) -> None:
    seats, table = kind(4000, (70, 70)), random_table(4000, (70, 70))
    seats.seat(table)
    assert seats.to(dtype).table() == table
    if isinstance(seats, PredictedTable):
        shares = seats.shares(0, torch.empty(1, 0, dtype=torch.long))
        expected = torch.from_numpy(table.counts(0)) / 4000
        torch.testing.assert_close(shares, expected.float())


def test_full_tables_need_no_mask() -> None:
    table = PredictedTable(9, (3, 3))
    assert table.occupied(0, torch.empty(2, 0, dtype=torch.long)) is None
    assert table.occupied(1, torch.tensor([[0], [2]])) is None


def test_the_mask_is_that_of_the_table_in_force() -> None:
    table, before_rows = PredictedTable(3, (2, 3)), torch.empty(1, 0, dtype=torch.long)
    table.seat(WordTable.from_cells(np.array([0, 1, 2]), (2, 3)))
    assert table.occupied(0, before_rows).tolist() == [[True, False]]
    table.seat(WordTable.from_cells(np.array([0, 1, 3]), (2, 3)))
    assert table.occupied(0, before_rows) is None
    assert table.occupied(1, torch.tensor([[1]])).tolist() == [[True, False, False]]


@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_prefixes_word_by_word(words: int, shape: tuple[int, ...]) -> None:
    """Their numbers, which values lead to words, and how words are spread over them."""
    seats, table = PredictedTable(words, shape), random_table(words, shape, words)
    seats.seat(table)
    for component, size in enumerate(shape):
        prefixes = list(np.ndindex(*shape[:component]))
        prefix = torch.tensor(prefixes, dtype=torch.long).view(len(prefixes), component)
        assert seats.number(prefix).tolist() == list(range(len(prefixes)))
        counts = torch.zeros(len(prefixes), size)
        for row in table.coordinates.tolist():
            counts[prefixes.index(tuple(row[:component])), row[component]] += 1
        occupied = seats.occupied(component, prefix)
        assert torch.equal(torch.ones_like(counts).bool() if occupied is None else occupied,
                           counts > 0)  # fmt: skip
        expected = counts / counts.sum(1, keepdim=True).clamp(min=1)
        torch.testing.assert_close(seats.shares(component, prefix), expected)
