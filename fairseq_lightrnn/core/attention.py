"""Global attention: what a decoder looks up in a source text before it predicts a word.

Luong et al. (arXiv 1508.04025, section 3.1) with the "general" score. What was read from the source
does not enter the next recurrent step (no input feeding), so the recurrent network reads a whole
target in one fused call and attention follows for all words at once.

A word is looked up in the source once, by the output that predicts its first component; the
outputs that predict its other components are combined with the same reading.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "Memory"]


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
