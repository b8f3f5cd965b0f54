"""Component vectors: how words are embedded and predicted.

The input vectors (:class:`ComponentEmbedding`) and the output softmaxes
(:class:`ComponentSoftmax`) of LightRNN (arXiv 1610.09893, section 3.1), for any number k of
components. The vectors of all components lie in one matrix of ΣR_i rows, component after
component, R_i being the size of component i.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_lightrnn.frequent_words import FrequentInput, FrequentOutput, FrequentSize
from fairseq_lightrnn.further_tables import FurtherTables
from fairseq_lightrnn.grouped_product import grouped_product
from fairseq_lightrnn.table_lookup import TableLookup

__all__ = [
    "ComponentEmbedding",
    "ComponentSoftmax",
    "WordEmbedding",
    "at_least_float32",
]

_INIT_RANGE = 0.1


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns half-precision numbers as float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _vectors(rows: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, dim).uniform_(-_INIT_RANGE, _INIT_RANGE))


class ComponentEmbedding(nn.Module):
    """The input vectors: one for each value of each component.

    Args:
        shape: the k sizes of the table.
        dim: the width of a vector.
        table: the word table in force; needed for residuals and an input table only.
        residual_dim: numbers of every word's own, projected to ``dim`` and added to the vector of
            its last component; 0 for none. They start at zero.
        dropout: the probability that training drops a whole vector, for all of its occurrences in a
            batch; the others are scaled. Words' residuals are vectors of their own: dropped word by
            word, whatever becomes of the words' components (arXiv 1708.02182, section 4.3).
        frequent: further numbers that frequent words have, added likewise.
        own_table: words have the vectors of their cells in a table of the input's own, which is the
            word table in force at first. Whole words only can be looked up then.
        further: further tables, whose vectors are added to that of a word's last component.

    Attributes:
        weight: parameter of shape (ΣR_i, dim).
        input_table: the input's own table, or None.
        further_weight: parameter of shape (M·ΣR_i, dim), the vectors of M further tables, or None.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dim: int,
        table: TableLookup | None = None,
        residual_dim: int = 0,
        dropout: float = 0.0,
        frequent: FrequentSize | None = None,
        own_table: bool = False,
        further: FurtherTables | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.dropout = dropout
        self.weight = _vectors(sum(shape), dim)
        offsets = torch.tensor([0, *accumulate(shape[:-1])])
        self.offsets: Tensor
        self.register_buffer("offsets", offsets, persistent=False)
        self.residual: nn.Embedding | None = None
        self.frequent: FrequentInput | None = None
        self.input_table: TableLookup | None = None
        self.further_weight: nn.Parameter | None = None
        if not residual_dim and frequent is None and not own_table and further is None:
            return
        if table is None:
            raise ValueError(
                "residuals, an input table and further tables need words: give the table in force"
            )
        self._table = (table,)
        if further is not None:
            self._further = (further,)  # a module of the model's
            self.further_weight = _vectors(further.num_vectors, dim)
        if own_table:
            self.input_table = TableLookup(table.num_words, table.shape)
            self.input_table.seat(table.table())
        if residual_dim:
            self.residual = nn.Embedding(table.num_words, residual_dim)
            nn.init.zeros_(self.residual.weight)
            self.projection = nn.Linear(residual_dim, dim, bias=False)
        if frequent is not None:
            frequent.check(table.num_words)
            self.frequent = FrequentInput(frequent, dim)

    def forward(self, coordinates: Tensor, first_component: int = 0) -> Tensor:
        """Looks vectors up.

        Args:
            coordinates: integers of shape (..., j): the values of j consecutive components in the
                word table in force.
            first_component: the first of them.

        Returns:
            Vectors of shape (..., j, dim).
        """
        size = coordinates.size(-1)
        offsets = self.offsets[first_component : first_component + size]
        additions = (self.residual, self.frequent, self.further_weight)
        ends_there = all(addition is None for addition in additions)
        if size < len(self.shape) or (ends_there and self.input_table is None):
            return self._look_up(coordinates + offsets, self.weight)
        (table,) = self._table
        words = table.words[table.flatten(coordinates)]
        if self.input_table is not None:
            coordinates = self.input_table(words)
        vectors = self._look_up(coordinates + offsets, self.weight)
        if ends_there:
            return vectors
        last = vectors[..., -1, :]
        if self.residual is not None:
            last = last + self.projection(self._look_up(words, self.residual.weight))
        if self.frequent is not None:
            last = last + self.frequent(words, self._look_up)
        if self.further_weight is not None:
            (further,) = self._further
            # (..., M·k, dim) -> (..., dim)
            last = last + self._look_up(further(words), self.further_weight).sum(dim=-2)
        return torch.cat([vectors[..., :-1, :], last[..., None, :]], dim=-2)

    def _look_up(self, index: Tensor, weight: Tensor) -> Tensor:
        """Returns rows of a matrix, some of the rows dropped in training."""
        vectors = F.embedding(index, weight)
        if not self.training or not self.dropout:
            return vectors
        kept = F.dropout(weight.new_ones(len(weight), 1), self.dropout)
        return vectors * F.embedding(index, kept)


class WordEmbedding(nn.Module):
    """Embeds whole words, each as the sum of its component vectors.

    Args:
        table: the word table in force, which seats the words.
        embedding: the component vectors.
        padding_idx: of the words; kept for those who ask, as with ``nn.Embedding``.
        owns_table: the table is a part of this module, rather than of another one.
    """

    def __init__(
        self,
        table: TableLookup,
        embedding: ComponentEmbedding,
        padding_idx: int,
        owns_table: bool = False,
    ) -> None:
        super().__init__()
        self._seats = (table,)
        self.table = table if owns_table else None
        self.embedding = embedding
        self.embedding_dim = embedding.weight.size(1)
        self.padding_idx = padding_idx

    def forward(self, words: Tensor) -> Tensor:
        """Returns vectors of shape (..., dim) of words of shape (...)."""
        (table,) = self._seats
        return self.embedding(table(words)).sum(dim=-2)


class ComponentSoftmax(nn.Module):
    """The output side: a softmax over the values of each component.

    ``log P(word | …) = Σ_i log P(coordinate i | coordinates before it, …)``, component i being
    predicted from a hidden output of its own (arXiv 1610.09893, equations 2 and 3). Values that
    lead to no word have probability 0, so the probabilities of the V words sum to 1.

    Additions give a word numbers of its own, which move with it from cell to cell: a bias, and a
    residual. Residuals are multiplied with the last e numbers of an output: with the first of them
    those of every word, with the last ones those that only frequent words have besides. Those in
    between are multiplied with the vectors of the word's rows and columns in further tables. All
    are added to the logits of the word's last component.

    Args:
        table: the word table in force.
        dim: d, the width of the outputs without what residuals are multiplied with.
        weight: share this parameter of shape (ΣR_i, d) rather than having one.
        word_bias: give every word a bias.
        residual_dim: the width of every word's residual; 0 for none.
        frequent: the residuals that frequent words have besides.
        residuals_of: use the residuals of these input vectors rather than having some.
        further: further tables, with vectors of width d; e is the sum of the three widths.
        further_weight: share these vectors, (M·ΣR_i, d), rather than having some.

    Attributes:
        weight: parameter of shape (ΣR_i, d).
        bias: parameter of shape (ΣR_i,).
        word_bias: parameter of shape (V,), or None.
        residual: parameter of shape (V, residual_dim), or None.
        further_weight: parameter of shape (M·ΣR_i, d), or None. It starts at zero, unless shared,
            as bias and residual do.
    """

    def __init__(
        self,
        table: TableLookup,
        dim: int,
        weight: nn.Parameter | None = None,
        word_bias: bool = False,
        residual_dim: int = 0,
        frequent: FrequentSize | None = None,
        residuals_of: ComponentEmbedding | None = None,
        further: FurtherTables | None = None,
        further_weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        rows = sum(table.shape)
        if weight is None:
            weight = _vectors(rows, dim)
        elif weight.shape != (rows, dim):
            raise ValueError(
                f"shared vectors must have shape {(rows, dim)}, got {tuple(weight.shape)}"
            )
        self._table = (table,)
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(rows))
        words = table.num_words
        self.word_bias = nn.Parameter(torch.zeros(words)) if word_bias else None
        self.residual = nn.Parameter(torch.zeros(words, residual_dim)) if residual_dim else None
        self.frequent = None
        if frequent is not None:
            frequent.check(words)
            self.frequent = FrequentOutput(frequent)
        if residuals_of is not None:
            self._share(residuals_of)
        self._further = (further,)  # a module of the model's
        self.further_weight = None
        if further is not None:
            shape = (further.num_vectors, dim)
            shared = nn.Parameter(torch.zeros(shape)) if further_weight is None else further_weight
            if shared.shape != shape:
                raise ValueError(
                    f"shared vectors must have shape {shape}, got {tuple(shared.shape)}"
                )
            self.further_weight = shared

    def _share(self, embedding: ComponentEmbedding) -> None:
        """Puts the residuals of input vectors in the place of those of the output."""
        every = None if embedding.residual is None else embedding.residual.weight
        frequent = None if embedding.frequent is None else embedding.frequent.residual.weight
        own = [self.residual, None if self.frequent is None else self.frequent.residual]
        shapes = [None if part is None else tuple(part.shape) for part in (*own, every, frequent)]
        if shapes[:2] != shapes[2:]:
            raise ValueError(f"shared residuals must have shapes {shapes[:2]}, got {shapes[2:]}")
        if every is not None:
            self.residual = cast(nn.Parameter, every)
        if self.frequent is not None:
            self.frequent.residual = cast(nn.Parameter, frequent)

    @property
    def table(self) -> TableLookup:
        """The word table in force; a module of the model's, not of the softmax."""
        return self._table[0]

    def vectors(self, component: int) -> tuple[Tensor, Tensor]:
        """Returns the vectors (R_i, d) and biases (R_i,) of a component."""
        start = sum(self.table.shape[:component])
        end = start + self.table.shape[component]
        return self.weight[start:end], self.bias[start:end]

    def logits(
        self, component: int, hidden: Tensor, prefix: Tensor, own: Tensor | None = None
    ) -> Tensor:
        """Scores every value of a component.

        Args:
            component: i.
            hidden: outputs of shape (N, d + e) that predict component i.
            prefix: the coordinates before it, integers of shape (N, i).
            own: what words' own numbers add, (N, R_k), if known already; for the last component.

        Returns:
            Logits of shape (N, R_i), -inf where a value leads to no word.
        """
        weight, bias = self.vectors(component)
        dim = weight.size(1)
        logits = F.linear(hidden[:, :dim], weight, bias)
        if component + 1 == self.table.num_components:
            logits = logits + (self._own_logits(hidden, prefix) if own is None else own)
        occupied = self.table.occupied(component, prefix)
        return logits if occupied is None else logits.masked_fill(~occupied, float("-inf"))

    def own_logits_of_all(self, hidden: Tensor) -> Tensor | None:
        """Returns what words' own numbers add to the logits of all words, seated in their cells.

        Args:
            hidden: outputs of shape (B, d + e) that predict any component.

        Returns:
            Shape (B, prefixes, R_k), the prefixes being all coordinates but the last in row-major
            order; empty cells hold any number. None if words have no numbers of their own.
        """
        query = hidden[:, self.weight.size(1) :]
        parts = []
        if self.word_bias is not None:
            parts.append(self.word_bias.expand(len(query), -1))
        if self.residual is not None:
            parts.append(query[:, : self.residual.size(1)] @ self.residual.T)
        if self.frequent is not None:
            frequent = query[:, -self.frequent.residual.size(1) :] @ self.frequent.residual.T
            parts.append(F.pad(frequent, (0, self.table.num_words - frequent.size(1))))
        if self.further_weight is not None:
            every = torch.arange(self.table.num_words, device=query.device)
            parts.append(self._further_logits(query, every))
        if not parts:
            return None
        own = sum(parts[1:], parts[0])
        return own.index_select(1, self.table.words).view(len(query), -1, self.table.shape[-1])

    def _further_logits(self, query: Tensor, words: Tensor) -> Tensor:
        """Returns what further tables add to the logits of words (N, C) or (C,): (N, C)."""
        (further,) = self._further
        assert further is not None and self.further_weight is not None
        start = 0 if self.residual is None else self.residual.size(1)
        mine = query[:, start : start + self.further_weight.size(1)]
        return further.sum_scores(F.linear(mine, self.further_weight), words)

    def _own_logits(self, hidden: Tensor, prefix: Tensor) -> Tensor | float:
        """Returns what words' own numbers add to the last component's logits, (N, R_k)."""
        if prefix.size(1) == 0:  # every word shares it: one product will do
            of_all = self.own_logits_of_all(hidden)
            return 0.0 if of_all is None else of_all[:, 0]
        query = hidden[:, self.weight.size(1) :]
        members = self.table.words.view(-1, self.table.shape[-1])
        group = self.table.flatten(prefix)
        logits: Tensor | float = 0.0
        if self.word_bias is not None:
            logits = logits + self.word_bias[members[group]]
        if self.residual is not None:
            mine = query[:, : self.residual.size(1)]
            logits = logits + grouped_product(mine, group, members, self.residual)
        if self.further_weight is not None:
            logits = logits + self._further_logits(query, members[group])
        if self.frequent is not None:
            mine = query[:, -self.frequent.residual.size(1) :]
            listed = self.table.frequent(len(self.frequent.residual), prefix)
            logits = logits + self.frequent(mine, *listed, self.table.shape[-1])
        return logits

    def forward(self, hidden: Tensor, coordinates: Tensor) -> Tensor:
        """Scores given words.

        Args:
            hidden: outputs of shape (N, k, d + e); ``hidden[:, i]`` predicts component i.
            coordinates: the words' coordinates, integers of shape (N, k).

        Returns:
            Log-probabilities of shape (N, k), in nats, of each coordinate given those before it;
            their sum over k is the word's.
        """
        scores = []
        for component in range(self.table.num_components):
            logits = self.logits(component, hidden[:, component], coordinates[:, :component])
            target = coordinates[:, component]
            scores.append(-F.cross_entropy(at_least_float32(logits), target, reduction="none"))
        return torch.stack(scores, dim=1)

    def forward_with_mean(self, hidden: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Scores given words, and the words in whose place they stand.

        Takes the arguments of :meth:`forward`.

        Returns:
            What :meth:`forward` returns; and for each component the mean of its log-probabilities
            over all words that share the given word's coordinates before it, shape (N, k): for two
            components over all words' rows, and over the columns of the words of the given row.
        """
        scores, means = [], []
        for component in range(self.table.num_components):
            prefix = coordinates[:, :component]
            logits = at_least_float32(self.logits(component, hidden[:, component], prefix))
            log_probs = torch.log_softmax(logits, dim=1)
            scores.append(log_probs.gather(1, coordinates[:, component, None]).squeeze(1))
            shares = self.table.shares(component, prefix).to(log_probs.dtype)
            # A value that leads to no word has no share, and a log-probability of -inf.
            means.append((log_probs.masked_fill(shares == 0, 0.0) * shares).sum(1))
        return torch.stack(scores, dim=1), torch.stack(means, dim=1)
