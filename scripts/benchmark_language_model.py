"""Trains language models of one width side by side and compares their perplexity, speed and size.

    python scripts/benchmark_language_model.py FOLDER OUTPUT --seeds 1 2 --epochs 30

FOLDER holds ``train.txt``, ``valid.txt`` and ``test.txt`` (anything may stand before ``train``, as
in ``ptb.train.txt``); OUTPUT receives binarised data, a folder for each run, ``results.json``,
``results.md`` and curves. Runs are processes of ``fairseq-train`` with one thread each, all with
the same width, layers, dropout, optimiser and schedule. Finished runs are kept, interrupted ones go
on from their last checkpoint, and ``--report`` sums up what there is.

Systems (``--systems``): the paper's model on a random table (``random``), on one that is
reallocated once as by the authors' program, greedily (``authors``), and on a co-occurrence table
(``recurrent``); the gated composition with a feed-forward layer of four times the width, bare
(``gated``), with a bias for each word (``gated-bias``), with 25 numbers of each word's own
(``gated-full``), with further 128 for each of 1,000 frequent words (``gated-frequent``), with 129
for every word (``gated-wide``), with 65 of which 64 serve input and output alike, as the vectors of
rows and columns then do too (``gated-shared``), these without that layer (``gated-linear``),
``gated`` and ``recurrent`` with 4√V rows of √V/4 columns (``gated-rows``, ``recurrent-rows``) or
with three further tables (``gated-further``, ``recurrent-further``); ``gated`` and
``gated-shared`` (with vectors of their own) with words reallocated after epochs 1, 2, 4, 8 and 16
where they are predicted, but not where they are read (``gated-moved``, ``gated-shared-moved``); the
same program with one component, an ordinary softmax LSTM (``softmax``), and that with the layer
(``softmax-ffn``); fairseq's ``lstm_lm`` with full (``lstm_lm``) and with adaptive softmax
(``lstm_lm-adaptive``). The last two know no carried state: they are trained on blocks, and tested
on blocks long enough that the start does not matter.

Seconds are those that the CPU worked for a training process, start and validation included, so
that other work on the machine changes them little. Perplexities are those of the checkpoint with
the best validation loss.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from allocation_peers import regret_greedy
from benchmark_allocation import load as load_instance
from language_model_report import summarise
from side_by_side import (
    PLUGIN,
    add_gpu_flag,
    append_line,
    call,
    count_parameters,
    device_flags,
    is_tested,
    machine,
    read_lines,
    train_for,
    train_in_steps,
    words_own,
)

from fairseq_lightrnn.commands.reallocate import main as reallocate
from fairseq_lightrnn.word_table import WordTable

SPLITS = ("train", "valid", "test")
# Of fairseq's adaptive softmax; those beyond the vocabulary are left out.
CUTOFFS = (2_000, 10_000, 50_000, 200_000)
TEST_BLOCK = 2048
VOCABULARY = ("embedding", "softmax", "gates", "embed_tokens", "fc_out")

# Input and output have the same vectors and numbers of words.
SHARED = ("--share-residuals", "--share-component-vectors")
# Words are read by the initial table for good, and moved where they are predicted.
MOVED = ("--keep-input-table", "--reallocation-regather")
MOVED_AFTER = (1, 2, 4, 8, 16)
# Words have cells in three more tables.
FURTHER = ["--further-tables", "3"]
# name: flags of the model and the task
OURS: dict[str, list[str]] = {
    "gated-full": ["--composition", "gated", *words_own(16, 8)],
    "gated-frequent": ["--composition", "gated", *words_own(16, 8), "--frequent-words", "1000"],
    "gated-wide": ["--composition", "gated", *words_own(64, 64)],
    "gated-shared": ["--composition", "gated", *words_own(64, 64), *SHARED],
    "gated-shared-moved": ["--composition", "gated", *words_own(64, 64), SHARED[0], *MOVED],
    "gated-moved": ["--composition", "gated", *MOVED],
    "gated-linear": ["--composition", "gated", *words_own(64, 64), *SHARED],
    "gated-bias": ["--composition", "gated", "--word-bias"],
    "gated-further": ["--composition", "gated", *FURTHER],
    "gated": ["--composition", "gated"],
    "gated-rows": ["--composition", "gated"],
    "recurrent-further": FURTHER,
    "recurrent": [],
    "recurrent-rows": [],
    "random": ["--initial-table", "random"],
    "authors": ["--initial-table", "random"],
    "softmax": ["--num-components", "1", "--initial-table", "random"],
    "softmax-ffn": ["--num-components", "1", "--initial-table", "random"],
}
WITHOUT_FFN = (
    "gated-linear",
    "recurrent-further",
    "recurrent",
    "recurrent-rows",
    "random",
    "authors",
    "softmax",
)
PEERS = ("lstm_lm", "lstm_lm-adaptive")


def add_training_flags(
    parser: argparse.ArgumentParser, width: int, dropout: float, lanes: int
) -> None:
    """Adds the folders, and what all models of a comparison have in common, with its defaults."""
    add = parser.add_argument
    add("text", type=Path, metavar="FOLDER", help="of the text files")
    add("out", type=Path, metavar="OUTPUT", help="folder to write to")
    add("--width", type=int, default=width, help="of vectors and LSTM (default: %(default)s)")
    add("--layers", type=int, default=1, help="of the LSTM (default: %(default)s)")
    add("--dropout", type=float, default=dropout, help="(default: %(default)s)")
    add("--lr", type=float, default=0.002, help="of Adam at first (default: %(default)s)")
    add("--batch-size", type=int, default=lanes, help="lanes (default: %(default)s)")
    add("--block", type=int, default=35, help="words of a block (default: %(default)s)")
    add_gpu_flag(parser)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--systems", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    add("--seeds", type=int, nargs="+", default=[1])
    add("--epochs", type=int, default=30, help="of training (default: %(default)s)")
    add("--seconds", type=float, metavar="S",
        help="train a system no further once it has had S CPU seconds")  # fmt: skip
    add("--for-seconds", type=float, metavar="S",
        help="train every system for S seconds of the clock, not for epochs")  # fmt: skip
    add("--validate-updates", type=int, default=3000, metavar="N",
        help="with --for-seconds, updates between validations (default: %(default)s)")  # fmt: skip
    add_training_flags(parser, width=200, dropout=0.3, lanes=32)
    add(
        "--authors-round",
        type=int,
        default=12,
        metavar="N",
        help="epochs before the reallocation of authors (default: %(default)s)",
    )
    add("--step", type=int, default=5,
        help="epochs of a process; the next one does not lower the learning rate for what the last "
        "validation of this one said (default: %(default)s)")  # fmt: skip
    add("--lr-schedule", choices=["halved", "linear"], default="halved",
        help="the learning rate is halved when validation gets worse, or falls to nothing on a "
        "line over all --epochs (default: %(default)s)")  # fmt: skip
    add("--report", action="store_true", help="train nothing, sum up what there is")
    args = parser.parse_args()
    moving = [name for name in args.systems if name.endswith("moved") or name == "authors"]
    if args.for_seconds is not None and moving:
        parser.error(f"--for-seconds moves no words after epochs; leave {', '.join(moving)} out")
    if args.for_seconds is not None and args.lr_schedule == "linear":
        parser.error("--lr-schedule linear needs to know its end: --epochs, not --for-seconds")
    return args


def find_text(folder: Path) -> dict[str, Path]:
    """Returns the files of the splits."""
    files = {}
    for split in SPLITS:
        found = sorted(folder.glob(f"*{split}.txt")) or sorted(folder.glob(f"*{split}.tokens"))
        if len(found) != 1:
            raise SystemExit(f"{folder}: expected one file *{split}.txt, found {len(found)}")
        files[split] = found[0]
    return files


def count_tokens(text: Path) -> int:
    """Returns the words of the training text and the ends of its lines."""
    with open(find_text(text)["train"], encoding="utf-8") as file:
        return sum(len(line.split()) + 1 for line in file)


def binarise(text: Path, out: Path) -> Path:
    """Makes fairseq's binary data, unless they are there."""
    if not (out / "bin" / "test.idx").exists():
        files = find_text(text)
        pairs = [part for split in SPLITS for part in (f"--{split}pref", files[split])]
        call("preprocess", "--only-source", *pairs, "--destdir", out / "bin")
    return out / "bin"


def model_flags(system: str, args: argparse.Namespace, num_words: int) -> list[Any]:
    """Returns the flags of a system's task, model and criterion."""
    if system in OURS:
        ffn_dim = 0 if system in WITHOUT_FFN else 4 * args.width
        shape = []
        if system.endswith("rows"):
            rows = math.ceil(4 * math.sqrt(num_words))
            shape = ["--table-shape", f"{rows}x{math.ceil(num_words / rows)}"]
        return [
            "--user-dir", PLUGIN, "--task", "lightrnn_language_modeling", "--carry-hidden-state",
            "--arch", "lightrnn_lm", "--criterion", "two_component_cross_entropy",
            "--embed-dim", args.width, "--hidden-size", args.width, "--num-layers", args.layers,
            "--output-ffn-dim", ffn_dim, *shape, *OURS[system],
        ]  # fmt: skip
    flags = [
        "--task", "language_modeling", "--arch", "lstm_lm", "--decoder-embed-dim", args.width,
        "--decoder-hidden-size", args.width, "--decoder-out-embed-dim", args.width,
        "--decoder-layers", args.layers,
    ]  # fmt: skip
    if system == "lstm_lm":
        return [*flags, "--criterion", "cross_entropy"]
    cutoffs = [cutoff for cutoff in CUTOFFS if cutoff < num_words] or [num_words // 5]
    joined = ",".join(map(str, cutoffs))
    return [*flags, "--criterion", "adaptive_loss", "--adaptive-softmax-cutoff", joined,
            "--ddp-backend", "legacy_ddp"]  # fmt: skip


def schedule_flags(args: argparse.Namespace) -> list[Any]:
    """Returns the flags of the learning rate's schedule."""
    if args.lr_schedule == "halved":
        return ["--lr-scheduler", "reduce_lr_on_plateau", "--lr-shrink", 0.5]
    updates = math.ceil(count_tokens(args.text) / (args.batch_size * args.block))
    total = updates * args.epochs
    return ["--lr-scheduler", "polynomial_decay", "--total-num-update", total]


def train(system: str, seed: int, data: Path, folder: Path, args: argparse.Namespace) -> None:
    """Trains until the epochs or the seconds are spent, a few epochs a process."""
    num_words = len((data / "dict.txt").read_text(encoding="utf-8").splitlines()) + 4
    flags = [
        data, *model_flags(system, args, num_words), "--dropout", args.dropout,
        "--tokens-per-sample", args.block, "--batch-size", args.batch_size, "--optimizer", "adam",
        "--lr", args.lr, *schedule_flags(args), "--clip-norm", 1, "--seed", seed,
        *device_flags(args),
    ]  # fmt: skip
    if args.for_seconds is not None:
        train_for(folder, flags, args.for_seconds, args.validate_updates)
        return
    if system.endswith("moved"):
        for goal in range(args.step, args.epochs, args.step):
            epochs = ",".join(str(epoch) for epoch in MOVED_AFTER if epoch < goal)
            moving = [*flags, "--reallocate-epochs", epochs]
            train_in_steps(folder, moving, goal, args.step, args.seconds)
        epochs = ",".join(str(epoch) for epoch in MOVED_AFTER if epoch < args.epochs)
        flags += ["--reallocate-epochs", epochs]
    if system == "authors":
        first = min(args.authors_round, args.epochs)
        train_in_steps(folder, flags, first, args.step, args.seconds)
        if read_lines(folder / "steps.jsonl")[-1]["epoch"] == args.authors_round < args.epochs:
            device = "cuda" if args.gpu else "cpu"
            reallocate_as_the_authors(folder, data, args.authors_round, device)
            # The loss of the torn table is not to be compared with the best one before: the
            # schedule would lower the learning rate after every epoch.
            goal = min(first + args.step, args.epochs)
            anew = [*flags, "--reset-lr-scheduler"]
            train_in_steps(folder, anew, goal, args.step, args.seconds)
    train_in_steps(folder, flags, args.epochs, args.step, args.seconds)


def reallocate_as_the_authors(folder: Path, data: Path, epoch: int, device: str) -> None:
    """Re-seats the words of the last checkpoint, that of an epoch, greedily and once."""
    checkpoint = folder / "checkpoint_last.pt"
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    if state["model"]["decoder.reallocation_round"] > 0:
        return
    with tempfile.TemporaryDirectory() as scratch:
        export, unused, new = (Path(scratch) / name for name in ("export", "unused.pt", "new.pt"))
        flags = ["--memory", "4", "--device", device, "--output"]
        reallocate([str(checkpoint), str(data), *flags, str(unused), "--export", str(export)])
        instance = load_instance(export)
        table = WordTable.from_cells(regret_greedy(instance), instance.table.shape)
        with open(data / "dict.txt", encoding="utf-8") as dictionary:
            words = [line.rsplit(" ", 1)[0] for line in dictionary]
        greedy = Path(scratch) / "table.txt"
        table.save(greedy, ["<s>", "<pad>", "</s>", "<unk>", *words])
        reallocate([str(checkpoint), str(data), "--table", str(greedy), "--output", str(new)])
        shutil.copy(new, folder / "new.pt")
        os.replace(folder / "new.pt", checkpoint)
    append_line(folder / "reallocations.jsonl", {"epoch": epoch})


def test(system: str, data: Path, folder: Path, args: argparse.Namespace) -> None:
    """Scores the test split with the best checkpoint and counts parameters."""
    if is_tested(folder):
        return
    flags = [*device_flags(args), "--path", folder / "checkpoint_best.pt"]
    # Without its limit of positions raised, fairseq skips blocks longer than those of training.
    longer = {"tokens_per_sample": TEST_BLOCK, "max_target_positions": TEST_BLOCK}
    if system in OURS:
        flags += ["--user-dir", PLUGIN, "--task", "lightrnn_language_modeling",
                  "--carry-hidden-state", "--tokens-per-sample", args.block,
                  "--batch-size", args.batch_size, "--gen-subset", "test"]  # fmt: skip
    else:
        flags += ["--task", "language_modeling", "--model-overrides", longer]
    if system == "lstm_lm-adaptive":
        # The criterion knows a word's probability without all the others, fairseq-eval-lm does not.
        # It leaves out the loss of one word a cluster, that whose place there is the number of the
        # padding: five words in 100,000.
        flags += ["--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp"]
        output = call("validate", data, *flags, "--valid-subset", "test",
                      "--batch-size", 4, "--log-format", "json")  # fmt: skip
        found = re.search(r"\"test_loss\": \"([0-9.]+)\"()", output)
    else:
        if system == "lstm_lm":
            flags += ["--tokens-per-sample", TEST_BLOCK, "--batch-size", 4, "--gen-subset", "test"]
        output = call("eval_lm", data, *flags)
        found = re.search(r"Loss \(base 2\): ([0-9.]+), Perplexity: ([0-9.]+)", output)
    if found is None or "will be skipped" in output:
        raise SystemExit(f"{folder}: no perplexity of the whole test in\n{output[-2000:]}")
    perplexity = float(found[2]) if found[2] else round(2 ** float(found[1]), 2)
    epoch = read_lines(folder / "steps.jsonl")[-1]["epoch"]
    result = {"epoch": epoch, "test_ppl": perplexity, **count_parameters(folder, VOCABULARY)}
    (folder / "test.json").write_text(json.dumps(result) + "\n")


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what is needed to reproduce the figures."""
    digests = {
        split: hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for split, path in find_text(args.text).items()
    }
    # benchmark_tables.py has no such flag.
    by_clock = getattr(args, "for_seconds", None) is not None
    names = ("width", "layers", "dropout", "lr", "batch_size", "block", "lr_schedule")
    return {
        "settings": {name: getattr(args, name) for name in names if hasattr(args, name)},
        "sha256": digests,
        "train_tokens": count_tokens(args.text),
        "clock": "seconds" if args.gpu or by_clock else "cpu_seconds",
        "shared": args.gpu,
        **machine(),
    }


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    data = binarise(args.text, args.out)
    for seed in args.seeds:
        for system in args.systems:
            folder = args.out / f"{system}-{seed}"
            if not args.report:
                train(system, seed, data, folder, args)
            if (folder / "steps.jsonl").exists():
                test(system, data, folder, args)
                summarise(args.out, describe(args))


if __name__ == "__main__":
    main()
