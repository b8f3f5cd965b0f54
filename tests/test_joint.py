"""Joint assignment against scipy on the words x cells matrix, and its certificate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fairseq_lightrnn.allocation import joint as module
from fairseq_lightrnn.allocation.assignment import SolverOptions
from fairseq_lightrnn.allocation.costs import DenseCosts, as_costs
from fairseq_lightrnn.allocation.joint import joint_assignment


def matrix_of(factors: list[np.ndarray], cells: np.ndarray) -> np.ndarray:
    return sum(factor[:, cells[:, i]] for i, factor in enumerate(factors))


def optimum(factors: list[np.ndarray], cells: np.ndarray) -> float:
    matrix = matrix_of(factors, cells)
    rows, columns = linear_sum_assignment(matrix)
    return float(matrix[rows, columns].sum())


def sources(factors: list[np.ndarray]) -> list[DenseCosts]:
    return [as_costs(factor) for factor in factors]


@st.composite
def problems(draw):
    """Tables of one to three components, full or not, one row or one column, with costs of all
    scales and ties.
    """
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    n = draw(st.integers(1, int(np.prod(shape))))
    chosen = np.sort(random.choice(int(np.prod(shape)), n, replace=False))
    cells = np.stack(np.unravel_index(chosen, shape), axis=1)
    scale = 10.0 ** draw(st.integers(-5, 8))
    weight = np.minimum(random.zipf(1.5, (n, 1)), 10**6)
    rounded, idle = draw(st.booleans()), random.random(n) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    factors = []
    for size in shape:
        factor = random.normal(size=(n, size))
        factor = (np.round(factor) if rounded else factor) * weight * scale
        factor[idle] = 0.0
        factors.append(factor)
    return factors, cells, shape


@pytest.mark.parametrize("limit", [0, 1 << 22])  # without and with scipy for small tables
@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_reaches_the_optimum_and_its_bound_holds(limit, problem):
    factors, cells, shape = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_DENSE_LIMIT", limit)
        found = joint_assignment(sources(factors), cells, shape, SolverOptions(0.0))
    best = optimum(factors, cells)
    assert sorted(found.places.tolist()) == list(range(len(cells)))
    matrix = matrix_of(factors, cells)
    slack = 1e-11 * np.abs(matrix).max(axis=1).sum()
    assert found.cost == pytest.approx(matrix[np.arange(len(cells)), found.places].sum(), abs=slack)
    assert found.cost <= best + slack
    assert found.bound <= best
    assert found.optimal


def zipf_instance(size: int, seed: int) -> tuple[list[np.ndarray], np.ndarray, tuple[int, int]]:
    random = np.random.default_rng(seed)
    n = size * size
    counts = np.maximum(1, 3 * n // np.arange(1, n + 1))[:, None]
    factors = []
    for _ in range(2):
        sums = counts * random.normal(size=(n, 8)) + np.sqrt(counts) * random.normal(size=(n, 8))
        factors.append(-(sums @ random.normal(size=(8, size))))
    return factors, np.stack(np.unravel_index(np.arange(n), (size, size)), axis=1), (size, size)


@pytest.mark.parametrize("seed", [41, 62])
def test_ties_between_costs_of_many_sizes_are_proven_optimal(seed, monkeypatch):
    """Words that tie outbid each other until the raise of the auction has to grow again."""
    monkeypatch.setattr(module, "_DENSE_LIMIT", 0)
    random = np.random.default_rng(seed)
    shape, n = (3, 4, 4), 48 - 3 * (seed % 2)
    chosen = np.sort(random.choice(48, n, replace=False))
    cells = np.stack(np.unravel_index(chosen, shape), axis=1)
    weight = np.minimum(random.zipf(1.5, (n, 1)), 10**6)
    idle = random.random(n) < 0.4
    factors = [np.round(random.normal(size=(n, size))) * weight for size in shape]
    for factor in factors:
        factor[idle] = 0.0
    found = joint_assignment(sources(factors), cells, shape, SolverOptions(0.0))
    assert found.optimal
    assert found.cost == optimum(factors, cells)
    assert found.bound <= found.cost


def test_four_hundred_words_are_exact_by_auction(monkeypatch):
    monkeypatch.setattr(module, "_DENSE_LIMIT", 0)
    factors, cells, shape = zipf_instance(20, 0)
    found = joint_assignment(sources(factors), cells, shape, SolverOptions(0.0))
    best = optimum(factors, cells)
    assert found.optimal
    assert found.cost == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
def test_a_requested_gap_is_kept_and_true(gap, monkeypatch):
    monkeypatch.setattr(module, "_DENSE_LIMIT", 0)
    factors, cells, shape = zipf_instance(20, 1)
    found = joint_assignment(sources(factors), cells, shape, SolverOptions(gap))
    best = optimum(factors, cells)
    assert found.relative_gap <= gap
    assert found.bound <= best <= found.cost + 1e-9


def test_threads_do_not_change_the_table(monkeypatch):
    monkeypatch.setattr(module, "_DENSE_LIMIT", 0)
    factors, cells, shape = zipf_instance(24, 2)
    tables = [
        joint_assignment(sources(factors), cells, shape, SolverOptions(num_threads=threads)).places
        for threads in (1, 2, 3)
    ]
    assert np.array_equal(tables[0], tables[1])
    assert np.array_equal(tables[0], tables[2])


def test_costs_that_are_not_finite_are_refused_naming_the_word():
    factors, cells, shape = zipf_instance(3, 4)
    factors[1][5, 2] = np.nan
    with pytest.raises(ValueError, match="component 1 of word 5 is NaN"):
        joint_assignment(sources(factors), cells, shape)


@pytest.mark.slow
def test_five_thousand_words_are_exact():
    factors, cells, shape = zipf_instance(70, 5)
    found = joint_assignment(sources(factors), cells, shape, SolverOptions(0.0))
    assert found.optimal
    assert found.cost == pytest.approx(optimum(factors, cells), rel=1e-12)


def test_words_that_never_occur_stay_where_they_can_and_the_rest_is_exact(monkeypatch):
    monkeypatch.setattr(module, "_DENSE_LIMIT", 0)
    random = np.random.default_rng(3)
    cells = np.stack(np.unravel_index(np.arange(144), (12, 12)), axis=1)
    costs = [random.normal(size=(144, 12)) for _ in range(2)]
    idle = random.random(144) < 0.6
    for cost in costs:
        cost[idle] = 0.0
    whole = costs[0][:, cells[:, 0]] + costs[1][:, cells[:, 1]]
    rows, columns = linear_sum_assignment(whole)
    present = random.permutation(144)
    found = joint_assignment(
        [as_costs(cost) for cost in costs], cells, (12, 12), SolverOptions(0.0), present=present
    )
    assert sorted(found.places) == list(range(144))
    assert found.cost == pytest.approx(whole[rows, columns].sum(), rel=1e-12)
    assert found.bound <= found.cost + 1e-12
    assert found.relative_gap <= 1e-9
    taken = set(found.places[~idle])
    could_stay = idle & ~np.isin(present, list(taken))
    assert (found.places[could_stay] == present[could_stay]).all()
