"""A recurrent decoder: reads words and predicts the next ones, perhaps beside a source text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fairseq_lightrnn.core.attention import Attention, Memory
from fairseq_lightrnn.core.conditioning import Conditioner, Context
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.network import RegularisedLSTM, State
from fairseq_lightrnn.core.reader import Reader
from fairseq_lightrnn.core.softmax import ComponentSoftmax

__all__ = ["Activations", "Decoder", "Decoded"]


class Activations(NamedTuple):
    """Outputs of the network, S steps for each text.

    Attributes:
        raw: before dropout, shape (B, S, d).
        dropped: what predicts after dropout, shape (B, S, d).
    """

    raw: Tensor
    dropped: Tensor


class Decoded(NamedTuple):
    """What a decoder makes of T+1 consecutive words.

    Attributes:
        hidden: predicts the components of words 1 … T, shape (B, T, k, d).
        state: to be given for the text that follows; None of a network that has none.
        activations: of a recurrent network.
        attention: where in the source words 1 … T were looked up, shape (B, T, S), or None.
    """

    hidden: Tensor
    state: State | None
    activations: Activations | None = None
    attention: Tensor | None = None


class Decoder(nn.Module):
    """Reads words with a recurrent network and predicts the next ones.

    Args:
        reader: looks up the vectors that words are read by.
        network: reads them.
        conditioner: how the components of the next word are conditioned on each other.
        softmax: predicts each.
        attention: looks words up in a source text, or None where there is none.
    """

    carries_state = True
    most_words: int | None = None

    def __init__(
        self,
        reader: Reader,
        network: RegularisedLSTM,
        conditioner: Conditioner,
        softmax: ComponentSoftmax,
        attention: Attention | None = None,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.network = network
        self.attention = attention
        self.head = ComponentHead(conditioner, softmax)

    def forward(
        self,
        words: Tensor,
        state: State | None = None,
        memory: Memory | None = None,
        *,
        continued: bool | None = None,
    ) -> Decoded:
        """Predicts each word of consecutive text but the first.

        Args:
            words: T+1 consecutive words, integers of shape (B, T+1). Padding may follow a text,
                not precede it.
            state: of the network; None starts from zero.
            memory: the source text.
            continued: the state is what this method returned for the text before, whose last word
                is this text's first (default: whenever a state is given).
        """
        steps = self.head.conditioner.steps
        predicted = words.size(1) - 1
        # All but the last component of word 0 were read at the end of the text before. The last
        # component of the last word predicts nothing here.
        continued = state is not None if continued is None else continued
        inputs = self._inputs(words)[:, steps - 1 if continued else 0 : -1]
        outputs, state = self.network(inputs, state)
        outputs = outputs[:, -predicted * steps :].unflatten(1, (predicted, steps))
        raw, weights = outputs, None
        if self.attention is not None and memory is not None:
            source, weights = self.attention(outputs[:, :, 0], memory)
            outputs = self.attention.combine(outputs, source[:, :, None])
        hidden = self.head.hidden(outputs, words[:, 1:])
        activations = Activations(raw.flatten(1, 2), hidden[:, :, :steps].flatten(1, 2))
        return Decoded(hidden, state, activations, weights)

    def contexts(
        self, words: Tensor, state: State | None = None, memory: Memory | None = None
    ) -> tuple[Context, State]:
        """Reads consecutive words and returns what is known after each of them.

        The recurrent state after every word is part of it where the next word's components are
        read too; there this takes a call of the network for each word.

        Args:
            words: integers of shape (B, T), as for :meth:`forward`, without the last one.
            state: of the network; None starts from zero.
            memory: the source text.

        Returns:
            The contexts of B·T texts, those of a text side by side, and the state after the words.
        """
        inputs, steps = self._inputs(words), self.head.conditioner.steps
        if steps == 1:
            outputs, state = self.network(inputs, state)
            states = None
        else:
            parts, after = [], []
            for word in inputs.split(steps, dim=1):
                output, state = self.network(word, state)
                parts.append(output[:, -1])
                after.append(state)
            outputs = torch.stack(parts, dim=1)
            hidden, cell = (torch.stack(each, dim=2).flatten(1, 2) for each in zip(*after))  # noqa: B905
            states = hidden, cell
        source = None
        if self.attention is not None and memory is not None:
            source, _ = self.attention(outputs, memory)
            outputs = self.attention.combine(outputs, source)
            source = source.flatten(0, 1)
        assert state is not None
        return self.head.start(outputs.flatten(0, 1), states, source), state

    def read(self, words: Tensor, context: Context | None = None) -> Context:
        """Reads whole words.

        Args:
            words: integers of shape (B, T).
            context: after the words before; None starts from zero.

        Returns:
            The context that predicts the first component of the next word.
        """
        return self.read_beside(words, context and context.state)[0]

    def read_beside(
        self, words: Tensor, state: State | None, memory: Memory | None = None
    ) -> tuple[Context, Tensor | None]:
        """Reads whole words, perhaps of a target whose source is given.

        Args:
            words: integers of shape (B, T).
            state: of the network before them.
            memory: the source.

        Returns:
            The context that predicts the first component of the next word, and where in the source
            that word was looked up, shape (B, 1, S), or None.
        """
        outputs, state = self.network(self._inputs(words), state)
        if self.attention is None or memory is None:
            return self.head.start(outputs[:, -1], state), None
        source, weights = self.attention(outputs[:, -1:], memory)
        output = self.attention.combine(outputs[:, -1], source[:, 0])
        return self.head.start(output, state, source[:, 0]), weights

    def _inputs(self, words: Tensor) -> Tensor:
        """Returns what the network reads of words (B, T): (B, T·steps, d)."""
        if self.head.conditioner.steps == 1:
            return self.reader.sum(words)
        vectors: Tensor = self.reader(words)
        return torch.flatten(vectors, 1, 2)
