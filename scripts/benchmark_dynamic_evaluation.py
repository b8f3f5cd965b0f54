"""Tests language models that go on learning while they read: dynamic evaluation.

    python scripts/benchmark_dynamic_evaluation.py DATA CHECKPOINT … --output dynamic.json

DATA is the folder of binarised text that the models were trained on. Each block of the text is
scored before anything is learnt from it; then every parameter takes a step against its gradient,
divided by what is usual for it in the training text, and a step back to where training left it
(Krause, Kahembwe, Murray and Renals, arXiv 1709.07432, section 4.2). How large both are is chosen
by the beginning of the validation text, for each model by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from fairseq.data import data_utils
from side_by_side import checksum, machine, write_whole
from torch import Tensor

from fairseq_lightrnn.language_model import LanguageModel

RATES = (1e-4, 2e-4, 4e-4, 8e-4)
RETURNS = (1e-3, 2e-3, 4e-3)
_LANES = 20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder of binarised text")
    add("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="of LSTMs of the plugin")
    add("--block", type=int, default=5, help="words between two steps (default: %(default)s)")
    add("--words", type=int, default=10_000, metavar="N",
        help="of the validation text, to choose by (default: %(default)s)")  # fmt: skip
    add("--batches", type=int, default=300, metavar="N",
        help="of the training text, to know usual gradients by (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help="JSON file to write to")
    return parser.parse_args()


def read(data: Path, split: str, model: LanguageModel) -> Tensor:
    """Returns the words of a split, (N), after an end of sentence."""
    text = data_utils.load_indexed_dataset(str(data / split), model.dictionary)
    start = torch.tensor(model.start)
    return torch.cat([start, *(text[index].long() for index in range(len(text)))])


def blocks(words: Tensor, length: int, lanes: int = 1) -> Iterator[Tensor]:
    """Yields parts of a text, (lanes, length + 1), each from the last word of the one before."""
    each = len(words) // lanes
    rows = words[: each * lanes].view(lanes, each)
    for start in range(0, each - 1, length):
        yield rows[:, start : start + length + 1]


class Learner:
    """A model that learns from what it reads.

    Args:
        model: a language model.
        training: parts of its training text; see :func:`blocks`.
    """

    def __init__(self, model: LanguageModel, training: Iterable[Tensor]) -> None:
        self.decoder = model.decoder
        self.parameters = list(self.decoder.parameters())
        self.trained = [parameter.detach().clone() for parameter in self.parameters]
        squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        state, number = None, 0
        for part in training:
            loss, state = self._loss(part, state)
            gradients = self._gradients(loss / part[:, 1:].numel())
            torch._foreach_addcmul_(squares, gradients, gradients)
            number += 1
        self.usual = [(square / number).sqrt() for square in squares]
        total = sum(usual.sum() for usual in self.usual)
        mean = total / sum(usual.numel() for usual in self.usual)
        # Parameters that training text hardly moves are not to jump, nor to stay for ever.
        self.divisors = [usual + mean for usual in self.usual]
        self.pulls = [(usual / mean).clamp(max=10) for usual in self.usual]

    def perplexity(self, words: Tensor, length: int, rate: float = 0, back: float = 0) -> float:
        """Reads a text and learns from it, then forgets it.

        Args:
            words: of the text, (N).
            length: words between two steps.
            rate: of the steps; 0 learns nothing.
            back: share of the way back to what was trained, in each step.

        Returns:
            The perplexity; infinite if the steps were so large that it is no number.
        """
        state, loss_of_all = None, 0.0
        for part in blocks(words, length):
            with torch.set_grad_enabled(rate > 0):
                loss, state = self._loss(part, state)
            loss_of_all += loss.item()
            if rate > 0:
                self._step(self._gradients(loss / length), rate, back)
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.trained)
        if not math.isfinite(loss_of_all):
            return math.inf
        return math.exp(loss_of_all / (len(words) - 1))

    def _loss(self, part: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is not None:
            state = tuple(tensor.detach() for tensor in state)
        hidden, state, *_ = self.decoder(part, state)
        scores = self.decoder.head.softmax(hidden.flatten(0, 1), part[:, 1:].reshape(-1))
        return -scores.sum(), state

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.parameters, materialize_grads=True))

    @torch.no_grad()
    def _step(self, gradients: list[Tensor], rate: float, back: float) -> None:
        steps = torch._foreach_div(gradients, self.divisors)
        torch._foreach_add_(self.parameters, steps, alpha=-rate)
        ways = torch._foreach_sub(self.trained, self.parameters)
        torch._foreach_addcmul_(self.parameters, ways, self.pulls, back)


def measure(checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the perplexities of a model, without and with learning."""
    model = LanguageModel.from_pretrained(checkpoint, args.data)
    training = blocks(read(args.data, "train", model), args.block, _LANES)
    learner = Learner(model, itertools.islice(training, args.batches))
    valid = read(args.data, "valid", model)[: args.words]
    tried = {
        (rate, back): learner.perplexity(valid, args.block, rate, back)
        for rate in RATES
        for back in RETURNS
    }
    rate, back = min(tried, key=lambda settings: tried[settings])
    test = read(args.data, "test", model)
    return {
        "test_ppl": round(learner.perplexity(test, args.block), 2),
        "dynamic_test_ppl": round(learner.perplexity(test, args.block, rate, back), 2),
        "rate": rate,
        "back": back,
        "tried": [
            [*settings, round(ppl, 2) if math.isfinite(ppl) else None]
            for settings, ppl in tried.items()
        ],
    }


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    report = {
        "settings": {"block": args.block, "words": args.words, "batches": args.batches},
        "sha256": {"test.bin": checksum(args.data / "test.bin")},
        **machine(),
        "systems": {},
    }
    folders = [path if path.is_dir() else path.parent for path in args.checkpoints]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise SystemExit(f"{' '.join(names)}: two folders of a name; rename one")
    for name, checkpoint in zip(names, args.checkpoints, strict=True):
        found = measure(checkpoint, args)
        report["systems"][name] = found
        print(checkpoint, found, flush=True)
        if args.output:
            write_whole(args.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
