"""What a word has beyond its row and its column: a bias, numbers of its own, further tables.

Each is a :class:`WordFeature`: one object that words are read by and predicted with. The word table
alone says how a word's probability is factored into components; features add to what a word is read
by, and to the logits of its last component. So probabilities sum to 1 as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_lightrnn.core.grouped_product import grouped_product
from fairseq_lightrnn.core.seats import Seats
from fairseq_lightrnn.core.summed_product import summed_product

__all__ = [
    "FurtherTables",
    "OwnNumbers",
    "WordBias",
    "WordFeature",
    "find_feature",
    "look_up",
    "query_layer",
    "uniform_vectors",
]

_INIT_RANGE = 0.1


def uniform_vectors(rows: int, dim: int) -> nn.Parameter:
    """Returns vectors of shape (rows, dim) as embeddings start: uniform between -0.1 and 0.1."""
    return nn.Parameter(torch.empty(rows, dim).uniform_(-_INIT_RANGE, _INIT_RANGE))


def look_up(weight: Tensor, index: Tensor, dropout: float = 0.0) -> Tensor:
    """Looks up rows of a matrix, some of the rows dropped wherever they occur.

    Args:
        weight: shape (rows, d).
        index: integers of shape (...).
        dropout: the probability that a row is dropped; the others are scaled.

    Returns:
        Shape (..., d).
    """
    vectors = F.embedding(index, weight)
    if not dropout:
        return vectors
    kept = F.dropout(weight.new_ones(len(weight), 1), dropout)
    return vectors * F.embedding(index, kept)


def query_layer(dim: int, size: int, bias: bool = False) -> nn.Linear:
    """Returns the projection of outputs to the query that e numbers of words are multiplied with.

    The numbers start at zero, and Adam moves every number by about as much in a step. So what the e
    numbers of a word add to its logit changes with Σ_i |q_i|, q being their query, where the d
    numbers of a word in an ordinary softmax change it with Σ_j |h_j|. The query starts with that
    sum, or few numbers would learn slowly: as random projections of h, d/e times as large as h.
    (Steps of plain SGD grow with the query: there the numbers learn d/e times as fast.)

    Args:
        dim: d, the width of outputs.
        size: e.
        bias: add one, which starts at zero.
    """
    query = nn.Linear(dim, size, bias=bias)
    nn.init.normal_(query.weight, std=dim**0.5 / size)
    if bias:
        nn.init.zeros_(query.bias)
    return query


class WordFeature(nn.Module):
    """Something that every word has beyond its row and column.

    Attributes:
        query: projects outputs (d) to what the feature is scored with (e), or None.
    """

    query: nn.Linear | None

    def __init__(self) -> None:
        super().__init__()
        self.query = None

    def ask(self, outputs: Tensor) -> Tensor | None:
        """Returns the query (..., e) of outputs (..., d) that predict words' first components."""
        return None if self.query is None else self.query(outputs)

    def read(self, words: Tensor, dropout: float = 0.0) -> Tensor | None:
        """Returns what words (...) are read by, (..., d), or None for nothing.

        Args:
            words: integers of any shape.
            dropout: the probability that a vector or a word's numbers are dropped wherever they
                occur.
        """
        return None

    def project(self, query: Tensor | None) -> Tensor | None:
        """Returns all of a query (N, e) that any row is scored with, so that it is done once."""
        return query

    def score_rows(self, projected: Tensor | None, rows: Tensor, members: Tensor) -> Tensor:
        """Scores the words of one row for each query.

        Args:
            projected: what :meth:`project` returned.
            rows: the row of each, integers of shape (N,).
            members: the words of all rows, integers of shape (rows, C).

        Returns:
            What is added to their logits, shape (N, C).
        """
        raise NotImplementedError

    def score_once(self, query: Tensor | None, rows: Tensor, members: Tensor) -> Tensor:
        """Does what :meth:`score_rows` does, of a query that is projected for this alone."""
        return self.score_rows(self.project(query), rows, members)

    def score_all(self, query: Tensor | None) -> Tensor:
        """Scores all V words: shape (N, V), or (1, V) of a feature that asks for no query."""
        raise NotImplementedError

    def vectors_of(self, words: Tensor) -> Tensor:
        """Returns what queries are multiplied with to score words (W,): (W, e).

        Without a query, (W, 1): the scores.
        """
        raise NotImplementedError

    def score_words(self, query: Tensor | None, words: Tensor) -> Tensor:
        """Scores some words (W,) alike for all queries: (N, W), or (1, W) without a query."""
        vectors = self.vectors_of(words)
        return vectors.T if query is None else F.linear(query, vectors)


def find_feature(features: Iterable[WordFeature], kind: type[Any]) -> Any:
    """Returns the feature of a kind that words have, or None."""
    return next((feature for feature in features if isinstance(feature, kind)), None)


class WordBias(WordFeature):
    """A bias for every word, which starts at zero.

    Args:
        num_words: V.
    """

    def __init__(self, num_words: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_words))

    def score_rows(self, projected: Tensor | None, rows: Tensor, members: Tensor) -> Tensor:
        """See :meth:`WordFeature.score_rows`."""
        if rows.numel() < len(members):
            return self.bias[members[rows]]
        return F.embedding(rows, self.bias[members])  # each row is put together once

    def score_all(self, query: Tensor | None) -> Tensor:
        """See :meth:`WordFeature.score_all`."""
        return self.bias[None]

    def vectors_of(self, words: Tensor) -> Tensor:
        """See :meth:`WordFeature.vectors_of`."""
        return self.bias[words][:, None]


class OwnNumbers(WordFeature):
    """A few numbers of every word's own, for reading and for predicting it; they start at zero.

    They are projected to the width of an input, and multiplied with a query of the outputs.

    Args:
        num_words: V.
        size: e, the numbers of a word.
        input_dim: the width of the vectors that words are read by; 0 if they are not read.
        output_dim: d, the width of the outputs; 0 if words are not predicted.
    """

    def __init__(self, num_words: int, size: int, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.zeros(num_words, size))
        self.projection = nn.Linear(size, input_dim, bias=False) if input_dim else None
        self.query = query_layer(output_dim, size) if output_dim else None

    def read(self, words: Tensor, dropout: float = 0.0) -> Tensor | None:
        """See :meth:`WordFeature.read`."""
        if self.projection is None:
            return None
        return self.projection(look_up(self.numbers, words, dropout))

    def score_rows(self, projected: Tensor | None, rows: Tensor, members: Tensor) -> Tensor:
        """See :meth:`WordFeature.score_rows`."""
        return grouped_product(cast(Tensor, projected), rows, members, self.numbers)

    def score_all(self, query: Tensor | None) -> Tensor:
        """See :meth:`WordFeature.score_all`."""
        return cast(Tensor, query) @ self.numbers.T

    def vectors_of(self, words: Tensor) -> Tensor:
        """See :meth:`WordFeature.vectors_of`."""
        return self.numbers[words]


class FurtherTables(WordFeature):
    """Further tables of the same words, in which every word has a cell too.

    A word shares its row and its column with others, and a model of one table has nothing else to
    know it by. In a second table it shares them with other words: the vectors of all its cells
    together are nearly its own, at the cost of 2·√V vectors a table for V words. They are added to
    what words are read by; their products with a query are added to the logits.

    Args:
        count: M, the number of tables.
        num_words: V.
        shape: the k sizes of each table.
        input_dim: the width of the vectors that words are read by.
        output_dim: d, the width of the outputs.
        shared: read and predict by the same vectors; the widths must be equal.
        keep_input: read words by tables of their own, which stay when words move.
        query_dim: e, the width of the vectors that words are predicted with, where it is below d
            and they are not shared. A third of the width predicts as well as all of it (Penn
            Treebank, d = 200), and the products with all vectors take most of the time.

    Attributes:
        tables: where the words sit in each table.
        kept_tables: where they sit in those that they are read by, if these are others.
        input_vectors: parameter of shape (M·ΣR_i, input_dim): one vector for each value of each
            component of each table.
        output_vectors: parameter of shape (M·ΣR_i, e). It starts at zero, unless shared.
    """

    def __init__(
        self,
        count: int,
        num_words: int,
        shape: Sequence[int],
        input_dim: int,
        output_dim: int,
        shared: bool = False,
        keep_input: bool = False,
        query_dim: int = 64,
    ) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"{count} further tables: expected at least 1")
        if shared and input_dim != output_dim:
            raise ValueError(f"shared vectors need equal widths, got {input_dim} and {output_dim}")
        self.tables = nn.ModuleList(Seats(num_words, shape) for _ in range(count))
        kept = [Seats(num_words, shape) for _ in range(count * keep_input)]
        self.kept_tables = nn.ModuleList(kept)
        self._sizes = count * list(shape)
        self.input_vectors = uniform_vectors(sum(self._sizes), input_dim)
        size = output_dim if shared else min(output_dim, query_dim)
        zeros = torch.zeros(sum(self._sizes), size)
        self.output_vectors = self.input_vectors if shared else nn.Parameter(zeros)
        self.query = query_layer(output_dim, size)
        self._looked_up: tuple[list[tuple[Tensor, int]], list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is kept of tables: the versions of a copy's tensors begin anew."""
        return {**self.__dict__, "_looked_up": None}

    def read(self, words: Tensor, dropout: float = 0.0) -> Tensor:
        """See :meth:`WordFeature.read`."""
        numbers = self._numbers(words, self.kept_tables or self.tables)
        index = torch.stack(list(numbers), dim=-1)
        # (..., M·k, input_dim) -> (..., input_dim)
        return look_up(self.input_vectors, index, dropout).sum(dim=-2)

    def project(self, query: Tensor | None) -> Tensor:
        """See :meth:`WordFeature.project`: returns the products with all vectors, (N, M·ΣR_i)."""
        return F.linear(cast(Tensor, query), self.output_vectors)

    def score_rows(self, projected: Tensor | None, rows: Tensor, members: Tensor) -> Tensor:
        """See :meth:`WordFeature.score_rows`."""
        places = (known[rows].long() for known in self._coordinates_of(members))
        return self._sum_scores(cast(Tensor, projected), places)

    def score_once(self, query: Tensor | None, rows: Tensor, members: Tensor) -> Tensor:
        """See :meth:`WordFeature.score_once`."""
        places = self._coordinates_of(members)
        vectors = self.output_vectors
        return summed_product(cast(Tensor, query), rows, places, vectors, self._sizes)

    def score_all(self, query: Tensor | None) -> Tensor:
        """See :meth:`WordFeature.score_all`."""
        first = cast(Seats, self.tables[0])
        words = torch.arange(first.num_words, device=first.coordinates.device)
        return self._sum_scores(self.project(query), _coordinates(words, self.tables))

    def score_table(self, query: Tensor, number: int) -> tuple[Tensor, ...]:
        """Scores what one of the tables is made of: k tensors (N, R_i), by queries (N, e)."""
        sizes = cast(Seats, self.tables[number]).shape
        vectors = self.output_vectors[number * sum(sizes) :][: sum(sizes)]
        return F.linear(query, vectors).split(sizes, dim=1)

    def _coordinates_of(self, members: Tensor) -> list[Tensor]:
        """Returns what :func:`_coordinates` yields of the words of all rows, int32 of (rows, C).

        To look them up for every query takes longer than to score them, so they are kept until a
        table changes: its tensor is then another one, or of another version.
        """
        sources = [members, *(cast(Seats, table).coordinates for table in self.tables)]
        if any(source.is_inference() for source in sources):  # these count no versions
            return [one.int() for one in _coordinates(members, self.tables)]
        now = [(source, source._version) for source in sources]
        if self._looked_up is not None:
            before, places = self._looked_up
            # Tensors that are kept cannot give their memory to others.
            if all(
                old.data_ptr() == new.data_ptr() and version == other and old.device == new.device
                for (old, version), (new, other) in zip(before, now, strict=True)
            ):
                return places
        places = [one.int() for one in _coordinates(members, self.tables)]
        self._looked_up = now, places
        return places

    def vectors_of(self, words: Tensor) -> Tensor:
        """See :meth:`WordFeature.vectors_of`."""
        total: Tensor | None = None
        for index in self._numbers(words, self.tables):
            one = F.embedding(index, self.output_vectors)
            total = one if total is None else total + one
        return cast(Tensor, total)

    def _numbers(self, words: Tensor, tables: nn.ModuleList) -> Iterator[Tensor]:
        """Yields which of all vectors are theirs, in the order of :func:`_coordinates`."""
        starts = accumulate(self._sizes[:-1], initial=0)
        for start, coordinate in zip(starts, _coordinates(words, tables), strict=True):
            yield start + coordinate

    def _sum_scores(self, scores: Tensor, places: Iterable[Tensor]) -> Tensor:
        """Sums the scores of each word's rows and columns.

        Args:
            scores: of all vectors, (N, M·ΣR_i).
            places: what :func:`_coordinates` yields of words of shape (N, C), or (C,) for the same
                in each of the N.

        Returns:
            Shape (N, C).
        """
        # A gather's gradient is as large as what it gathers from: of each component its own scores.
        total: Tensor | None = None
        parts = zip(scores.split(self._sizes, dim=1), places, strict=True)
        for part, index in parts:
            one = part.gather(1, index) if index.dim() > 1 else part.index_select(1, index)
            total = one if total is None else total + one
        return cast(Tensor, total)


def _coordinates(words: Tensor, tables: nn.ModuleList) -> Iterator[Tensor]:
    """Yields words' coordinates, table by table and component by component."""
    for table in tables:
        yield from table(words).unbind(-1)
