"""A trained decoder cut into a few graphs, so that no number is in two of them.

What belongs to words stays outside: which word is in which cell. So graphs see places, never words,
and a table can grow without them. ``k`` is the number of a word's components, ``N`` any number of
texts, ``added`` is 0, or -inf where a value leads to no word, and whatever else is to be added.

- ``read``: a step of a word for ``T = 1``, a block of words for more. Reads vectors by their places
  (N, T, P), their sum each time, with the states (N, layers, d) before and after. Of a transformer
  see :mod:`fairseq_lightrnn.export.transformer_graph`.
- ``first``: what the outputs (N, d) say of a word's first component, and what its later ones will
  be predicted with.
- ``expand1`` …: log-probabilities of the values of a later component after prefixes (N, i), for two
  components the columns of the words of given rows.
- ``bias``, ``numbers``: what words have of their own, looked up by word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import _VF, Tensor, nn

from fairseq_lightrnn.core.conditioning import Gated
from fairseq_lightrnn.core.decoder import Decoder
from fairseq_lightrnn.core.features import (
    FurtherTables,
    OwnNumbers,
    WordBias,
    WordFeature,
    find_feature,
)
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.export.pieces import (
    Graph,
    Linear,
    LookUp,
    Stored,
    WordReader,
    feed_forward,
    feed_on,
    make_graph,
    optional,
    read_inputs,
)
from fairseq_lightrnn.export.transformer_graph import transformer_read_graph
from fairseq_lightrnn.models.lightrnn_transformer import TransformerText

__all__ = ["decoder_graphs"]


def decoder_graphs(
    decoder: Decoder | TransformerText, order: Tensor, half: bool = False
) -> dict[str, Graph]:
    """Cuts a decoder into graphs.

    Args:
        decoder: in evaluation mode, without a source text.
        order: the words in the order in which they are to be numbered, integers of shape (V,).
        half: store numbers in half precision; computed is in single precision nevertheless.

    Raises:
        ValueError: if a transformer has a part that no graph is known of.
    """
    dtype = torch.float16 if half else torch.float32
    if isinstance(decoder, TransformerText):
        read = transformer_read_graph(decoder)
    else:
        read = _read_graph(decoder)
    graphs = {"read": read, "first": _first_graph(decoder.head)}
    for component in range(1, decoder.head.table.num_components):
        graphs[f"expand{component}"] = _expand_graph(decoder.head, component)
    for name, values in _words_own(decoder.head.softmax.features).items():
        module = LookUp(values.index_select(0, order))
        graphs[name] = make_graph(module, {"words": ("N", None)}, [name])
    for graph in graphs.values():
        graph.module.requires_grad_(False).to(dtype).eval()
    return graphs


def _words_own(features: Sequence[WordFeature]) -> dict[str, Tensor]:
    """Returns what is stored for every word, (V, …), by name."""
    bias, own = find_feature(features, WordBias), find_feature(features, OwnNumbers)
    result = {} if bias is None else {"bias": bias.bias.data}
    return result if own is None else {**result, "numbers": own.numbers.data}


class _Read(WordReader):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.reader)
        network = decoder.network
        self.layers = network.num_layers
        self.weights = nn.ModuleList(Stored(cast(Tensor, one)) for one in network._flat_weights)
        self.project = optional(Linear.of, network.project)
        self.ffn = feed_forward(decoder.head.conditioner.ffn)

    def forward(
        self, places: Tensor, hidden: Tensor, cell: Tensor, numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self.look_up(places, numbers)
        state = hidden.transpose(0, 1).contiguous(), cell.transpose(0, 1).contiguous()
        weights = [weight() for weight in self.weights]
        outputs, after, cells = _VF.lstm(
            inputs, state, weights, True, self.layers, 0.0, False, False, True
        )
        outputs = outputs if self.project is None else self.project(outputs)
        outputs = feed_on(self.ffn, outputs)
        return outputs, after.transpose(0, 1), cells.transpose(0, 1)


def _read_graph(decoder: Decoder) -> Graph:
    state = ("N", decoder.network.num_layers, decoder.network.hidden_size)
    components = decoder.reader.num_components if decoder.head.conditioner.steps == 1 else 1
    inputs = read_inputs(decoder.reader, components, {"hidden": state, "cell": state})
    return make_graph(_Read(decoder), inputs, ["outputs", "next_hidden", "next_cell"])


class _First(nn.Module):
    """Predicts first components; see :meth:`ComponentSoftmax.logits` and :class:`Gated`."""

    def __init__(self, head: ComponentHead) -> None:
        super().__init__()
        softmax, conditioner = head.softmax, head.conditioner
        self.only = softmax.table.num_components == 1
        self.logits = Linear(*softmax.component(0))
        transforms: Any = conditioner.transforms if isinstance(conditioner, Gated) else []
        self.transforms = nn.ModuleList(Linear.of(one) for one in transforms)
        own = find_feature(softmax.features, OwnNumbers)
        further = find_feature(softmax.features, FurtherTables)
        self.own = None if own is None else Linear.of(own.query)
        # Of a table of one component, where a value is a cell.
        cells = softmax.table.words
        self.of_words = Linear(own.numbers[cells]) if own is not None and self.only else None
        self.further = None
        if further is not None:
            self.further = nn.ModuleList([Linear.of(further.query), Linear(further.output_vectors)])

    def forward(self, outputs: Tensor, added: Tensor) -> tuple[Tensor, ...]:
        logits = self.logits(outputs) + added
        if self.of_words is not None:
            logits = logits + self.of_words(cast(Linear, self.own)(outputs))
        results = [torch.log_softmax(logits, dim=1)]
        if len(self.transforms):
            results.append(torch.stack([one(outputs) for one in self.transforms], dim=1))
        if self.own is not None and not self.only:
            results.append(self.own(outputs))
        if self.further is not None:
            query, vectors = self.further
            results.append(vectors(query(outputs)))
        return tuple(results)


def _first_graph(head: ComponentHead) -> Graph:
    softmax = head.softmax
    module = _First(head)
    outputs = ["log_probs"]
    outputs += ["projections"] if len(module.transforms) else []
    outputs += ["query"] if module.own is not None and not module.only else []
    outputs += ["scores"] if module.further is not None else []
    inputs = {"outputs": ("N", softmax.vectors.dim), "added": ("N", softmax.table.shape[0])}
    return make_graph(module, inputs, outputs)


class _Expand(nn.Module):
    """Predicts a later component; see :meth:`ComponentSoftmax.logits` and :class:`Gated`."""

    def __init__(self, head: ComponentHead, component: int) -> None:
        super().__init__()
        softmax, conditioner = head.softmax, head.conditioner
        self.logits = Linear(*softmax.component(component))
        self.starts: Tensor
        self.gates = None
        if isinstance(conditioner, Gated):
            gates: Any = conditioner.gates[component - 1]
            self.gates = LookUp(gates.weight)
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


def _expand_graph(head: ComponentHead, component: int) -> Graph:
    softmax = head.softmax
    module = _Expand(head, component)
    size = softmax.table.shape[component]
    inputs: dict[str, tuple[Any, ...]] = {
        "hidden": ("N", softmax.vectors.dim), "added": ("N", size),
    }  # fmt: skip
    if isinstance(head.conditioner, Gated):
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
    return make_graph(module, inputs, ["log_probs"])
