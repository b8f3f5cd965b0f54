"""Random models, exported without a checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tiny_models import KINDS, PAD, TABLES, build, single_precision
from torch import nn

from fairseq_lightrnn.core.decoder import Decoder
from fairseq_lightrnn.export.formats import graph_files
from fairseq_lightrnn.export.graphs import decoder_graphs
from fairseq_lightrnn.export.model import describe, pack_words, table_cells
from fairseq_lightrnn.runtime.folder import WORDS, write_folder
from fairseq_lightrnn.runtime.memory import memory_of
from fairseq_lightrnn.runtime.model import ExportedModel
from fairseq_lightrnn.runtime.network import Network, OnnxGraphs
from fairseq_lightrnn.runtime.seating import Seating
from fairseq_lightrnn.runtime.torch_graphs import TorchGraphs
from fairseq_lightrnn.runtime.vocabulary import Vocabulary, front_code

CASES = [
    (kind, words, shape, extras)
    for kind in KINDS
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
    """Exports a random model, or one that is given; its words are numbered in another order."""
    decoder = kind
    if kind in KINDS:
        decoder = single_precision(build(kind, words, shape, scale=scale, extras=extras))
    # Every word has vectors of its own: further tables are refused there.
    if len(shape) == 1 and isinstance(decoder, Decoder):
        for part in (decoder.reader, decoder.head.softmax):
            part.features = nn.ModuleList(list(part.features)[:2])
    order = np.random.default_rng(words).permutation(words)
    order = np.append(order[order != PAD], PAD)  # texts begin with the first, never with padding
    graphs = decoder_graphs(decoder, torch.from_numpy(order), quantise == "fp16")
    files = graph_files(graphs, form, quantise, 17)
    seating = Seating(shape, **table_cells(decoder, order))
    graphs_of = TorchGraphs(files) if form == "torch" else OnnxGraphs(files, 1)
    number, says = np.argsort(order), describe(decoder)
    memory = memory_of({"model": says, "padding": int(number[PAD])})
    network = Network(graphs_of, seating, says["composition"], memory, says["width"])
    return Exported(decoder, network, number, order, files)


def text_model(found: Exported, carried: bool = False) -> ExportedModel:
    """An exported model as it is read from a folder; its words are w000 (the end), w001, …"""
    return ExportedModel(description(found, carried), vocabulary(len(found.order)), found.network)


def description(found: Exported, carried: bool = False) -> dict[str, Any]:
    """What the JSON file of an exported model says of it."""
    return {
        "graphs": "onnx", "quantize": "none", "carry_hidden_state": carried, "start": [0],
        "end": 0, "unknown": 1, "padding": int(found.number[PAD]), "signature": {"model": "tiny"},
        "model": {**describe(found.decoder), "words": len(found.order)},
        "files": {"read.onnx": {"sha256": hashlib.sha256(found.files["read.onnx"]).hexdigest()}},
    }  # fmt: skip


def vocabulary(words: int) -> Vocabulary:
    """Names for so many words, in their order."""
    _, shared, rest = front_code([f"w{number:03}" for number in range(words)])
    return Vocabulary(shared, rest)


def write(found: Exported, folder: Path) -> None:
    """Writes an export as ``lightrnn-export`` does."""
    _, shared, rest = front_code([f"w{number:03}" for number in range(len(found.order))])
    packed = pack_words(found.decoder, found.order, shared, rest)
    write_folder(folder, {**found.files, WORDS: packed}, description(found))
