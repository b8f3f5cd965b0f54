"""Tables from word vectors: k-means that settles, columns of their own, coordinates together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fairseq_lightrnn.allocation import clustering
from fairseq_lightrnn.allocation.clustering import table_of_vectors
from fairseq_lightrnn.allocation.sums import Sums, sums_of_tables
from fairseq_lightrnn.core.table import WordTable, balanced_cells


def clusters(seed: int, members: int = 15) -> np.ndarray:
    """Vectors about 8 corners of a cube, some corners near each other."""
    random = np.random.default_rng(seed)
    corners = random.normal(size=(8, 6))
    return np.repeat(corners, members, axis=0) + 0.05 * random.normal(size=(8 * members, 6))


def together_or_apart(patch: pytest.MonkeyPatch, joint: bool) -> None:
    """Lets coordinates be chosen again by what all others do not explain, or not."""
    patch.setattr(clustering, "_JOINT_ROUNDS", 16 if joint else 0)


def spread(vectors: np.ndarray, rows: np.ndarray) -> float:
    """Returns the sum of squared distances to the means of the rows."""
    means = [vectors[rows == row].mean(axis=0) for row in range(8)]
    return sum(float(((vectors[rows == row] - means[row]) ** 2).sum()) for row in range(8))


@pytest.mark.parametrize("sampled", [False, True])
def test_rounds_go_on_until_rows_settle(monkeypatch, sampled):
    """Rows about words drawn at random are far wider."""
    together_or_apart(monkeypatch, False)
    if sampled:  # rounds of the heaviest 64 words, all words in the end
        monkeypatch.setattr(clustering, "_ROUND_WORDS", 8)

    def widths(rounds: int) -> list[float]:
        monkeypatch.setattr(clustering, "_ROUNDS", rounds)
        found = []
        for seed in range(12):
            vectors, weights = clusters(seed), np.random.default_rng(seed).uniform(1, 2, 120)
            table = table_of_vectors(vectors, weights, shape=(8, 15), seed=seed)
            rows = table.coordinates[:, 0]
            assert np.bincount(rows).tolist() == [15] * 8
            found.append(spread(vectors, rows))
        return found

    settled = widths(16)
    assert max(settled) < 4  # the corners themselves: 8 · 15 · 6 · 0.05² = 1.8
    if not sampled:
        assert sum(widths(0)) > 10 * sum(settled)


@pytest.mark.parametrize("joint", [False, True])
def test_columns_are_chosen_by_vectors_of_their_own(monkeypatch, joint: bool):
    """Six classes follow each other; who follows three words later makes six groups in each."""
    together_or_apart(monkeypatch, joint)
    random = np.random.default_rng(0)
    classes = np.repeat(np.eye(6), 6, axis=0) + 0.01 * random.normal(size=(36, 6))
    groups = np.tile(np.eye(6), (6, 1)) + 0.01 * random.normal(size=(36, 6))
    # A row's mean is not told from a column by vectors that have both: it is taken off.
    mixed = groups + 10 * classes
    for columns in (groups, mixed):
        both = np.hstack([classes, columns])
        table = table_of_vectors(both, np.ones(36), row_dims=6, shape=(6, 6))
        by_class, by_group = table.coordinates.T
        for number in range(6):
            assert len(set(by_class[6 * number : 6 * number + 6])) == 1
            assert len(set(by_group[number::6])) == 1
    alone = table_of_vectors(classes, np.ones(36), shape=(6, 6)).coordinates[:, 1]
    assert any(len(set(alone[number::6])) > 1 for number in range(6))


def nearest_sums(
    tables: list[WordTable], vectors: np.ndarray, weights: np.ndarray
) -> list[np.ndarray]:
    """Returns each coordinate's centroids, whose sums are nearest to the vectors: least squares."""
    places = [(table.coordinates[:, i], n) for table in tables for i, n in enumerate(table.shape)]
    ones = np.hstack([np.eye(size)[place] for place, size in places])
    root = np.sqrt(weights)[:, None]
    found, *_ = np.linalg.lstsq(root * ones, root * vectors, rcond=None)
    return np.split(found, np.cumsum([size for _, size in places])[:-1])


def distance(table: WordTable, vectors: np.ndarray, weights: np.ndarray) -> float:
    """Returns the weighted sum of squared distances between words and sums of centroids."""
    centroids = nearest_sums([table], vectors, weights)
    sums = sum(places[table.coordinates[:, i]] for i, places in enumerate(centroids))
    return weighted_squares(vectors - sums, weights)


def weighted_squares(vectors: np.ndarray, weights: np.ndarray) -> float:
    return float((weights * (vectors**2).sum(axis=1)).sum())


SHAPES = [(12, 10), (6, 20), (5, 4, 6), (120, 1), (1, 120)]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), st.integers(0, 5))
def test_coordinates_that_settle_together_are_no_farther(seed: int, shape, empty: int):
    random = np.random.default_rng(seed)
    num_words = int(np.prod(shape)) - min(empty, min(shape) - 1)
    vectors, weights = random.normal(size=(num_words, 4)), random.uniform(0.1, 9, num_words)
    tables = []
    for joint in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            together_or_apart(patch, joint)
            tables.append(table_of_vectors(vectors, weights, shape=shape, seed=seed))
    apart, together = tables
    assert sorted(together.cells) == balanced_cells(num_words, shape).tolist()
    # Which is nearer is told from centroids that approach the least squares.
    assert distance(together, vectors, weights) <= 1.02 * distance(apart, vectors, weights)


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
def test_no_exchange_within_a_row_is_left(monkeypatch, shape: tuple[int, ...]):
    """The last coordinate against scipy's assignment of the words that agree in all others."""
    monkeypatch.setattr(clustering, "_JOINT_TOLERANCE", 0.0)
    random = np.random.default_rng(len(shape))
    size = int(np.prod(shape))
    vectors, weights = random.normal(size=(size, 3)), random.uniform(1, 5, size)
    table = table_of_vectors(vectors, weights, shape=shape)
    *others, last = nearest_sums([table], vectors, weights)
    left = vectors - sum(found[table.coordinates[:, i]] for i, found in enumerate(others))
    costs = weights[:, None] * ((left[:, None] - last) ** 2).sum(axis=2)
    saved = 0.0
    for key in np.unique(table.coordinates[:, :-1], axis=0):
        words = np.flatnonzero((table.coordinates[:, :-1] == key).all(axis=1))
        rows, columns = linear_sum_assignment(costs[words])
        now = costs[words, table.coordinates[words, -1]].sum()
        saved += now - costs[words][rows, columns].sum()
    assert saved <= 0.02 * distance(table, vectors, weights)


def test_words_settle_where_both_of_their_vectors_are_nearer(monkeypatch):
    """Rows chosen by one kind of vectors alone leave something to gain for both."""
    apart, together = [], []
    for seed in range(8):
        random = np.random.default_rng(seed)
        vectors, columns = random.normal(size=(2, 120, 4))
        weights = random.pareto(1.5, 120) + 0.1
        for joint, found in ((False, apart), (True, together)):
            together_or_apart(monkeypatch, joint)
            both = np.hstack([vectors, columns])
            table = table_of_vectors(both, weights, row_dims=4, shape=(12, 10), seed=seed)
            found.append(distance(table, both, weights))
    assert all(near < far for near, far in zip(together, apart, strict=True))
    assert sum(together) < 0.95 * sum(apart)


def test_what_tables_do_not_say_is_left_by_least_squares():
    random = np.random.default_rng(1)
    vectors, weights = random.normal(size=(300, 5)), random.uniform(1, 3, 300)
    tables = [
        WordTable.from_cells(random.permutation(balanced_cells(300, shape)), shape)
        for shape in ((18, 17), (7, 7, 7), (18, 17))
    ]
    places = [table.coordinates[:, i] for table in tables for i in range(table.num_components)]
    centroids = nearest_sums(tables, vectors, weights)
    expected = sum(found[place] for found, place in zip(centroids, places, strict=True))
    least = weighted_squares(vectors - expected, weights)
    found = weighted_squares(sums_of_tables(vectors, weights, tables).rest()[:], weights)
    assert least < found < 1.02 * least < 0.8 * weighted_squares(vectors, weights)
    alone = sums_of_tables(vectors, weights, tables[:1]).rest()[:]
    assert weighted_squares(alone, weights) > 1.2 * found
    assert weighted_squares(alone, weights) == pytest.approx(
        distance(tables[0], vectors, weights), rel=0.01
    )


def test_a_further_table_of_what_is_left_explains_more():
    random = np.random.default_rng(2)
    vectors, weights = random.normal(size=(100, 6)), random.uniform(1, 3, 100)
    first = table_of_vectors(vectors, weights, shape=(10, 10), seed=1)
    left = sums_of_tables(vectors, weights, [first]).rest()[:]
    alike = table_of_vectors(vectors, weights, shape=(10, 10), seed=2)
    other = table_of_vectors(vectors, weights, shape=(10, 10), before=[first], seed=2)
    same = table_of_vectors(left, weights, shape=(10, 10), seed=2)

    def lacking(second: WordTable) -> float:
        return weighted_squares(
            sums_of_tables(vectors, weights, [first, second]).rest()[:], weights
        )

    assert lacking(other) < 0.9 * lacking(alike)
    assert lacking(other) == pytest.approx(lacking(same), rel=0.1)  # they settle elsewhere


@pytest.mark.parametrize("dense", [False, True])
def test_costs_and_means_of_sums_are_those_of_their_words(dense: bool):
    """They are found without looking at words; against each word's own vector."""
    random = np.random.default_rng(3)
    vectors, weights = random.normal(size=(60, 3)), random.uniform(1, 3, 60)
    sizes = (4, 5, 3) if dense else (20, 30, 40)  # places that share more or less of their words
    sums = Sums(vectors, weights)
    for size in sizes:
        sums.add(random.integers(size, size=60), size)
    sums.fit()
    sums.move(1, random.integers(sizes[1], size=60))
    said = sum(sums.centroids[i][sums.places[i]] for i in range(3))
    assert sums.cost() == pytest.approx(weighted_squares(vectors - said, weights))
    sums._fit_one(1)
    left = vectors - sums.centroids[0][sums.places[0]] - sums.centroids[2][sums.places[2]]
    for place in range(sizes[1]):
        own = sums.places[1] == place
        if own.any():
            mean = np.average(left[own], axis=0, weights=weights[own])
            assert sums.centroids[1][place] == pytest.approx(mean)


def test_words_that_are_assigned_in_parts_are_hardly_farther(monkeypatch):
    whole, apart = [], []
    for seed in range(6):
        random = np.random.default_rng(seed)
        vectors, weights = random.normal(size=(395, 4)), random.uniform(1, 3, 395)
        tables = [table_of_vectors(vectors, weights, shape=(8, 50), seed=seed)]
        with monkeypatch.context() as patch:
            patch.setattr(clustering, "_PART_ENTRIES", 1)
            patch.setattr(clustering, "_PART_WORDS", 25)  # parts of 198 words
            for threads in (1, 3):
                again = table_of_vectors(
                    vectors, weights, shape=(8, 50), seed=seed, num_threads=threads
                )
                tables.append(again)
        assert tables[1] == tables[2] != tables[0]
        assert sorted(tables[1].cells) == balanced_cells(395, (8, 50)).tolist()
        whole.append(distance(tables[0], vectors, weights))
        apart.append(distance(tables[1], vectors, weights))
    assert sum(apart) < 1.05 * sum(whole)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 9), st.data())
def test_parts_take_every_word_and_no_more_than_there_is(capacities, limit: int, data):
    room = np.array(capacities)
    words = np.arange(data.draw(st.integers(0, int(room.sum()))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clustering, "_PART_ENTRIES", limit * len(room))
        patch.setattr(clustering, "_PART_WORDS", 0)
        parts = list(clustering._parts(words, room))
    if len(words):
        assert sorted(np.concatenate([some for some, _ in parts])) == words.tolist()
        assert (sum(share for _, share in parts) == room).all()
        for some, share in parts:
            assert len(some) <= min(limit, share.sum()) and (share >= 0).all()


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_lower_precision_makes_much_the_same_table(kind):
    random = np.random.default_rng(4)
    vectors, weights = random.normal(size=(120, 4)), random.uniform(1, 3, 120)
    tables = [
        table_of_vectors(vectors.astype(one), weights, shape=(12, 10)) for one in (kind, np.float64)
    ]
    near, far = (distance(table, vectors, weights) for table in tables)
    assert near == pytest.approx(far, rel=0.05)


@pytest.mark.parametrize("shape", [(40_000,), (1, 40_000), (40_001, 1)])
def test_words_with_a_vector_each_need_no_clustering(shape: tuple[int, ...]) -> None:
    """Costs of each word in each place would take 6 GB."""
    vectors = np.ones((40_000, 2), np.float32)
    table = table_of_vectors(vectors, np.ones(40_000), shape=shape)
    assert np.array_equal(table.cells, balanced_cells(40_000, shape))
