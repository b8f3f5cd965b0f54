"""Trains language models of one width side by side and compares their perplexity, speed and size.

    python scripts/benchmark_language_model.py FOLDER OUTPUT --seeds 1 2 --epochs 30

FOLDER holds ``train.txt``, ``valid.txt`` and ``test.txt`` (anything may stand before ``train``, as
in ``ptb.train.txt``); OUTPUT receives binarised data, a folder for each run, ``results.json``,
``results.md`` and curves. Runs are processes of ``fairseq-train`` with one thread each, all with
the same width, dropout, optimiser and schedule. Finished runs are kept, interrupted ones go on from
their last checkpoint, and ``--report`` sums up what there is.

Systems (``--systems``), LSTMs first:

* ``softmax``: an ordinary softmax, a table of one component; ``softmax-tied``: with one set of
  vectors for input and output; ``softmax-ffn``: with a feed-forward layer of four times the width;
* ``recommended``: ``lightrnn_lm_gated`` without one more flag; ``-separate``: with component
  vectors of its own for input and output; ``-linear``: without the feed-forward layer;
  ``-recurrent``: without that and with the paper's second recurrent step in place of gates (64
  numbers of each word's own, as has the recommended one of a small vocabulary); ``-random``: on a
  random table;
* ``gated``: with nothing but one table; ``-bias``: and a bias for each word; ``-further``: three
  further tables, ``-further-bias``: both; ``-rows``: 4√V rows of √V/4 columns; ``-3d``, ``-4d``:
  with three and four components;
* ``recurrent``: the paper's model on a co-occurrence table; ``-further``, ``-rows``: as above;
* ``random``: the paper's model on a random table; ``authors``: that, with words moved once,
  greedily, as by the authors' program;
* ``lstm_lm``, ``lstm_lm-adaptive``: fairseq's, with full and with adaptive softmax;
  ``lstm_lm-narrow``, ``lstm_lm-adaptive-narrow``: with vectors of 64 below an LSTM of the full
  width, the former with one set of them for input and output.

* ``kenlm``: a 5-gram of KenLM, whose programs must be on the PATH, once for all seeds.

Transformers of as many words a batch: ``lightrnn_transformer_lm``, the recommended one;
``transformer_lm``, fairseq's, with one set of vectors for input and output, and
``transformer_lm-adaptive``, with adaptive input and softmax that share theirs.

``@8000`` after the name of another system, as in ``lstm_lm@8000``, trains it on so many pieces of
words by sentencepiece. Its perplexity is that of a word, spelt in the pieces that sentencepiece
splits it into: an upper bound, since all of its spellings together are at least as probable.

LSTMs of the plugin carry their hidden state from block to block. fairseq's cannot: they are trained
on blocks, and tested on blocks so long that the start does not matter. Transformers see nothing
beyond their block, in training as in the test.

Seconds are those that the CPU worked for a training process, start and validation included, so
that other work on the machine changes them little. Perplexities are those of the checkpoint with
the best validation loss.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from language_model_report import summarise
from language_model_runs import (
    OURS,
    PEERS,
    add_training_flags,
    claim_folder,
    schedule_flags,
    test,
    training_flags,
)
from language_model_text import (
    binarise,
    count_tokens,
    find_text,
    require_known_words,
    split_words,
)
from side_by_side import append_line, commit, last_epoch, train_for, train_in_steps, write_whole

# Of fairseq's adaptive softmax; those beyond the vocabulary are left out, and those of clusters
# whose words would have no numbers left: they have a quarter of those of the cluster before.
CUTOFFS = (2_000, 10_000, 50_000, 200_000)
NARROW = 64  # width of vectors below a wider LSTM
ONE_TABLE = ["--word-dim", "0", "--further-tables", "0"]
# Architecture and flags of models of the plugin with an LSTM.
LSTMS: dict[str, list[str]] = {
    "softmax": ["lightrnn_lm", "--table-shape", "1d"],
    "softmax-tied": ["lightrnn_lm", "--table-shape", "1d", "--component-vectors", "shared"],
    "softmax-ffn": ["lightrnn_lm_gated", "--table-shape", "1d"],
    "recommended": ["lightrnn_lm_gated"],
    "recommended-separate": ["lightrnn_lm_gated", "--component-vectors", "separate"],
    "recommended-linear": ["lightrnn_lm_gated", "--output-ffn-dim", "0"],
    "recommended-recurrent": ["lightrnn_lm", "--word-dim", "65"],
    "recommended-random": ["lightrnn_lm_gated", "--initial-table", "random"],
    "gated": ["lightrnn_lm_gated", *ONE_TABLE],
    "gated-bias": ["lightrnn_lm_gated", "--word-dim", "1", "--further-tables", "0"],
    "gated-further": ["lightrnn_lm_gated", "--word-dim", "0", "--further-tables", "3"],
    "gated-further-bias": ["lightrnn_lm_gated", "--word-dim", "1", "--further-tables", "3"],
    "gated-rows": ["lightrnn_lm_gated", *ONE_TABLE],
    "gated-3d": ["lightrnn_lm_gated", *ONE_TABLE, "--table-shape", "3d"],
    "gated-4d": ["lightrnn_lm_gated", *ONE_TABLE, "--table-shape", "4d"],
    "recurrent": ["lightrnn_lm"],
    "recurrent-further": ["lightrnn_lm", "--further-tables", "3"],
    "recurrent-rows": ["lightrnn_lm"],
    "random": ["lightrnn_lm", "--initial-table", "random"],
    "authors": ["lightrnn_lm", "--initial-table", "random"],
}
SYSTEMS = (*LSTMS, "lightrnn_transformer_lm", *PEERS)
KENLM = "kenlm"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_training_flags(parser, width=200, dropout=0.3, lanes=32)
    add("--systems", nargs="+", type=check_system, default=list(SYSTEMS), metavar="SYSTEM",
        help="what to compare (default: all that are trained, on words)")  # fmt: skip
    add("--epochs", type=int, default=30, help="of training (default: %(default)s)")
    add("--seconds", type=float, metavar="S",
        help="train a system no further once it has had S CPU seconds")  # fmt: skip
    add("--for-seconds", type=float, metavar="S",
        help="train every system for S seconds of the processor, not for epochs; of the clock with "
        "--gpu")  # fmt: skip
    add("--validate-updates", type=int, default=3000, metavar="N",
        help="with --for-seconds, updates between validations (default: %(default)s)")  # fmt: skip
    add("--step", type=int, default=5,
        help="epochs of a process; the next one does not lower the learning rate for what the last "
        "validation of this one said (default: %(default)s)")  # fmt: skip
    add("--lr-schedule", choices=["halved", "linear"], default="halved",
        help="the learning rate is halved when validation gets worse, or falls to nothing on a "
        "line over all --epochs or --for-seconds (default: %(default)s)")  # fmt: skip
    add("--authors-round", type=int, default=12, metavar="N",
        help="epochs before the reallocation of authors (default: %(default)s)")  # fmt: skip
    add("--transformer-layers", type=int, default=3, help="(default: %(default)s)")
    add("--transformer-heads", type=int, default=4, help="of attention (default: %(default)s)")
    add("--transformer-block", type=int, default=140, metavar="N",
        help="words of a block of transformers (default: %(default)s)")  # fmt: skip
    add("--transformer-lr", type=float, default=0.001,
        help="of Adam at first, for transformers (default: %(default)s)")  # fmt: skip
    add("--report", action="store_true", help="train nothing, sum up what there is")
    args = parser.parse_args()
    names = [system.partition("@")[0] for system in args.systems]
    if args.for_seconds is not None and "authors" in names:
        parser.error("--for-seconds moves no words after an epoch; leave authors out of --systems")
    return args


def check_system(name: str) -> str:
    """Returns the name of a system, if it is one."""
    system, at, pieces = name.partition("@")
    if system not in (*SYSTEMS, KENLM):
        known = ", ".join((*SYSTEMS, KENLM))
        raise argparse.ArgumentTypeError(f"{name}: there is no system {system}; there are {known}")
    if at and (system == KENLM or not pieces.isdecimal()):
        raise argparse.ArgumentTypeError(f"{name}: expected pieces as in lstm_lm@8000")
    return name


def model_flags(system: str, args: argparse.Namespace, num_words: int) -> list[Any]:
    """Returns the flags of a system's task, model and criterion."""
    width = args.width
    if system in LSTMS:
        flags = [*OURS, "--carry-hidden-state", "--arch", *LSTMS[system], "--embed-dim", width,
                 "--hidden-size", width, "--num-layers", args.layers]  # fmt: skip
        if system.endswith("-rows"):
            flags += ["--table-shape", many_rows(num_words)]
        return flags
    name, *kinds = system.split("-")
    adaptive, narrow = "adaptive" in kinds, "narrow" in kinds
    if name == "lstm_lm":
        # An adaptive softmax has narrower vectors for rarer words by itself.
        outputs = NARROW if narrow and not adaptive else width
        sizes = ["--decoder-embed-dim", NARROW if narrow else width,
                 "--decoder-hidden-size", width,
                 "--decoder-out-embed-dim", outputs, "--decoder-layers", args.layers]  # fmt: skip
    else:
        sizes = ["--decoder-embed-dim", width, "--decoder-input-dim", width,
                 "--decoder-output-dim", width, "--decoder-ffn-embed-dim", 4 * width,
                 "--decoder-layers", args.transformer_layers,
                 "--decoder-attention-heads", args.transformer_heads]  # fmt: skip
    if name == "lightrnn_transformer_lm":
        return [*OURS, "--arch", name, *sizes]
    flags = ["--task", "language_modeling", "--arch", name, *sizes]
    if not adaptive:
        tied = narrow or name == "transformer_lm"
        shared = ["--share-decoder-input-output-embed"] if tied else []
        return [*flags, *shared, "--criterion", "cross_entropy"]
    levels = [cutoff for level, cutoff in enumerate(CUTOFFS, 1) if width >= 4**level]
    joined = cutoffs_within(num_words, levels)
    if name == "transformer_lm":
        flags += ["--adaptive-input", "--adaptive-input-cutoff", joined, "--tie-adaptive-weights"]
    return [*flags, "--criterion", "adaptive_loss", "--adaptive-softmax-cutoff", joined,
            "--ddp-backend", "legacy_ddp"]  # fmt: skip


def many_rows(num_words: int) -> str:
    """Returns the shape of a table of four times as many rows as a square has."""
    rows = math.ceil(4 * math.sqrt(num_words))
    return f"{rows}x{math.ceil(num_words / rows)}"


def cutoffs_within(num_words: int, cutoffs: Sequence[int] = CUTOFFS) -> str:
    """Returns those cutoffs of an adaptive softmax that a vocabulary has room for, or one."""
    some = [cutoff for cutoff in cutoffs if cutoff < num_words] or [num_words // 5]
    return ",".join(map(str, some))


def train(system: str, seed: int, data: Path, folder: Path, args: argparse.Namespace) -> None:
    """Trains until the epochs or the seconds are spent, a few epochs a process."""
    num_words = len((data / "dict.txt").read_text(encoding="utf-8").splitlines()) + 4
    flags = [
        *training_flags(system, seed, data, args), *schedule_flags(system, args),
        *model_flags(system, args, num_words),
    ]  # fmt: skip
    if args.for_seconds is not None:
        train_for(folder, flags, args.for_seconds, args.validate_updates, clock=args.gpu)
        return
    if system == "authors":
        first = min(args.authors_round, args.epochs)
        train_in_steps(folder, flags, first, args.step, args.seconds)
        if last_epoch(folder) == args.authors_round < args.epochs:
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
    import torch
    from allocation_peers import regret_greedy
    from benchmark_allocation import load
    from fairseq.data import Dictionary

    from fairseq_lightrnn.commands.reallocate import main as reallocate
    from fairseq_lightrnn.core.table import WordTable

    checkpoint = folder / "checkpoint_last.pt"
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    if state["model"]["decoder.reallocations.round"] > 0:
        return
    with tempfile.TemporaryDirectory() as scratch:
        export, unused, new = (Path(scratch) / name for name in ("export", "unused.pt", "new.pt"))
        flags = ["--memory", "4", "--device", device, "--output"]
        reallocate([str(checkpoint), str(data), *flags, str(unused), "--export", str(export)])
        instance = load(export)
        table = WordTable.from_cells(regret_greedy(instance), instance.table.shape)
        greedy = Path(scratch) / "table.txt"
        table.save(greedy, Dictionary.load(str(data / "dict.txt")).symbols)
        reallocate([str(checkpoint), str(data), "--table", str(greedy), "--output", str(new)])
        shutil.copy(new, folder / "new.pt")
        os.replace(folder / "new.pt", checkpoint)
    append_line(folder / "reallocations.jsonl", {"epoch": epoch})


def count_n_grams(data: Path, folder: Path, args: argparse.Namespace) -> None:
    """Counts KenLM's n-grams and tests them, unless that is done."""
    if (folder / "test.json").exists():
        return
    from export_peers import Kenlm, build_kenlm

    files, started = find_text(args.text), time.monotonic()
    built = build_kenlm(files["train"], data, folder / "n-grams", quantise=False)
    used = {"cpu_seconds": round(built.seconds, 1), "peak_mib": built.peak_mib,
            "seconds": round(time.monotonic() - started, 1),
            "commit": commit()}  # fmt: skip
    model, perplexities = Kenlm(folder / "n-grams"), {}
    for split in ("valid", "test"):
        with open(files[split], encoding="utf-8") as lines:
            scored = model.log_prob(list(lines))
        assert scored.words == count_tokens(args.text, split)
        perplexities[split] = round(scored.perplexity, 2)
    append_line(folder / "epochs.jsonl", {"epoch": 1, "valid_ppl": perplexities["valid"]})
    append_line(folder / "steps.jsonl", {"epoch": 1, "trained": 1, **used})
    numbers = {"parameters": built.numbers, "vocabulary_parameters": built.numbers}
    tested = {"epoch": 1, "test_ppl": perplexities["test"], **numbers}
    write_whole(folder / "test.json", json.dumps(tested) + "\n")


def run(system: str, seed: int, folder: Path, args: argparse.Namespace) -> None:
    """Trains and tests a system on words, or on pieces of them."""
    name, _, pieces = system.partition("@")
    out, per_word = args.out, None
    if pieces:
        out = args.out / f"pieces@{pieces}"
        text, per_word = split_words(args.text, out / "text", int(pieces))
        args = argparse.Namespace(**{**vars(args), "text": text})
    data = binarise(args.text, out)
    if name == KENLM:
        count_n_grams(data, folder, args)
        return
    if not args.report:
        train(name, seed, data, folder, args)
    test(name, data, folder, args, per_word)


def main() -> None:
    args = parse()
    spelt = [system for system in args.systems if "@" in system or system == KENLM]
    if spelt and not args.report:
        require_known_words(args.text, spelt[0])
    # A rate that falls on a line over the epochs must know the last one.
    by_epochs = args.lr_schedule == "linear" and args.for_seconds is None
    more = [] if by_epochs else ["epochs"]
    description = claim_folder(args, "seconds", "step", *more)
    for seed in args.seeds:
        for system in args.systems:
            folder = args.out / f"{system}-{seed}"
            wanted = not args.report and (system != KENLM or seed == args.seeds[0])
            if wanted or (folder / "steps.jsonl").exists():
                run(system, seed, folder, args)
                summarise(args.out, description)


if __name__ == "__main__":
    main()
