"""The tables of a training: where they come from, where they are written, how far they moved."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairseq_lightrnn.core.seats import Seats
from fairseq_lightrnn.core.table import INITIAL_TABLES, WordTable
from fairseq_lightrnn.errors import UsageError, usage_errors
from fairseq_lightrnn.files import whole_file
from fairseq_lightrnn.models.flags import further_files, parse_shape, table_shape
from fairseq_lightrnn.models.word_head import WordHead
from fairseq_lightrnn.workers import rank, table_of_first_worker

if TYPE_CHECKING:
    from fairseq_lightrnn.allocation.initial_table import TableMaker

__all__ = ["TaskTables", "load_table"]

logger = logging.getLogger(__name__)

_REPORTS = "reallocations.jsonl"  # in the save directory


class TaskTables:
    """Seats the words of a model's tables: the one in force, those beside it, a source's.

    Which tables a model has, it knows itself; so does it how often words were moved, and after
    which epoch, in buffers of its :class:`WordHead`, since fairseq restores no state of tasks.

    Args:
        args: the task's flags.
        dictionary: of the words that are predicted.
    """

    def __init__(self, args: Any, dictionary: Any) -> None:
        self.args = args
        self.dictionary = dictionary
        self._given: WordTable | None = None
        self._given_further: list[WordTable] = []

    def read_files(self, cfg: Any) -> None:
        """Loads the files that flags name, and gives the model the shape of its first table.

        Args:
            cfg: the model's flags.

        Raises:
            UsageError: if a file is missing, damaged, of other words or of another shape.
        """
        symbols = self.dictionary.symbols
        kind = self.args.initial_table
        if kind not in INITIAL_TABLES:
            self._given = load_table(
                "--initial-table", kind, symbols, f"neither one of {', '.join(INITIAL_TABLES)} nor "
            )
            shape = self._given.shape
            asked = cfg.table_shape
            if asked != "2d" and parse_shape(asked, len(symbols)) != shape:
                raise UsageError(
                    f"--table-shape {asked} is not the shape of the table in {kind}, "
                    f"{'x'.join(map(str, shape))}; leave the flag out"
                )
            cfg.table_shape = "x".join(map(str, shape))
        for file in further_files(cfg):
            table = load_table("--further-tables", file, symbols, "neither a number of tables nor ")
            shape = table_shape(cfg, len(symbols))
            if table.shape != shape:
                raise UsageError(
                    f"--further-tables: {file} is a table of shape {table.shape}, the first table "
                    f"has {shape}; make them equal"
                )
            self._given_further.append(table)

    def seat_initial(self, words: WordHead, maker: TableMaker) -> None:
        """Seats the words of all tables for the first time, alike on all workers.

        Args:
            words: of the model.
            maker: makes tables of these words.
        """
        kind = self.args.initial_table
        first = self.seat(words.table, kind, self._given, maker, "word_table")
        if words.input_table is not None:
            words.input_table.seat(first)
        seated = [first]
        for number, seats in enumerate(words.further_tables, 1):
            given = self._given_further[number - 1] if self._given_further else None
            how = "random" if kind == "random" else "cooccurrence"
            table = self.seat(seats, how, given, maker, f"further_word_table{number}", seated)
            if table in seated:
                logger.warning(
                    f"further table {number} seats all words as one before it does, and tells no "
                    "more of them apart: give another one or fewer of them"
                )
            seated.append(table)
        for seats, table in zip(words.further_input_tables, seated[1:], strict=False):
            seats.seat(table)
        words.round.fill_(0)
        self.forget_reports()

    def seat(
        self,
        seats: Seats,
        kind: str,
        given: WordTable | None,
        maker: TableMaker,
        file_name: str,
        before: Sequence[WordTable] = (),
        symbols: Sequence[str] | None = None,
    ) -> WordTable:
        """Seats the words of a table for the first time, alike on all workers, and saves it.

        Args:
            seats: where they are to sit.
            kind: how, or where ``given`` came from.
            given: the table, if it is not to be made.
            maker: makes tables of these words.
            file_name: the table's file in the save directory, without ``.txt``.
            before: of a further table, all tables before it.
            symbols: the words, if they are not those that are predicted.

        Returns:
            The table.
        """
        start = time.monotonic()
        table = table_of_first_worker(
            lambda: given or maker.make(kind, seats.shape, before),
            seats.num_words,
            seats.shape,
            seats.coordinates.device,
        )
        seats.seat(table)
        name = file_name.replace("word_table", "table ").replace("_", " ").strip()
        how = "" if before else f"{kind}, "
        logger.info(f"initial {name}: {how}{table}, {time.monotonic() - start:.1f} seconds")
        self.save(table, 0, file_name, symbols)
        return table

    @property
    def _writes(self) -> bool:
        """Whether this worker writes files."""
        return rank() == 0 and not self.args.no_save

    def save_others(self, words: WordHead) -> None:
        """Writes the tables of a training that goes on from elsewhere into its own folder."""
        for file_name, seats in _named(words):
            self.save_other(seats, int(words.epoch), file_name)

    def save_other(
        self, seats: Seats, epoch: int, file_name: str, symbols: Sequence[str] | None = None
    ) -> None:
        """Writes a table, unless the file in the save directory has the same one."""
        if not self._writes:
            return
        path = Path(self.args.save_dir) / f"{file_name}.txt"
        words = self.dictionary.symbols if symbols is None else symbols
        try:
            saved = WordTable.load(path, words) if path.exists() else None
        except ValueError:
            saved = None  # damaged, or of the training of another dictionary
        table = seats.table()
        if saved != table:
            self.save(table, epoch, file_name, words)

    def save_all(self, words: WordHead, further: bool = True) -> None:
        """Writes the tables in force as those of the last epoch that words were moved after.

        Args:
            words: of the model.
            further: write further tables too.
        """
        for file_name, seats in _named(words, further):
            self.save(seats.table(), int(words.epoch), file_name)

    def forget_reports(self) -> None:
        """Removes what an earlier training in the same folder reported."""
        if self._writes:
            (Path(self.args.save_dir) / _REPORTS).unlink(missing_ok=True)

    def add_report(self, report: dict[str, Any]) -> None:
        """Adds a reallocation to ``reallocations.jsonl``, in place of one after the same epoch.

        A training that was killed before its checkpoint repeats what it did since the last one.
        """
        if not self._writes:
            return
        path = Path(self.args.save_dir) / _REPORTS
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _epoch_of(line) < report["epoch"]]
        with whole_file(path) as file:
            file.writelines(line + "\n" for line in [*kept, json.dumps(report)])

    def save(
        self,
        table: WordTable,
        epoch: int,
        file_name: str,
        symbols: Sequence[str] | None = None,
    ) -> None:
        """Writes a table next to the checkpoints, under its epoch and as the newest."""
        if not self._writes:
            return
        directory = Path(self.args.save_dir)
        directory.mkdir(parents=True, exist_ok=True)
        symbols = self.dictionary.symbols if symbols is None else symbols
        table.save(directory / f"{file_name}.epoch{epoch}.txt", symbols)
        table.save(directory / f"{file_name}.txt", symbols)


def _named(words: WordHead, further: bool = True) -> Iterator[tuple[str, Seats]]:
    """Yields the tables that predict words, each after the name of its file."""
    yield "word_table", words.table
    for number, seats in enumerate(words.further_tables if further else (), 1):
        yield f"further_word_table{number}", seats


def _epoch_of(report: str) -> float:
    """Returns the epoch of a line of reports; infinite if it is damaged."""
    try:
        return float(json.loads(report)["epoch"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def load_table(flag: str, file: str, symbols: Sequence[str], otherwise: str = "no ") -> WordTable:
    """Loads the table file that a flag names.

    Args:
        flag: for the error.
        file: its path.
        symbols: the words that it must hold, in the order of their ids.
        otherwise: what else the flag's value could have been, for the error.

    Raises:
        UsageError: if there is no such file, or it is no table of these words.
    """
    if not os.path.isfile(file):
        raise UsageError(f"{flag} {file}: {otherwise}a file")
    with usage_errors(flag):
        return WordTable.load(file, symbols)
