"""Random models, exported without a checkpoint."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from tiny_models import CONDITIONERS, HIDDEN, TABLES, build
from torch import nn

from fairseq_lightrnn.core.conditioning import Recurrent
from fairseq_lightrnn.export.formats import graph_files
from fairseq_lightrnn.export.graphs import decoder_graphs
from fairseq_lightrnn.export.model import table_cells
from fairseq_lightrnn.runtime.network import Network, OnnxGraphs, Seating
from fairseq_lightrnn.runtime.torch_graphs import TorchGraphs

LAYERS = 2
CASES = [
    (kind, words, shape, extras)
    for kind in CONDITIONERS
    for words, shape in TABLES
    for extras in (True, False)
]


class Exported(NamedTuple):
    """A decoder and what it was exported as.

    Attributes:
        decoder: in single precision.
        network: runs the export.
        number: of each of the decoder's words in the export.
        order: the decoder's word of each number.
        files: of the graphs, by name.
    """

    decoder: Any
    network: Network
    number: np.ndarray
    order: np.ndarray
    files: dict[str, bytes]


def export(
    kind: Any,
    words: int,
    shape: tuple[int, ...],
    extras: bool = True,
    form: str = "onnx",
    quantise: str = "none",
    scale: float = 1.0,
) -> Exported:
    """Exports a random model; its words are numbered in another order."""
    decoder = build(kind, words, shape, scale=scale, extras=extras).float()
    if len(shape) == 1:  # every word has vectors of its own: further tables are refused there
        for part in (decoder.reader, decoder.head.softmax):
            part.features = nn.ModuleList(list(part.features)[:2])
    order = np.random.default_rng(words).permutation(words)
    graphs = decoder_graphs(decoder, torch.from_numpy(order), quantise == "fp16")
    files = graph_files(graphs, form, quantise, 17)
    cells = table_cells(decoder, order)
    seating = Seating(shape, cells["cells"], cells.get("input_cells"), cells.get("further_cells"))
    graphs_of = TorchGraphs(files) if form == "torch" else OnnxGraphs(files, 1)
    composition = "recurrent" if kind is Recurrent else "gated"
    network = Network(graphs_of, seating, composition, LAYERS, HIDDEN)
    return Exported(decoder, network, np.argsort(order), order, files)
