"""Word vectors from neighbouring words: counts, positive pointwise mutual information, truncated
SVD.

The vectors of Bullinaria and Levy ("Extracting semantic representations from word co-occurrence
statistics", 2007), left and right neighbours kept apart: words that can stand in the same place are
alike. The nearer the neighbours, the more the vectors tell of grammar, the farther, of topics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import accumulate, repeat

import numpy as np
from scipy import sparse

from fairseq_lightrnn.allocation.sums import slices

__all__ = [
    "CoOccurrence",
    "Neighbours",
    "Occurrences",
    "positive_information",
    "word_vectors",
]

_CONTEXT_POWER = 0.75  # flattens the context distribution, so that rare contexts do not dominate
_OCCURRENCES = 1 << 24  # that are counted of longer texts
_PAIRS_AT_ONCE = 1 << 20  # bounds temporaries
_WORDS_AT_ONCE = 1 << 16  # likewise: many words may have no pairs
_COLUMNS_AT_ONCE = 32  # likewise
_TOKENS_AT_ONCE = 1 << 22
_POWER_ITERATIONS = 5
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


@dataclass(frozen=True)
class Occurrences:
    """Where the words of a text stand; of a text of more than 2^24 words, of a sample.

    A sample has all occurrences of rare words and some of frequent ones.

    Attributes:
      text: ids of the words, the id V around and between its pieces.
      counts: (V,) occurrences of each word in the text.
      share: (V,) of them that the sample has.
      places: indices into the text of those, word by word.
      starts: (V + 1,) where the places of each word begin.
    """

    text: np.ndarray
    counts: np.ndarray
    share: np.ndarray
    places: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, tokens: Iterable[np.ndarray], num_words: int, window: int) -> Occurrences:
        """Reads a text.

        Args:
          tokens: pieces of consecutive text, 1-D arrays of word ids.
          num_words: V, size of the dictionary.
          window: how far neighbours of a word will be looked for.

        Raises:
          ValueError: a word id is out of range.
        """
        text = _joined(tokens, num_words, window)
        counts = np.zeros(num_words + 1, np.int64)
        for start in range(0, len(text), _TOKENS_AT_ONCE):
            counts += np.bincount(text[start : start + _TOKENS_AT_ONCE], minlength=len(counts))
        counts = counts[:-1]
        share = _sampled_share(counts)
        return cls(text, counts, share, *_places(text, counts, share))


class Neighbours:
    """How often words have each of the most frequent words on their right and on their left.

    Of a word of which there is a sample, each occurrence counts for those left out.

    Args:
      words: V of them.
      num_contexts: see `CoOccurrence`, as for the next.
      window: see there; at most that of ``words``.

    Attributes:
      blocks: of words, which are counted at once.
      num_contexts: M, at most what was asked for.
    """

    def __init__(self, words: Occurrences, num_contexts: int, window: int) -> None:
        self._words, self._window = words, window
        counts = words.counts
        order = np.argsort(-counts, kind="stable")[: min(num_contexts, len(counts))]
        order = np.sort(order[counts[order] > 0])
        self.num_contexts = len(order)
        self._column = np.full(len(counts) + 1, -1, np.int64)  # the last stands between pieces
        self._column[order] = np.arange(len(order))
        self.blocks = list(_groups(np.diff(words.starts), _PAIRS_AT_ONCE // (2 * window)))

    def counts(self, block: slice) -> sparse.csr_array:
        """Returns the rows of a block of the matrix (V, 2 M) of counts, right neighbours first."""
        words, contexts = self._words, self.num_contexts
        starts = words.starts[block.start : block.stop + 1]
        some = words.places[starts[0] : starts[-1]]
        numbers = np.arange(block.stop - block.start)
        centre = np.repeat(numbers, np.diff(starts))
        cells, distances = [], []
        for distance in range(1, self._window + 1):
            for side, offset in ((distance, 0), (-distance, contexts)):
                neighbour = self._column[words.text[some + side]]
                known = neighbour >= 0
                cells.append(centre[known] * (2 * contexts) + (neighbour[known] + offset))
                distances.append(distance)
        result = _summed(cells, distances, (len(numbers), 2 * contexts))
        result.data /= np.repeat(words.share[block], np.diff(result.indptr)).astype(np.float32)
        return result

    def totals(self) -> np.ndarray:
        """Returns the sums of all words' counts, (2 M,), as the whole text has them."""
        text, num_words = self._words.text, len(self._words.counts)
        result = np.zeros((2, self.num_contexts))
        for start in range(0, len(text), _TOKENS_AT_ONCE):
            for distance in range(1, self._window + 1):
                piece = text[start : start + _TOKENS_AT_ONCE + distance]
                first, last = piece[:-distance], piece[distance:]
                for side, (words, neighbours) in enumerate([(first, last), (last, first)]):
                    column = self._column[neighbours[words < num_words]]
                    found = np.bincount(column[column >= 0], minlength=self.num_contexts)
                    result[side] += found / distance
        return result.reshape(-1)


def _joined(tokens: Iterable[np.ndarray], num_words: int, window: int) -> np.ndarray:
    """Returns the text in one, V ``window`` times around and between its pieces."""
    between = np.full(window, num_words, np.int32)
    done: list[np.ndarray] = []
    parts, length = [between], 0
    for piece in tokens:
        parts += [_piece(piece, num_words).astype(np.int32), between]
        length += len(parts[-2])
        if length > _TOKENS_AT_ONCE:  # memory of millions of small pieces never comes back
            done.append(np.concatenate(parts))
            parts, length = [], 0
    return np.concatenate([*done, *parts])


def _piece(piece: np.ndarray, num_words: int) -> np.ndarray:
    piece = np.asarray(piece).reshape(-1)
    if piece.size and (piece.min() < 0 or piece.max() >= num_words):
        wrong = int(piece[(piece < 0) | (piece >= num_words)][0])
        raise ValueError(
            f"word id {wrong} in the text is not in the dictionary of {num_words} words"
        )
    return piece


def _sampled_share(counts: np.ndarray) -> np.ndarray:
    """Returns which share of each word's occurrences a sample of bounded size takes, (V,)."""
    low, most = 0.0, float(counts.max(initial=0))
    if counts.sum() <= _OCCURRENCES:
        return np.ones(len(counts))
    for _ in range(50):  # how many of a word at most
        middle = (low + most) / 2
        if np.minimum(counts, middle).sum() > _OCCURRENCES:
            most = middle
        else:
            low = middle
    return np.minimum(1.0, low / np.maximum(counts, 1))


def _places(
    text: np.ndarray, counts: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns where words are in the text, word by word, and where those of each begin."""
    random = np.random.default_rng(0)
    chance = np.append(share, 0.0)  # nothing of what stands between pieces
    kept = np.zeros(len(chance), np.int64)
    places, end = np.empty(min(int(counts.sum()), _OCCURRENCES * 5 // 4 + 100), np.int64), 0
    for start in range(0, len(text), _TOKENS_AT_ONCE):
        words = text[start : start + _TOKENS_AT_ONCE]
        found = np.flatnonzero(random.random(len(words)) < chance[words])
        kept += np.bincount(words[found], minlength=len(kept))
        places[end : end + len(found)] = words[found].astype(np.int64) * len(text) + found + start
        end += len(found)
    places = places[:end]
    places.sort()  # far faster than to sort indices
    places %= len(text)
    if len(text) <= np.iinfo(np.int32).max:
        places = places.astype(np.int32)
    return places, np.concatenate([[0], kept[:-1].cumsum()])


def _groups(sizes: np.ndarray, limit: int) -> Iterator[slice]:
    """Yields words in order, not too many, together as long as their sizes stay below a limit."""
    before, start = np.concatenate([[0], sizes.cumsum()]), 0
    while start < len(sizes):
        stop = int(np.searchsorted(before, before[start] + limit, side="right")) - 1
        stop = min(max(stop, start + 1), start + _WORDS_AT_ONCE)
        yield slice(start, stop)
        start = stop


def _summed(
    cells: list[np.ndarray], distances: Sequence[int], shape: tuple[int, int]
) -> sparse.csr_array:
    """Returns a matrix to whose cells their places in the arrays add 1 / distance."""
    base = max(distances) + 1
    keys = np.concatenate(
        [cell * base + distance for cell, distance in zip(cells, distances, strict=True)]
    )
    keys.sort()  # far faster than to sort indices
    cell, distance = np.divmod(keys, base)
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    values = np.add.reduceat(1.0 / distance, first) if len(first) else np.zeros(0)
    rows, columns = np.divmod(cell[first], shape[1])
    starts = np.searchsorted(rows, np.arange(shape[0] + 1))
    parts = values.astype(np.float32), columns.astype(np.int32), starts.astype(np.int32)
    return sparse.csr_array(parts, shape=shape)


def positive_information(neighbours: Neighbours, executor: Executor) -> list[sparse.csr_array]:
    """Returns the positive pointwise mutual information of words and neighbours, (V, 2 M).

    Args:
      neighbours: of words.
      executor: counts blocks in parallel; the information does not depend on it.

    Returns:
      Blocks of rows.
    """
    contexts = neighbours.totals() ** _CONTEXT_POWER
    contexts /= max(contexts.sum(), 1e-300)

    def inform(block: slice) -> sparse.csr_array:
        counts = neighbours.counts(block)
        sizes = np.diff(counts.indptr)
        words = np.repeat(counts.sum(axis=1, dtype=np.float64), sizes)
        values = np.log(counts.data / (words * contexts[counts.indices]))
        kept = values > 0
        starts = np.concatenate([[0], kept.cumsum()])[counts.indptr]
        parts = values[kept].astype(np.float32), counts.indices[kept], starts.astype(np.int32)
        return sparse.csr_array(parts, shape=counts.shape)

    return list(executor.map(inform, neighbours.blocks))


def word_vectors(
    information: Sequence[sparse.csr_array],
    dim: int,
    seed: int,
    executor: Executor,
    vectors: np.ndarray,
) -> None:
    """Writes the left singular vectors times the singular values, each row scaled to length 1.

    Randomised subspace iteration (Halko, Martinsson and Tropp, 2011) on the side of the neighbours,
    of which there are few, so that nothing of the size of the vectors is needed besides them;
    deterministic for a seed.

    Args:
      information: blocks of rows of a matrix (V, N).
      dim: of the vectors.
      seed: of the first subspace.
      executor: runs the blocks in parallel; the vectors do not depend on it.
      vectors: (V, dim) of any precision, written: those of the largest values first, 0 in
        dimensions that the matrix does not have.
    """
    shape = len(vectors), information[0].shape[1]
    width = min(dim + _OVERSAMPLING, *shape)
    random = np.random.default_rng(seed)
    basis = random.standard_normal((shape[1], width), dtype=np.float32)

    def multiplied(columns: np.ndarray) -> np.ndarray:
        result = np.zeros(columns.shape)
        for block in information:
            result += block.T @ (block @ columns)
        return result

    for _ in range(_POWER_ITERATIONS):
        # Of some columns: products with a block are as large as the sum.
        parts = np.array_split(basis, 1 + basis.shape[1] // _COLUMNS_AT_ONCE, axis=1)
        parts = [np.ascontiguousarray(part) for part in parts]
        basis = _orthonormal(np.concatenate(list(executor.map(multiplied, parts)), axis=1))
    _, axes = np.linalg.eigh(sum(executor.map(_squares, information, repeat(basis))))
    basis = basis @ axes[:, ::-1][:, :dim].astype(np.float32)
    vectors[:, basis.shape[1] :] = 0.0

    def write(start: int, block: sparse.csr_array) -> None:
        rows = vectors[start : start + block.shape[0], : basis.shape[1]]
        for words in slices(len(rows)):
            found = block[words] @ basis
            # Those of frequent words are longer otherwise.
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
            rows[words] = found

    sizes = [block.shape[0] for block in information]
    list(executor.map(write, accumulate(sizes, initial=0), information))


def _squares(block: sparse.csr_array, basis: np.ndarray) -> np.ndarray:
    result = np.zeros((basis.shape[1], basis.shape[1]))
    for words in slices(block.shape[0]):
        found = (block[words] @ basis).astype(np.float64)
        result += found.T @ found
    return result


def _orthonormal(basis: np.ndarray) -> np.ndarray:
    """Returns an orthonormal basis of the columns' space, single precision.

    By the eigenvectors of their products: for such tall matrices ten times as fast as a
    QR decomposition; directions that are lost in rounding are left out.
    """
    values, axes = np.linalg.eigh(basis.T @ basis)
    kept = values > 1e-12 * values.max(initial=0.0)
    return (basis @ (axes[:, kept] / np.sqrt(values[kept]))).astype(np.float32)
