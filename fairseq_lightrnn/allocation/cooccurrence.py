"""Word vectors from neighbouring words: counts, positive pointwise mutual information, truncated
SVD.

The vectors of Bullinaria and Levy ("Extracting semantic representations from word co-occurrence
statistics", 2007), left and right neighbours kept apart: words that can stand in the same place are
alike. The nearer the neighbours, the more the vectors tell of grammar, the farther, of topics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import sparse

__all__ = ["CoOccurrence", "neighbour_counts", "positive_information", "word_vectors"]

_CHUNK = 1 << 22  # tokens that are counted at once
_CONTEXT_POWER = 0.75  # flattens the context distribution, so that rare contexts do not dominate
# Of longer texts, wide windows see a sample: of frequent words fewer occurrences, of rare ones all.
_WIDE_OCCURRENCES = 1 << 24
_POWER_ITERATIONS = 4
_OVERSAMPLING = 16


@dataclass(frozen=True)
class CoOccurrence:
    """How a co-occurrence table is made; what the defaults are worth is in examples/tables.

    Rows gather words that are alike, and columns words that differ from their rows in a like way.
    What a row has in common should be what precedes and follows it; within a row topics tell more.

    Attributes:
      window: for rows, neighbours up to this distance count, one at distance n as 1/n.
      column_window: likewise for the components after the first.
      weight_power: a word weighs its count to this power; frequent words matter more to a row.
      num_contexts: only so many of the most frequent words count as neighbours; bounds the memory.
      dim: of the word vectors.

    Raises:
      ValueError: a value is out of range.
    """

    window: int = 1
    column_window: int = 5
    weight_power: float = 0.75
    num_contexts: int = 20_000
    dim: int = 100

    def __post_init__(self) -> None:
        for name in ("window", "column_window", "num_contexts", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.weight_power < np.inf:
            raise ValueError(f"weight_power must not be negative, got {self.weight_power}")


def neighbour_counts(
    tokens: Iterable[np.ndarray], num_words: int, num_contexts: int, window: int = 1
) -> tuple[sparse.csr_array, np.ndarray]:
    """Counts how often each word has each other word on its left and on its right.

    Of texts beyond 2^24 words, windows wider than 1 count a sample: all occurrences of rare words,
    some of frequent ones, each for those left out.

    Args:
      tokens: pieces of consecutive text, 1-D arrays of word ids; nothing is counted across pieces.
      num_words: V, size of the dictionary.
      num_contexts: see `CoOccurrence`, as for the others.
      window: see there.

    Returns:
      Counts (V, 2 M), right neighbours first, over the M <= ``num_contexts`` most frequent
      words; and the occurrences of each word, (V,).

    Raises:
      ValueError: a word id is out of range.
    """
    pieces = [_piece(piece, num_words) for piece in tokens]
    counts = np.zeros(num_words, np.int64)
    for piece in pieces:
        counts += np.bincount(piece, minlength=num_words)
    order = np.argsort(-counts, kind="stable")[: min(num_contexts, num_words)]
    order = np.sort(order[counts[order] > 0])
    column = np.full(num_words, -1, np.int64)
    column[order] = np.arange(len(order))
    total = sparse.csr_array((num_words, 2 * len(order)), dtype=np.float64)
    share = _sampled_share(counts) if window > 1 else np.ones(num_words)
    sampled, random = bool((share < 1).any()), np.random.default_rng(0)
    for distance in range(1, window + 1):
        for left, right in _pairs(pieces, distance):
            for centre, neighbour, offset in ((left, right, 0), (right, left, len(order))):
                known = column[neighbour] >= 0
                if sampled:
                    known &= random.random(len(centre)) < share[centre]
                places = (centre[known], column[neighbour[known]] + offset)
                values = 1 / (distance * share[centre[known]])
                total = total + sparse.coo_array((values, places), shape=total.shape).tocsr()
    return sparse.csr_array(total), counts


def _sampled_share(counts: np.ndarray) -> np.ndarray:
    """Returns which share of each word's occurrences a sample of bounded size takes, (V,)."""
    low, most = 0.0, float(counts.max(initial=0))
    if counts.sum() <= _WIDE_OCCURRENCES:
        return np.ones(len(counts))
    for _ in range(50):  # how many of a word at most
        middle = (low + most) / 2
        if np.minimum(counts, middle).sum() > _WIDE_OCCURRENCES:
            most = middle
        else:
            low = middle
    return np.minimum(1.0, low / np.maximum(counts, 1))


def _piece(piece: np.ndarray, num_words: int) -> np.ndarray:
    piece = np.asarray(piece).reshape(-1)
    if piece.size and (piece.min() < 0 or piece.max() >= num_words):
        wrong = int(piece[(piece < 0) | (piece >= num_words)][0])
        raise ValueError(
            f"word id {wrong} in the text is not in the dictionary of {num_words} words"
        )
    return piece


def _pairs(pieces: Iterable[np.ndarray], distance: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yields words at a distance from each other as two arrays, several pieces at once."""
    left: list[np.ndarray] = []
    right: list[np.ndarray] = []
    held = 0
    for piece in pieces:
        for start in range(0, max(0, len(piece) - distance), _CHUNK):
            part = piece[start : start + _CHUNK + distance]
            left.append(part[:-distance])
            right.append(part[distance:])
            held += len(part) - distance
            if held >= _CHUNK:
                yield np.concatenate(left), np.concatenate(right)
                left, right, held = [], [], 0
    if held:
        yield np.concatenate(left), np.concatenate(right)


def positive_information(counts: sparse.csr_array) -> sparse.csr_array:
    """Returns the positive pointwise mutual information of words and neighbours, sparse."""
    total = counts.sum()
    words = counts.sum(axis=1)
    contexts = counts.sum(axis=0) ** _CONTEXT_POWER
    contexts = contexts / max(contexts.sum(), 1e-300)
    entries = counts.tocoo()
    expected = words[entries.row] * contexts[entries.col]
    values = np.log(entries.data / np.maximum(expected, 1e-300)) if total > 0 else entries.data
    kept = values > 0
    places = (entries.row[kept], entries.col[kept])
    return sparse.coo_array((values[kept], places), shape=counts.shape).tocsr()


def word_vectors(information: sparse.csr_array, dim: int, seed: int) -> np.ndarray:
    """Returns the left singular vectors times the singular values, (V, at most dim).

    Randomised subspace iteration (Halko, Martinsson and Tropp, 2011); deterministic for a seed.
    """
    width = min(dim + _OVERSAMPLING, *information.shape)
    if width == 0 or information.nnz == 0:
        return np.zeros((information.shape[0], 1))
    random = np.random.default_rng(seed)
    basis = information @ random.standard_normal((information.shape[1], width))
    transposed = information.T.tocsr()
    for _ in range(_POWER_ITERATIONS):
        basis, _ = np.linalg.qr(basis)
        basis, _ = np.linalg.qr(transposed @ basis)
        basis = information @ basis
    basis, _ = np.linalg.qr(basis)
    left, values, _ = np.linalg.svd((transposed @ basis).T, full_matrices=False)
    kept = min(dim, width)
    return (basis @ left[:, :kept]) * values[:kept]
