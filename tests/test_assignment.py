"""Balanced assignment against scipy's linear assignment on repeated places, and its certificate."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fairseq_lightrnn.allocation import assignment
from fairseq_lightrnn.allocation import problem as problem_of_assignment
from fairseq_lightrnn.allocation.assignment import SolverOptions, assign
from fairseq_lightrnn.allocation.costs import LowRankCosts


def optimum(costs: np.ndarray, capacities: np.ndarray) -> float:
    """The least cost, by a copy of each place for each word that it takes."""
    copies = np.repeat(costs, capacities, axis=1)
    rows, columns = linear_sum_assignment(copies)
    return float(copies[rows, columns].sum())


@st.composite
def problems(draw):
    """Costs of all scales with ties, zero rows and very unequal words; capacities tight or loose,
    some zero.
    """
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m = draw(st.integers(1, 40)), draw(st.integers(1, 8))
    if draw(st.booleans()):
        capacities = random.multinomial(n, np.ones(m) / m)
    else:
        capacities = random.integers(0, n + 3, m)
        capacities[random.integers(m)] += max(0, n - capacities.sum())
    scale = 10.0 ** draw(st.integers(-5, 8))
    weight = np.minimum(random.zipf(1.5, (n, 1)), 10**6)
    costs = random.normal(size=(n, m))
    if draw(st.booleans()):
        costs = np.round(costs)
    costs = costs * weight * scale
    if draw(st.booleans()):
        costs[random.random(n) < 0.4] = 0.0
    if draw(st.booleans()):
        costs[random.random(n) < 0.5] = costs[0]
    return costs, capacities


@pytest.mark.parametrize("limit", [0, 1 << 22])  # scipy where ties prolong an auction, or always
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_reaches_the_optimum_and_proves_it(limit, problem):
    costs, capacities = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "_EXACT_LIMIT", limit)
        found = assign(costs, capacities)
    best = optimum(costs, capacities)
    assert (np.bincount(found.places, minlength=len(capacities)) <= capacities).all()
    assert found.cost == pytest.approx(costs[np.arange(len(costs)), found.places].sum(), rel=1e-12)
    slack = 1e-12 * np.abs(costs).sum()
    if limit:
        assert found.optimal
        assert found.cost <= best + slack
    assert found.bound <= best
    # As a share of what could be saved if every word had its cheapest place.
    gain = found.mean_cost - costs[:, capacities > 0].min(axis=1).sum()
    assert found.gap <= 2e-6 * gain + slack


@settings(max_examples=60, deadline=None)
@given(problem=problems(), gap=st.sampled_from([0.3, 1e-2, 1e-4]))
def test_with_a_gap_certificates_are_valid(problem, gap):
    costs, capacities = problem
    found = assign(costs, capacities, SolverOptions(gap))
    best = optimum(costs, capacities)
    slack = 1e-12 * np.abs(costs).sum()
    assert (np.bincount(found.places, minlength=len(capacities)) <= capacities).all()
    assert found.bound <= best <= found.cost + slack


def by_auction_alone(patch: pytest.MonkeyPatch) -> None:
    """Leaves nothing to scipy."""
    for limit in ("_EXACT_LIMIT", "_TIES_LIMIT", "_SQUARE_LIMIT"):
        patch.setattr(assignment, limit, 0)


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_the_auction_alone_certifies_what_it_finds(problem):
    costs, capacities = problem
    with pytest.MonkeyPatch.context() as patch:
        by_auction_alone(patch)
        found = assign(costs, capacities)
    best = optimum(costs, capacities)
    assert (np.bincount(found.places, minlength=len(capacities)) <= capacities).all()
    assert found.bound <= best <= found.cost + 1e-12 * np.abs(costs).sum()


def tied(kind: str, n: int, m: int) -> np.ndarray:
    random = np.random.default_rng(3)
    counts = np.maximum(1, 3 * n // np.arange(1, n + 1))[:, None]
    return {
        "few values": lambda: random.integers(0, 4, (n, m)).astype(float),
        "few values, Zipf counts": lambda: random.integers(0, 4, (n, m)) * counts.astype(float),
        "words alike": lambda: random.normal(size=(12, m))[random.integers(12, size=n)],
        "places alike": lambda: np.repeat(counts * random.normal(size=(n, 4)), m // 4, axis=1),
        "much at stake": lambda: random.pareto(0.4, (n, 1)) * random.normal(size=(1, m)),
    }[kind]()  # fmt: skip


@pytest.mark.parametrize("memory", [1 << 30, 20_000])  # all costs held, or those of few places
@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize(
    "kind",
    ["few values", "few values, Zipf counts", "words alike", "places alike", "much at stake"],
)
def test_ties_end_with_a_small_certified_gap(kind, spare, memory, monkeypatch):
    by_auction_alone(monkeypatch)
    n, m = 300, 20
    costs, capacities = tied(kind, n, m), np.full(m, n // m + spare)
    found = assign(costs, capacities, SolverOptions(memory=memory))
    best = optimum(costs, capacities)
    assert (np.bincount(found.places, minlength=m) <= capacities).all()
    assert found.bound <= best <= found.cost + 1e-9 * abs(best)
    assert found.relative_gap <= 2e-3


@pytest.mark.parametrize("kind", ["words alike", "places alike"])
def test_ties_are_left_to_scipy_where_an_optimum_is_asked_for(kind, monkeypatch):
    monkeypatch.setattr(assignment, "_EXACT_LIMIT", 0)
    costs, capacities = tied(kind, 300, 20), [15] * 20
    found = assign(costs, capacities)
    assert found.optimal
    assert found.cost == pytest.approx(optimum(costs, np.array(capacities)), rel=1e-12)


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
def test_a_requested_gap_is_kept(gap):
    random = np.random.default_rng(5)
    counts = np.maximum(1, 5000 // np.arange(1, 601))[:, None]
    costs = (counts * random.normal(size=(600, 8))) @ random.normal(size=(8, 20))
    assert assign(costs, [30] * 20, SolverOptions(gap)).relative_gap <= gap


def test_any_prices_give_a_bound_by_brute_force():
    random = np.random.default_rng(0)
    costs = random.normal(size=(6, 3))
    least = min(
        costs[np.arange(6), list(places)].sum()
        for places in itertools.product(range(3), repeat=6)
        if (np.bincount(places, minlength=3) <= 2).all()
    )
    found = assign(costs, [2, 2, 2])
    assert found.cost == pytest.approx(least, rel=1e-12)
    assert np.bincount(found.places).tolist() == [2, 2, 2]


@pytest.mark.parametrize("single", [False, True])
def test_larger_instances_with_zipf_counts_are_exact(single, monkeypatch):
    if single:
        monkeypatch.setattr(problem_of_assignment, "_FLOAT64_LIMIT", 0)
    random = np.random.default_rng(1)
    n, m = 600, 20
    counts = np.maximum(1, 5000 // np.arange(1, n + 1))[:, None]
    costs = -(
        counts * random.normal(size=(n, 8)) + np.sqrt(counts) * random.normal(size=(n, 8))
    ) @ random.normal(size=(8, m))
    capacities = np.full(m, 30)
    found = assign(costs, capacities)
    best = optimum(costs, capacities)
    assert found.bound <= best <= found.cost + 1e-9
    assert found.relative_gap <= (1e-6 if single else 1e-12)


def test_warm_prices_do_not_change_the_optimum(monkeypatch):
    random = np.random.default_rng(2)
    monkeypatch.setattr(assignment, "_EXACT_LIMIT", 0)
    costs = random.normal(size=(60, 6))
    first = assign(costs, [10] * 6)
    again = assign(costs + 0.01, [10] * 6, prices=first.prices + 5.0)
    wild = assign(costs, [10] * 6, prices=random.normal(size=6) * 1e6)
    for found in (again, wild):
        assert np.array_equal(found.places, first.places)
        assert found.optimal


def test_low_rank_costs_equal_their_matrix():
    random = torch.Generator().manual_seed(3)
    sums, vectors = torch.randn(50, 4, generator=random), torch.randn(5, 4, generator=random)
    counts, biases = torch.arange(50.0), torch.randn(5, generator=random)
    costs = LowRankCosts(sums, vectors, counts, biases)
    matrix = -(sums.double() @ vectors.double().T + counts[:, None].double() * biases.double())
    assert torch.allclose(costs.block(slice(None)), matrix, rtol=1e-13)
    low_rank, dense = assign(costs, [10] * 5), assign(matrix, [10] * 5)
    assert np.array_equal(low_rank.places, dense.places)
    assert low_rank.cost == pytest.approx(dense.cost, rel=1e-12)


def test_indifferent_words_keep_their_place_where_they_can():
    costs = np.zeros((6, 3))
    costs[0] = [0.0, 5.0, 5.0]
    present = np.array([2, 2, 2, 1, 1, 0])
    found = assign(costs, [2, 2, 2], present=present)
    assert found.places.tolist() == [0, 2, 2, 1, 1, 0]


def test_no_words_and_places_without_capacity():
    assert assign(np.zeros((0, 2)), [1, 1]).places.tolist() == []
    found = assign(np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]), [0, 1, 1])
    assert sorted(found.places.tolist()) == [1, 2]
    assert found.cost == 3.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_refused_naming_the_word(value):
    costs = np.zeros((3, 2))
    costs[1, 1] = value
    with pytest.raises(ValueError, match=r"the cost of word 1 \('b'\) is NaN or infinite"):
        assign(costs, [2, 2], symbols=["a", "b", "c"])


@pytest.mark.parametrize(
    ("capacities", "message"),
    [
        ([1, 1], "total capacity 2 cannot take 3 words"),
        ([4, -1], "capacity of place 1 is -1"),
        ([4], "2 integers"),
        ([2.0, 2.0], "2 integers"),
    ],
)
def test_bad_capacities_are_refused(capacities, message):
    with pytest.raises(ValueError, match=message):
        assign(np.zeros((3, 2)), capacities)


def test_costs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="matrix of words by places"):
        assign(np.zeros(3), [3])
    with pytest.raises(ValueError, match="do not fit together"):
        LowRankCosts(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3), torch.zeros(5))


@settings(max_examples=60, deadline=None)
@given(problem=problems(), entries=st.sampled_from([1, 10**6]))
def test_costs_that_do_not_fit_leave_a_small_certified_gap(problem, entries):
    costs, capacities = problem
    with pytest.MonkeyPatch.context() as patch:
        by_auction_alone(patch)
        patch.setattr(assignment, "_SAMPLE_ENTRIES", entries)
        found = assign(costs, capacities, SolverOptions(memory=0))
    best = optimum(costs, capacities)
    slack = 1e-12 * np.abs(costs).sum()
    assert (np.bincount(found.places, minlength=len(capacities)) <= capacities).all()
    assert found.bound <= best <= found.cost + slack
    whole = assign(costs, capacities)
    assert found.mean_cost == pytest.approx(whole.mean_cost, rel=1e-9, abs=slack)


@pytest.mark.parametrize("idle", [0, 60])
def test_cached_places_come_close_to_the_optimum(idle, monkeypatch):
    monkeypatch.setattr(assignment, "_SAMPLE_ENTRIES", 2000)
    by_auction_alone(monkeypatch)
    random = torch.Generator().manual_seed(5)
    n, m = 600, 40
    counts = (5000 // torch.arange(1, n + 1)).clamp(min=1).double()
    sums = counts[:, None] * torch.randn(n, 8, generator=random).double()
    counts[n - idle :], sums[n - idle :] = 0.0, 0.0
    vectors = torch.randn(m, 8, generator=random).double()
    costs = LowRankCosts(sums, vectors, counts, torch.randn(m, generator=random))
    whole = assign(costs, [15] * m)
    parts = assign(costs, [15] * m, SolverOptions(memory=0))
    assert parts.bound <= whole.cost
    assert parts.relative_gap <= 1e-5
    assert parts.cost - whole.cost <= 1e-5 * (whole.mean_cost - whole.cost)


LIMITED = """
import resource, sys
import numpy as np, torch
from fairseq_lightrnn.allocation.assignment import SolverOptions, assign
from fairseq_lightrnn.allocation.costs import LowRankCosts

def problem(n, m):
    random = torch.Generator().manual_seed(0)
    factors = torch.randn(n, 4, generator=random), torch.randn(m, 4, generator=random)
    return LowRankCosts(*factors, torch.ones(n), torch.zeros(m)), np.full(m, n // m)

memory = int(sys.argv[1])
assign(*problem(400, 20), SolverOptions(1e-3, memory=memory))  # compiles
costs, capacities = problem(20000, 400)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (48 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = assign(costs, capacities, SolverOptions(1e-3, memory=memory))
print(found.relative_gap)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_AS")
def test_the_memory_bound_holds_under_a_real_limit():
    def run(memory: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, str(memory)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    bounded = run(1 << 20)
    assert bounded.returncode == 0, bounded.stderr
    assert float(bounded.stdout) <= 1e-3
    assert "Memory" in run(1 << 40).stderr  # the matrix alone takes 64 MB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_cpu_and_gpu_cost_the_same(memory):
    random = torch.Generator().manual_seed(6)
    factors = [torch.randn(3000, 16, generator=random), torch.randn(50, 16, generator=random)]
    factors += [torch.arange(3000.0), torch.randn(50, generator=random)]
    costs = [
        assign(
            LowRankCosts(*(factor.to(device) for factor in factors)),
            [60] * 50,
            SolverOptions(memory=memory),
        ).cost
        for device in ("cpu", "cuda")
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-6)
