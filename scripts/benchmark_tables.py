"""Compares word tables by perplexity: how they are made, shaped and reallocated.

    python scripts/benchmark_tables.py FOLDER OUTPUT --seeds 1 2

FOLDER holds text as for ``benchmark_language_model.py``, and OUTPUT receives the same: a folder for
each run, ``results.json``, ``results.md`` and curves. Finished runs are kept.

One model, small enough for many runs: one LSTM layer of 128, the gated composition with a bias for
each word and no feed-forward layer, carried state in 64 lanes, Adam at a constant rate. A seed is
one of the model and of the table.

``--tables`` names what is compared, each an initial table and perhaps what differs, joined by ``+``
(``cooccurrence+own-64+row-first``):

* ``random``, ``frequency``, ``cooccurrence``: the initial table;
* ``50x201``, ``22x22x22``, ``3d`` …: its shape (nearly square by default);
* ``further-3``: so many further tables of the same kind;
* ``own-64``: so many numbers of each word's own, besides its bias;
* ``shared``: input and output share component vectors;
* ``width-256``: another width of vectors and LSTM;
* ``paper``: the paper's model, whose words have no bias;
* ``true-loss``, ``row-first``, ``joint``: words are reallocated with this objective after epoch 3,
  ``after-1``: after epoch 1 instead (or any other); ``often``: after every epoch from that one;
  ``kept``: words are read by the initial table for good, as they are by default with ``true-loss``.

What differs in its reallocations alone has the same training before the first of them. Besides what
other benchmarks write, ``reallocations.jsonl`` gets what every reallocation reported.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from language_model_report import summarise
from language_model_runs import OURS, add_training_flags, claim_folder, test, training_flags
from language_model_text import binarise
from side_by_side import read_lines, train_in_steps

KINDS = ("random", "frequency", "cooccurrence")
OBJECTIVES = ("true-loss", "row-first", "joint")
TABLES = (
    "random", "frequency", "cooccurrence",
    "cooccurrence+201x50", "cooccurrence+50x201", "cooccurrence+3d",
    "cooccurrence+further-1", "cooccurrence+further-3", "cooccurrence+further-6",
    "cooccurrence+own-8", "cooccurrence+own-32", "cooccurrence+own-64",
    "cooccurrence+own-64+further-3", "cooccurrence+shared",
    *(f"cooccurrence+{moved}" for moved in ("true-loss", "true-loss+often", "row-first", "joint")),
    *(f"random+{moved}+after-1"
      for moved in ("true-loss", "true-loss+often", "row-first+often", "joint+often")),
)  # fmt: skip
FIRST = 3  # epoch that a reallocation follows unless a name says otherwise


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_training_flags(parser, width=128, dropout=0.2, lanes=64)
    add("--tables", nargs="+", type=check_name, default=list(TABLES), metavar="TABLE",
        help=f"what to compare (default: {' '.join(TABLES)})")  # fmt: skip
    add("--epochs", type=int, default=8, help="of training (default: %(default)s)")
    return parser.parse_args()


def check_name(name: str) -> str:
    """Returns the name of what is compared, if it is one."""
    kind, *parts = name.split("+")
    known = r"further-\d+|own-\d+|width-\d+|after-[1-9]\d*|"
    known += r"\dd|\d+(x\d+)+|shared|paper|often|kept|"
    known += "|".join(OBJECTIVES)
    wrong = [part for part in parts if not re.fullmatch(known, part)]
    if kind not in KINDS or wrong:
        raise argparse.ArgumentTypeError(f"{name}: {(wrong or [kind])[0]} is no part of a name")
    moves = [part for part in parts if part in OBJECTIVES]
    moved = [part for part in parts if re.fullmatch(r"often|kept|after-\d+", part)]
    if len(moves) > 1 or (moved and not moves):
        raise argparse.ArgumentTypeError(f"{name}: must have one of {', '.join(OBJECTIVES)}")
    if {"paper", "kept"} <= set(parts):
        raise argparse.ArgumentTypeError(f"{name}: the paper's model has one table for both sides")
    return name


def numbers_of(parts: list[str]) -> dict[str, int]:
    """Returns what the parts of a name say in numbers, as ``own-64`` does."""
    found = [re.fullmatch(r"([a-z]+)-(\d+)", part) for part in parts]
    return {match[1]: int(match[2]) for match in found if match}


def first_reallocation(name: str) -> int:
    """Returns the first epoch that a reallocation follows."""
    return numbers_of(name.split("+")).get("after", FIRST)


def flags_of(name: str, args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Returns flags of the model and its table, and those that differ after a reallocation."""
    kind, *parts = name.split("+")
    numbers = numbers_of(parts)
    width = numbers.get("width", args.width)
    word_dim = 0 if "paper" in parts else 1
    if "own" in numbers:
        word_dim += numbers["own"]
    model = [
        "--arch", "lightrnn_lm" if "paper" in parts else "lightrnn_lm_gated",
        "--embed-dim", width, "--hidden-size", width, "--num-layers", args.layers,
        "--output-ffn-dim", 0, "--word-dim", word_dim,
        "--further-tables", numbers.get("further", 0), "--initial-table", kind,
        "--component-vectors", "shared" if "shared" in parts else "separate",
    ]  # fmt: skip
    for part in parts:
        if re.fullmatch(r"\dd|\d+(x\d+)+", part):
            model += ["--table-shape", part]
    for part in parts:
        if part in OBJECTIVES:
            first = first_reallocation(name)
            epochs = f"{first}-{args.epochs - 1}" if "often" in parts else first
            kept = ["--keep-input-table"] * ("kept" in parts)
            return model, [*kept, "--reallocate-epochs", epochs, "--reallocation-objective", part]
    return model, []


def train(name: str, seed: int, data: Path, args: argparse.Namespace) -> Path:
    """Trains a model on a table and returns its folder."""
    folder = args.out / f"{name}-{seed}"
    model, reallocation = flags_of(name, args)
    common = training_flags("lstm", seed, data, args)
    flags = [*common, "--lr", args.lr, *OURS, "--carry-hidden-state", *model]
    if not folder.exists():
        first = first_reallocation(name)
        moves = {*OBJECTIVES, "often", "kept", f"after-{first}"}
        parts = [part for part in name.split("+") if part not in moves]
        start = args.out / f"start-{'+'.join(parts)}-{first}-{seed}"
        train_in_steps(start, flags, first, first)
        copy = args.out / f"copy-{folder.name}"  # a folder with a run's name is complete
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(start, copy)
        copy.rename(folder)
    train_in_steps(folder, flags + reallocation, args.epochs, args.epochs)
    return folder


def keep_reallocations(out: Path) -> None:
    """Writes what every reallocation of every run reported."""
    with open(out / "reallocations.jsonl", "w") as file:
        for path in sorted(out.glob("*/reallocations.jsonl")):
            if not path.parent.name.startswith(("start-", "copy-")):
                for record in read_lines(path):
                    print(json.dumps({"run": path.parent.name, **record}), file=file)


def main() -> None:
    args = parse()
    description = claim_folder(args, "epochs")
    data = binarise(args.text, args.out)
    for seed in args.seeds:
        for name in args.tables:
            folder = train(name, seed, data, args)
            test("lightrnn_lm", data, folder, args)
            keep_reallocations(args.out)
            summarise(args.out, description)


if __name__ == "__main__":
    main()
