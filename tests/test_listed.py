"""Assignment to listed cells against scipy, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fairseq_lightrnn.allocation.assignment import SolverOptions
from fairseq_lightrnn.allocation.listed import assign_listed


def problem(n: int, listed: int, seed: int, whole: bool = False):
    """Words, some of their cells and costs, and the cell of each now; cells have gaps."""
    random = np.random.default_rng(seed)
    names = np.sort(random.choice(3 * n, n, replace=False))
    present = random.permutation(names)
    cells = np.full((n, listed), -1)
    for word in range(n):
        others = names[names != present[word]]
        some = random.choice(others, min(listed - 1, len(others)), replace=False)
        cells[word, : 1 + len(some)] = random.permutation([present[word], *some])
        if not whole:
            cells[word, random.random(listed) < 0.2] = -1
            if present[word] not in cells[word]:
                cells[word, 0] = present[word]
    costs = random.normal(size=cells.shape) * random.exponential(size=(n, 1))
    return cells, np.where(cells < 0, np.nan, costs), present


def optimum(cells: np.ndarray, costs: np.ndarray, present: np.ndarray) -> float:
    size = int(present.max()) + 1
    matrix = np.full((len(cells), size), 1e6)
    for word, at in np.argwhere(cells >= 0):
        if cells[word, at] in present:
            matrix[word, cells[word, at]] = costs[word, at]
    words, places = linear_sum_assignment(matrix)
    return float(matrix[words, places].sum())


def cost_of(cells: np.ndarray, costs: np.ndarray, places: np.ndarray) -> float:
    here = (cells == places[:, None]) & (cells >= 0)
    assert (here.sum(axis=1) == 1).all(), "every word has one of its cells"
    return float(np.where(here, costs, 0.0).sum())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 10**6))
def test_optimum_is_scipys(n, listed, seed):
    cells, costs, present = problem(n, listed, seed)
    found = assign_listed(cells, costs, present, SolverOptions(gap=0))
    assert sorted(found.places) == sorted(present)
    assert cost_of(cells, costs, found.places) == pytest.approx(found.cost)
    best = optimum(cells, costs, present)
    assert found.cost == pytest.approx(best, abs=1e-6)
    assert found.bound <= best + 1e-9


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 30), st.integers(0, 10**6))
def test_words_all_alike(n, seed):
    """Ties everywhere: whole costs of a few values, and words that want the same cells."""
    cells, costs, present = problem(n, n, seed, whole=True)
    costs = np.round(costs)
    found = assign_listed(cells, costs, present)
    assert found.bound <= optimum(cells, costs, present) + 1e-9 <= found.cost + 2e-9
    again = assign_listed(cells, np.zeros_like(costs), present)
    assert (again.places == present).all(), "nothing to gain, nothing moved"


def test_default_gap_is_kept_and_prices_are_a_warm_start():
    cells, costs, present = problem(600, 40, 3)
    found = assign_listed(cells, costs, present)
    assert found.gap <= 1e-3 * (found.mean_cost - found.bound)
    warm = assign_listed(cells, costs, present, prices=found.prices)
    assert warm.gap <= 1e-3 * (warm.mean_cost - warm.bound)
    again = assign_listed(cells, costs, present)
    assert (again.places == found.places).all()


def test_a_cell_of_a_word_that_stays_is_not_given_away():
    cells = np.array([[0, -1], [1, 0], [2, 1]])
    costs = np.array([[5.0, 0.0], [5.0, 0.0], [5.0, 0.0]])
    found = assign_listed(cells, costs, np.array([0, 1, 2]))
    assert found.places.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cells, costs, present: (cells, costs[:, :2], present), "do not fit"),
        (lambda cells, costs, present: (cells, costs * np.inf, present), "NaN or infinite"),
        (lambda cells, costs, present: (cells, costs, present * 0 + present[0]), "own now"),
        (lambda cells, costs, present: (cells + 1, costs, present), "not among its cells"),
    ],
)
def test_refused(change, message):
    cells, costs, present = problem(9, 4, 0, whole=True)
    with pytest.raises(ValueError, match=message):
        assign_listed(*change(cells, costs, present))
