"""Sums of centroids, one for each place that a word has, that approach vectors of the words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

from fairseq_lightrnn.core.table import WordTable

__all__ = ["FITS", "Rest", "Sums", "moments", "slices", "squares", "sums_of_tables"]

FITS = 4
"""Passes of alternating means over groupings that are there."""
_PIECE = 1 << 14  # words


def sums_of_tables(vectors: np.ndarray, weights: np.ndarray, tables: Sequence[WordTable]) -> Sums:
    """Returns the sums of coordinates' centroids that are nearest to word vectors.

    Args:
      vectors: (V, d) word vectors.
      weights: (V,) weight of each word.
      tables: of the words, of any shapes.
    """
    sums = Sums(vectors, weights)
    for table in tables:
        for component, size in enumerate(table.shape):
            sums.add(np.ascontiguousarray(table.coordinates[:, component]), size)
    sums.fit(FITS)
    return sums


class Rest:
    """What sums of centroids lack of words' vectors, formed only for the words that are asked for.

    Attributes:
      vectors: (V, d) word vectors.
      explained: the place of each word, (V,), and the places' centroids, for each of some
        groupings.
    """

    def __init__(
        self, vectors: np.ndarray, explained: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> None:
        self.vectors = vectors
        self._kind = np.result_type(vectors, np.float32)
        self.explained = [(places, centroids.astype(self._kind)) for places, centroids in explained]

    def __getitem__(self, words: slice | np.ndarray) -> np.ndarray:
        rest = self.vectors[words].astype(self._kind)
        for places, centroids in self.explained:
            rest -= centroids[places[words]]
        return rest


class Sums:
    """Centroids whose sums approach vectors: one of each word's place in each of some groupings.

    The means of what all other groupings lack are found from the weight that two places share and
    from the sums of the vectors of each place, without looking at words again.

    Attributes:
      vectors: (V, d) word vectors.
      weights: (V,) weight of each word.
      places: of the words in each grouping, (V,) each.
      centroids: of the places of each grouping, (R, d) each.
    """

    def __init__(self, vectors: np.ndarray, weights: np.ndarray) -> None:
        self.vectors, self.weights = vectors, weights
        self.places: list[np.ndarray] = []
        self.centroids: list[np.ndarray] = []
        self._totals: list[np.ndarray] = []  # weight of each place
        self._moments: list[np.ndarray] = []  # weighted sum of each place's vectors
        self._shared: dict[tuple[int, int], np.ndarray | sparse.csr_array] = {}
        self._squares = squares(Rest(vectors, []), weights, np.arange(len(vectors)))

    def add(self, places: np.ndarray, size: int) -> None:
        """Adds a grouping, whose centroids explain what those before it lack."""
        self.places.append(places)
        for parts in (self._moments, self.centroids):
            parts.append(np.zeros((size, self.vectors.shape[1])))
        self._totals.append(np.zeros(size))
        self.move(len(self.places) - 1, places)
        self._fit_one(len(self.places) - 1)

    def move(self, number: int, places: np.ndarray) -> None:
        """Groups words otherwise; centroids stay where they are."""
        self.places[number] = places
        size = len(self.centroids[number])
        self._totals[number], self._moments[number] = moments(
            Rest(self.vectors, []), self.weights, np.arange(len(places)), places, size
        )
        for other, others in enumerate(self.places):
            if other != number:
                shape = size, len(self.centroids[other])
                shared = sparse.coo_array((self.weights, (places, others)), shape=shape).tocsr()
                # Far faster to multiply with, if not much larger.
                dense = shape[0] * shape[1] <= 2 * len(places)
                self._shared[number, other] = shared.toarray() if dense else shared
                self._shared[other, number] = self._shared[number, other].T

    def _others(self, number: int) -> np.ndarray:
        """Returns the weighted sums, for each place, of what all other groupings say of words."""
        total = np.zeros_like(self.centroids[number])
        for other, centroids in enumerate(self.centroids):
            if other != number:
                total += self._shared[number, other] @ centroids
        return total

    def _fit_one(self, number: int) -> None:
        """Moves centroids to the means of what all others lack; those without weight stay."""
        weights = self._totals[number][:, None]
        means = (self._moments[number] - self._others(number)) / np.where(weights > 0, weights, 1)
        self.centroids[number] = np.where(weights > 0, means, self.centroids[number])

    def fit(self, passes: int = 1) -> None:
        """Fits the centroids of each grouping in turn."""
        for _ in range(passes):
            for number in range(len(self.places)):
                self._fit_one(number)

    def cost(self) -> float:
        """Returns the weighted sum of squared distances between vectors and sums."""
        cost = self._squares
        for number, centroids in enumerate(self.centroids):
            own = self._totals[number][:, None] * centroids + self._others(number)
            cost += float((centroids * (own - 2.0 * self._moments[number])).sum())
        return cost

    def rest(self, left_out: int | None = None, dims: slice = slice(None)) -> Rest:  # noqa: B008
        """Returns what the sums lack in some dimensions, that of one grouping left out."""
        return Rest(
            self.vectors[:, dims],
            [
                (places, centroids[:, dims])
                for number, (places, centroids) in enumerate(
                    zip(self.places, self.centroids, strict=True)
                )
                if number != left_out
            ],
        )


def moments(
    rest: Rest, weights: np.ndarray, words: np.ndarray, places: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weight of the words in each place, (R,), and their weighted sum, (R, d)."""
    total = np.bincount(places[words], weights[words], minlength=size)
    sums = np.zeros((size, rest.vectors.shape[1]))
    for piece in slices(len(words)):
        some = words[piece]
        entries = weights[some], places[some], np.arange(len(some) + 1)
        sums += sparse.csr_array(entries, shape=(len(some), size)).T @ rest[some]
    return total, sums


def squares(rest: Rest, weights: np.ndarray, words: np.ndarray) -> float:
    """Returns the weighted sum of the vectors' squared lengths."""
    total = 0.0
    for piece in slices(len(words)):
        some = rest[words[piece]].astype(np.float64)
        total += float(weights[words[piece]] @ np.einsum("ij,ij->i", some, some))
    return total


def slices(num_words: int) -> Iterator[slice]:
    """Yields all words in pieces, so that temporaries stay small beside the vectors."""
    for start in range(0, num_words, _PIECE):
        yield slice(start, start + _PIECE)
