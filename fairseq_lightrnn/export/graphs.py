"""A trained decoder cut into a few graphs, so that no number is in two of them.

What belongs to words stays outside: which word is in which cell. So graphs see places, never words,
and a table can grow without them. ``k`` is the number of a word's components, ``N`` any number of
texts, ``added`` is 0, or -inf where a value leads to no word, and whatever else is to be added.

- ``read``: a step of a word for ``T = 1``, a block of words for more. Reads vectors by their places
  (N, T, P), their sum each time, with the states (N, layers, d) before and after.
- ``first``: what the outputs (N, d) say of a word's first component, and what its later ones will
  be predicted with.
- ``expand1`` …: log-probabilities of the values of a later component after prefixes (N, i), for two
  components the columns of the words of given rows.
- ``bias``, ``numbers``: what words have of their own, looked up by word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import _VF, Tensor, nn

from fairseq_lightrnn.core.conditioning import Gated
from fairseq_lightrnn.core.decoder import Decoder
from fairseq_lightrnn.core.features import FurtherTables, OwnNumbers, WordBias, find_feature
from fairseq_lightrnn.core.network import FeedForward

__all__ = ["Graph", "decoder_graphs"]


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


def decoder_graphs(decoder: Decoder, order: Tensor, half: bool = False) -> dict[str, Graph]:
    """Cuts a decoder into graphs.

    Args:
        decoder: in evaluation mode, without a source text.
        order: the words in the order in which they are to be numbered, integers of shape (V,).
        half: store numbers in half precision; computed is in single precision nevertheless.
    """
    dtype = torch.float16 if half else torch.float32
    graphs = {"read": _read_graph(decoder), "first": _first_graph(decoder)}
    for component in range(1, decoder.head.table.num_components):
        graphs[f"expand{component}"] = _expand_graph(decoder, component)
    for name, values in _words_own(decoder).items():
        module = _LookUp(values.index_select(0, order))
        graphs[name] = _graph(module, {"words": ("N", None)}, [name])
    for graph in graphs.values():
        graph.module.requires_grad_(False).to(dtype).eval()
    return graphs


_Size = int | str | None
_EXAMPLE = 2  # of an axis that may have any size


def _graph(
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


def _words_own(decoder: Decoder) -> dict[str, Tensor]:
    """Returns what is stored for every word, (V, …), by name."""
    features = decoder.head.softmax.features
    bias, own = find_feature(features, WordBias), find_feature(features, OwnNumbers)
    result = {} if bias is None else {"bias": bias.bias.data}
    return result if own is None else {**result, "numbers": own.numbers.data}


class _Stored(nn.Module):
    """Numbers that may be stored in half precision, and compute in single precision."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.detach().clone())

    def forward(self) -> Tensor:
        return self.values.float()


class _Linear(nn.Module):
    """``x W + b``: one product of matrices, which every quantiser knows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = _Stored(weight.T.contiguous())
        self.bias = None if bias is None else _Stored(bias)

    @classmethod
    def of(cls, layer: nn.Linear) -> _Linear:
        """Takes over a layer."""
        return cls(layer.weight, layer.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = inputs @ self.weight()
        return outputs if self.bias is None else outputs + self.bias()


class _LookUp(nn.Module):
    """Rows of a matrix by their numbers."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.detach().clone())

    def forward(self, words: Tensor) -> Tensor:
        return self.values[words.long()].float()


class _Read(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        reader, network = decoder.reader, decoder.network
        further = find_feature(reader.features, FurtherTables)
        own = find_feature(reader.features, OwnNumbers)
        vectors: list[Tensor] = [reader.vectors.weight]
        vectors += [] if further is None else [further.input_vectors]
        vectors += [vectors[0].new_zeros(1, reader.vectors.dim)]
        self.vectors = _LookUp(torch.cat([one.detach() for one in vectors]))
        self.projection = None if own is None else _Linear.of(own.projection)
        self.layers = network.num_layers
        self.weights = nn.ModuleList(_Stored(cast(Tensor, one)) for one in network._flat_weights)
        self.ffn = _feed_forward(decoder.head.conditioner.ffn)

    def forward(
        self, places: Tensor, hidden: Tensor, cell: Tensor, numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self.vectors(places).sum(dim=2)
        if self.projection is not None:
            inputs = inputs + self.projection(cast(Tensor, numbers))
        state = hidden.transpose(0, 1).contiguous(), cell.transpose(0, 1).contiguous()
        weights = [weight() for weight in self.weights]
        outputs, after, cells = _VF.lstm(
            inputs, state, weights, True, self.layers, 0.0, False, False, True
        )
        if self.ffn is not None:
            inner, outer = self.ffn
            outputs = outputs + outer(torch.relu(inner(outputs)))
        return outputs, after.transpose(0, 1), cells.transpose(0, 1)


def _feed_forward(ffn: FeedForward | None) -> nn.ModuleList | None:
    return None if ffn is None else nn.ModuleList([_Linear.of(ffn.inner), _Linear.of(ffn.outer)])


def _read_graph(decoder: Decoder) -> Graph:
    reader, layers = decoder.reader, decoder.network.num_layers
    further = find_feature(reader.features, FurtherTables)
    own = find_feature(reader.features, OwnNumbers)
    components = reader.num_components
    of_others = 0 if further is None else len(further.tables) * components
    places = of_others + (components if decoder.head.conditioner.steps == 1 else 1)
    state = ("N", layers, decoder.network.hidden_size)
    inputs: dict[str, tuple[Any, ...]] = {
        "places": ("N", "T", places, None), "hidden": state, "cell": state,
    }  # fmt: skip
    if own is not None:
        inputs["numbers"] = ("N", "T", own.numbers.size(1))
    return _graph(_Read(decoder), inputs, ["outputs", "next_hidden", "next_cell"])


class _First(nn.Module):
    """Predicts first components; see :meth:`ComponentSoftmax.logits` and :class:`Gated`."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        softmax, conditioner = decoder.head.softmax, decoder.head.conditioner
        self.only = softmax.table.num_components == 1
        self.logits = _Linear(*softmax.component(0))
        transforms: Any = conditioner.transforms if isinstance(conditioner, Gated) else []
        self.transforms = nn.ModuleList(_Linear.of(one) for one in transforms)
        own = find_feature(softmax.features, OwnNumbers)
        further = find_feature(softmax.features, FurtherTables)
        self.own = None if own is None else _Linear.of(own.query)
        # Of a table of one component, where a value is a cell.
        cells = softmax.table.words
        self.of_words = _Linear(own.numbers[cells]) if own is not None and self.only else None
        self.further = None
        if further is not None:
            self.further = nn.ModuleList(
                [_Linear.of(further.query), _Linear(further.output_vectors)]
            )

    def forward(self, outputs: Tensor, added: Tensor) -> tuple[Tensor, ...]:
        logits = self.logits(outputs) + added
        if self.of_words is not None:
            logits = logits + self.of_words(cast(_Linear, self.own)(outputs))
        results = [torch.log_softmax(logits, dim=1)]
        if len(self.transforms):
            results.append(torch.stack([one(outputs) for one in self.transforms], dim=1))
        if self.own is not None and not self.only:
            results.append(self.own(outputs))
        if self.further is not None:
            query, vectors = self.further
            results.append(vectors(query(outputs)))
        return tuple(results)


def _first_graph(decoder: Decoder) -> Graph:
    softmax = decoder.head.softmax
    module = _First(decoder)
    outputs = ["log_probs"]
    outputs += ["projections"] if len(module.transforms) else []
    outputs += ["query"] if module.own is not None and not module.only else []
    outputs += ["scores"] if module.further is not None else []
    inputs = {"outputs": ("N", softmax.vectors.dim), "added": ("N", softmax.table.shape[0])}
    return _graph(module, inputs, outputs)


class _Expand(nn.Module):
    """Predicts a later component; see :meth:`ComponentSoftmax.logits` and :class:`Gated`."""

    def __init__(self, decoder: Decoder, component: int) -> None:
        super().__init__()
        softmax, conditioner = decoder.head.softmax, decoder.head.conditioner
        self.logits = _Linear(*softmax.component(component))
        self.starts: Tensor
        self.gates = None
        if isinstance(conditioner, Gated):
            gates: Any = conditioner.gates[component - 1]
            self.gates = _LookUp(gates.weight)
            self.register_buffer("starts", gates.starts.to(torch.int32), persistent=False)
        last = component + 1 == softmax.table.num_components
        features = softmax.features if last else ()
        self.own = find_feature(features, OwnNumbers) is not None
        self.further = find_feature(features, FurtherTables) is not None

    def forward(
        self,
        hidden: Tensor,
        added: Tensor,
        prefix: Tensor | None = None,
        query: Tensor | None = None,
        numbers: Tensor | None = None,
        scores: Tensor | None = None,
        seats: Tensor | None = None,
    ) -> Tensor:
        if self.gates is not None:
            gates = self.gates(cast(Tensor, prefix) + self.starts).sum(dim=1)
            gate, shift = gates.chunk(2, dim=1)
            hidden = torch.tanh(hidden * (2 * torch.sigmoid(gate)) + shift)
        logits = self.logits(hidden) + added
        if self.own:
            # (N, C, e) × (N, e, 1)
            own = cast(Tensor, numbers) @ cast(Tensor, query)[:, :, None]
            logits = logits + own[:, :, 0]
        if self.further:
            of_cells = cast(Tensor, scores).gather(1, cast(Tensor, seats).flatten(1).long())
            logits = logits + of_cells.view(*cast(Tensor, seats).shape).sum(dim=2)
        return torch.log_softmax(logits, dim=1)


def _expand_graph(decoder: Decoder, component: int) -> Graph:
    softmax = decoder.head.softmax
    module = _Expand(decoder, component)
    size = softmax.table.shape[component]
    inputs: dict[str, tuple[Any, ...]] = {
        "hidden": ("N", softmax.vectors.dim), "added": ("N", size),
    }  # fmt: skip
    if isinstance(decoder.head.conditioner, Gated):
        inputs["prefix"] = ("N", component, None)
    if module.own:
        own = find_feature(softmax.features, OwnNumbers).numbers.size(1)
        inputs |= {"query": ("N", own), "numbers": ("N", size, own)}
    if module.further:
        further = find_feature(softmax.features, FurtherTables)
        places = len(further.tables) * softmax.table.num_components
        inputs |= {
            "scores": ("N", len(further.output_vectors)), "seats": ("N", size, places, None),
        }  # fmt: skip
    return _graph(module, inputs, ["log_probs"])
