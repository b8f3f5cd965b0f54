"""The paper's composition of a word: one recurrent step for every component.

A word enters the recurrent network as k steps, its component vectors one after the other, through
the same weights (arXiv 1610.09893, section 3.1 and figure 2). The output after a word's last
component predicts the first component of the next word, the output after its i-th component the
next one. So k·T steps score T words, in one fused LSTM call.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fairseq_lightrnn.components import ComponentEmbedding

__all__ = ["Context", "RecurrentComposition", "State"]

State = tuple[Tensor, Tensor]
"""Hidden and cell state of an LSTM, each of shape (layers, B, d)."""


class Context(NamedTuple):
    """What is known after reading some words, and perhaps some components of the next.

    Attributes:
        output: the hidden output of shape (B, d) that predicts the next component.
        state: the recurrent state behind it.
    """

    output: Tensor
    state: State

    def select(self, index: Tensor) -> Context:
        """Picks, repeats or reorders the texts of the batch by an index of shape (N,)."""
        hidden, cell = self.state
        state = (hidden.index_select(1, index), cell.index_select(1, index))
        return Context(self.output.index_select(0, index), state)


class RecurrentComposition(nn.Module):
    """Reads words and predicts the next ones, with one recurrent step for every component.

    Args:
        embedding: the input vectors.
        hidden_size: d, the width of the LSTM.
        num_layers: the layers of the LSTM.
        dropout_in: dropout on the input vectors.
        dropout_between: dropout between the layers.
        dropout_out: dropout on the outputs.
    """

    def __init__(
        self,
        embedding: ComponentEmbedding,
        hidden_size: int,
        num_layers: int = 1,
        dropout_in: float = 0.0,
        dropout_between: float = 0.0,
        dropout_out: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.dropout_in = nn.Dropout(dropout_in)
        self.dropout_out = nn.Dropout(dropout_out)
        self.lstm = nn.LSTM(
            embedding.weight.size(1),
            hidden_size,
            num_layers,
            batch_first=True,
            # nn.LSTM warns of a dropout that has no layers to stand between.
            dropout=dropout_between if num_layers > 1 else 0.0,
        )

    @property
    def num_components(self) -> int:
        """k, the number of components of a word."""
        return len(self.embedding.shape)

    def forward(self, coordinates: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Predicts each word of consecutive text but the first.

        Args:
            coordinates: of T+1 consecutive words, integers of shape (B, T+1, k). Padding may
                follow a text, not precede it.
            state: the state that this method returned for the text before, whose last word is this
                text's first; None starts from zero.

        Returns:
            The hidden outputs, shape (B, T, k, d), that predict the components of words 1 … T, and
            the state (after all that was read: word T, but for its last component).
        """
        batch, words, components = coordinates.shape
        # The last component of the last word predicts nothing here.  (B, (T+1)·k - 1, dim)
        inputs = self.embedding(coordinates).reshape(batch, words * components, -1)[:, :-1]
        if state is not None:
            inputs = inputs[:, components - 1 :]  # these were read at the end of the text before
        outputs, state = self.lstm(self.dropout_in(inputs), state)
        outputs = outputs[:, -(words - 1) * components :]
        return self.dropout_out(outputs).reshape(batch, words - 1, components, -1), state

    def read(self, coordinates: Tensor, context: Context | None = None) -> Context:
        """Reads whole words.

        Args:
            coordinates: integers of shape (B, T, k).
            context: after the words before; None starts from zero.

        Returns:
            The context that predicts the first component of the next word.
        """
        batch, words, components = coordinates.shape
        inputs = self.embedding(coordinates).reshape(batch, words * components, -1)
        outputs, state = self.lstm(self.dropout_in(inputs), context and context.state)
        return Context(self.dropout_out(outputs[:, -1]), state)

    def extend(self, context: Context, component: int, coordinate: Tensor) -> Context:
        """Conditions a context on one more component of the next word.

        Args:
            context: predicts that component.
            component: its number.
            coordinate: its value, integers of shape (B,).

        Returns:
            The context that predicts the component after it.
        """
        inputs = self.embedding(coordinate[:, None], component)
        outputs, state = self.lstm(self.dropout_in(inputs), context.state)
        return Context(self.dropout_out(outputs[:, -1]), state)
