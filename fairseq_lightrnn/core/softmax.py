"""The output layer: a softmax over the values of each component, exactly normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_lightrnn.core.features import WordFeature
from fairseq_lightrnn.core.reader import ComponentVectors
from fairseq_lightrnn.core.seats import PredictedTable

__all__ = ["ComponentSoftmax", "Queries", "at_least_float32"]

Queries = tuple[Tensor | None, ...]
"""What each feature is scored with, shape (N, e) or None; see :meth:`ComponentSoftmax.ask`."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns half-precision numbers as float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class ComponentSoftmax(nn.Module):
    """Predicts a word component by component.

    ``log P(word | …) = Σ_i log P(coordinate i | coordinates before it, …)``, component i being
    predicted from a hidden state of its own (arXiv 1610.09893, equations 2 and 3). Values that
    lead to no word have probability 0, so the probabilities of the V words sum to 1.

    Features add to the logits of the last component. They are scored with queries of the hidden
    state that predicts the first component, which depends on no coordinate.

    Args:
        table: the word table in force.
        vectors: of the components.
        features: what else words are predicted with.

    Attributes:
        bias: parameter of shape (ΣR_i,).
    """

    def __init__(
        self,
        table: PredictedTable,
        vectors: ComponentVectors,
        features: Sequence[WordFeature] = (),
    ) -> None:
        super().__init__()
        if vectors.shape != table.shape:
            raise ValueError(f"vectors of shape {vectors.shape} for a table of {table.shape}")
        self.table = table
        self.vectors = vectors
        self.features: Sequence[WordFeature] = nn.ModuleList(features)  # type: ignore[assignment]
        self.bias = nn.Parameter(torch.zeros(sum(table.shape)))

    def component(self, component: int) -> tuple[Tensor, Tensor]:
        """Returns the vectors (R_i, d) and biases (R_i,) of a component."""
        return self.vectors.of(component), self.bias.split(self.table.shape)[component]

    def ask(self, outputs: Tensor) -> Queries:
        """Returns the features' queries of hidden states (N, d) that predict first components."""
        return tuple(feature.ask(outputs) for feature in self.features)

    def logits(
        self,
        component: int,
        hidden: Tensor,
        prefix: Tensor,
        queries: Queries | None = None,
        featured: Tensor | None = None,
    ) -> Tensor:
        """Scores every value of a component.

        Args:
            component: i.
            hidden: states of shape (N, d) that predict component i.
            prefix: the coordinates before it, integers of shape (N, i).
            queries: for the last component, those of the states that predicted the first; asked
                here if there is but one component.
            featured: what features add to the logits, (N, R_k), if known already.

        Returns:
            Logits of shape (N, R_i), -inf where a value leads to no word.
        """
        logits = self.vector_logits(component, hidden, prefix)
        if component + 1 == self.table.num_components and len(self.features):
            if featured is None:
                featured = self.feature_logits(
                    self.ask(hidden) if queries is None and component == 0 else queries, prefix
                )
            logits = logits + featured
        return logits

    def vector_logits(self, component: int, hidden: Tensor, prefix: Tensor) -> Tensor:
        """Returns what vectors and biases alone make of :meth:`logits`."""
        logits = F.linear(hidden, *self.component(component))
        occupied = self.table.occupied(component, prefix)
        return logits if occupied is None else logits.masked_fill(~occupied, float("-inf"))

    def feature_logits(self, queries: Queries | None, prefix: Tensor) -> Tensor:
        """Scores the words of prefixes by their features.

        Args:
            queries: of N states that predict the first component.
            prefix: all coordinates but the last, integers of shape (N, k - 1).

        Returns:
            What is added to the last component's logits, shape (N, R_k); empty cells hold any
            number.
        """
        if queries is None:
            raise ValueError(
                "the last component is predicted with features: give the queries of the hidden "
                "states that predicted the first component, softmax.ask(hidden)"
            )
        if prefix.size(1) == 0:  # every word shares it: one product will do
            of_all = cast(Tensor, self.feature_logits_of_all(queries))
            return of_all[:, 0]
        members, rows = self.table.members, self.table.number(prefix)
        parts = [
            feature.score_once(query, rows, members)
            for feature, query in zip(self.features, queries, strict=True)
        ]
        return sum(parts[1:], parts[0])

    def project(self, queries: Queries) -> Queries:
        """Returns what :meth:`projected_logits` takes, so that many prefixes share the work."""
        pairs = zip(self.features, queries, strict=True)
        return tuple(feature.project(query) for feature, query in pairs)

    def projected_logits(self, projected: Queries, prefix: Tensor) -> Tensor:
        """Returns what :meth:`feature_logits` does, of queries that were projected."""
        members, rows = self.table.members, self.table.number(prefix)
        parts = [
            feature.score_rows(query, rows, members)
            for feature, query in zip(self.features, projected, strict=True)
        ]
        return sum(parts[1:], parts[0])

    def feature_logits_of_all(self, queries: Queries) -> Tensor | None:
        """Returns what features add to the logits of all words, seated in their cells.

        Args:
            queries: of B texts.

        Returns:
            Shape (B, prefixes, R_k), the prefixes being all coordinates but the last in row-major
            order, or (1, prefixes, R_k) where it is the same for all texts; empty cells hold any
            number. None if there are no features.
        """
        if not len(self.features):
            return None
        parts = [
            feature.score_all(query) for feature, query in zip(self.features, queries, strict=True)
        ]
        of_words = sum(parts[1:], parts[0])
        of_cells = of_words.index_select(1, self.table.words)
        return of_cells.view(len(of_cells), -1, self.table.shape[-1])

    def feature_logits_of(self, queries: Queries, words: Tensor) -> Tensor:
        """Returns what features add to the logits of words (W,): (N, W), or (1, W) for all alike.

        Args:
            queries: of N states that predict the first component.
            words: wherever they sit.
        """
        parts = [
            feature.score_words(query, words)
            for feature, query in zip(self.features, queries, strict=True)
        ]
        return sum(parts[1:], parts[0])

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """Scores given words.

        Args:
            hidden: states of shape (N, k, d); ``hidden[:, i]`` predicts component i.
            words: integers of shape (N,).

        Returns:
            Log-probabilities of shape (N, k), in nats, of each coordinate given those before it;
            their sum over k is the word's.
        """
        coordinates, queries = self.table(words), self.ask(hidden[:, 0])
        scores = []
        for component, target in enumerate(coordinates.unbind(1)):
            prefix = coordinates[:, :component]
            logits = self.logits(component, hidden[:, component], prefix, queries)
            scores.append(-F.cross_entropy(at_least_float32(logits), target, reduction="none"))
        return torch.stack(scores, dim=1)

    def forward_with_mean(self, hidden: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Scores given words, and the words in whose place they stand.

        Takes the arguments of :meth:`forward`.

        Returns:
            What :meth:`forward` returns; and for each component the mean of its log-probabilities
            over all words that share the given word's coordinates before it, shape (N, k): for two
            components over all words' rows, and over the columns of the words of the given row.
        """
        coordinates, queries = self.table(words), self.ask(hidden[:, 0])
        scores, means = [], []
        for component, target in enumerate(coordinates.unbind(1)):
            prefix = coordinates[:, :component]
            logits = self.logits(component, hidden[:, component], prefix, queries)
            log_probs = torch.log_softmax(at_least_float32(logits), dim=1)
            scores.append(log_probs.gather(1, target[:, None]).squeeze(1))
            shares = self.table.shares(component, prefix).to(log_probs.dtype)
            # A value that leads to no word has no share, and a log-probability of -inf.
            means.append((log_probs.masked_fill(shares == 0, 0.0) * shares).sum(1))
        return torch.stack(scores, dim=1), torch.stack(means, dim=1)
