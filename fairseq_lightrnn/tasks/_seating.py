"""What every LightRNN task shares: seating words in the table, at first and between epochs."""

import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from fairseq.logging import progress_bar
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY
from fairseq.utils import resolve_max_positions
from omegaconf import DictConfig, open_dict
from torch import nn

from fairseq_lightrnn.allocation.initial_table import INITIAL_TABLES
from fairseq_lightrnn.allocation.reallocation import Reallocation, reallocate
from fairseq_lightrnn.allocation.statistics import AllocationStatistics
from fairseq_lightrnn.errors import UsageError, usage_errors
from fairseq_lightrnn.tasks._generator import TopWordsGenerator
from fairseq_lightrnn.tasks._reallocation import (
    broadcast_table,
    log_reallocation,
    reallocation_report,
)
from fairseq_lightrnn.tasks._schedule import reallocation_epochs
from fairseq_lightrnn.tasks._seating_config import check_checkpoints, check_seating
from fairseq_lightrnn.tasks._statistics import (
    Gathered,
    gather_statistics,
    rank,
    sample_share,
    statistics_storage,
    world_size,
)
from fairseq_lightrnn.tasks._table_maker import TableMaker, read_further_tables
from fairseq_lightrnn.word_table import WordTable

__all__ = ["SeatingMixin"]

logger = logging.getLogger(__name__)

CRITERION = "two_component_cross_entropy"


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
    _given_further: Sequence[WordTable] = ()
    _started: float | None = None
    _reallocation_seconds = 0.0

    def training_text(self) -> Iterable[np.ndarray]:
        """Yields the words to be predicted as arrays of consecutive text."""
        raise NotImplementedError

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> Any:
        """Sets the task up, after checking the flags and the dictionary."""
        check_seating(args)
        check_checkpoints(
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
        if from_checkpoint:
            _add_new_flags(cfg)
        else:
            self._read_table_files(cfg)
        model: nn.Module = super().build_model(cfg, from_checkpoint)  # type: ignore[misc]
        if not hasattr(getattr(model, "decoder", None), "reallocation_round"):
            raise UsageError(
                f"--arch {getattr(cfg, 'arch', None) or cfg._name} has no word table: use "
                f"--arch {' or '.join(self.architectures)} with this task, or --task "
                f"{self.stock_task} with that model"
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
        self._given_further = read_further_tables(cfg, dictionary)

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
            UsageError: if there is no such file, or it is not a table of these words and this
                shape.
        """
        file = getattr(self.args, flag[2:].replace("-", "_"))
        if file in INITIAL_TABLES:
            return None
        if not os.path.isfile(file):
            raise UsageError(
                f"{flag} {file}: neither one of {', '.join(INITIAL_TABLES)} nor a file"
            )
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
        maker = TableMaker(dictionary, self.training_text, self.args.table_seed)
        kind, given = self.args.initial_table, self._given_table
        first = self.seat(decoder.table, kind, given, maker, "word_table")
        if decoder.input_vectors.input_table is not None:
            decoder.input_vectors.input_table.seat(first)
        if decoder.further is not None:
            self._seat_further_tables(first, decoder.further.tables, maker)
        decoder.reallocation_round.fill_(0)

    def _seat_further_tables(
        self, first: WordTable, lookups: Iterable[Any], maker: TableMaker
    ) -> None:
        """Seats the words of all tables but the first."""
        kind = "random" if self.args.initial_table == "random" else "cooccurrence"
        seated = [first]
        for number, lookup in enumerate(lookups, 1):
            given = self._given_further[number - 1] if self._given_further else None
            table = self.seat(lookup, kind, given, maker, f"further_word_table{number}", seated)
            if table in seated:
                logger.warning(
                    f"further table {number} seats all words as one before it does, and tells no "
                    "more of them apart: give another one or fewer of them"
                )
            seated.append(table)

    def seat(
        self,
        lookup: Any,
        kind: str,
        given: WordTable | None,
        maker: TableMaker,
        file_name: str,
        before: Sequence[WordTable] = (),
    ) -> WordTable:
        """Seats the words of a table for the first time, alike on all workers, and saves it.

        Args:
            lookup: the table to be seated.
            kind: how, or where ``given`` came from.
            given: the table, if it is not to be made.
            maker: makes tables of these words.
            file_name: the table's file in the save directory, without ``.txt``.
            before: of a further table, all tables before it.

        Returns:
            The table.
        """
        start = time.monotonic()
        table = None
        if rank() == 0:
            table = given or maker.make(kind, lookup.shape, before)
        table = broadcast_table(table, lookup)
        lookup.seat(table)
        name = file_name.replace("word_table", "table ").replace("_", " ").strip()
        how = "" if before else f"{kind}, "
        logger.info(f"initial {name}: {how}{table}, {time.monotonic() - start:.1f} seconds")
        self._save_table(table, 0, maker.dictionary, file_name)
        return table

    def _reallocate(self, epoch: int, model: nn.Module) -> None:
        decoder: Any = model.decoder
        start = time.monotonic()
        title = f"reallocation after epoch {epoch}"
        folder = tempfile.gettempdir() if self.args.no_save else self.args.save_dir
        report, solving = self.move_words(title, model, folder)
        decoder.reallocation_round += 1
        decoder.reallocation_epoch.fill_(epoch)
        end = time.monotonic()
        self._reallocation_seconds += end - start
        if report is None:
            return
        table, total = decoder.table.table(), end - start
        seconds = {"statistics": total - solving, "solve": solving, "total": total}
        share = self._reallocation_seconds / (end - (self._started or start))
        report |= {
            "epoch": epoch,
            "round": int(decoder.reallocation_round),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "share_of_training": round(share, 5),
        }
        log_reallocation(title, report, table)
        dictionary = self.target_dictionary  # type: ignore[attr-defined]
        self._save_table(table, epoch, dictionary, "word_table")
        if not self.args.no_save:
            with open(Path(self.args.save_dir) / "reallocations.jsonl", "a") as file:
                file.write(json.dumps(report) + "\n")

    def move_words(
        self,
        title: str,
        model: nn.Module,
        folder: str,
        export: Callable[[Gathered], None] | None = None,
    ) -> tuple[dict[str, Any] | None, float]:
        """Puts a better table into force, as the flags ask for.

        Args:
            title: of the log.
            model: whose words are moved.
            folder: where statistics that do not fit into memory may go.
            export: called with the first statistics.

        Returns:
            A report, on the first worker, and the seconds that the solver took.
        """
        decoder: Any = model.decoder
        old = decoder.table.table()
        size = decoder.table.num_words, *decoder.statistics_shape()
        passes = decoder.table.num_components if self.args.reallocation_regather else 1
        report, solving = None, 0.0
        with statistics_storage(self.args.reallocation_memory, size, folder) as storage:
            for fixed in range(passes):
                what = f"{title}, component {fixed + 1}" if passes > 1 else title
                logger.info(f"{what}: gathering statistics")
                gathered = gather_statistics(model, self.training_batches(), storage.arguments)
                if export is not None and fixed == 0:
                    export(gathered)
                begun, table = time.monotonic(), None
                if rank() == 0:
                    logger.info(f"{what}: solving")
                    found = self._solve_reallocation(
                        decoder, gathered.statistics, storage.solver_memory, fixed
                    )
                    table = found.table
                    if report is None:
                        objective = str(self.args.reallocation_objective)
                        weight = self.args.reallocation_row_weight
                        report = reallocation_report(found, gathered, objective, weight)
                decoder.table.seat(broadcast_table(table, decoder.table))
                solving += time.monotonic() - begun
                del gathered  # before the next ones take as much memory
        if report is not None:
            table = decoder.table.table()
            moved = int((table.cells != old.cells).sum())
            report |= {"moved": moved, "table": table.digest()}
        return report, solving

    def _solve_reallocation(
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


def _add_new_flags(cfg: Any) -> None:
    """Gives flags that are younger than a checkpoint their defaults.

    fairseq does so for models, but not for the architectures that are presets of a model.
    """
    if not isinstance(cfg, DictConfig):
        return
    model = ARCH_MODEL_NAME_REGISTRY.get(cfg._name, cfg._name)
    defaults = MODEL_DATACLASS_REGISTRY[model]()
    with open_dict(cfg):
        for flag in fields(defaults):
            if flag.name not in cfg:
                cfg[flag.name] = getattr(defaults, flag.name)
