"""The parameters of a trained model for fewer words, or for more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq_lightrnn.core.features import FurtherTables, OwnNumbers, WordBias
from fairseq_lightrnn.core.reader import ComponentVectors
from fairseq_lightrnn.core.seats import Seats
from fairseq_lightrnn.core.softmax import ComponentSoftmax

__all__ = ["grown_shape", "resize", "widened"]


def grown_shape(shape: Sequence[int], num_words: int) -> tuple[int, ...]:
    """Returns a table's shape with so many more columns that the words have room."""
    prefixes = math.prod(shape[:-1])
    return *shape[:-1], max(shape[-1], -(-num_words // prefixes))


def resize(
    model: nn.Module,
    state: dict[str, Tensor],
    kept: Tensor,
    added: int,
    columns: int,
) -> dict[str, Tensor]:
    """Drops words from a model's parameters, and makes room for new ones.

    Args:
        model: that the parameters are of.
        state: its parameters and buffers.
        kept: the words that stay, integers.
        added: how many are new; they come last, without a seat.
        columns: that the tables get.

    Returns:
        Parameters and buffers of the model of the new words.
    """
    result = dict(state)

    def change(name: str, new: Any) -> None:
        if name in state:  # what is shared stands there once
            result[name] = new(state[name])

    def of_words(value: Tensor) -> Tensor:
        rows = value.index_select(0, kept)
        return torch.cat([rows, rows.new_zeros(added, *rows.shape[1:])])

    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Seats):
            change(f"{name}.coordinates", of_words)
        elif isinstance(module, WordBias):
            change(f"{name}.bias", of_words)
        elif isinstance(module, OwnNumbers):
            change(f"{name}.numbers", of_words)
        elif isinstance(module, FurtherTables):
            shape = cast(Seats, module.tables[0]).shape
            for part in ("input_vectors", "output_vectors"):
                change(f"{name}.{part}", lambda value, s=shape: widened(value, s, columns))
        elif isinstance(module, ComponentSoftmax):
            shape = module.table.shape
            change(f"{name}.bias", lambda value, s=shape: widened(value, s, columns))
            change(f"{name}.vectors.weight", lambda value, s=shape: widened(value, s, columns))
        elif isinstance(module, ComponentVectors) and name.endswith("reader.vectors"):
            change(f"{name}.weight", lambda value, s=module.shape: widened(value, s, columns))
    return result


def widened(values: Tensor, shape: Sequence[int], columns: int) -> Tensor:
    """Gives the last component of each table more values, the means of its others.

    Args:
        values: of tables of the same shape, one after the other, (M·ΣR_i, …).
        shape: of each.
        columns: how many more values.
    """
    parts = []
    for table in values.split(sum(shape)):
        last = table[-shape[-1] :]
        mean = last.mean(dim=0, keepdim=True)
        parts += [table, mean.expand(columns, *mean.shape[1:])]
    return torch.cat(parts)
