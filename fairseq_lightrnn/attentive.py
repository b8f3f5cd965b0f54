"""Compositions that look at a source text before they predict, as decoders of translations.

Global attention of Luong et al. (arXiv 1508.04025, section 3.1) with the "general" score. What was
read from the source does not enter the next recurrent step (no input feeding), so the recurrent
network reads a whole target in one fused call and attention follows for all words at once.

A word is looked up in the source once, by the output that predicts its first component; the
outputs that predict its other components are combined with the same reading.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_lightrnn.components import ComponentEmbedding
from fairseq_lightrnn.composition import Composition, Context, State
from fairseq_lightrnn.gated import GatedComposition
from fairseq_lightrnn.recurrent import RecurrentComposition

__all__ = [
    "Attention",
    "AttentiveComposition",
    "AttentiveGatedComposition",
    "AttentiveRecurrentComposition",
    "Memory",
]


class Memory(NamedTuple):
    """An encoded source text.

    Attributes:
        values: what the encoder made of each source word, shape (B, S, m).
        padding: true where there is no word, shape (B, S).
    """

    values: Tensor
    padding: Tensor


class Attention(nn.Module):
    """Looks outputs up in a source text and combines them with what they find there.

    Args:
        dim: d, the width of the outputs.
        memory_dim: m, the width of the memory.
    """

    def __init__(self, dim: int, memory_dim: int) -> None:
        super().__init__()
        self.key = nn.Linear(dim, memory_dim, bias=False)
        self.combination = nn.Linear(dim + memory_dim, dim, bias=False)

    def forward(self, outputs: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Looks outputs of shape (B, T, d) up.

        Returns:
            The weighted means of the memory, shape (B, T, m), and the weights, shape (B, T, S).
        """
        scores = torch.bmm(self.key(outputs), memory.values.transpose(1, 2))
        scores = scores.masked_fill(memory.padding[:, None], float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        return torch.bmm(weights, memory.values), weights

    def combine(self, outputs: Tensor, source: Tensor) -> Tensor:
        """Merges outputs (..., d) with what was read from the source, (..., m): (..., d)."""
        dim = outputs.size(-1)
        own, read = self.combination.weight[:, :dim], self.combination.weight[:, dim:]
        return torch.tanh(F.linear(outputs, own) + F.linear(source, read))


class AttentiveComposition(Composition):
    """What both compositions with attention share; to be mixed in before a composition.

    Args:
        embedding: the input vectors.
        hidden_size: d.
        memory_dim: m, the width of the memory.
    """

    def __init__(
        self,
        embedding: ComponentEmbedding,
        hidden_size: int,
        *args: Any,
        memory_dim: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(embedding, hidden_size, *args, **kwargs)
        self.attention = Attention(hidden_size, memory_dim)

    def translate(self, coordinates: Tensor, state: State, memory: Memory) -> tuple[Tensor, Tensor]:
        """Predicts each word of a target but the first.

        Args:
            coordinates: of T+1 consecutive words, integers of shape (B, T+1, k). Padding may
                follow a text, not precede it.
            state: the recurrent state before the first of them.
            memory: the source.

        Returns:
            The outputs, shape (B, T, k, d + e), that predict the components of words 1 … T, and
            where in the source the words were looked up, shape (B, T, S).
        """
        raise NotImplementedError

    def read_beside(
        self, coordinates: Tensor, state: State | None, memory: Memory
    ) -> tuple[Context, Tensor]:
        """Reads whole words of a target.

        Args:
            coordinates: integers of shape (B, T, k).
            state: the recurrent state before them.
            memory: the source.

        Returns:
            The context that predicts the first component of the next word, and where in the source
            that word was looked up, shape (B, 1, S).
        """
        output, state = self._last_output(coordinates, state)
        source, weights = self.attention(output[:, None], memory)
        context = self._context(self.attention.combine(output, source[:, 0]), state)
        return context._replace(source=source[:, 0]), weights


class AttentiveRecurrentComposition(AttentiveComposition, RecurrentComposition):
    """The paper's composition with attention."""

    def translate(self, coordinates: Tensor, state: State, memory: Memory) -> tuple[Tensor, Tensor]:
        """See :meth:`AttentiveComposition.translate`."""
        outputs, _ = self._run(coordinates, state)
        source, weights = self.attention(outputs[:, :, 0], memory)
        return self._predict(self.attention.combine(outputs, source[:, :, None])), weights

    def _extended(self, context: Context, output: Tensor, state: State) -> Context:
        if context.source is None:
            raise ValueError("the context to extend must come from this composition's read_beside")
        extended = super()._extended(context, self.attention.combine(output, context.source), state)
        return extended._replace(source=context.source)


class AttentiveGatedComposition(AttentiveComposition, GatedComposition):
    """The gated composition with attention."""

    def translate(self, coordinates: Tensor, state: State, memory: Memory) -> tuple[Tensor, Tensor]:
        """See :meth:`AttentiveComposition.translate`."""
        base, _ = self._run(coordinates[:, :-1], state)
        source, weights = self.attention(base, memory)
        return self.predict(self.attention.combine(base, source), coordinates[:, 1:]), weights
