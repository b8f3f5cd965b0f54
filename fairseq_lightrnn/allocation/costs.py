"""Cost matrices of words and places, formed block by block.

A cost source tells what all places cost a few words, what each word pays at a given place, and to
which words all places cost the same. Solvers never see more of a matrix than they ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CostSource",
    "DenseCosts",
    "LowRankCosts",
    "Rows",
    "as_costs",
    "require_finite",
    "word_name",
]

_CHOSEN_BLOCK = 1 << 10  # temporaries stay in the cache


def word_name(word: int, symbols: Sequence[str] | None = None) -> str:
    """Returns how an error message calls a word: its id, and its symbol where that is known."""
    return f"word {word}" if symbols is None else f"word {word} ({symbols[word]!r})"


@dataclass(frozen=True)
class DenseCosts:
    """A cost matrix that is held in memory.

    Attributes:
      matrix: (n, m) costs of n words at m places.
      places: those that there are, if not all; the matrix is not copied.
    """

    matrix: Tensor
    places: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        width = self.matrix.shape[1] if self.places is None else len(self.places)
        return self.matrix.shape[0], width

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def terms(self) -> int:
        """Terms that are added up for one cost."""
        return 1

    def block(self, rows: slice | Tensor) -> Tensor:
        """Returns the costs of the words in ``rows``, (b, m) in float64."""
        found = self.matrix[rows]
        found = found if self.places is None else found[:, self.places]
        return found.to(torch.float64)

    def select(self, rows: Tensor) -> DenseCosts:
        """Returns the costs of some of the words."""
        return DenseCosts(self.matrix[rows], self.places)

    def restrict(self, places: Tensor) -> DenseCosts:
        """Returns the costs of some of the places."""
        return DenseCosts(self.matrix, places if self.places is None else self.places[places])

    def indifferent(self) -> Tensor:
        """Returns which words pay the same everywhere, (n,) booleans."""
        pieces = torch.arange(len(self.matrix), device=self.device).split(_CHOSEN_BLOCK)
        blocks = (self.block(some) for some in pieces)
        return torch.cat([(block == block[:, :1]).all(dim=1) for block in blocks])

    def chosen(self, places: Tensor) -> Tensor:
        """Returns what each word pays at its place, (n,) in float64."""
        columns = places if self.places is None else self.places[places]
        return self.matrix.gather(1, columns[:, None]).squeeze(1).to(torch.float64)


class Rows(Protocol):
    """A matrix of which rows can be had, such as a tensor, or one that is never stored whole."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def device(self) -> torch.device: ...

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class LowRankCosts:
    """Costs ``-(sums @ vectors.T + counts[:, None] * biases)``, never stored whole.

    With summed hidden states as ``sums`` and occurrences as ``counts`` this is, up to a constant
    of each word, the training loss of giving the word a coordinate (arXiv 1610.09893, section
    3.3), because the loss of an occurrence is linear in the hidden state except for a normaliser
    that all coordinates share.

    Attributes:
      sums: (n, d) summed hidden states; may be backed by a memory-mapped file or formed when asked
        for.
      vectors: (m, d) output vectors of the places.
      counts: (n,) occurrences.
      biases: (m,) output biases of the places.
    """

    sums: Rows
    vectors: Tensor
    counts: Tensor
    biases: Tensor

    def __post_init__(self) -> None:
        n, d = self.sums.shape
        m = self.vectors.shape[0]
        if self.vectors.shape != (m, d) or self.counts.shape != (n,) or self.biases.shape != (m,):
            raise ValueError(
                f"cost factors do not fit together: sums {tuple(self.sums.shape)}, vectors "
                f"{tuple(self.vectors.shape)}, counts {tuple(self.counts.shape)}, biases "
                f"{tuple(self.biases.shape)}; expected (n, d), (m, d), (n,), (m,)"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.sums.shape[0], self.vectors.shape[0]

    @property
    def device(self) -> torch.device:
        return self.sums.device

    @property
    def terms(self) -> int:
        """Terms that are added up for one cost."""
        return self.vectors.shape[1] + 1

    def block(self, rows: slice | Tensor) -> Tensor:
        """Returns the costs of the words in ``rows``, (b, m) in float64."""
        sums = self.sums[rows].to(torch.float64)
        counts = self.counts[rows].to(torch.float64)
        result = counts[:, None] * self.biases.to(torch.float64)
        result.addmm_(sums, self.vectors.to(torch.float64).T)
        return result.neg_()

    def select(self, rows: Tensor) -> LowRankCosts:
        """Returns the costs of some of the words."""
        return LowRankCosts(self.sums[rows], self.vectors, self.counts[rows], self.biases)

    def restrict(self, places: Tensor) -> LowRankCosts:
        """Returns the costs of some of the places."""
        return LowRankCosts(self.sums, self.vectors[places], self.counts, self.biases[places])

    def indifferent(self) -> Tensor:
        """Returns which words never occurred, (n,) booleans; they pay the same everywhere."""
        idle = self.counts == 0
        words = torch.nonzero(idle).squeeze(1)
        for some in words.split(_CHOSEN_BLOCK):
            idle[some] = (self.sums[some] == 0).all(dim=1)
        return idle

    def chosen(self, places: Tensor) -> Tensor:
        """Returns what each word pays at its place, (n,) in float64."""
        n = self.shape[0]
        result = torch.empty(n, dtype=torch.float64, device=self.device)
        vectors, biases = self.vectors.to(torch.float64), self.biases.to(torch.float64)
        for start in range(0, n, _CHOSEN_BLOCK):
            rows = slice(start, min(start + _CHOSEN_BLOCK, n))
            sums = self.sums[rows].to(torch.float64)
            dots = torch.linalg.vecdot(sums, vectors[places[rows]])
            result[rows] = -(dots + self.counts[rows].to(torch.float64) * biases[places[rows]])
        return result


CostSource = DenseCosts | LowRankCosts


def as_costs(costs: Tensor | np.ndarray | CostSource) -> CostSource:
    """Returns ``costs`` as a cost source; a matrix is wrapped, not copied."""
    if isinstance(costs, (DenseCosts, LowRankCosts)):
        return costs
    matrix = torch.as_tensor(costs)
    if matrix.dim() != 2:
        raise ValueError(
            f"costs must be a matrix of words by places, got shape {tuple(matrix.shape)}"
        )
    return DenseCosts(matrix)


def require_finite(
    values: Tensor, what: str, words: np.ndarray, symbols: Sequence[str] | None = None
) -> None:
    """Refuses NaN and infinity.

    Args:
      values: (b, ...) numbers, one row a word.
      what: what the numbers are, for the message.
      words: (b,) ids of the words.
      symbols: names of all words, by id.

    Raises:
      ValueError: a number is not finite; names the first such word.
    """
    if torch.isfinite(values.sum()):  # a sum is finite only if every term is
        return
    finite = torch.isfinite(values).reshape(values.shape[0], -1).all(dim=1)
    if finite.all():
        return  # the sum overflowed, the numbers did not
    word = int(words[int(torch.nonzero(~finite)[0])])
    raise ValueError(
        f"{what} of {word_name(word, symbols)} is NaN or infinite; the model that gathered it has "
        "diverged: go back to an earlier checkpoint or lower the learning rate"
    )
