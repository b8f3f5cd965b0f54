"""What graphs are made of: numbers as they are stored, products, look-ups, words as input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fairseq_lightrnn.core.features import FurtherTables, OwnNumbers, find_feature
from fairseq_lightrnn.core.network import FeedForward
from fairseq_lightrnn.core.reader import Reader

__all__ = [
    "Graph",
    "Linear",
    "LookUp",
    "Stored",
    "WordReader",
    "feed_forward",
    "feed_on",
    "make_graph",
    "optional",
    "read_inputs",
]


class Graph(NamedTuple):
    """A graph to be written.

    Attributes:
        module: computes it.
        inputs: an example of each, by the names of the module's arguments and in their order;
            integers are int32.
        outputs: their names.
        free: for each input the axes that may have any size, and their names.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]
    free: Mapping[str, Mapping[int, str]]


_EXAMPLE = 2  # of an axis that may have any size


def make_graph(
    module: nn.Module, inputs: Mapping[str, tuple[Any, ...]], outputs: Sequence[str]
) -> Graph:
    """Makes a graph of inputs' sizes: names of free axes, numbers, last None for integers."""
    examples, free = {}, {}
    for name, sizes in inputs.items():
        kind = torch.int32 if sizes[-1] is None else torch.float32
        axes = [size for size in sizes if size is not None]
        shape = [_EXAMPLE if isinstance(size, str) else size for size in axes]
        examples[name] = torch.zeros(shape, dtype=kind)
        free[name] = {axis: size for axis, size in enumerate(axes) if isinstance(size, str)}
    return Graph(module, examples, outputs, free)


class Stored(nn.Module):
    """Numbers that may be stored in half precision, and compute in single precision."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.detach().clone())

    def forward(self) -> Tensor:
        return self.values.float()


class Linear(nn.Module):
    """``x W + b``: one product of matrices, which every quantiser knows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = Stored(weight.T.contiguous())
        self.bias = None if bias is None else Stored(bias)

    @classmethod
    def of(cls, layer: nn.Linear) -> Linear:
        """Takes over a layer."""
        return cls(layer.weight, layer.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = inputs @ self.weight()
        return outputs if self.bias is None else outputs + self.bias()


class LookUp(nn.Module):
    """Rows of a matrix by their numbers."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.detach().clone())

    def forward(self, words: Tensor) -> Tensor:
        return self.values[words.long()].float()


class WordReader(nn.Module):
    """Looks up what words are read by: the start of every graph that reads them."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        further = find_feature(reader.features, FurtherTables)
        own = find_feature(reader.features, OwnNumbers)
        vectors: list[Tensor] = [reader.vectors.weight]
        vectors += [] if further is None else [further.input_vectors]
        vectors += [vectors[0].new_zeros(1, reader.vectors.dim)]
        self.vectors = LookUp(torch.cat([one.detach() for one in vectors]))
        self.projection = None if own is None else Linear.of(own.projection)

    def look_up(self, places: Tensor, numbers: Tensor | None) -> Tensor:
        """Returns vectors (N, T, d) by places (N, T, P) and words' own numbers (N, T, e)."""
        inputs: Tensor = self.vectors(places).sum(dim=2)
        if self.projection is not None:
            inputs = inputs + self.projection(cast(Tensor, numbers))
        return inputs


def read_inputs(
    reader: Reader, components: int, state: Mapping[str, tuple[Any, ...]]
) -> dict[str, tuple[Any, ...]]:
    """Returns the sizes of what a graph reads words by.

    Args:
        reader: of the words.
        components: of a word that are read in one step.
        state: what the graph takes besides.
    """
    further = find_feature(reader.features, FurtherTables)
    own = find_feature(reader.features, OwnNumbers)
    of_others = 0 if further is None else len(further.tables) * reader.num_components
    inputs = {"places": ("N", "T", of_others + components, None), **state}
    if own is not None:
        inputs["numbers"] = ("N", "T", own.numbers.size(1))
    return inputs


def optional(kind: Any, layer: Any) -> Any:
    """Takes over a layer that a network may lack."""
    return None if layer is None else kind(layer)


def feed_forward(ffn: FeedForward | None) -> nn.ModuleList | None:
    """Takes over what outputs pass before they predict anything."""
    return None if ffn is None else nn.ModuleList([Linear.of(ffn.inner), Linear.of(ffn.outer)])


def feed_on(ffn: nn.ModuleList | None, outputs: Tensor) -> Tensor:
    """Lets outputs pass it."""
    if ffn is None:
        return outputs
    inner, outer = ffn
    return outputs + cast(Tensor, outer(torch.relu(inner(outputs))))
