"""A trained language model as a folder that runs without fairseq."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq_lightrnn.core.conditioning import Recurrent
from fairseq_lightrnn.core.decoder import Decoder
from fairseq_lightrnn.core.features import FurtherTables, find_feature
from fairseq_lightrnn.export.formats import check_format, graph_files
from fairseq_lightrnn.export.graphs import decoder_graphs
from fairseq_lightrnn.export.page import page_files
from fairseq_lightrnn.language_model import LanguageModel
from fairseq_lightrnn.models.lightrnn_transformer import TransformerText
from fairseq_lightrnn.perplexity import perplexity
from fairseq_lightrnn.runtime.cells import code_cells
from fairseq_lightrnn.runtime.folder import WORDS, pack, write_folder
from fairseq_lightrnn.runtime.model import ExportedModel
from fairseq_lightrnn.runtime.vocabulary import front_code
from fairseq_lightrnn.version import __version__

__all__ = ["DEFAULT_OPSET", "describe", "export_model", "pack_words", "table_cells"]

logger = logging.getLogger(__name__)

DEFAULT_OPSET = 17


def export_model(
    model: LanguageModel,
    folder: str | Path,
    form: str = "onnx",
    quantise: str = "none",
    opset: int = DEFAULT_OPSET,
    text: Iterable[str] = (),
) -> dict[str, Any]:
    """Writes a model as a folder that :class:`ExportedModel` reads.

    Args:
        model: an LSTM or a transformer.
        folder: made if it does not exist; an export in it is overwritten.
        form: ``onnx``; ``torch``, programs of torch.export; or ``web``, a page for a browser.
        quantise: ``none``, ``fp16``, ``int8`` or ``int4``: how numbers are stored.
        opset: of ONNX.
        text: sentences; the perplexity of the model and of the export on them is noted.

    Returns:
        What the folder's JSON file says.

    Raises:
        ValueError: if the model or what is asked for cannot be exported.
    """
    check_format(form, quantise, opset)
    decoder: Decoder | TransformerText = model.decoder
    order, shared, rest = front_code(model.dictionary.symbols)
    number_of = np.empty_like(order)
    number_of[order] = np.arange(len(order))
    files = {WORDS: pack_words(decoder, order, shared, rest)}
    graphs = decoder_graphs(decoder, torch.from_numpy(order), quantise == "fp16")
    files |= graph_files(graphs, form, quantise, opset)
    dictionary = model.dictionary
    description: dict[str, Any] = {
        "graphs": "torch" if form == "torch" else "onnx",
        "quantize": quantise,
        "model": {**describe(decoder), "words": len(dictionary)},
        "start": number_of[model.start].tolist(),
        "end": int(number_of[dictionary.eos()]),
        "unknown": int(number_of[dictionary.unk()]),
        "carry_hidden_state": model.carried_hidden_state,
        "signature": {
            "model": model.parameter_digest(),
            "vocabulary": model.vocabulary_digest(),
            "table": model.table_digest(),
            "version": __version__,
        },
    }
    if isinstance(decoder, TransformerText):
        description["padding"] = int(number_of[dictionary.pad()])
    if form != "torch":
        description["opset"] = opset
    exported = ExportedModel.from_parts(description, files)
    description["metrics"] = _metrics(model, exported, list(text))
    return write_folder(folder, files, description, page_files() if form == "web" else {})


def describe(decoder: Decoder | TransformerText) -> dict[str, Any]:
    """Returns what a runner has to know of a network."""
    further = find_feature(decoder.head.softmax.features, FurtherTables)
    description = {
        "composition": "recurrent" if isinstance(decoder.head.conditioner, Recurrent) else "gated",
        "shape": list(decoder.head.table.shape),
        "further_tables": 0 if further is None else len(further.tables),
        "width": decoder.head.softmax.vectors.dim,
    }
    if isinstance(decoder, Decoder):
        network = decoder.network
        return {**description, "layers": network.num_layers, "hidden_size": network.hidden_size}
    transformer = decoder.decoder
    return {
        **description,
        "network": "transformer",
        "layers": transformer.num_layers,
        "embed_dim": transformer.embed_dim,
        "positions": transformer.max_positions(),
    }


def pack_words(
    decoder: Decoder | TransformerText, order: np.ndarray, shared: np.ndarray, rest: np.ndarray
) -> bytes:
    """Returns the file of words: how they are spelt, front-coded, and where they sit."""
    cells = table_cells(decoder, order)
    if "further_cells" in cells:
        read_by = cells.pop("further_input_cells", None)
        size = math.prod(decoder.head.table.shape)
        cells |= code_cells(cells["further_cells"], size, read_by)
    return pack({"shared": shared, "rest": rest, **cells})


def table_cells(decoder: Decoder | TransformerText, order: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the cells of the words, in the order of their numbers, in each table.

    They have the names of :class:`Seating`'s arguments.
    """
    table = decoder.head.table
    cells = {"cells": table.table().cells[order]}
    if decoder.reader.seats is not table:
        cells["input_cells"] = decoder.reader.seats.table().cells[order]
    further = find_feature(decoder.head.softmax.features, FurtherTables)
    if further is not None:
        cells["further_cells"] = np.stack([one.table().cells[order] for one in further.tables])
        read_by = [one.table().cells[order] for one in further.kept_tables]
        if read_by:
            cells["further_input_cells"] = np.stack(read_by)
    return cells


def _metrics(model: LanguageModel, exported: ExportedModel, text: list[str]) -> dict[str, Any]:
    """Compares the export with the model, and so tries it before it is written."""
    carried = model.carried_hidden_state
    sentences = text or _every_word_once(model)
    scores = {
        "checkpoint": model.score(sentences, carry_hidden_state=carried),
        "export": exported.score(sentences, carry_hidden_state=carried),
    }
    words = sum(len(score.tokens) for score in scores["export"])
    perplexities = {
        name: perplexity(sum(score.log_prob for score in of_one), words) or math.nan
        for name, of_one in scores.items()
    }
    logger.info("perplexity of the checkpoint and of the export: %s", perplexities)
    relative = perplexities["export"] / perplexities["checkpoint"] - 1
    return {
        "text": "given" if text else "words of the dictionary",
        "words": words,
        # JSON has no infinity.
        "perplexity": {name: _finite(value) for name, value in perplexities.items()},
        "difference": _finite(relative),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _every_word_once(model: LanguageModel) -> list[str]:
    """Returns the first words of the dictionary, a few a line: something to compare by."""
    symbols = model.dictionary.symbols[model.dictionary.nspecial :][:200]
    return [" ".join(symbols[start : start + 10]) for start in range(0, len(symbols), 10)]
