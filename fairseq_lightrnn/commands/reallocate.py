"""``lightrnn-reallocate``: re-seats the words of a trained model, outside of training.

For one more round, another objective, another shape or number of components, or a table of the
user's own. Writes a new checkpoint, from which fairseq-train goes on. See
``lightrnn-reallocate --help``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, tasks
from omegaconf import OmegaConf

from fairseq_lightrnn import register  # noqa: F401
from fairseq_lightrnn.allocation.reshaping import (
    reshape_biases,
    reshape_vectors,
    table_of_statistics,
)
from fairseq_lightrnn.commands._text import whole_file
from fairseq_lightrnn.errors import UsageError, usage_errors
from fairseq_lightrnn.models._table import parse_shape
from fairseq_lightrnn.tasks._reallocation import log_reallocation
from fairseq_lightrnn.tasks._statistics import Gathered, gather_statistics, statistics_storage
from fairseq_lightrnn.word_table import WordTable, check_shape

__all__ = ["main"]

logger = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightrnn-reallocate",
        description="Re-seat the words of a trained model in its word table, or in a table of "
        "another shape, and write a new checkpoint to go on training from.",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint of fairseq-train")
    add("data", help="folder of binarised data, of the dictionary that the model was trained with")
    add("--output", required=True, metavar="FILE", help="the new checkpoint")
    add("--report", metavar="FILE", help="write what was done here, as JSON")
    add("--split", default="train", help="split to gather statistics on (default: train)")
    add("--objective", choices=("row-first", "joint"), default="row-first",
        help="what to minimise: the loss of rows, then that of columns within each row (default), "
        "or the sum of both")  # fmt: skip
    add("--row-weight", type=float, default=1.0, metavar="X",
        help="weight of the rows' loss in --objective joint (default: 1)")  # fmt: skip
    add("--margin", type=float, default=0.0, metavar="X",
        help="nats that a word must gain, each time it occurs, to change its row, and again its "
        "column (default: 0)")  # fmt: skip
    add("--regather", action="store_true",
        help="gather statistics again before words choose columns in their new rows; takes twice "
        "as long, and pays for models trained with --keep-input-table")  # fmt: skip
    add("--table-shape", metavar="RxC",
        help="seat the words in a table of this shape, such as 100x100 or 30x30x30; its vectors "
        "are means of the old ones, so the model must be trained further")  # fmt: skip
    add(
        "--table",
        metavar="FILE",
        help="seat the words as in this word table file, whatever it costs; gathers no statistics",
    )
    add("--words", type=int, metavar="N",
        help="gather statistics over about this many words (default: all)")  # fmt: skip
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="GiB that statistics and costs may take, besides some 300 bytes a word",
    )
    add("--export", metavar="DIR", help="also write the statistics, the table and the output "
        "vectors to this new folder, for scripts/benchmark_allocation.py --instances")  # fmt: skip
    add("--max-tokens", type=int, default=8192, metavar="N",
        help="words of a batch (default: %(default)s); no result depends on it, and models trained "
        "with --carry-hidden-state keep their lanes")  # fmt: skip
    add("--device", default="cpu", help="where to compute: cpu (default), cuda, …")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Raises:
        UsageError: for mistakes in flags and files (on a command line: one sentence, status 1).
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parser().parse_args(arguments)
    if not Path(args.output).absolute().parent.is_dir():
        raise UsageError(f"--output {args.output}: there is no such folder to write into")
    if args.export and Path(args.export).exists():
        raise UsageError(f"--export {args.export}: exists already; give a new folder")
    for other in ("table_shape", "export"):
        if args.table and getattr(args, other):
            raise UsageError(f"--table and --{other.replace('_', '-')}: give one of them")
    for flag in ("margin", "regather"):
        if getattr(args, flag) and (args.table or args.table_shape):
            raise UsageError(
                f"--{flag}: --table and --table-shape seat all words anew; leave it out"
            )
    if args.regather:
        _check_regather(args)
    if not 0 <= args.margin < float("inf"):
        raise UsageError(f"--margin {args.margin}: must not be negative")
    started = time.monotonic()
    state, task = _load(args)
    model = task.build_model(state["cfg"].model, from_checkpoint=True)
    model.load_state_dict(state["model"], strict=True)
    model.to(args.device)
    decoder: Any = model.decoder
    if args.table:
        _finish(args, state, *_seat(args, state, task, decoder))
        return 0
    shape = _new_shape(args, state, decoder)
    task.load_dataset(args.split)
    folder = tempfile.gettempdir()

    def export(gathered: Gathered) -> None:
        if args.export:
            _export(Path(args.export), decoder, gathered)

    if shape is None:
        report, solving = task.move_words("reallocation", model, folder, export)
        table = _put_into_force(state, decoder.table.table())
    else:
        size = decoder.table.num_words, *decoder.statistics_shape()
        with statistics_storage(args.memory, size, folder) as storage:
            gathered = gather_statistics(model, task.training_batches(), storage.arguments)
            export(gathered)
            begun = time.monotonic()
            report, table = _reshape(state, decoder, gathered, shape)
            solving = time.monotonic() - begun
    total = time.monotonic() - started
    report["seconds"] = {"statistics": total - solving, "solve": solving, "total": total}
    if shape is None:
        log_reallocation("reallocation", report, table)
    _finish(args, state, report, table)
    if shape is not None:
        logger.info(
            f"go on with fairseq-train … --restore-file {args.output} --reset-optimizer "
            f"--num-components {len(shape)} --table-shape {'x'.join(map(str, shape))}"
        )
    return 0


def _check_regather(args: argparse.Namespace) -> None:
    """Refuses --regather beside flags of a reallocation that it has no meaning with."""
    if args.objective == "joint":
        raise UsageError(
            "--regather belongs to --objective row-first; joint chooses rows and columns at once"
        )
    if args.margin:
        raise UsageError("--margin and --regather: give one of them")


def _finish(
    args: argparse.Namespace, state: dict[str, Any], report: dict[str, Any], table: WordTable
) -> None:
    """Writes the checkpoint, then the report."""
    _save(state, args.output)
    logger.info(f"wrote {args.output}: {table}")
    if args.report:
        with whole_file(args.report) as file:
            print(json.dumps(report, indent=2), file=file)


def _load(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Loads the checkpoint and sets up its task for the flags."""
    if not os.path.isfile(args.checkpoint):
        raise UsageError(f"{args.checkpoint}: no such checkpoint")
    overrides = {
        "data": args.data,
        "train_subset": args.split,
        "reallocation_objective": args.objective,
        "reallocation_row_weight": args.row_weight,
        "reallocation_margin": args.margin,
        "reallocation_regather": args.regather,
        "reallocation_words": args.words,
        "reallocation_memory": args.memory,
        "initial_table": "random",
        "reallocate_epochs": None,
        "reallocate_interval": None,
        "max_tokens": args.max_tokens,
        "batch_size": None,
        "path": args.checkpoint,
        "log_format": "simple",
    }
    state = checkpoint_utils.load_checkpoint_to_cpu(args.checkpoint)
    if "decoder.table.coordinates" not in state["model"]:
        raise UsageError(f"{args.checkpoint}: the model has no word table")
    if state["cfg"].task.get("carry_hidden_state"):  # its lanes are those of the training
        overrides.update(max_tokens=None, batch_size=state["cfg"].dataset.batch_size)
    settings = OmegaConf.create(OmegaConf.to_container(state["cfg"].task))
    settings.update(overrides)
    if "table_text" in settings:  # of a table that is not made here
        settings.table_text = "target"
    return state, tasks.setup_task(settings)


def _new_shape(
    args: argparse.Namespace, state: dict[str, Any], decoder: Any
) -> tuple[int, ...] | None:
    """Returns the shape of --table-shape if it is another one, or None."""
    if args.table_shape is None:
        return None
    with usage_errors(f"--table-shape {args.table_shape}"):
        shape = check_shape(parse_shape(args.table_shape), decoder.table.num_words)
    if shape == decoder.table.shape:
        return None
    if decoder.further is not None:
        raise UsageError(
            f"--table-shape {args.table_shape}: the model has further tables of shape "
            f"{'x'.join(map(str, decoder.table.shape))}, which are not made anew; leave it out"
        )
    if str(getattr(state["cfg"].model, "composition", "gated")) != "recurrent":
        raise UsageError(
            f"--table-shape {args.table_shape}: gates of another shape cannot be made from those "
            "of this model; train one with --initial-table and the table of --composition recurrent"
        )
    return shape


def _put_into_force(state: dict[str, Any], table: WordTable) -> WordTable:
    """Makes a table that of the checkpoint."""
    weights = state["model"]
    weights["decoder.table.coordinates"] = _coordinates(table)
    weights["decoder.reallocation_round"] = weights["decoder.reallocation_round"] + 1
    return table


def _seat(
    args: argparse.Namespace, state: dict[str, Any], task: Any, decoder: Any
) -> tuple[dict[str, Any], WordTable]:
    """Seats the words as in a file."""
    old = decoder.table.table()
    with usage_errors("--table"):
        table = WordTable.load(args.table, task.target_dictionary.symbols)
    if table.shape != old.shape:
        shapes = ("x".join(map(str, shape)) for shape in (table.shape, old.shape))
        raise UsageError("--table {}: its shape is {}, the model's {}".format(args.table, *shapes))
    moved = int((table.cells != old.cells).sum())
    report = {"moved": moved, "words": table.num_words, "table": table.digest()}
    return report, _put_into_force(state, table)


def _reshape(
    state: dict[str, Any], decoder: Any, gathered: Gathered, shape: tuple[int, ...]
) -> tuple[dict[str, Any], WordTable]:
    """Seats the words in another shape and makes its vectors from the old ones."""
    old = decoder.table.table()
    table = table_of_statistics(gathered.statistics, shape)
    counts = gathered.statistics.counts.cpu().numpy()
    weights = state["model"]
    for name in ("decoder.composition.embedding.weight", "decoder.softmax.weight"):
        weights[name] = reshape_vectors(weights[name], old, table, counts)
    weights["decoder.softmax.bias"] = reshape_biases(
        weights["decoder.softmax.bias"], old, table, counts
    )
    weights["decoder.table.coordinates"] = _coordinates(table)
    state["cfg"].model.table_shape = "x".join(map(str, shape))
    state["cfg"].model.num_components = len(shape)
    state["last_optimizer_state"] = None  # its moments belong to vectors that are gone
    report = {
        "old_shape": list(old.shape),
        "new_shape": list(shape),
        "words": table.num_words,
        "tokens": gathered.tokens,
        "loss_before": float(gathered.losses.sum()) / gathered.tokens,
        "table": table.digest(),
    }
    return report, table


def _export(folder: Path, decoder: Any, gathered: Gathered) -> None:
    """Writes what a reallocation is computed from."""
    folder.mkdir(parents=True)
    np.save(folder / "sums.npy", gathered.statistics.sums.float().numpy())
    table = decoder.table.table()
    outputs: dict[str, Any] = {}
    for component in range(table.num_components):
        vectors, biases = decoder.softmax.vectors(component)
        outputs[f"vectors{component}"] = vectors.detach().cpu().numpy()
        outputs[f"biases{component}"] = biases.detach().cpu().numpy()
    counts = gathered.statistics.counts.numpy()
    np.savez(folder / "rest.npz", cells=table.cells, shape=table.shape, counts=counts, **outputs)


def _coordinates(table: WordTable) -> torch.Tensor:
    return torch.from_numpy(table.coordinates.astype("int32"))


def _save(state: dict[str, Any], path: str) -> None:
    """Writes a checkpoint as fairseq does; it appears whole or not at all."""
    state["cfg"] = OmegaConf.to_container(state["cfg"], resolve=True, enum_to_str=True)
    checkpoint_utils.torch_persistent_save(state, path)
