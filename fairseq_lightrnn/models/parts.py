"""Readers and output layers as flags ask for them."""

from __future__ import annotations

from torch import nn

from fairseq_lightrnn.core.features import FurtherTables, OwnNumbers, WordBias, WordFeature
from fairseq_lightrnn.core.network import FeedForward
from fairseq_lightrnn.core.reader import ComponentVectors, Reader
from fairseq_lightrnn.core.seats import PredictedTable, Seats
from fairseq_lightrnn.core.softmax import ComponentSoftmax
from fairseq_lightrnn.models.flags import TableSettings

__all__ = ["build_words", "feed_forward"]


def build_words(
    settings: TableSettings,
    num_words: int,
    input_dim: int,
    output_dim: int,
    *,
    shared: bool = False,
    dropout: float = 0.0,
) -> tuple[Reader, ComponentSoftmax]:
    """Builds what words are read and predicted by, on tables that are to be seated.

    Args:
        settings: of the table.
        num_words: V.
        input_dim: width of the vectors that words are read by.
        output_dim: width of the hidden states.
        shared: read and predict by the same vectors of rows and columns.
        dropout: of whole input vectors.
    """
    shape = settings.shape
    features: list[WordFeature] = []
    if settings.word_dim:
        features.append(WordBias(num_words))
    if settings.word_dim > 1:
        features.append(OwnNumbers(num_words, settings.word_dim - 1, input_dim, output_dim))
    if settings.further_tables:
        sizes = settings.further_tables, num_words, shape, input_dim, output_dim
        features.append(FurtherTables(*sizes, shared=shared, keep_input=settings.keep_input_table))
    table = PredictedTable(num_words, shape)
    seats = Seats(num_words, shape) if settings.keep_input_table else table
    vectors = ComponentVectors(shape, input_dim)
    reader = Reader(seats, vectors, features, dropout)
    own = vectors if shared else ComponentVectors(shape, output_dim)
    return reader, ComponentSoftmax(table, own, features)


def feed_forward(dim: int, units: int, dropout: nn.Module) -> FeedForward | None:
    """Returns the feed-forward layer that hidden states pass, or None if it has no units."""
    return FeedForward(dim, units, dropout) if units else None
