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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fairseq import tasks
from omegaconf import OmegaConf

from fairseq_lightrnn import register  # noqa: F401
from fairseq_lightrnn.allocation.gathering import statistics_storage
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.checkpoint import (
    build_model,
    find_checkpoint,
    find_device,
    forget_other_parameters,
    load_state,
    save_state,
)
from fairseq_lightrnn.commands.run import command
from fairseq_lightrnn.core.conditioning import Recurrent
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.files import check_new_folder, check_outputs, whole_file, whole_folder
from fairseq_lightrnn.models.flags import parse_shape, settle, table_shape
from fairseq_lightrnn.models.word_head import WordHead
from fairseq_lightrnn.tasks.flags import REALLOCATION_MEMORY
from fairseq_lightrnn.tasks.reallocator import Reallocator, log_reallocation

__all__ = ["main"]

logger = logging.getLogger(__name__)

_MAX_TOKENS = 8192  # unless a flag says otherwise

Export = Callable[[AllocationStatistics], None]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lightrnn-reallocate",
        description="Re-seat the words of a trained model in its word table, or in a table of "
        "another shape, and write a new checkpoint to go on training from.",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint file, or folder with checkpoint_best.pt")
    add("data", help="folder of binarised data, of the dictionary that the model was trained with")
    add("--output", required=True, metavar="FILE", help="the new checkpoint")
    add("--report", metavar="FILE", help="write what was done here, as JSON")
    add("--split", help="split to gather statistics on (default: train)")
    add("--objective", choices=("true-loss", "row-first", "joint"),
        help="what to minimise: the loss that training minimises (default); or what was measured "
        "before any word moved: the loss of rows, then that of columns within each row, or the "
        "sum of both as in the paper")  # fmt: skip
    add("--table-shape", metavar="RxC",
        help="seat the words in a table of this shape, such as 100x100 or 30x30x30; its vectors "
        "are means of the old ones, so the model must be trained further. For models of the "
        "paper's architectures alone")  # fmt: skip
    add("--table", metavar="FILE",
        help="seat the words as in this word table file, whatever it costs; gathers no statistics"
        )  # fmt: skip
    add("--words", type=int, metavar="N",
        help="seat words by about this many words of text, and measure the new table of true-loss "
        "by others (default: by all, measured by 131,072 of them)")  # fmt: skip
    add("--memory", type=float, metavar="GIB",
        help="GiB that statistics, costs and memories of the text may take, besides some 300 bytes "
        f"a word (default: {REALLOCATION_MEMORY})")  # fmt: skip
    add("--export", metavar="DIR", help="also write the statistics, the table and the output "
        "vectors to this new folder, for scripts/benchmark_allocation.py --instances")  # fmt: skip
    add("--max-tokens", type=int, metavar="N",
        help=f"words of a batch (default: {_MAX_TOKENS}); models trained with --carry-hidden-state "
        "keep their lanes")  # fmt: skip
    add("--device", default="cpu", help="where to compute: cpu (default), cuda, …")
    return parser.parse_intermixed_args(arguments)


@command("lightrnn-reallocate", _parse)
def main(args: argparse.Namespace) -> None:
    """Re-seats the words of a model as the flags ask for."""
    device = find_device(args.device)
    _check(args)
    state, task = _load(args)
    _forget_same_shape(args, state, task)
    kept = _keep_input_table(args, state, task)
    model = build_model(task, state, args.checkpoint)
    model.to(device)
    if args.table:
        report = _seat(args, task, model.decoder.words)
    else:
        shape = _new_shape(args, model.decoder.words)
        _check_memory(task.args.reallocation_memory, model.decoder.words)
        task.load_dataset(task.args.train_subset)
        if shape is None:
            report = _move(args, task, model)
        else:
            model, report = _reshape(args, state, task, model, shape)
    state["model"] = model.state_dict()
    save_state(state, args.output)
    logger.info(f"wrote {args.output}: {model.decoder.words.table.table()}")
    if args.report:
        with whole_file(args.report) as file:
            print(json.dumps(report, indent=2), file=file)
    if kept:
        logger.info("words are read as they sat before; to go on, add --keep-input-table")
    if "new_shape" in report:
        logger.info(
            f"go on with fairseq-train … --restore-file {args.output} --reset-optimizer "
            f"--table-shape {state['cfg'].model.table_shape}"
        )


def _check(args: argparse.Namespace) -> None:
    args.checkpoint = str(find_checkpoint(args.checkpoint))
    check_outputs({"--output": args.output, "--report": args.report}, [args.checkpoint, args.table])
    if args.export:
        check_new_folder(args.export, "--export")
    for flag in ("words", "memory", "max_tokens"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{flag.replace('_', '-')} {value}: must be above 0")
    for other in (
        "table_shape", "export", "words", "objective", "split", "memory", "max_tokens",
    ):  # fmt: skip
        if args.table and getattr(args, other) is not None:
            raise ValueError(f"--table and --{other.replace('_', '-')}: give one of them")


def _load(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Loads the checkpoint and sets up its task for the flags."""
    overrides = {
        "data": args.data,
        "train_subset": args.split or "train",
        "reallocation_objective": args.objective or "true-loss",
        "reallocation_words": args.words,
        "reallocation_memory": args.memory or REALLOCATION_MEMORY,
        "initial_table": "random",
        "reallocate_epochs": None,
        "max_tokens": args.max_tokens or _MAX_TOKENS,
        "batch_size": None,
        "path": args.checkpoint,
        "restore_file": os.path.abspath(args.checkpoint),
        "log_format": "simple",
    }
    state = load_state(args.checkpoint)
    if not any(name.endswith(".coordinates") for name in state["model"]):
        raise ValueError(f"{args.checkpoint}: the model has no word table")
    if state["cfg"].task.get("carry_hidden_state"):  # its lanes are those of the training
        if args.max_tokens:
            raise ValueError(
                f"--max-tokens {args.max_tokens}: the model carries its hidden state, so its text "
                "is read in the lanes of its training; leave the flag out"
            )
        overrides.update(max_tokens=None, batch_size=state["cfg"].dataset.batch_size)
    settings = OmegaConf.create(OmegaConf.to_container(state["cfg"].task))
    settings.update(overrides)
    if "table_text" in settings:  # of a table that is not made here
        settings.table_text = "target"
    return state, tasks.setup_task(settings)


def _keep_input_table(args: argparse.Namespace, state: dict[str, Any], task: Any) -> bool:
    """Lets a model read words by its present table from now on, where that is for the better.

    Returns:
        Whether it did not do so before.
    """
    if args.table or args.table_shape or task.args.reallocation_objective != "true-loss":
        return False
    cfg = state["cfg"].model
    before = cfg.get("keep_input_table", False)
    if any(name.endswith("softmax.vectors.weight") for name in state["model"]):
        settle(cfg, len(task.target_dictionary), moving=True)
    return bool(cfg.get("keep_input_table", False)) and not before


def _forget_same_shape(args: argparse.Namespace, state: dict[str, Any], task: Any) -> None:
    """Takes a --table-shape that the table has already for none: words move as without it."""
    num_words = len(task.target_dictionary)
    now = table_shape(state["cfg"].model, num_words)
    if args.table_shape and parse_shape(args.table_shape, num_words) == now:
        logger.info(f"--table-shape {args.table_shape}: the table has this shape, words move in it")
        args.table_shape = None


def _move(args: argparse.Namespace, task: Any, model: Any) -> dict[str, Any]:
    """Moves the words in their table as training does."""
    words: WordHead = model.decoder.words
    if words.table.num_components == 1:
        raise ValueError(
            f"{args.checkpoint}: every word has vectors of its own, there is nothing to move"
        )
    report = Reallocator(task).move_words(
        model, "reallocation", tempfile.gettempdir(), _exporter(args, words)
    )
    assert report is not None  # there is but one worker
    words.round.add_(1)
    log_reallocation("reallocation", report, words.table.table())
    return report


def _seat(args: argparse.Namespace, task: Any, words: WordHead) -> dict[str, Any]:
    """Seats the words as in a file."""
    old = words.table.table()
    try:
        table = WordTable.load(args.table, task.target_dictionary.symbols)
    except ValueError as error:
        raise ValueError(f"--table {error}") from None
    if table.shape != old.shape:
        shapes = ("x".join(map(str, shape)) for shape in (table.shape, old.shape))
        raise ValueError("--table {}: its shape is {}, the model's {}".format(args.table, *shapes))
    words.table.seat(table)
    words.round.add_(1)
    moved = int((table.cells != old.cells).sum())
    return {"moved": moved, "words": table.num_words, "table": table.digest()}


def _check_memory(memory: float, words: WordHead) -> None:
    """Refuses a memory in which not even counts have room."""
    size = words.table.num_words, words.table.num_components, words.head.softmax.vectors.dim
    try:
        with statistics_storage(memory, size, tempfile.gettempdir()):
            pass
    except ValueError as error:
        raise ValueError(f"--memory {memory}: {error}") from None


def _new_shape(args: argparse.Namespace, words: WordHead) -> tuple[int, ...] | None:
    """Returns the shape of --table-shape, or None."""
    if args.table_shape is None:
        return None
    shape = parse_shape(args.table_shape, words.table.num_words)
    if args.objective is not None:
        raise ValueError(
            f"--objective {args.objective}: words are seated in a new shape by what their rows and "
            "columns would predict of their states; leave it out, or --table-shape"
        )
    if words.further_tables:
        raise ValueError(
            f"--table-shape {args.table_shape}: the model has further tables of shape "
            f"{'x'.join(map(str, words.table.shape))}, which are not made anew; leave it out"
        )
    if not isinstance(words.head.conditioner, Recurrent):
        raise ValueError(
            f"--table-shape {args.table_shape}: gates of another shape cannot be made from those "
            "of this model; train a new one with --table-shape, or one of the paper's "
            "architectures, which have no gates"
        )
    return shape


def _reshape(
    args: argparse.Namespace,
    state: dict[str, Any],
    task: Any,
    model: Any,
    shape: tuple[int, ...],
) -> tuple[Any, dict[str, Any]]:
    """Seats the words in another shape and makes its vectors from the old ones."""
    from fairseq_lightrnn.allocation.reshaping import table_of_statistics

    started = time.monotonic()
    words: WordHead = model.decoder.words
    with Reallocator(task).gathered(model, tempfile.gettempdir()) as (statistics, _):
        export = _exporter(args, words)
        if export is not None:
            export(statistics)
        begun = time.monotonic()
        table = table_of_statistics(statistics, shape)
        counts = statistics.counts.cpu().numpy()
    state["cfg"].model.table_shape = "x".join(map(str, shape))
    new = task.build_model(state["cfg"].model, from_checkpoint=True).to(args.device)
    _inherit(new, model, table, counts, f"--table-shape {args.table_shape}")
    forget_other_parameters(state)
    report = {
        "old_shape": list(words.table.shape),
        "new_shape": list(shape),
        "words": table.num_words,
        "tokens": int(counts.sum()),
        "table": table.digest(),
        "seconds": {
            "statistics": begun - started,
            "solve": time.monotonic() - begun,
            "total": time.monotonic() - started,
        },
    }
    return new, report


@torch.no_grad()
def _inherit(new: Any, old: Any, table: WordTable, counts: np.ndarray, flag: str) -> None:
    """Gives a model all that another one of another shape has learnt.

    Args:
        new: gets the vectors and biases of the new rows and columns as means of the old ones, and
            everything else as it is.
        old: the model that it inherits from.
        table: seats the words of the new one.
        counts: occurrences of the words, (V,).
        flag: for errors.
    """
    from fairseq_lightrnn.allocation.reshaping import reshape_biases, reshape_vectors

    ours, theirs = new.decoder.words, old.decoder.words
    before = theirs.table.table()
    vectors, softmax = ours.reader.vectors.weight, ours.head.softmax
    pairs = [
        (vectors, theirs.reader.vectors.weight, reshape_vectors),
        (softmax.bias, theirs.head.softmax.bias, reshape_biases),
    ]
    if softmax.vectors.weight is not vectors:
        pairs.append((softmax.vectors.weight, theirs.head.softmax.vectors.weight, reshape_vectors))
    made = {id(target) for target, _, _ in pairs} | {id(ours.table.coordinates)}
    names = [name for name, value in _state(new).items() if id(value) not in made]
    learnt = old.state_dict()
    try:
        new.load_state_dict({name: learnt[name] for name in names}, strict=False)
    except (KeyError, RuntimeError):
        raise ValueError(
            f"{flag}: the model has a table of the source's words, which is not made anew; leave "
            "the flag out"
        ) from None
    for target, values, reshape in pairs:
        target.copy_(reshape(values.cpu(), before, table, counts))
    ours.table.seat(table)


def _state(model: Any) -> dict[str, torch.Tensor]:
    """Returns a model's parameters and buffers themselves, under the names of its checkpoints."""
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    return state


def _exporter(args: argparse.Namespace, words: WordHead) -> Export | None:
    """Returns what writes all that a reallocation is computed from, if it is wanted."""
    if not args.export:
        return None

    def export(statistics: AllocationStatistics) -> None:
        table = words.table.table()
        outputs: dict[str, Any] = {}
        for component in range(table.num_components):
            vectors, biases = words.head.softmax.component(component)
            outputs[f"vectors{component}"] = vectors.detach().cpu().numpy()
            outputs[f"biases{component}"] = biases.detach().cpu().numpy()
        counts = statistics.counts.numpy()
        rest = dict(cells=table.cells, shape=table.shape, counts=counts, **outputs)
        with whole_folder(args.export) as folder:
            np.save(folder / "sums.npy", statistics.sums.float().numpy())
            np.savez(folder / "rest.npz", **rest)

    return export


if __name__ == "__main__":
    raise SystemExit(main())
