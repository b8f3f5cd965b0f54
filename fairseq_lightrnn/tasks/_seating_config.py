"""Flags of the word table that all tasks have, and which values they refuse."""

# ruff: noqa: UP045  (fairseq reads flags from Optional[...], not from X | None)

import os
import zipfile
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.tasks._schedule import reallocation_epochs

__all__ = ["SeatingConfig", "check_checkpoints", "check_seating"]


@dataclass
class SeatingConfig(FairseqDataclass):
    initial_table: str = field(
        default="cooccurrence",
        metadata={
            "help": "how words are seated before training: random, frequency (frequent words "
            "share rows), cooccurrence (words used alike share rows and columns), or a word "
            "table file that this plugin wrote"
        },
    )
    table_seed: int = field(default=1, metadata={"help": "seed of the tables that are made"})
    reallocate_epochs: Optional[str] = field(
        default=None,
        metadata={
            "help": "re-seat the words after these epochs, such as 3,6 (default: the table stays)"
        },
    )
    reallocate_interval: Optional[int] = field(
        default=None,
        metadata={"help": "re-seat the words after every N epochs, but not after the last"},
    )
    reallocation_objective: ChoiceEnum(["row-first", "joint"]) = field(  # type: ignore[valid-type]
        default="row-first",
        metadata={
            "help": "what a reallocation minimises: the loss of rows, then that of columns within "
            "each row (row-first), or the sum of both as in the paper (joint)"
        },
    )
    reallocation_row_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the rows' loss in the joint objective; the larger, the nearer to "
            "row-first"
        },
    )
    reallocation_margin: float = field(
        default=0.0,
        metadata={
            "help": "nats that a word must gain, each time it occurs, to change its row (and again "
            "its column): the larger, the fewer words move; not with --reallocation-regather"
        },
    )
    reallocation_regather: bool = field(
        default=False,
        metadata={
            "help": "gather statistics again once words have their new rows, before they choose "
            "columns there (row-first only); one more pass over the text for each further component"
        },
    )
    reallocation_words: Optional[int] = field(
        default=None,
        metadata={
            "help": "gather statistics over about this many words, spread evenly over the "
            "training split (default: all)"
        },
    )
    reallocation_memory: Optional[float] = field(
        default=None,
        metadata={
            "help": "GiB that a reallocation's statistics and costs may take, besides some 300 "
            "bytes a word; statistics that do not fit go to a file in the save directory while "
            "they are needed, costs are formed anew (default: 8 for costs, no bound for the rest)"
        },
    )
    max_epoch: int = II("optimization.max_epoch")
    max_tokens: Optional[int] = II("dataset.max_tokens")
    batch_size: Optional[int] = II("dataset.batch_size")
    seed: int = II("common.seed")
    train_subset: str = II("dataset.train_subset")
    num_workers: int = II("dataset.num_workers")
    save_dir: str = II("checkpoint.save_dir")
    restore_file: str = II("checkpoint.restore_file")
    path: Optional[str] = II("common_eval.path")
    no_save: bool = II("checkpoint.no_save")
    log_format: Optional[str] = II("common.log_format")
    log_interval: int = II("common.log_interval")


def check_seating(args: Any) -> None:
    """Refuses flags of reallocation that have no meaning."""
    reallocation_epochs(args.reallocate_epochs, args.reallocate_interval, args.max_epoch)
    for name in ("reallocation_row_weight", "reallocation_words", "reallocation_memory"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if args.reallocation_row_weight != 1 and str(args.reallocation_objective) != "joint":
        raise UsageError(
            f"--reallocation-row-weight {args.reallocation_row_weight} belongs to "
            "--reallocation-objective joint; row-first heeds rows alone"
        )
    if not 0 <= args.reallocation_margin < float("inf"):
        raise UsageError(f"--reallocation-margin {args.reallocation_margin}: must not be negative")
    if args.reallocation_regather and str(args.reallocation_objective) == "joint":
        raise UsageError(
            "--reallocation-regather belongs to --reallocation-objective row-first; joint chooses "
            "rows and columns at once"
        )
    if args.reallocation_regather and args.reallocation_margin:
        raise UsageError(
            "--reallocation-margin and --reallocation-regather: give one of them; columns chosen "
            "anew have no place to stay"
        )


def check_checkpoints(*paths: str) -> None:
    """Refuses checkpoints that were cut short, which torch reports without their name."""
    for path in paths:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                is_zip = file.read(2) == b"PK"
            if os.path.getsize(path) == 0 or (is_zip and not zipfile.is_zipfile(path)):
                raise UsageError(
                    f"{path}: the checkpoint is truncated; remove it, or go on from another one "
                    "with --restore-file"
                )
