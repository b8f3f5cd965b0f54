"""Compares word tables by perplexity: how they are made, shaped and reallocated.

    python scripts/benchmark_tables.py FOLDER OUTPUT --seeds 1 2

FOLDER holds text as for ``benchmark_language_model.py``, and OUTPUT receives the same: a folder for
each run, ``results.json``, ``results.md`` and curves. Finished runs are kept.

One model, small enough for many runs: one LSTM layer of 128, the gated composition with a bias for
each word, carried state in 64 lanes, Adam at a constant rate. A seed is one of the model and of the
table. ``--tables`` names what is compared:

* ``random``, ``frequency``, ``cooccurrence``: the initial tables of the task, never reallocated;
* ``unequal-lengths``, ``apart``, ``roots``, ``one-window``, ``columns-3``, ``columns-10``: what a
  co-occurrence table counts and weighs, one thing changed at a time: words of unequal length,
  rows and columns that do not settle together, and so on; ``unsettled``: the first two at once;
* ``former``: these, one window for rows and columns, and roots of the values; ``power-0.5``,
  ``power-1``, ``window-2``, ``window-5``, ``left``, ``right``, ``dim-25``, ``dim-50``, ``dim-300``:
  one thing changed in that;
* ``50x201``, ``201x50``, ``401x25``, ``22x22x22``: other shapes, and three components;
* ``tied``: input and output share component vectors;
* ``further-1``, ``further-3``, ``further-6``: so many further tables from co-occurrence;
  ``random-further-3``: three random ones beside a co-occurrence table;
* ``own-8``, ``own-32``, ``own-64``: so many numbers of each word's own for input and output alike;
  ``own-64-further-3``: with further tables besides;
  ``width-64``, ``width-256``: another width of vectors and LSTM: what else parameters buy;
* ``…-row-first``, ``…-joint``: a random or a co-occurrence table, reallocated once
  (``--reallocate-after``); ``-regather``: columns from statistics gathered again; ``-margin-…``:
  only words that gain so many nats each time move; ``-kept``: words are read by the initial table
  for good, and only the table that predicts them changes (with ``-regather``, but for
  ``cooccurrence-kept``); ``-often``: after every epoch from then on. All go on from the same
  epochs before, but for ``-early``: after epochs 1, 2 and 4.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_language_model import add_training_flags, binarise, describe, test
from fairseq.data import Dictionary, data_utils
from language_model_report import summarise
from side_by_side import PLUGIN, device_flags, train_in_steps

from fairseq_lightrnn.allocation import CoOccurrence, initial_table
from fairseq_lightrnn.data.target_input import consecutive_text
from fairseq_lightrnn.word_table import default_shape

JOINT = ("--reallocation-objective", "joint")
REGATHER = ("--reallocation-regather",)
MARGIN = ("--reallocation-margin", "0.5")
WIDE_MARGIN = ("--reallocation-margin", "2")
OFTEN = ("--reallocate-interval", "1")
EARLY = ("--reallocate-epochs", "1,2,4")
KEPT = ("--keep-input-table",)


@dataclass(frozen=True)
class Table:
    """One way to seat words.

    Attributes:
        kind: of the initial table.
        how: what a co-occurrence table is made of.
        shape: of the table; nearly square if None.
        flags: of the model.
        further: how many further tables there are.
        further_kind: of these.
        reallocation: flags of a reallocation, or None without one.
    """

    kind: str = "cooccurrence"
    how: CoOccurrence = field(default_factory=CoOccurrence)
    shape: tuple[int, ...] | None = None
    flags: tuple[str, ...] = ()
    further: int = 0
    further_kind: str = "cooccurrence"
    reallocation: tuple[str, ...] | None = None


def former(**how: Any) -> Table:
    """The co-occurrence table of an earlier revision, one thing changed."""
    return Table(
        how=CoOccurrence(
            column_window=None, singular_power=0.5, unit_length=False, joint=False, **how
        )
    )


def own(numbers: int, further: int = 0) -> Table:
    """Words have so many numbers of their own, a co-occurrence table and further ones."""
    size = str(numbers)
    residuals = ("--input-residual-dim", size, "--output-residual-dim", size)
    return Table(flags=(*residuals, "--share-residuals"), further=further)


TABLES = {
    "random": Table("random"),
    "frequency": Table("frequency"),
    "cooccurrence": Table(),
    "unequal-lengths": Table(how=CoOccurrence(unit_length=False)),
    "apart": Table(how=CoOccurrence(joint=False)),
    "unsettled": Table(how=CoOccurrence(unit_length=False, joint=False)),
    "roots": Table(how=CoOccurrence(singular_power=0.5)),
    "one-window": Table(how=CoOccurrence(column_window=None)),
    "columns-3": Table(how=CoOccurrence(column_window=3)),
    "columns-10": Table(how=CoOccurrence(column_window=10)),
    "former": former(),
    "power-0.5": former(weight_power=0.5),
    "power-1": former(weight_power=1.0),
    "window-2": former(window=2),
    "window-5": former(window=5),
    "left": former(sides="left"),
    "right": former(sides="right"),
    "dim-25": former(dim=25),
    "dim-50": former(dim=50),
    "dim-300": former(dim=300),
    "50x201": Table(shape=(50, 201)),
    "201x50": Table(shape=(201, 50)),
    "401x25": Table(shape=(401, 25)),
    "22x22x22": Table(shape=(22, 22, 22)),
    "tied": Table(flags=("--share-component-vectors",)),
    "further-1": Table(further=1),
    "further-3": Table(further=3),
    "further-6": Table(further=6),
    "further-3-kept-regather": Table(flags=KEPT, further=3, reallocation=REGATHER),
    "random-further-3": Table(further=3, further_kind="random"),
    "own-8": own(8),
    "own-32": own(32),
    "own-64": own(64),
    "own-64-further-3": own(64, 3),
    "width-64": Table(flags=("--embed-dim", "64", "--hidden-size", "64")),
    "width-256": Table(flags=("--embed-dim", "256", "--hidden-size", "256")),
    "random-row-first": Table("random", reallocation=()),
    "random-joint": Table("random", reallocation=JOINT),
    "random-regather": Table("random", reallocation=REGATHER),
    "random-margin-0.5": Table("random", reallocation=MARGIN),
    "cooccurrence-row-first": Table(reallocation=()),
    "cooccurrence-joint": Table(reallocation=JOINT),
    "cooccurrence-regather": Table(reallocation=REGATHER),
    "cooccurrence-margin-0.5": Table(reallocation=MARGIN),
    "cooccurrence-margin-2": Table(reallocation=WIDE_MARGIN),
    "random-kept": Table("random", flags=KEPT, reallocation=REGATHER),
    "cooccurrence-kept": Table(flags=KEPT, reallocation=()),
    "cooccurrence-kept-regather": Table(flags=KEPT, reallocation=REGATHER),
    "cooccurrence-kept-margin-2": Table(flags=KEPT, reallocation=REGATHER + WIDE_MARGIN),
    "cooccurrence-kept-early": Table(flags=KEPT, reallocation=REGATHER + EARLY),
    "cooccurrence-kept-often": Table(flags=KEPT, reallocation=REGATHER + OFTEN),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    add("--seeds", type=int, nargs="+", default=[1, 2])
    add("--epochs", type=int, default=8, help="of training (default: %(default)s)")
    add("--reallocate-after", type=int, default=3, metavar="N",
        help="epochs before a reallocation (default: %(default)s)")  # fmt: skip
    add_training_flags(parser, width=128, dropout=0.2, lanes=64)
    return parser.parse_args()


def make_table(table: Table, data: Path, path: Path, seed: int) -> None:
    """Writes the file of an initial table, unless it is there."""
    if path.exists():
        return
    dictionary = Dictionary.load(str(data / "dict.txt"))
    text = data_utils.load_indexed_dataset(str(data / "train"), dictionary)
    initial_table(
        table.kind,
        len(dictionary),
        table.shape or default_shape(len(dictionary)),
        seed=seed,
        counts=np.array(dictionary.count),
        tokens=consecutive_text(text),
        how=table.how,
    ).save(path, dictionary.symbols)


def further_tables(name: str, seed: int, data: Path, args: argparse.Namespace) -> str:
    """Returns how many further tables there are to make, or the files of random ones."""
    table = TABLES[name]
    if table.further_kind == "cooccurrence":
        return str(table.further)
    files = []
    for number in range(1, table.further + 1):
        files.append(args.out / f"{name}.{seed}.further{number}.table.txt")
        # Far from the seeds of first tables.
        make_table(Table(table.further_kind), data, files[-1], 100 * seed + number)
    return ",".join(map(str, files))


def train(name: str, seed: int, data: Path, args: argparse.Namespace) -> Path:
    """Trains a model on a table and returns its folder."""
    table, folder = TABLES[name], args.out / f"{name}-{seed}"
    file = args.out / f"{name}.{seed}.table.txt"
    make_table(table, data, file, seed)
    flags: list[Any] = [
        data, "--user-dir", PLUGIN, "--task", "lightrnn_language_modeling", "--carry-hidden-state",
        "--arch", "lightrnn_lm_gated", "--criterion", "two_component_cross_entropy", "--word-bias",
        "--embed-dim", args.width, "--hidden-size", args.width, "--num-layers", args.layers,
        "--output-ffn-dim", 0, "--initial-table", file, "--table-seed", seed, *table.flags,
        "--dropout", args.dropout,
        "--tokens-per-sample", args.block, "--batch-size", args.batch_size, "--optimizer", "adam",
        "--lr", args.lr, "--clip-norm", 1, "--seed", seed, *device_flags(args),
    ]  # fmt: skip
    if table.further:
        flags += ["--further-tables", further_tables(name, seed, data, args)]
    if table.reallocation is None or "--reallocate-epochs" in table.reallocation:
        train_in_steps(folder, flags + list(table.reallocation or ()), args.epochs, args.epochs)
        return folder
    # Before a reallocation there is nothing to keep: all tables of a kind start alike.
    kind = f"{table.kind}-further" if table.further else table.kind
    start = args.out / f"start-{kind}-{args.reallocate_after}-{seed}"
    without = [flag for flag in flags if flag not in KEPT]
    train_in_steps(start, without, args.reallocate_after, args.reallocate_after)
    if not folder.exists():
        shutil.copytree(start, folder)
    flags += table.reallocation
    if "--reallocate-interval" not in table.reallocation:
        flags += ["--reallocate-epochs", args.reallocate_after]
    train_in_steps(folder, flags, args.epochs, args.epochs)
    return folder


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    data = binarise(args.text, args.out)
    for seed in args.seeds:
        for name in args.tables:
            folder = train(name, seed, data, args)
            test("gated", data, folder, args)
            summarise(args.out, {**describe(args), "reallocate_after": args.reallocate_after})


if __name__ == "__main__":
    main()
