"""How words are read: the vectors of their components, and what else a word has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_lightrnn.core.features import WordFeature, look_up, uniform_vectors
from fairseq_lightrnn.core.seats import Seats

__all__ = ["ComponentVectors", "Reader", "WordEmbedding"]


class ComponentVectors(nn.Module):
    """A vector for each value of each component, component after component in one matrix.

    The vectors by which words are read or predicted (arXiv 1610.09893, section 3.1); for both the
    same object may be given.

    Args:
        shape: the k sizes of the table.
        dim: d, the width of a vector.

    Attributes:
        weight: parameter of shape (ΣR_i, d).
    """

    def __init__(self, shape: Sequence[int], dim: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.weight = uniform_vectors(sum(shape), dim)
        self._starts = [0, *accumulate(shape)]
        starts = torch.tensor(self._starts[:-1])
        self.starts: Tensor
        self.register_buffer("starts", starts, persistent=False)

    @property
    def dim(self) -> int:
        """d, the width of a vector."""
        return self.weight.size(1)

    def of(self, component: int) -> Tensor:
        """Returns the vectors (R_i, d) of a component."""
        return self.weight[self._starts[component] : self._starts[component + 1]]

    def forward(self, coordinates: Tensor, dropout: float = 0.0) -> Tensor:
        """Looks vectors up.

        Args:
            coordinates: of the first j components, integers of shape (..., j).
            dropout: the probability that a whole vector is dropped, for all of its occurrences; the
                others are scaled.

        Returns:
            Vectors of shape (..., j, d).
        """
        index = coordinates + self.starts[: coordinates.size(-1)]
        return look_up(self.weight, index, dropout)


class Reader(nn.Module):
    """Looks up the vectors by which words are read.

    Args:
        seats: where the words sit.
        vectors: of the components.
        features: what else words are read by; added to the vector of a word's last component.
        dropout: the probability that training drops a whole vector, for all of its occurrences in
            a batch (arXiv 1708.02182, section 4.3). Words' own numbers and vectors of further
            tables are dropped by themselves.
    """

    def __init__(
        self,
        seats: Seats,
        vectors: ComponentVectors,
        features: Sequence[WordFeature] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.seats = seats
        self.vectors = vectors
        self.features: Sequence[WordFeature] = nn.ModuleList(features)  # type: ignore[assignment]
        self.dropout = dropout

    @property
    def num_components(self) -> int:
        """k, the number of components of a word."""
        return self.seats.num_components

    def forward(self, words: Tensor) -> Tensor:
        """Returns the vectors of each component, (..., k, d), of words of shape (...)."""
        vectors = self.vectors(self.seats(words), self._rate)
        added = self._features(words)
        if added is None:
            return vectors
        last = vectors[..., -1, :] + added
        return torch.cat([vectors[..., :-1, :], last[..., None, :]], dim=-2)

    def sum(self, words: Tensor) -> Tensor:
        """Returns the sums of these vectors, shape (..., d)."""
        total: Tensor = self.vectors(self.seats(words), self._rate).sum(dim=-2)
        added = self._features(words)
        return total if added is None else total + added

    def component(self, component: int, values: Tensor) -> Tensor:
        """Returns the vectors (..., d) of values (...) of a component that is not a word's last."""
        return F.embedding(values, self.vectors.of(component))

    @property
    def _rate(self) -> float:
        return self.dropout if self.training else 0.0

    def _features(self, words: Tensor) -> Tensor | None:
        total: Tensor | None = None
        for feature in self.features:
            part = feature.read(words, self._rate)
            if part is not None:
                total = part if total is None else total + part
        return total


class WordEmbedding(nn.Module):
    """Embeds words as ``nn.Embedding`` does, each as the sum of the vectors that it is read by.

    Args:
        reader: looks the vectors up.
        padding_idx: of the words; kept for those who ask.
    """

    def __init__(self, reader: Reader, padding_idx: int) -> None:
        super().__init__()
        self.reader = reader
        self.embedding_dim = reader.vectors.dim
        self.num_embeddings = reader.seats.num_words
        self.padding_idx = padding_idx

    def forward(self, words: Tensor) -> Tensor:
        """Returns vectors of shape (..., d) of words of shape (...)."""
        return self.reader.sum(words)
