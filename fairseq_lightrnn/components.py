"""Component vectors: how words are looked up in the table, embedded and predicted.

The word table itself (:class:`TableLookup`), the input vectors (:class:`ComponentEmbedding`) and
the output softmaxes (:class:`ComponentSoftmax`) of LightRNN (arXiv 1610.09893, section 3.1), for
any number k of components. The vectors of all components lie in one matrix of ΣR_i rows, component
after component, R_i being the size of component i.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_lightrnn.word_table import WordTable, balanced_cells

__all__ = ["ComponentEmbedding", "ComponentSoftmax", "TableLookup", "at_least_float32"]

_INIT_RANGE = 0.1


class TableLookup(nn.Module):
    """The word table as part of a model: its coordinates are a buffer and travel with checkpoints.

    Starts as an arbitrary balanced table; :meth:`seat` puts another one in.

    Args:
        num_words: V.
        shape: the k sizes of the table.

    Attributes:
        coordinates: int32 buffer of shape (V, k).
        cells: int64 of shape (V,), the flat, row-major cell of each word; derived.
    """

    coordinates: Tensor
    cells: Tensor

    def __init__(self, num_words: int, shape: Sequence[int]) -> None:
        super().__init__()
        table = WordTable.from_cells(balanced_cells(num_words, shape), shape)
        self.shape = table.shape
        self.register_buffer("coordinates", torch.empty(num_words, len(shape), dtype=torch.int32))
        self.register_buffer("cells", torch.empty(num_words, dtype=torch.int64), False)
        for component in range(len(shape)):
            self.register_buffer(f"_occupied{component}", None, False)
        self.seat(table)
        self.register_load_state_dict_post_hook(lambda module, _: module.seat(module.table()))

    @property
    def num_words(self) -> int:
        """V, the number of words."""
        return len(self.coordinates)

    @property
    def num_components(self) -> int:
        """k, the number of coordinates of a word."""
        return len(self.shape)

    def table(self) -> WordTable:
        """Returns the word table in force."""
        return WordTable(self.coordinates.cpu().numpy(), self.shape)

    def seat(self, table: WordTable) -> None:
        """Puts a table of the same words and shape into force.

        Raises:
            ValueError: if the table has another number of words or another shape.
        """
        if table.shape != self.shape or table.num_words != self.num_words:
            raise ValueError(
                f"the model needs a table of {self.num_words} words and shape {self.shape}, "
                f"got {table.num_words} words and shape {table.shape}"
            )
        self.coordinates.copy_(torch.from_numpy(np.array(table.coordinates)))
        self.cells.copy_(torch.from_numpy(np.array(table.cells)))
        for component in range(self.num_components):
            occupied = table.occupied(component)
            # None: every value leads to a word, nothing needs a mask.
            mask = None if occupied.all() else torch.from_numpy(occupied)
            setattr(self, f"_occupied{component}", _to_device(mask, self.coordinates.device))

    def forward(self, words: Tensor) -> Tensor:
        """Returns the coordinates, int64 of shape (..., k), of words of shape (...)."""
        return F.embedding(words, self.coordinates).long()

    def occupied(self, component: int, prefix: Tensor) -> Tensor | None:
        """Tells which values of a component lead to a word.

        Args:
            component: i.
            prefix: the coordinates before it, integers of shape (N, i).

        Returns:
            Booleans of shape (N, R_i), or None where all are true.
        """
        mask: Tensor | None = getattr(self, f"_occupied{component}")
        if mask is None:
            return None
        group = torch.zeros(len(prefix), dtype=torch.long, device=prefix.device)
        for size, coordinate in zip(self.shape, prefix.unbind(1), strict=False):
            group = group * size + coordinate
        return mask[group]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns half-precision numbers as float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


class ComponentEmbedding(nn.Module):
    """The input vectors: one for each value of each component.

    Args:
        shape: the k sizes of the table.
        dim: the width of a vector.

    Attributes:
        weight: parameter of shape (ΣR_i, dim).
    """

    def __init__(self, shape: Sequence[int], dim: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.weight = nn.Parameter(torch.empty(sum(shape), dim))
        offsets = torch.tensor([0, *accumulate(shape[:-1])])
        self.offsets: Tensor
        self.register_buffer("offsets", offsets, persistent=False)
        nn.init.uniform_(self.weight, -_INIT_RANGE, _INIT_RANGE)

    def forward(self, coordinates: Tensor, first_component: int = 0) -> Tensor:
        """Looks vectors up.

        Args:
            coordinates: integers of shape (..., j): the values of j consecutive components.
            first_component: the first of them.

        Returns:
            Vectors of shape (..., j, dim).
        """
        last = first_component + coordinates.size(-1)
        return F.embedding(coordinates + self.offsets[first_component:last], self.weight)


class ComponentSoftmax(nn.Module):
    """The output side: a softmax over the values of each component.

    ``log P(word | …) = Σ_i log P(coordinate i | coordinates before it, …)``, component i being
    predicted from a hidden output of its own (arXiv 1610.09893, equations 2 and 3). Values that
    lead to no word have probability 0, so the probabilities of the V words sum to 1.

    Args:
        table: the word table in force.
        dim: the width d of the hidden outputs.
        weight: share this parameter of shape (ΣR_i, d) rather than having one.

    Attributes:
        weight: parameter of shape (ΣR_i, d).
        bias: parameter of shape (ΣR_i,).
    """

    def __init__(self, table: TableLookup, dim: int, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        rows = sum(table.shape)
        if weight is None:
            weight = nn.Parameter(torch.empty(rows, dim))
            nn.init.uniform_(weight, -_INIT_RANGE, _INIT_RANGE)
        elif weight.shape != (rows, dim):
            raise ValueError(
                f"shared vectors must have shape {(rows, dim)}, got {tuple(weight.shape)}"
            )
        self.table = table
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(rows))

    def vectors(self, component: int) -> tuple[Tensor, Tensor]:
        """Returns the vectors (R_i, d) and biases (R_i,) of a component."""
        start = sum(self.table.shape[:component])
        end = start + self.table.shape[component]
        return self.weight[start:end], self.bias[start:end]

    def logits(self, component: int, hidden: Tensor, prefix: Tensor) -> Tensor:
        """Scores every value of a component.

        Args:
            component: i.
            hidden: outputs of shape (N, d) that predict component i.
            prefix: the coordinates before it, integers of shape (N, i).

        Returns:
            Logits of shape (N, R_i), -inf where a value leads to no word.
        """
        logits = F.linear(hidden, *self.vectors(component))
        occupied = self.table.occupied(component, prefix)
        return logits if occupied is None else logits.masked_fill(~occupied, float("-inf"))

    def forward(self, hidden: Tensor, coordinates: Tensor) -> Tensor:
        """Scores given words.

        Args:
            hidden: outputs of shape (N, k, d); ``hidden[:, i]`` predicts component i.
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
