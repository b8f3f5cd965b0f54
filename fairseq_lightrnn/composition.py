"""What compositions share: a recurrent network that reads words and predicts components.

A composition says how a word is read (its component vectors into the recurrent network) and how the
next word is predicted component by component, each conditioned on the components before it. See
:mod:`fairseq_lightrnn.recurrent` (the paper's) and :mod:`fairseq_lightrnn.gated`; with a source
text to look at, as in translation, :mod:`fairseq_lightrnn.attentive`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_lightrnn.components import ComponentEmbedding
from fairseq_lightrnn.regularisation import LockedDropout, RegularisedLSTM

__all__ = ["Composition", "Context", "FeedForward", "Prediction", "State", "query_layer"]

State = tuple[Tensor, Tensor]
"""Hidden and cell state of an LSTM, each of shape (layers, B, d)."""


class Context(NamedTuple):
    """What is known after reading some words, and perhaps some components of the next.

    Attributes:
        output: the outputs of shape (B, d) that predict the next component.
        state: the recurrent state behind it, if there is a recurrent network.
        base: what a composition needs to know of the words alone, shape (B, …).
        prefix: the components of the next word that are known, integers of shape (B, i).
        source: what attention read from the source text, shape (B, m), where there is one.
    """

    output: Tensor
    state: State | None
    base: Tensor | None = None
    prefix: Tensor | None = None
    source: Tensor | None = None

    def select(self, index: Tensor) -> Context:
        """Picks, repeats or reorders the texts of the batch by an index of shape (N,)."""

        def chosen(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, index)

        state = None
        if self.state is not None:
            hidden, cell = self.state
            state = hidden.index_select(1, index), cell.index_select(1, index)
        output = self.output.index_select(0, index)
        return Context(output, state, chosen(self.base), chosen(self.prefix), chosen(self.source))

    def join(self, other: Context) -> Context:
        """Puts the texts of another batch, of which as much is known, behind those of this one."""

        def both(one: Tensor | None, two: Tensor | None) -> Tensor | None:
            return None if one is None else torch.cat([one, cast(Tensor, two)])

        state = None
        if self.state is not None:
            pairs = zip(self.state, cast(State, other.state), strict=True)
            hidden, cell = (torch.cat(pair, dim=1) for pair in pairs)
            state = hidden, cell
        return Context(
            torch.cat([self.output, other.output]),
            state,
            both(self.base, other.base),
            both(self.prefix, other.prefix),
            both(self.source, other.source),
        )


class FeedForward(nn.Module):
    """A feed-forward layer with a connection around it: ``h + B dropout(relu(A h))``.

    Args:
        dim: d, the width of inputs and outputs.
        inner_dim: the number of its units.
        dropout: of these units.
    """

    def __init__(self, dim: int, inner_dim: int, dropout: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, inner_dim)
        self.dropout = dropout
        self.outer = nn.Linear(inner_dim, dim)

    def forward(self, outputs: Tensor) -> Tensor:
        """Returns outputs of shape (…, d) in the same shape."""
        return outputs + self.outer(self.dropout(F.relu(self.inner(outputs))))


def query_layer(dim: int, sizes: Sequence[int]) -> nn.Linear | None:
    """Returns the projection of outputs to what the words' output residuals are multiplied with.

    Residuals start at zero, and Adam moves every number by about as much in a step. So what the e
    numbers of a word add to its logit changes with Σ_i |q_i|, q being their query, where the d
    numbers of a word in an ordinary softmax change it with Σ_j |h_j|. The query starts with that
    sum, or few numbers would learn slowly: as random projections of h, d/e times as large as h.
    (Steps of plain SGD grow with the query: there the numbers learn d/e times as fast.)

    Args:
        dim: d, the width of outputs.
        sizes: the widths e of the parts of the query, one after the other; zeros are left out.
    """
    sizes = [size for size in sizes if size]
    if not sizes:
        return None
    query = nn.Linear(dim, sum(sizes), bias=False)
    for part in query.weight.split(sizes):
        nn.init.normal_(part, std=dim**0.5 / len(part))
    return query


class Prediction(nn.Module):
    """What predicts a word component by component, each conditioned on those before it.

    Attributes:
        reads_components: whether a component changes the recurrent state.
        dropout_out: dropout on what predicts a component.
        dropout_hidden: dropout on what is transformed to predict a component.
        query: projects outputs to what the words' output residuals are multiplied with, or None.
        ffn: what outputs pass before they predict anything, or None. An ordinary softmax sums over
            words in every row's place; logits of rows that are linear in h say less than that.
    """

    reads_components = True
    dropout_out: nn.Module
    dropout_hidden: nn.Module
    query: nn.Linear | None
    ffn: FeedForward | None

    def extend(self, context: Context, component: int, coordinate: Tensor) -> Context:
        """Conditions a context on one more component of the next word.

        Args:
            context: predicts that component.
            component: its number.
            coordinate: its value, integers of shape (B,).

        Returns:
            The context that predicts the component after it.
        """
        raise NotImplementedError

    def extend_to_all(self, context: Context, component: int, size: int) -> Context:
        """Conditions every context on every value of one more component of the next word.

        Args:
            context: of B texts; predicts that component.
            component: its number.
            size: R, the number of its values.

        Returns:
            The contexts, B·R of them, those of a text side by side.
        """
        batch, device = len(context.output), context.output.device
        texts = torch.arange(batch, device=device).repeat_interleave(size)
        values = torch.arange(size, device=device).repeat(batch)
        return self.extend(context.select(texts), component, values)

    def to_extend(self, context: Context) -> Context:
        """Drops from a context what extending it does not need, or every prefix would copy it."""
        return context if self.reads_components else context._replace(state=None, source=None)

    def _feed_forward(self, outputs: Tensor) -> Tensor:
        return outputs if self.ffn is None else self.ffn(outputs)

    def _with_query(self, outputs: Tensor, base: Tensor | None) -> Tensor:
        """Appends to outputs (…, d) what the output residuals are multiplied with: (…, d + e)."""
        if self.query is None:
            return outputs
        if base is None:
            raise ValueError("the context to extend must come from this composition's read")
        query = self.query(base)
        return torch.cat([outputs, query.expand(*outputs.shape[:-1], -1)], dim=-1)


class Composition(Prediction):
    """The recurrent network and its dropout; subclasses say what its steps are.

    Args:
        embedding: the input vectors.
        hidden_size: d, the width of the LSTM.
        num_layers: the layers of the LSTM.
        dropout_in: dropout on the input vectors.
        dropout_between: dropout between the layers.
        dropout_out: dropout on the outputs.
        dropout_hidden: dropout within the feed-forward layer, and on outputs that are transformed
            before they predict.
        query_sizes: the widths of what the words' output residuals are multiplied with; their sum
            is e.
        locked_dropout: each of these dropouts has one mask for a text, shared over time.
        weight_dropout: dropout on the recurrent matrices of the LSTM.
        ffn_dim: units of the feed-forward layer between LSTM and predictions; 0 for none.
    """

    def __init__(
        self,
        embedding: ComponentEmbedding,
        hidden_size: int,
        num_layers: int = 1,
        dropout_in: float = 0.0,
        dropout_between: float = 0.0,
        dropout_out: float = 0.0,
        dropout_hidden: float = 0.0,
        query_sizes: Sequence[int] = (),
        locked_dropout: bool = False,
        weight_dropout: float = 0.0,
        ffn_dim: int = 0,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        dropout = LockedDropout if locked_dropout else nn.Dropout
        self.dropout_in = dropout(dropout_in)
        self.dropout_out = dropout(dropout_out)
        self.dropout_hidden = dropout(dropout_hidden)
        self.lstm = RegularisedLSTM(
            embedding.weight.size(1),
            hidden_size,
            num_layers,
            dropout_between,
            locked_dropout,
            weight_dropout,
        )
        self.query = query_layer(hidden_size, query_sizes)
        self.ffn = FeedForward(hidden_size, ffn_dim, self.dropout_hidden) if ffn_dim else None

    @property
    def num_components(self) -> int:
        """k, the number of components of a word."""
        return len(self.embedding.shape)

    def forward(
        self,
        coordinates: Tensor,
        state: State | None = None,
        activations: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """Predicts each word of consecutive text but the first.

        Args:
            coordinates: of T+1 consecutive words, integers of shape (B, T+1, k). Padding may
                follow a text, not precede it.
            state: the state that this method returned for the text before, whose last word is this
                text's first; None starts from zero.
            activations: receives ``raw``, the outputs of the LSTM, and ``dropped``, what predicts
                after its dropout, shape (B, S, d), with as many of the S steps for each word that
                is predicted.

        Returns:
            The outputs, shape (B, T, k, d + e), that predict the components of words 1 … T, and
            the state to be given for the text that follows.
        """
        raise NotImplementedError

    def read(self, coordinates: Tensor, context: Context | None = None) -> Context:
        """Reads whole words.

        Args:
            coordinates: integers of shape (B, T, k).
            context: after the words before; None starts from zero.

        Returns:
            The context that predicts the first component of the next word.
        """
        output, state = self._last_output(coordinates, context and context.state)
        return self._context(output, state)

    def _last_output(self, coordinates: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Returns the recurrent output after words (B, T, k), shape (B, d), and the state."""
        raise NotImplementedError

    def _context(self, output: Tensor, state: State | None) -> Context:
        """Returns the context that predicts the next word from an output of shape (B, d)."""
        raise NotImplementedError
