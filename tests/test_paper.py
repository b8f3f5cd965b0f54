"""Reallocation against costs added up token by token, brute force over permutations and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fairseq_lightrnn.allocation.assignment import SolverOptions
from fairseq_lightrnn.allocation.paper import reallocate
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.core.table import WordTable, balanced_cells


def instance(num_words: int, shape: tuple[int, ...], seed: int, tokens: int = 300, dim: int = 4):
    """A random table, a text of Zipf words with random states, and random output vectors."""
    random = np.random.default_rng(seed)
    cells = balanced_cells(num_words, shape)
    table = WordTable.from_cells(random.permutation(cells), shape)
    chance = 1.0 / np.arange(1, num_words + 1)
    words = torch.from_numpy(random.choice(num_words, tokens, p=chance / chance.sum()))
    hidden = torch.from_numpy(random.uniform(-1, 1, (tokens, len(shape), dim)).astype(np.float32))
    vectors = [torch.from_numpy(random.normal(size=(size, dim))) for size in shape]
    biases = [torch.from_numpy(random.normal(size=size)) for size in shape]
    statistics = AllocationStatistics(num_words, len(shape), dim)
    statistics.add(words, hidden)
    return table, statistics, vectors, biases, words, hidden


def cost_matrices(statistics, vectors, biases) -> list[np.ndarray]:
    return [
        -(statistics.sums[i] @ v.double().T + statistics.counts[:, None] * b.double()).numpy()
        for i, (v, b) in enumerate(zip(vectors, biases, strict=True))
    ]


def total(costs: list[np.ndarray], coordinates: np.ndarray) -> list[float]:
    words = np.arange(len(coordinates))
    return [float(cost[words, coordinates[:, i]].sum()) for i, cost in enumerate(costs)]


def test_predicted_change_is_the_change_of_the_loss_token_by_token():
    table, statistics, vectors, biases, words, hidden = instance(20, (5, 4), seed=0)

    def loss(some: WordTable) -> np.ndarray:
        """Loss of every component with the hidden states as they are."""
        result = []
        for i in range(2):
            logits = hidden[:, i].double() @ vectors[i].T + biases[i]
            target = torch.from_numpy(np.array(some.coordinates))[words, i]
            result.append(torch.nn.functional.cross_entropy(logits, target, reduction="sum").item())
        return np.array(result)

    for objective in ("row-first", "joint"):
        found = reallocate(table, statistics, vectors, biases, objective=objective)
        predicted = np.subtract(found.component_costs_after, found.component_costs_before)
        assert predicted == pytest.approx(loss(found.table) - loss(table), abs=1e-4)
        assert found.moved == (found.table.cells != table.cells).sum()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(2, 2), (3, 2), (1, 5), (5, 1), (6,), (2, 2, 2), (1, 2, 3)]),
    missing=st.integers(0, 2),
    tokens=st.integers(0, 40),
    seed=st.integers(0, 10**6),
)
def test_both_objectives_against_brute_force(shape, missing, tokens, seed):
    cells = int(np.prod(shape))
    num_words = max(1, min(6, cells - missing))
    table, statistics, vectors, biases, *_ = instance(num_words, shape, seed, tokens)
    costs = cost_matrices(statistics, vectors, biases)
    every = [
        total(costs, np.array(table.coordinates)[list(order)])
        for order in itertools.permutations(range(num_words))
    ]
    joint = reallocate(
        table, statistics, vectors, biases, objective="joint", options=SolverOptions(0.0)
    )
    best = min(sum(some) for some in every)
    assert joint.cost_after == pytest.approx(best, abs=1e-9)
    assert joint.lower_bound <= best + 1e-12
    rows_first = reallocate(table, statistics, vectors, biases, objective="row-first")
    best_rows = min(some[0] for some in every)
    assert rows_first.cost_after == pytest.approx(best_rows, abs=1e-9)
    assert rows_first.lower_bound <= best_rows + 1e-12
    for found in (joint, rows_first):
        assert sorted(found.table.cells) == sorted(table.cells)
        assert found.component_costs_after == pytest.approx(
            total(costs, found.table.coordinates), abs=1e-9
        )


def test_later_stages_are_best_within_their_rows():
    table, statistics, vectors, biases, *_ = instance(23, (5, 5), seed=1)
    costs = cost_matrices(statistics, vectors, biases)
    found = reallocate(table, statistics, vectors, biases)
    for row in range(5):
        words = np.flatnonzero(found.table.coordinates[:, 0] == row)
        columns = np.flatnonzero(table.words.reshape(5, 5)[row] >= 0)
        part = costs[1][np.ix_(words, columns)]
        rows, chosen = linear_sum_assignment(part)
        spent = costs[1][words, found.table.coordinates[words, 1]].sum()
        assert spent == pytest.approx(part[rows, chosen].sum(), abs=1e-9)


def test_joint_equals_scipy_at_four_hundred_words():
    table, statistics, vectors, biases, *_ = instance(400, (20, 20), seed=2, tokens=4000, dim=8)
    costs = cost_matrices(statistics, vectors, biases)
    cells = np.array(table.coordinates)
    matrix = costs[0][:, cells[:, 0]] + costs[1][:, cells[:, 1]]
    rows, columns = linear_sum_assignment(matrix)
    found = reallocate(
        table, statistics, vectors, biases, objective="joint", options=SolverOptions(0.0)
    )
    assert found.cost_after == pytest.approx(matrix[rows, columns].sum(), rel=1e-12)
    assert found.gap <= 1e-9 * abs(found.cost_after)


def test_an_optimal_table_stays():
    table, statistics, vectors, biases, *_ = instance(30, (6, 5), seed=4, tokens=3000)
    for objective in ("row-first", "joint"):
        best = reallocate(
            table, statistics, vectors, biases, objective=objective, options=SolverOptions(0.0)
        ).table
        again = reallocate(
            best, statistics, vectors, biases, objective=objective, options=SolverOptions(0.0)
        )
        assert again.table == best
        assert again.moved == 0
        assert again.gap < 1e-6


def test_words_that_never_occurred_stay_in_their_row_where_they_can():
    table, statistics, vectors, biases, *_ = instance(36, (6, 6), seed=7, tokens=0)
    found = reallocate(table, statistics, vectors, biases)
    assert found.moved == 0


@pytest.mark.parametrize("objective", ["row-first", "joint"])
def test_threads_and_repetition_do_not_change_the_table(objective):
    arguments = instance(100, (10, 10), seed=8, tokens=1000)[:4]
    tables = [
        reallocate(*arguments, objective=objective, options=SolverOptions(num_threads=n)).table
        for n in (1, 2, 3, 1)
    ]
    assert all(table == tables[0] for table in tables)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused_naming_the_word(value):
    table, statistics, vectors, biases, *_ = instance(9, (3, 3), seed=9)
    statistics.sums[1, 4, 2] = value
    with pytest.raises(ValueError, match=r"component 1 of word 4 \('e'\) is NaN or infinite"):
        reallocate(table, statistics, vectors, biases, symbols=list("abcdefghi"))
    vectors[0][2, 1] = value
    with pytest.raises(ValueError, match="vectors or biases of component 0"):
        reallocate(table, statistics, vectors, biases)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "rows"}, "objective must be one of row-first, joint, got 'rows'"),
        ({"table": WordTable.from_cells(np.arange(8), (3, 3))}, "do not fit a table of 8 words"),
        ({"biases": [torch.zeros(3), torch.zeros(4)]}, "biases of component 1"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    table, statistics, vectors, biases, *_ = instance(9, (3, 3), seed=10)
    arguments = {
        "table": table,
        "statistics": statistics,
        "vectors": vectors,
        "biases": biases,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        reallocate(**arguments)
