"""What benchmarks of language models share: texts, flags of a training, and the test of a model."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

from language_model_text import count_tokens, find_text
from side_by_side import (
    PLUGIN,
    add_gpu_flag,
    call,
    checksum,
    device_flags,
    is_tested,
    keep_settings,
    machine,
    write_test,
)

__all__ = [
    "OURS",
    "PEERS",
    "add_run_flags",
    "add_training_flags",
    "claim_folder",
    "describe",
    "schedule_flags",
    "test",
    "training_flags",
]

OURS = ("--user-dir", PLUGIN, "--task", "lightrnn_language_modeling")
"""Flags of a command that uses a model of the plugin."""
PEERS = (
    "lstm_lm", "lstm_lm-narrow", "lstm_lm-adaptive", "lstm_lm-adaptive-narrow",
    "transformer_lm", "transformer_lm-adaptive",
)  # fmt: skip
"""fairseq's own models, with full and with adaptive softmax."""
# A recurrent model without carried state is tested on blocks so long that the start hardly matters.
TEST_BLOCK = 2048
TRANSFORMER_WARMUP = 400  # updates


def add_run_flags(parser: argparse.ArgumentParser, lanes: int) -> None:
    """Adds the folders, the seeds, the batches and the device."""
    add = parser.add_argument
    add("text", type=Path, metavar="FOLDER", help="of the text files")
    add("out", type=Path, metavar="OUTPUT", help="folder to write to")
    add("--seeds", type=int, nargs="+", default=[1], help="of each system (default: %(default)s)")
    add("--batch-size", type=int, default=lanes,
        help="pieces of text that are read side by side (default: %(default)s)")  # fmt: skip
    add("--block", type=int, default=35, help="words of a block (default: %(default)s)")
    add("--bf16", action="store_true", help="train, but not test, in half precision")
    add_gpu_flag(parser)


def add_training_flags(
    parser: argparse.ArgumentParser, width: int, dropout: float, lanes: int
) -> None:
    """Adds what all models of a comparison have in common, with its defaults."""
    add_run_flags(parser, lanes)
    add = parser.add_argument
    add("--width", type=int, default=width, help="of vectors and networks (default: %(default)s)")
    add("--layers", type=int, default=1, help="of LSTMs (default: %(default)s)")
    add("--dropout", type=float, default=dropout, help="(default: %(default)s)")
    add("--lr", type=float, default=0.002, help="of Adam at first (default: %(default)s)")


def block_and_batch(system: str, args: argparse.Namespace) -> tuple[int, int]:
    """Returns the words of a block, and how many blocks a batch has: as many words for all."""
    if "transformer" not in system:
        return args.block, args.batch_size
    block: int = args.transformer_block
    return block, max(1, round(args.block * args.batch_size / block))


def schedule_flags(system: str, args: argparse.Namespace) -> list[Any]:
    """Returns the flags of the learning rate and its schedule."""
    flags: list[Any] = ["--lr", args.lr]
    if "transformer" in system:
        flags = ["--lr", args.transformer_lr, "--warmup-updates", TRANSFORMER_WARMUP]
    if args.lr_schedule == "halved":
        return [*flags, "--lr-scheduler", "reduce_lr_on_plateau", "--lr-shrink", 0.5]
    if args.for_seconds is not None:  # train_for_seconds.py lowers it by time
        updates = 1_000_000
    else:
        block, batch = block_and_batch(system, args)
        updates = args.epochs * math.ceil(count_tokens(args.text) / (block * batch))
    return [*flags, "--lr-scheduler", "polynomial_decay", "--total-num-update", updates]


def training_flags(system: str, seed: int, data: Path, args: argparse.Namespace) -> list[Any]:
    """Returns what ``fairseq-train`` is told of every model alike, but for the learning rate."""
    block, batch = block_and_batch(system, args)
    return [
        data, "--dropout", args.dropout, "--tokens-per-sample", block, "--batch-size", batch,
        "--optimizer", "adam", "--clip-norm", 1, "--seed", seed, *device_flags(args),
        *(["--bf16"] if args.bf16 else []),
    ]  # fmt: skip


def test(
    system: str,
    data: Path,
    folder: Path,
    args: argparse.Namespace,
    pieces_per_word: dict[str, float] | None = None,
) -> None:
    """Scores the test split with the best checkpoint and counts parameters, unless that is done.

    Args:
        system: one of ``PEERS``, or of the plugin.
        data: folder of binarised text.
        folder: of the run.
        args: settings of the comparison.
        pieces_per_word: of each split, where the text is one of pieces; perplexity is still that of
            a word, as far as it is spelt in these pieces.
    """
    if is_tested(folder):
        return
    block, batch = block_and_batch(system, args)
    flags = [*device_flags(args), "--path", folder / "checkpoint_best.pt"]
    if system not in PEERS:
        flags += [*OURS]
    else:
        flags += ["--task", "language_modeling"]
        if system.startswith("lstm_lm"):
            block, batch = TEST_BLOCK, 4
        # Without its limit of positions raised, fairseq skips blocks longer than those of training.
        longer = {"tokens_per_sample": block, "max_target_positions": block}
        flags += ["--model-overrides", longer]
    flags += ["--batch-size", batch]
    if "-adaptive" in system:
        # The criterion knows a word's probability without all the others, fairseq-eval-lm does not.
        # It leaves out the loss of one word a cluster, that whose place there is the number of the
        # padding: five words in 100,000.
        flags += ["--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp"]
        output = call("validate", data, *flags, "--valid-subset", "test", "--log-format", "json")
        found = re.search(r"\"test_loss\": \"([0-9.]+)\"()", output)
    else:
        output = call("eval_lm", data, *flags, "--tokens-per-sample", block, "--gen-subset", "test")
        found = re.search(r"Loss \(base 2\): ([0-9.]+), Perplexity: ([0-9.]+)", output)
    if found is None or "will be skipped" in output:
        raise SystemExit(f"{folder}: no perplexity of the whole test in\n{output[-2000:]}")
    if pieces_per_word is not None:
        perplexity = round(2 ** (float(found[1]) * pieces_per_word["test"]), 2)
        write_test(folder, test_ppl=perplexity, pieces_per_word=pieces_per_word)
        return
    write_test(folder, test_ppl=float(found[2]) if found[2] else round(2 ** float(found[1]), 2))


def claim_folder(args: argparse.Namespace, *free: str, **more: Any) -> dict[str, Any]:
    """Describes a comparison, whose folder is one of its settings and texts from now on.

    Args:
        args: the flags.
        *free: names of those that runs of one folder may differ in.
        **more: what they must have in common besides.

    Returns:
        What is needed to reproduce the figures.

    Raises:
        SystemExit: if the folder has runs of other settings or texts.
    """
    description = describe(args)
    fixed = {name: one for name, one in description["settings"].items() if name not in free}
    texts = {f"{split} text": one for split, one in description["sha256"].items()}
    keep_settings(args.out, {**fixed, **texts, "gpu": args.gpu, **more})
    return description


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what is needed to reproduce the figures."""
    ignored = ("text", "out", "seeds", "systems", "tables", "rungs", "gpu", "report")
    return {
        "settings": {name: value for name, value in vars(args).items() if name not in ignored},
        "sha256": {split: checksum(path) for split, path in find_text(args.text).items()},
        "train_tokens": count_tokens(args.text),
        "clock": "seconds" if args.gpu else "cpu_seconds",
        "shared": args.gpu,
        **machine(),
    }
