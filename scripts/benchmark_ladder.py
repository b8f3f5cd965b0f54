"""Trains small language models with every regulariser, ours and softmax models of the same size.

    python scripts/benchmark_ladder.py FOLDER OUTPUT --seeds 1 --rungs softmax-2.6M lightrnn-1.3M

FOLDER holds text as for ``benchmark_language_model.py``; OUTPUT receives binarised data, a folder
for each run, ``results.json``, ``results.md`` and curves. Interrupted trainings go on from their
last epoch. A rung is named by its kind and its parameters on Penn Treebank, or on WikiText-2
(``lightrnn-wikitext-2-3M``, ``narrow-wikitext-2-3M``):

* ``softmax``: two layers of an LSTM with an ordinary softmax, one set of vectors for input and
  output (``--arch lightrnn_lm --table-shape 1d --component-vectors shared``);
* ``narrow``: the same with vectors narrower than the LSTM, whose outputs are projected to them;
* ``lightrnn``: two layers and a feed-forward layer (``--arch lightrnn_lm_gated``), words moved
  after two epochs of the first third. Of its own a word has a bias and three further tables, from
  2M parameters on 64 numbers in their place.

All are trained alike: 20 pieces of text with carried hidden state, blocks of 35 words, Adam, its
learning rate rising for 300 updates and then falling to nothing on a line, gradients clipped at
0.5, weight decay 0.03, AWD-LSTM's dropouts, as many epochs. What differs is a learning rate for
each kind, and another for ``narrow`` on WikiText-2, and how strong the dropouts of a rung are.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

from language_model_report import summarise
from language_model_runs import OURS, add_run_flags, claim_folder, test, training_flags
from language_model_text import binarise, count_tokens
from side_by_side import train_in_steps


class Rung(NamedTuple):
    """A model of the ladder.

    Attributes:
        width: of the LSTM, and of vectors unless they are narrower.
        dropout: of inputs, outputs, between layers, and of recurrent matrices.
        ffn: units of the feed-forward layer of ours.
        word_dim: numbers of each word's own in ours, a bias among them.
        vectors: width of narrower ones.
        lr: learning rate, where another than that of its kind was found to be better.
    """

    width: int
    dropout: float
    ffn: int = 0
    word_dim: int = 1
    vectors: int = 0
    lr: float | None = None


SOFTMAX = {
    "0.5M": Rung(45, 0.05),
    "1M": Rung(84, 0.1),
    "2M": Rung(152, 0.2),
    "2.6M": Rung(200, 0.25),
    "5M": Rung(320, 0.35),
    "10M": Rung(520, 0.45),
}
NARROW = {
    "0.5M": Rung(110, 0.1, vectors=32),
    "1M": Rung(156, 0.15, vectors=64),
    "2.6M": Rung(310, 0.3, vectors=128),
    "wikitext-2-1M": Rung(150, 0.05, vectors=20, lr=0.008),
    "wikitext-2-3M": Rung(248, 0.1, vectors=64, lr=0.008),
}
LIGHTRNN = {
    "0.5M": Rung(112, 0.05, 384),
    "1M": Rung(170, 0.15, 680),
    "1.3M": Rung(200, 0.2, 800),
    "2M": Rung(210, 0.25, 800, 65),
    "2.6M": Rung(272, 0.3, 1000, 65),
    "5M": Rung(416, 0.4, 1280, 65),
    "10M": Rung(608, 0.5, 2048, 65),
    "wikitext-2-1M": Rung(148, 0.05, 592),
    "wikitext-2-3M": Rung(158, 0.1, 632, 65),
}
LEARNING_RATES = {"softmax": 0.002, "narrow": 0.004, "lightrnn": 0.003}
RUNGS = {f"softmax-{size}": rung for size, rung in SOFTMAX.items()}
RUNGS |= {f"narrow-{size}": rung for size, rung in NARROW.items()}
RUNGS |= {f"lightrnn-{size}": rung for size, rung in LIGHTRNN.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_flags(parser, lanes=20)
    add = parser.add_argument
    add("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS), metavar="RUNG",
        help=f"which of {', '.join(RUNGS)} (default: all)")  # fmt: skip
    add("--epochs", type=int, default=48, help="of training (default: %(default)s)")
    add("--report", action="store_true", help="train nothing, sum up what there is")
    return parser.parse_args()


def model_flags(name: str, epochs: int) -> list[Any]:
    """Returns the flags of a rung: its model, regularisers, learning rate and reallocations."""
    kind, rung = name.partition("-")[0], RUNGS[name]
    awd = f"awd,weight={rung.dropout},component=0.05,activation=0,change=0"
    flags = [
        "--embed-dim", rung.vectors or rung.width, "--hidden-size", rung.width, "--num-layers", 2,
        "--dropout", rung.dropout, "--regularise", awd, "--lr", rung.lr or LEARNING_RATES[kind],
    ]  # fmt: skip
    if kind != "lightrnn":
        own = ["--table-shape", "1d", "--component-vectors", "shared"]
        return ["--arch", "lightrnn_lm", *flags, *own]
    moves = sorted({max(1, epochs // 8), max(1, epochs * 10 // 32)})
    own = ["--word-dim", rung.word_dim]
    if rung.word_dim == 1:
        own += ["--further-tables", 3]
    return [
        "--arch", "lightrnn_lm_gated", *flags, *own, "--output-ffn-dim", rung.ffn,
        "--reallocate-epochs", ",".join(map(str, moves)),
    ]  # fmt: skip


def train(name: str, seed: int, data: Path, args: argparse.Namespace) -> Path:
    """Trains a rung and returns its folder."""
    # Rounded up to tens, so that the last updates change something too.
    updates = 10 * math.ceil(count_tokens(args.text) / (args.block * args.batch_size) / 10)
    own = argparse.Namespace(**vars(args), dropout=RUNGS[name].dropout)
    flags = [
        *training_flags("lstm", seed, data, own), *OURS, "--carry-hidden-state",
        "--clip-norm", 0.5, "--weight-decay", 0.03, "--lr-scheduler", "polynomial_decay",
        "--warmup-updates", 300, "--total-num-update", args.epochs * updates,
        *model_flags(name, args.epochs),
    ]  # fmt: skip
    folder: Path = args.out / f"{name}-{seed}"
    train_in_steps(folder, flags, args.epochs, args.epochs)
    return folder


def main() -> None:
    args = parse()
    description = claim_folder(args)
    data = binarise(args.text, args.out)
    for seed in args.seeds:
        for name in args.rungs:
            if not args.report:
                folder = train(name, seed, data, args)
                test("lightrnn_lm", data, folder, args)
            summarise(args.out, description)


if __name__ == "__main__":
    main()
