"""Initial tables: what they promise about rows, determinism, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import sparse

from fairseq_lightrnn.allocation import cooccurrence
from fairseq_lightrnn.allocation.clustering import table_of_vectors
from fairseq_lightrnn.allocation.cooccurrence import (
    CoOccurrence,
    Neighbours,
    Occurrences,
    positive_information,
    word_vectors,
)
from fairseq_lightrnn.allocation.initial_table import (
    TableMaker,
    WordVectors,
    cooccurrence_vectors,
)
from fairseq_lightrnn.core.table import WordTable, balanced_cells

ONE = ThreadPoolExecutor(1)
SHAPES = [(20, (5, 4)), (18, (5, 4)), (12, (12,)), (23, (3, 3, 3)), (7, (1, 7)), (7, (7, 1))]


def grammar(classes: int, members: int, length: int, seed: int) -> np.ndarray:
    """Text in which class follows class in order and each member of a class is equally likely."""
    random = np.random.default_rng(seed)
    return (np.arange(length) % classes) * members + random.integers(members, size=length)


def initial_table(
    kind: str,
    num_words: int,
    shape: Sequence[int],
    tokens: Sequence[np.ndarray] = (),
    seed: int = 1,
) -> WordTable:
    """Makes the first table of words that occur as in the text."""
    counts = np.bincount(np.concatenate([*tokens, range(num_words)])) - 1
    return TableMaker(num_words, counts, lambda: tokens, seed).make(kind, shape)


def seated(words: WordVectors, shape: Sequence[int], num_threads: int | None = None) -> WordTable:
    """Makes the first table of words that are described already."""
    vectors, weights, row_dims = words
    return table_of_vectors(
        vectors, weights, row_dims=row_dims, shape=shape, num_threads=num_threads
    )


def counts_of(
    pieces: list[np.ndarray], num_words: int, num_contexts: int, window: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns neighbour counts, (V, 2 M), and the occurrences of the words, (V,)."""
    words = Occurrences.of(pieces, num_words, window)
    neighbours = Neighbours(words, num_contexts, window)
    blocks = [neighbours.counts(block) for block in neighbours.blocks]
    assert all(block.has_sorted_indices for block in blocks)
    counts = sparse.vstack(blocks).toarray()
    if (words.share == 1).all():
        assert neighbours.totals() == pytest.approx(counts.sum(axis=0), rel=1e-6)
    return counts, words.counts


@pytest.mark.parametrize(("num_words", "shape"), SHAPES)
@pytest.mark.parametrize("kind", ["random", "frequency", "cooccurrence"])
def test_every_kind_fills_the_balanced_cells_and_repeats_itself(kind, num_words, shape):
    tokens = [np.random.default_rng(0).integers(num_words, size=200)]
    tables = [initial_table(kind, num_words, shape, tokens, 3) for _ in range(2)]
    assert sorted(tables[0].cells) == balanced_cells(num_words, shape).tolist()
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("num_words", "shape"), SHAPES)
def test_neither_vectors_nor_tables_depend_on_threads(num_words, shape):
    tokens = [np.random.default_rng(0).integers(num_words, size=200)]
    vectors, tables = [], []
    for threads in (1, 2):
        words = cooccurrence_vectors(tokens, num_words, CoOccurrence(), 3, threads)
        vectors.append(words.vectors)
        tables.append(seated(words, shape, threads))
    assert np.array_equal(*vectors) and tables[0] == tables[1]


def test_seeds_give_different_random_tables():
    assert initial_table("random", 50, (8, 7), seed=1) != initial_table(
        "random", 50, (8, 7), seed=2
    )


def test_frequency_order_runs_along_the_rows():
    text = [np.repeat(np.arange(6), [3, 9, 9, 0, 5, 1])]
    assert initial_table("frequency", 6, (2, 3), text).words.tolist() == [1, 2, 4, 0, 5, 3]


def test_words_that_stand_in_the_same_places_share_a_row():
    table = initial_table("cooccurrence", 36, (6, 6), [grammar(6, 6, 6000, 0)])
    classes = np.arange(36) // 6
    for row in range(6):
        assert len(set(classes[table.coordinates[:, 0] == row])) == 1


def test_words_without_occurrences_fill_what_is_left():
    table = initial_table("cooccurrence", 40, (7, 6), [grammar(6, 6, 4000, 0)])
    assert sorted(table.cells) == balanced_cells(40, (7, 6)).tolist()
    assert initial_table("cooccurrence", 5, (2, 3), [np.array([], np.int64)]).num_words == 5


def test_neighbour_counts_by_hand():
    counts, occurrences = counts_of([np.array([0, 1, 0, 2]), np.array([1, 1])], 4, 3)
    right = np.array([[0, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]])
    left = np.array([[0, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert np.array_equal(counts, np.hstack([right, left]))
    assert occurrences.tolist() == [2, 3, 1, 0]


def test_far_neighbours_count_less():
    """Against a loop over all pairs of words."""
    text, others = np.random.default_rng(3).integers(4, size=(2, 30))
    expected = np.zeros((4, 8))
    for piece in (text, others):
        for here, word in enumerate(piece):
            for distance in (1, 2, 3):
                if here + distance < len(piece):
                    expected[word, piece[here + distance]] += 1 / distance
                if here >= distance:
                    expected[word, 4 + piece[here - distance]] += 1 / distance
    counts, _ = counts_of([text, others], 4, 4, window=3)
    assert counts == pytest.approx(expected)


@pytest.mark.parametrize("window", [1, 3])
def test_of_long_texts_a_sample_of_frequent_words_is_counted(monkeypatch, window: int):
    """Its counts are right on average, those of rare words exactly."""
    random = np.random.default_rng(5)
    text = random.choice(40, size=60_000, p=np.r_[[0.03] * 32, [0.005] * 8])
    whole, occurrences = counts_of([text], 40, 40, window)
    assert whole.sum() == pytest.approx(
        2 * sum((len(text) - n) / n for n in range(1, window + 1)), rel=1e-6
    )
    monkeypatch.setattr(cooccurrence, "_OCCURRENCES", 20_000)
    sampled, same = counts_of([text], 40, 40, window)
    again, _ = counts_of([text], 40, 40, window)
    assert np.array_equal(same, occurrences) and np.array_equal(sampled, again)
    rare = occurrences < 400
    assert rare.sum() == 8
    assert sampled[rare] == pytest.approx(whole[rare], rel=1e-6)
    assert not np.allclose(sampled[~rare], whole[~rare], rtol=1e-3)
    assert sampled.sum(axis=1) == pytest.approx(whole.sum(axis=1), rel=0.1)


def test_what_a_cooccurrence_table_counts_makes_a_difference():
    text = [grammar(6, 6, 3000, 0)]
    tables = []
    for how in (
        CoOccurrence(), CoOccurrence(window=4, column_window=4), CoOccurrence(column_window=1),
        CoOccurrence(weight_power=0), CoOccurrence(dim=3),
    ):  # fmt: skip
        tables.append(seated(cooccurrence_vectors(text, 36, how), (6, 6)))
    assert tables[0] == initial_table("cooccurrence", 36, (6, 6), text)
    assert len({table.digest() for table in tables}) == len(tables)


def test_the_same_window_makes_the_same_vectors():
    text = [grammar(6, 6, 3000, 0)]
    for how in (CoOccurrence(column_window=1), CoOccurrence(window=3, column_window=3)):
        words = cooccurrence_vectors(text, 36, how)
        assert words.row_dims is None and words.vectors.shape == (36, 100)
    both = cooccurrence_vectors(iter(text), 36, CoOccurrence(column_window=3))
    assert both.row_dims == 100 and both.vectors.shape == (36, 200)
    assert np.array_equal(both.vectors[:, 100:], words.vectors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"column_window": 0}, "column_window must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"num_contexts": -1}, "num_contexts must be at least 1, got -1"),
        ({"weight_power": -0.5}, "weight_power must not be negative, got -0.5"),
        ({"weight_power": float("nan")}, "weight_power must not be negative, got nan"),
    ],
)
def test_ways_to_count_that_have_no_meaning_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoOccurrence(**arguments)


@pytest.mark.parametrize("window", [1, 3])
def test_blocks_cut_anywhere_give_the_same_counts(monkeypatch, window: int):
    text = np.random.default_rng(1).integers(5, size=300)
    whole, _ = counts_of([text], 5, 5, window)
    monkeypatch.setattr(cooccurrence, "_TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(cooccurrence, "_PAIRS_AT_ONCE", 130)
    cut, _ = counts_of([text], 5, 5, window)
    assert np.array_equal(cut, whole)


def test_vectors_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(cooccurrence, "_PAIRS_AT_ONCE", 2000)
    text = [grammar(9, 20, 20_000, 0)]
    one, three = (
        cooccurrence_vectors(text, 180, CoOccurrence(), num_threads=threads).vectors
        for threads in (1, 3)
    )
    assert np.array_equal(one, three)


def test_only_the_most_frequent_words_are_contexts():
    counts, _ = counts_of([np.array([0, 1, 0, 2, 0, 1])], 3, 2)
    assert counts.shape == (3, 4)


def information_of(text: np.ndarray, num_words: int) -> list[sparse.csr_array]:
    words = Occurrences.of([text], num_words, 2)
    return positive_information(Neighbours(words, num_words, 2), ONE)


def test_information_by_its_definition():
    text = np.random.default_rng(6).integers(9, size=400)
    counts, _ = counts_of([text], 9, 9, window=2)
    contexts = counts.sum(axis=0) ** 0.75
    expected = counts.sum(axis=1)[:, None] * contexts / contexts.sum()
    with np.errstate(divide="ignore"):
        information = np.log(counts / expected)
    found = sparse.vstack(information_of(text, 9)).toarray()
    assert found == pytest.approx(np.maximum(information, 0.0), abs=1e-5)


@pytest.mark.parametrize("dim", [4, 100])
def test_vectors_of_a_small_matrix_are_its_singular_vectors(monkeypatch, dim: int):
    monkeypatch.setattr(cooccurrence, "_PAIRS_AT_ONCE", 1000)
    information = information_of(np.random.default_rng(2).integers(12, size=500), 12)
    assert len(information) > 1
    left, values, _ = np.linalg.svd(sparse.vstack(information).toarray())
    vectors = np.full((12, dim), np.nan, np.float32)
    word_vectors(information, dim, 0, ONE, vectors)
    kept = min(dim, 12)
    expected = left[:, :kept] * values[:kept]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(vectors[:, :kept]) == pytest.approx(np.abs(expected), abs=1e-4)
    assert not vectors[:, kept:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "alphabetic"},
            "must be one of random, frequency, cooccurrence, got 'alphabetic'",
        ),
        ({"counts": np.ones(5)}, "counts must be 6"),
        ({"counts": np.full(6, np.nan)}, "counts must be 6 finite"),
        ({"kind": "cooccurrence", "text": [np.array([1, 6])]}, "word id 6"),
        ({"kind": "random", "shape": (2, 2)}, "too few"),
    ],
)
def test_what_is_wrong_is_refused(arguments, message):
    given = {"kind": "random", "shape": (2, 3), "counts": np.ones(6), "text": [], **arguments}
    with pytest.raises(ValueError, match=message):
        TableMaker(6, given["counts"], lambda: given["text"]).make(given["kind"], given["shape"])


def test_a_maker_reads_its_text_once_and_only_if_needed():
    read = []

    def text() -> list[np.ndarray]:
        read.append(1)
        return [grammar(6, 6, 3000, 0)]

    maker = TableMaker(36, np.arange(36), text, 5)
    for kind in ("random", "frequency"):
        maker.make(kind, (6, 6))
    for shape in ((36,), (1, 40), (36, 2)):  # where any order will do
        assert maker.make("cooccurrence", shape) == maker.make("frequency", shape)
    assert not read
    first = maker.make("cooccurrence", (6, 6))
    assert read == [1]
    further = [maker.make("cooccurrence", (6, 6), [first]), maker.make("random", (6, 6), [first])]
    assert first not in further and maker.make("random", (6, 6)) not in further
    assert read == [1]


def test_rare_words_sit_in_further_tables_as_they_are_spelt(monkeypatch):
    text, names = [grammar(6, 6, 3000, 0)], [f"w{word * 7 % 36:02}" for word in range(36)]
    plain, spelt = (TableMaker(36, np.arange(36), lambda: text, 5, n) for n in ((), names))
    monkeypatch.setattr("fairseq_lightrnn.allocation.initial_table.FREQUENT", 9)
    first = plain.make("cooccurrence", (6, 7))
    assert spelt.make("cooccurrence", (6, 7)) == first
    one, two = (maker.make("cooccurrence", (6, 7), [first]) for maker in (plain, spelt))
    assert np.array_equal(one.cells[:9], two.cells[:9])
    assert sorted(one.cells) == sorted(two.cells)
    rare = sorted(range(9, 36), key=names.__getitem__)
    assert np.array_equal(two.cells[rare], np.sort(one.cells[rare]))
