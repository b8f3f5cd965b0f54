"""``lightrnn-export``: a trained language model as a small folder that runs without fairseq."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fairseq_lightrnn.commands.run import command
from fairseq_lightrnn.commands.text import check_texts, read_texts
from fairseq_lightrnn.export.formats import FORMATS, OPSETS, QUANTISATIONS, check_format
from fairseq_lightrnn.export.model import DEFAULT_OPSET, export_model
from fairseq_lightrnn.export.page import find_npm
from fairseq_lightrnn.language_model import LanguageModel
from fairseq_lightrnn.runtime.folder import check_folder

__all__ = ["main"]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lightrnn-export",
        description="Write a trained language model as a small folder that runs without fairseq: "
        "see lightrnn-run.",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint file, or folder with checkpoint_best.pt")
    add("-o", "--output", required=True, metavar="DIR", help="the folder to write")
    add("--data", metavar="DIR", help="folder with dict.txt (default: that of the training, or "
        "what lies beside the checkpoint)")  # fmt: skip
    add("--format", default="onnx", metavar="|".join(FORMATS),
        help="onnx (default), for numpy and onnxruntime alone; torch, programs of torch.export; "
        "web, a page for a browser, onnxruntime-web with it")  # fmt: skip
    add("--quantize", default="none", metavar="|".join(QUANTISATIONS),
        help="how numbers are stored: in single precision (none, default), in half, or in eight or "
        "four bits by onnxruntime's quantisers")  # fmt: skip
    add("--opset", type=int, metavar="N",
        help=f"of ONNX, from {OPSETS.start} to {OPSETS.stop - 1} (default: {DEFAULT_OPSET})"
        )  # fmt: skip
    add("--text", action="append", default=[], metavar="FILE", help="measure the perplexity of "
        "this text, a sentence a line, with the checkpoint and with the export")  # fmt: skip
    return parser.parse_args(arguments)


@command("lightrnn-export", _parse)
def main(args: argparse.Namespace) -> None:
    """Exports a model as the flags ask for."""
    if args.format == "torch" and args.opset is not None:
        raise ValueError(f"--opset {args.opset} is of ONNX, not of --format torch; leave it out")
    opset = DEFAULT_OPSET if args.opset is None else args.opset
    check_format(args.format, args.quantize, opset)
    if args.format == "web":
        find_npm()
    check_folder(args.output)
    check_texts(args.text)
    model = LanguageModel.from_pretrained(args.checkpoint, args.data)
    text = list(read_texts(args.text)) if args.text else []
    if args.text and not text:
        raise ValueError(f"--text {args.text[0]}: is empty; give a text to measure")
    found = export_model(model, args.output, args.format, args.quantize, opset, text)
    size = sum(entry["bytes"] for entry in found["files"].values())
    print(f"{args.output}\t{size / 1e6:.2f} MB")
    for name, value in found["metrics"]["perplexity"].items():
        print(f"perplexity of the {name}\t{value:.6f}\t{found['metrics']['text']}")


if __name__ == "__main__":
    sys.exit(main())
