"""``lightrnn-rescore``: re-rank n-best lists with a language model.

Each hypothesis gets ``score + LM_WEIGHT · log P(text) + LENGTH_WEIGHT · words``, log P in nats with
the end of sentence. The weights are given, read from a file, or tuned on lists with references.
A KenLM model may be interpolated word by word: P = (1 - a) · P(LightRNN) + a · P(KenLM).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from fairseq_lightrnn.checkpoint import find_checkpoint
from fairseq_lightrnn.commands.nbest import (
    Hypothesis,
    Weights,
    format_hypothesis,
    read_nbest,
    read_references,
    reference_format,
    tune,
)
from fairseq_lightrnn.commands.run import command
from fairseq_lightrnn.commands.text import add_scoring_flags, read_texts
from fairseq_lightrnn.files import STANDARD, check_outputs, read_text, whole_file
from fairseq_lightrnn.language_model import LanguageModel

__all__ = ["main"]

logger = logging.getLogger(__name__)

_KENLM_WEIGHTS = tuple(share / 10 for share in range(11))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lightrnn-rescore",
        description="Re-rank n-best lists ('id ||| hypothesis ||| features ||| score') with a "
        "trained language model.",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint file, or folder with checkpoint_best.pt")
    add("nbest", nargs="?", default=STANDARD, help="n-best lists, plain or .gz; - is the standard "
        "input (default)")  # fmt: skip
    add(
        "--data",
        metavar="DIR",
        help="folder with dict.txt (default: that of the training, or "
        "what lies beside the checkpoint)",
    )
    add("--lm-weight", type=float, metavar="W",
        help=f"weight of log P (default: {Weights.lm})")  # fmt: skip
    add("--length-weight", type=float, metavar="W",
        help=f"added for each word; negative favours short ones (default: {Weights.length})"
        )  # fmt: skip
    add("--kenlm", metavar="FILE", help="interpolate with this KenLM model (ARPA or binary)")
    add("--kenlm-weight", type=float, metavar="A",
        help=f"share of the KenLM model, 0 to 1 (default: {Weights.kenlm})")  # fmt: skip
    add("--weights", metavar="FILE", help="read the weights that --save-weights wrote")
    add("--tune", metavar="REFERENCES", help="choose the weights that are best for these right "
        "sentences: line id + 1 is that of list id (Moses), or 'id words' lines (Kaldi)"
        )  # fmt: skip
    add("--reference-format", choices=("moses", "kaldi"),
        help="which of the two (default: Kaldi's if ids are no numbers, or if each line begins "
        "with one of its own)")  # fmt: skip
    add("--metric", choices=("wer", "bleu"), help="what --tune optimises (default: wer)")
    add("--save-weights", metavar="FILE", help="write the weights here, as JSON")
    add("--best", action="store_true", help="write the first choice of every list alone: its text, "
        "behind its id where ids are not numbers")  # fmt: skip
    add("--output", default=STANDARD, metavar="FILE",
        help="write here instead of to the standard output")  # fmt: skip
    add_scoring_flags(parser)
    return parser.parse_intermixed_args(arguments)


@command("lightrnn-rescore", _parse)
def main(args: argparse.Namespace) -> None:
    """Rescores n-best lists as the flags ask for."""
    weights = _weights(args)
    check_outputs(
        {"--output": args.output, "--save-weights": args.save_weights},
        [find_checkpoint(args.checkpoint), args.nbest, args.kenlm, args.tune],
    )
    kenlm = _load_kenlm(args.kenlm) if args.kenlm else None
    lists = read_nbest(read_texts([args.nbest]), args.nbest)
    references = None
    if args.tune and not lists:
        raise ValueError(f"{args.nbest}: holds no n-best list to tune on (--tune {args.tune})")
    if args.tune:
        keys = [nbest[0].key for nbest in lists]
        lines = list(read_texts([args.tune]))
        form = args.reference_format or reference_format(lines, keys, args.tune)
        references = read_references(lines, keys, args.tune, form)
    model = LanguageModel.from_pretrained(args.checkpoint, args.data, args.device)
    scores = _Scores(model, kenlm, lists, args)
    if references is not None:
        weights = _tune(lists, references, scores, weights, args)
    if args.save_weights:
        with whole_file(args.save_weights) as file:
            saved = asdict(weights)
            if kenlm is None:
                del saved["kenlm"]
            print(json.dumps(saved), file=file)
    numbered = all(nbest[0].key.isdecimal() for nbest in lists)
    with whole_file(args.output) as file:
        for nbest, lm_scores, features in zip(
            lists, scores.of_share(weights.kenlm), scores.features(), strict=True
        ):
            order, totals = _ranked(nbest, lm_scores, weights)
            if args.best:
                first = nbest[order[0]]
                print(first.text if numbered else f"{first.key} {first.text}", file=file)
                continue
            for index in order:
                print(format_hypothesis(nbest[index], features[index], totals[index]), file=file)


def _weights(args: argparse.Namespace) -> Weights:
    if args.batch_words < 1:
        raise ValueError(f"--batch-words {args.batch_words}: must be at least 1")
    if args.kenlm_weight is not None and not args.kenlm:
        raise ValueError(f"--kenlm-weight {args.kenlm_weight} needs --kenlm, the model")
    if args.reference_format and not args.tune:
        raise ValueError(f"--reference-format {args.reference_format} needs --tune")
    for flag in ("weights", "lm_weight", "length_weight"):
        if args.tune and getattr(args, flag) is not None:
            raise ValueError(f"--tune and --{flag.replace('_', '-')} exclude each other")
    if args.metric and not args.tune:
        raise ValueError(f"--metric {args.metric} needs --tune")
    weights = Weights() if args.weights is None else _read_weights(args.weights, bool(args.kenlm))
    given = {"lm": args.lm_weight, "length": args.length_weight, "kenlm": args.kenlm_weight}
    weights = replace(
        weights, **{name: value for name, value in given.items() if value is not None}
    )
    for name in ("lm", "length"):
        if not math.isfinite(getattr(weights, name)):
            raise ValueError(f"--{name}-weight {getattr(weights, name)}: must be finite")
    if not 0 <= weights.kenlm <= 1:
        raise ValueError(f"--kenlm-weight {weights.kenlm}: must be between 0 and 1")
    return weights


def _read_weights(path: str, has_kenlm: bool) -> Weights:
    try:
        content = read_text(path)
    except ValueError as error:
        raise ValueError(f"--weights {error}") from None
    try:
        values = json.loads(content)
        weights = Weights(**{name: float(value) for name, value in values.items()})
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"--weights {path}: not a file that --save-weights wrote") from None
    if "kenlm" in values and not has_kenlm:
        raise ValueError(f"--weights {path}: are those of a KenLM model too; give it with --kenlm")
    return weights


def _load_kenlm(path: str) -> Any:
    if not Path(path).is_file():
        raise ValueError(f"--kenlm {path}: no such file")
    try:
        import kenlm
    except ImportError:
        raise ValueError("--kenlm needs the package kenlm: pip install kenlm") from None
    try:
        return kenlm.Model(path)
    except (OSError, UnicodeDecodeError) as error:
        # Of bytes that are no text kenlm makes a message that is none either.
        reason = str(error).splitlines()[0] if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"--kenlm {path}: not a KenLM model ({reason})") from None


class _Scores:
    """The language models' log-probabilities, in nats, of all hypotheses."""

    def __init__(
        self,
        model: LanguageModel,
        kenlm: Any,
        lists: Sequence[Sequence[Hypothesis]],
        args: argparse.Namespace,
    ) -> None:
        texts = [hypothesis.text for nbest in lists for hypothesis in nbest]
        scores = model.score_lines(texts, batch_words=args.batch_words)
        hide = args.no_progress_bar or None
        self.sizes = [len(nbest) for nbest in lists]
        self.ours = [
            score.log_probs
            for score in tqdm(scores, total=len(texts), unit=" hypotheses", disable=hide)
        ]
        self.kenlm = None if kenlm is None else [_kenlm_log_probs(kenlm, text) for text in texts]

    def of_share(self, share: float) -> list[list[float]]:
        """Returns log-probabilities, list by list, with this share of the KenLM model."""
        if self.kenlm is None:
            return self._by_list([float(ours.sum()) for ours in self.ours])
        return self._by_list(
            [
                float(_interpolate(ours, theirs, share).sum())
                for ours, theirs in zip(self.ours, self.kenlm, strict=True)
            ]
        )

    def features(self) -> list[list[str]]:
        """Returns what is added to the features of the hypotheses, list by list."""
        features = [f"LightRNN= {ours.sum():.6f}" for ours in self.ours]
        if self.kenlm is not None:
            pairs = zip(features, self.kenlm, strict=True)
            features = [f"{feature} KenLM= {theirs.sum():.6f}" for feature, theirs in pairs]
        return self._by_list(features)

    def _by_list(self, values: list[Any]) -> list[list[Any]]:
        ends = np.cumsum(self.sizes)
        return [values[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]


def _kenlm_log_probs(model: Any, text: str) -> np.ndarray:
    """Returns the words' log-probabilities in nats, that of the end of sentence last."""
    scores = model.full_scores(" ".join(text.split()), bos=True, eos=True)
    return np.array([log10 for log10, _, _ in scores]) * math.log(10)


def _interpolate(ours: np.ndarray, theirs: np.ndarray, share: float) -> np.ndarray:
    if share in (0, 1):
        return theirs if share else ours
    return np.logaddexp(ours + math.log1p(-share), theirs + math.log(share))


def _tune(
    lists: Sequence[Sequence[Hypothesis]],
    references: Sequence[Sequence[str]],
    scores: _Scores,
    weights: Weights,
    args: argparse.Namespace,
) -> Weights:
    shares: Sequence[float] = (weights.kenlm,)
    if args.kenlm and args.kenlm_weight is None:
        shares = _KENLM_WEIGHTS
    metric: Literal["wer", "bleu"] = args.metric or "wer"
    found, value, before = tune(lists, references, scores.of_share, shares, metric)
    print(
        f"{metric.upper()} {before:.2f} -> {value:.2f} with --lm-weight {found.lm:g} "
        f"--length-weight {found.length:g}"
        + (f" --kenlm-weight {found.kenlm:g}" if args.kenlm else ""),
        file=sys.stderr,
    )
    return found


def _ranked(
    nbest: Sequence[Hypothesis], lm_scores: Sequence[float], weights: Weights
) -> tuple[list[int], list[float]]:
    """Returns the order of a list, the best hypothesis first, and the score of each in the list.

    Equally good ones stay in order.
    """
    totals = [
        hypothesis.score + weights.lm * lm + weights.length * len(hypothesis.text.split())
        for hypothesis, lm in zip(nbest, lm_scores, strict=True)
    ]
    for hypothesis, total in zip(nbest, totals, strict=True):
        if not math.isfinite(total):
            raise ValueError(
                f"the n-best list {hypothesis.key} has the hypothesis {hypothesis.text!r}, whose "
                f"score comes to {total} with these weights and models"
            )
    return sorted(range(len(nbest)), key=lambda index: -totals[index]), totals


if __name__ == "__main__":
    sys.exit(main())
