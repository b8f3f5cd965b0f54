"""What every LightRNN task shares: seating words in the table, at first and between epochs."""

# ruff: noqa: UP045  (fairseq reads flags from Optional[...], not from X | None)

import itertools
import json
import logging
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import progress_bar
from fairseq.utils import resolve_max_positions
from omegaconf import II
from torch import nn

from fairseq_lightrnn.allocation.initial_table import INITIAL_TABLES, initial_table
from fairseq_lightrnn.allocation.reallocation import Reallocation, reallocate
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.errors import UsageError, usage_errors
from fairseq_lightrnn.tasks._generator import TopWordsGenerator
from fairseq_lightrnn.tasks._reallocation import (
    broadcast_table,
    log_reallocation,
    move_input_vectors,
    reallocation_report,
)
from fairseq_lightrnn.tasks._schedule import reallocation_epochs
from fairseq_lightrnn.tasks._statistics import (
    gather_statistics,
    rank,
    sample_share,
    statistics_storage,
    world_size,
)
from fairseq_lightrnn.word_table import WordTable

__all__ = ["SeatingConfig", "SeatingMixin", "check_initial_table"]

logger = logging.getLogger(__name__)

CRITERION = "two_component_cross_entropy"


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
    table_seed: int = field(default=1, metadata={"help": "seed of the initial table"})
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
            "its column): the larger, the fewer words move"
        },
    )
    reallocation_regather: bool = field(
        default=False,
        metadata={
            "help": "gather statistics again once words have their new rows, before they choose "
            "columns there (row-first only); one more pass over the text for each further component"
        },
    )
    reallocation_mean_inputs: bool = field(
        default=False,
        metadata={
            "help": "give each row and column the mean of the input vectors that its new words "
            "had, so that words which moved are read much as before"
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
    fp16: bool = II("common.fp16")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")
    train_subset: str = II("dataset.train_subset")
    num_workers: int = II("dataset.num_workers")
    save_dir: str = II("checkpoint.save_dir")
    restore_file: str = II("checkpoint.restore_file")
    path: Optional[str] = II("common_eval.path")
    no_save: bool = II("checkpoint.no_save")
    log_format: Optional[str] = II("common.log_format")
    log_interval: int = II("common.log_interval")


class SeatingMixin:
    """Adds a word table and its reallocation to a fairseq task.

    Mix in before the task. ``self.args`` must be a :class:`SeatingConfig` with the task's own
    fields, and :meth:`training_text` must be defined.

    Attributes:
        architectures: the models that the task can train.
        stock_task: fairseq's task without a word table.
    """

    architectures: tuple[str, ...]
    stock_task: str
    args: Any
    datasets: dict[str, Any]
    in_order = False  # whether batches go on where the one before stopped
    _given_table: WordTable | None = None
    _started: float | None = None
    _reallocation_seconds = 0.0

    def training_text(self) -> Iterable[np.ndarray]:
        """Yields the words to be predicted as arrays of consecutive text."""
        raise NotImplementedError

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> Any:
        """Sets the task up, after checking the flags and the dictionary."""
        _check(args)
        check_initial_table("--initial-table", args.initial_table)
        _check_checkpoints(
            os.path.join(args.save_dir, args.restore_file), *(args.path or "").split(os.pathsep)
        )
        task = super().setup_task(args, **kwargs)  # type: ignore[misc]
        dictionary = task.target_dictionary
        words = range(dictionary.nspecial, len(dictionary))
        if all(dictionary[word].startswith("madeupword") for word in words):
            raise UsageError(
                f"{args.data}: the dictionary has no words but fairseq's own symbols; was "
                "fairseq-preprocess given an empty text?"
            )
        return task

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> nn.Module:
        """Builds a model that seats words; the initial table is seated when training begins."""
        if not from_checkpoint:
            self._read_table_files(cfg)
        model: nn.Module = super().build_model(cfg, from_checkpoint)  # type: ignore[misc]
        if not hasattr(getattr(model, "decoder", None), "reallocation_round"):
            raise UsageError(
                f"--arch {getattr(cfg, 'arch', None) or cfg._name} has no word table: use "
                f"--arch {' or '.join(self.architectures)} with this task, or --task "
                f"{self.stock_task} with that model"
            )
        if self.args.reallocation_mean_inputs:
            decoder: Any = model.decoder
            if decoder.input_vectors.weight is decoder.softmax.weight:
                raise UsageError(
                    "--reallocation-mean-inputs: input and output have the same vectors, which "
                    "must stay as they are for the output; leave the flag out"
                )
        return model

    def build_generator(
        self, models: Any, args: Any, seq_gen_cls: Any = None, *more: Any, **kwargs: Any
    ) -> Any:
        """Builds fairseq's generator, which asks for no more words than it can choose."""
        if seq_gen_cls is None and not getattr(args, "print_alignment", None):
            seq_gen_cls = TopWordsGenerator
        return super().build_generator(  # type: ignore[misc]
            models, args, seq_gen_cls, *more, **kwargs
        )

    def _read_table_files(self, cfg: Any) -> None:
        """Loads the file named by --initial-table and gives the model its shape."""
        dictionary = self.target_dictionary  # type: ignore[attr-defined]
        table = self.read_table_file("--initial-table", "--table-shape", dictionary, cfg)
        if table is not None:
            self._given_table = table
            cfg.num_components = len(table.shape)

    def read_table_file(
        self, flag: str, shape_flag: str, dictionary: Any, cfg: Any
    ) -> WordTable | None:
        """Loads the table file that a flag names, and gives the model its shape.

        Args:
            flag: names a file, or a kind of table to be made.
            shape_flag: of the model; may be absent, or the shape of the file.
            dictionary: of the words.
            cfg: of the model.

        Returns:
            The table, or None if the flag names no file.

        Raises:
            UsageError: if the file is not a table of these words and this shape.
        """
        file = getattr(self.args, flag[2:].replace("-", "_"))
        if file in INITIAL_TABLES:
            return None
        with usage_errors(flag):
            table = WordTable.load(file, dictionary.symbols)
        shape, name = "x".join(map(str, table.shape)), shape_flag[2:].replace("-", "_")
        if (getattr(cfg, name, None) or shape) != shape:
            raise UsageError(
                f"{shape_flag} {getattr(cfg, name)} is not the shape of the table in {file}, "
                f"{shape}; leave the flag out"
            )
        setattr(cfg, name, shape)
        return table

    def build_criterion(self, cfg: Any) -> Any:
        """Builds the criterion, which must be one that knows components."""
        name = getattr(cfg, "_name", None) or getattr(cfg, "criterion", None)
        if name != CRITERION:
            raise UsageError(
                f"--criterion {name} cannot train a model with a word table: use "
                f"--criterion {CRITERION}"
            )
        return super().build_criterion(cfg)  # type: ignore[misc]

    def begin_epoch(self, epoch: int, model: nn.Module) -> None:
        """Seats the initial table, or re-seats the words after an epoch of the schedule.

        fairseq calls this again for the same epoch after a resume in mid-epoch; the model's
        buffers tell that the work is done.
        """
        super().begin_epoch(epoch, model)  # type: ignore[misc]
        decoder: Any = model.decoder
        if self._started is None:
            self._started = time.monotonic()
        schedule = reallocation_epochs(
            self.args.reallocate_epochs, self.args.reallocate_interval, self.args.max_epoch
        )
        if decoder.reallocation_round < 0:
            self._seat_initial_tables(model)
        elif schedule(epoch - 1) and decoder.reallocation_epoch < epoch - 1:
            self._reallocate(epoch - 1, model)

    def _seat_initial_tables(self, model: nn.Module) -> None:
        decoder: Any = model.decoder
        dictionary = self.target_dictionary  # type: ignore[attr-defined]
        kind = self.args.initial_table
        self.seat(
            decoder.table, kind, self._given_table, dictionary, self.training_text, "word_table"
        )
        decoder.reallocation_round.fill_(0)

    def seat(
        self,
        lookup: Any,
        kind: str,
        given: WordTable | None,
        dictionary: Any,
        text: Callable[[], Iterable[np.ndarray]],
        file_name: str,
    ) -> None:
        """Seats the words of a table for the first time, alike on all workers, and saves it.

        Args:
            lookup: the table to be seated.
            kind: how, or where ``given`` came from.
            given: the table, if it is not to be made.
            dictionary: of the words.
            text: returns text of these words.
            file_name: the table's file in the save directory, without ``.txt``.
        """
        start = time.monotonic()
        table = None
        if rank() == 0:
            table = given or initial_table(
                kind,
                lookup.num_words,
                lookup.shape,
                seed=self.args.table_seed,
                counts=np.array(dictionary.count, dtype=np.int64),
                tokens=text(),
            )
        lookup.seat(broadcast_table(table, lookup))
        table = lookup.table()
        name = file_name.replace("word_table", "table").replace("_", " ")
        logger.info(f"initial {name}: {kind}, {table}, {time.monotonic() - start:.1f} seconds")
        self._save_table(table, 0, dictionary, file_name)

    def _reallocate(self, epoch: int, model: nn.Module) -> None:
        decoder: Any = model.decoder
        start = time.monotonic()
        folder = tempfile.gettempdir() if self.args.no_save else self.args.save_dir
        size = decoder.table.num_words, *decoder.statistics_shape()
        old, report, solving = decoder.table.table(), {}, 0.0
        passes = decoder.table.num_components if self.args.reallocation_regather else 1
        with statistics_storage(self.args.reallocation_memory, size, folder) as storage:
            for fixed in range(passes):
                what = f"reallocation after epoch {epoch}"
                what += f", component {fixed + 1}" if passes > 1 else ""
                logger.info(f"{what}: gathering statistics")
                gathered = gather_statistics(model, self.training_batches(), storage.arguments)
                begun, result = time.monotonic(), None
                if rank() == 0:
                    logger.info(f"{what}: solving")
                    result = self.solve_reallocation(
                        decoder, gathered.statistics, storage.solver_memory, fixed
                    )
                    if not report:
                        objective = str(self.args.reallocation_objective)
                        weight = self.args.reallocation_row_weight
                        report = reallocation_report(result, gathered, objective, weight)
                table = broadcast_table(result.table if result else None, decoder.table)
                if self.args.reallocation_mean_inputs:
                    move_input_vectors(
                        decoder.input_vectors, decoder.table.table(), table, gathered.statistics
                    )
                decoder.table.seat(table)
                solving += time.monotonic() - begun
        decoder.reallocation_round += 1
        decoder.reallocation_epoch.fill_(epoch)
        end = time.monotonic()
        self._reallocation_seconds += end - start
        if rank() == 0:
            total = end - start
            seconds = {"statistics": total - solving, "solve": solving, "total": total}
            share = self._reallocation_seconds / (end - (self._started or start))
            report |= {
                "moved": int((table.cells != old.cells).sum()),
                "table": table.digest(),
                "epoch": epoch,
                "round": int(decoder.reallocation_round),
                "seconds": {name: round(value, 3) for name, value in seconds.items()},
                "share_of_training": round(share, 5),
            }
            log_reallocation(f"reallocation after epoch {epoch}", report, table)
            dictionary = self.target_dictionary  # type: ignore[attr-defined]
            self._save_table(table, epoch, dictionary, "word_table")
            if not self.args.no_save:
                with open(Path(self.args.save_dir) / "reallocations.jsonl", "a") as file:
                    file.write(json.dumps(report) + "\n")

    def solve_reallocation(
        self,
        decoder: Any,
        statistics: AllocationStatistics,
        memory: dict[str, int],
        fixed_components: int = 0,
    ) -> Reallocation:
        """Finds the words' new cells, as the flags ask for."""
        components = range(decoder.table.num_components)
        vectors, biases = zip(*(decoder.softmax.vectors(i) for i in components), strict=True)
        return reallocate(
            decoder.table.table(),
            statistics,
            [vector.detach() for vector in vectors],
            [bias.detach() for bias in biases],
            objective=str(self.args.reallocation_objective),
            row_weight=self.args.reallocation_row_weight,
            fixed_components=fixed_components,
            stay_margin=self.args.reallocation_margin,
            symbols=self.target_dictionary.symbols,  # type: ignore[attr-defined]
            **memory,
        )

    def training_batches(self) -> Iterator[Any]:
        """Yields this worker's share of the training split, without fairseq's dummy batches."""
        dataset = self.datasets[self.args.train_subset]
        iterator = self.get_batch_iterator(  # type: ignore[attr-defined]
            dataset=dataset,
            max_tokens=self.args.max_tokens,
            max_sentences=self.args.batch_size,
            # As in training, which skips what does not fit into a batch.
            max_positions=resolve_max_positions(
                self.max_positions(),  # type: ignore[attr-defined]
                self.args.max_tokens,
            ),
            ignore_invalid_inputs=True,
            seed=self.args.seed,
            num_shards=world_size(),
            shard_id=rank(),
            num_workers=self.args.num_workers,
            # A cached iterator would be the one that training goes on with.
            disable_iterator_cache=True,
        )
        # Of pairs of texts the last is the one that is predicted.
        words = int(np.sum(dataset.sizes if np.ndim(dataset.sizes) == 1 else dataset.sizes[:, -1]))
        share = sample_share(
            self.args.reallocation_words, words, len(iterator.frozen_batches), self.in_order
        )
        progress = progress_bar.progress_bar(
            iterator.next_epoch_itr(shuffle=False),
            log_format=self.args.log_format,
            log_interval=self.args.log_interval,
            prefix="reallocation statistics",
            default_log_format="simple",
        )
        # Batches are dealt to the workers in turn, so that these are the same for any number.
        chosen = (share(number * world_size() + rank()) for number in itertools.count())
        return (sample for sample, used in zip(progress, chosen) if sample and used)  # noqa: B905

    def _save_table(self, table: WordTable, epoch: int, dictionary: Any, file_name: str) -> None:
        """Writes a table next to the checkpoints, under its epoch and as the newest."""
        if rank() != 0 or self.args.no_save:
            return
        directory = Path(self.args.save_dir)
        directory.mkdir(parents=True, exist_ok=True)
        table.save(directory / f"{file_name}.epoch{epoch}.txt", dictionary.symbols)
        table.save(directory / f"{file_name}.txt", dictionary.symbols)


def check_initial_table(flag: str, value: str) -> None:
    """Refuses what is neither a kind of table nor a file."""
    if value not in INITIAL_TABLES and not os.path.isfile(value):
        raise UsageError(f"{flag} {value}: neither one of {', '.join(INITIAL_TABLES)} nor a file")


def _check(args: Any) -> None:
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
    if args.reallocation_mean_inputs and args.fp16 and not args.memory_efficient_fp16:
        raise UsageError(
            "--reallocation-mean-inputs changes the model's vectors, which --fp16 would overwrite "
            "with its copy: use --memory-efficient-fp16"
        )


def _check_checkpoints(*paths: str) -> None:
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
