"""Graphs as bytes of a file: torch's exporters, onnxruntime's quantisers."""

from __future__ import annotations

import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq_lightrnn.export.pieces import Graph
from fairseq_lightrnn.runtime.torch_graphs import OUTPUTS

__all__ = ["FORMATS", "OPSETS", "QUANTISATIONS", "check_format", "graph_files"]

FORMATS = ("onnx", "torch", "web")
QUANTISATIONS = ("none", "fp16", "int8", "int4")
OPSETS = range(14, 21)
"""Of ONNX: from the last change of recurrent layers to the last that torch's exporter knows."""
_NEEDED = ("onnx", "onnxruntime")
# Numbers of four bits that share a scale.
_BLOCK = 64


def check_format(form: str, quantise: str, opset: int) -> None:
    """Refuses what cannot be written.

    Raises:
        ValueError: naming the flag.
    """
    if form not in FORMATS:
        raise ValueError(f"--format {form}: unknown; give one of {', '.join(FORMATS)}")
    if quantise not in QUANTISATIONS:
        raise ValueError(f"--quantize {quantise}: unknown; give one of {', '.join(QUANTISATIONS)}")
    if form == "torch" and quantise in ("int8", "int4"):
        raise ValueError(
            f"--quantize {quantise}: onnxruntime has the quantiser; give --format onnx, or fp16"
        )
    if opset not in OPSETS:
        raise ValueError(f"--opset {opset}: give one from {OPSETS.start} to {OPSETS.stop - 1}")
    missing = [name for name in _NEEDED if form != "torch" and find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format {form} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def graph_files(
    graphs: Mapping[str, Graph], form: str, quantise: str, opset: int
) -> dict[str, bytes]:
    """Returns the contents of graphs' files, by their names; see :func:`check_format`."""
    if form == "torch":
        return {f"{name}.pt2": _torch_file(graph) for name, graph in graphs.items()}
    # The 4-bit quantiser has blocks of rows, and a bias has none.
    eight = {"bias"} if quantise == "int4" else set()
    return {
        f"{name}.onnx": _onnx_file(graph, "int8" if name in eight else quantise, opset)
        for name, graph in graphs.items()
    }


def _onnx_file(graph: Graph, quantise: str, opset: int) -> bytes:
    axes = {name: dict(free) for name, free in graph.free.items()}
    axes |= {name: {0: "N"} for name in graph.outputs}
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter that has an operator for recurrent layers is the older one.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.module,
            (),
            file,  # type: ignore[arg-type]
            kwargs=dict(graph.inputs),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,
            # Folded, numbers of half precision would be stored in single precision.
            do_constant_folding=quantise != "fp16",
        )
    content = file.getvalue()
    return content if quantise in ("none", "fp16") else _quantised(content, quantise)


def _quantised(content: bytes, quantise: str) -> bytes:
    """Stores numbers in eight bits; or matrices in four, and recurrent layers in eight.

    Eight bits are unsigned: signed ones overflow on processors without VNNI.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load_from_string(content)
    kinds = ["MatMul", "Gather", "LSTM"]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        if quantise == "int4":
            by_block = MatMulNBitsQuantizer(
                model, bits=4, block_size=_BLOCK, is_symmetric=True, op_types_to_quantize=kinds[:2]
            )
            by_block.process()
            model, kinds = by_block.model.model, kinds[2:]
        result = Path(folder) / "result.onnx"
        quantize_dynamic(
            model,
            result,
            op_types_to_quantize=kinds,
            per_channel=True,
            weight_type=QuantType.QUInt8,
        )
        return result.read_bytes()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the quantisers' advice from the user, who cannot follow it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with np.errstate(all="ignore"):  # blocks of zeros
            yield
    finally:
        logging.disable(before)


def _torch_file(graph: Graph) -> bytes:
    sizes: dict[str, Any] = {}
    inputs, shapes = dict(graph.inputs), {}
    for name, free in graph.free.items():
        # torch.export has no loop over time: a single step of an LSTM
        one_step = "T" in free.values() and "cell" in graph.inputs
        if one_step:
            inputs[name] = inputs[name][:, :1]
        shapes[name] = {
            axis: sizes.setdefault(size, torch.export.Dim(size))
            for axis, size in free.items()
            if not (one_step and size == "T")
        }
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph.module, (), inputs, dynamic_shapes=shapes)
        torch.export.save(program, file, extra_files={OUTPUTS: json.dumps(graph.outputs)})
    return file.getvalue()
