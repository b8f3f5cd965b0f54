"""``lightrnn-score``: what a language model thinks of a text, in words, sentences or as a whole.

Text is read from files or the standard input (or a binarised split), scored in input order, and
memory depends on neither the vocabulary nor the length of lines. See ``lightrnn-score --help``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import numpy as np
from fairseq.data import data_utils
from tqdm import tqdm

from fairseq_lightrnn.commands._text import add_scoring_flags, read_texts, whole_file
from fairseq_lightrnn.criterions.two_component_cross_entropy import component_names
from fairseq_lightrnn.errors import UsageError, usage_errors
from fairseq_lightrnn.language_model import LanguageModel, SentenceScore
from fairseq_lightrnn.scoring import CorpusScore
from fairseq_lightrnn.signature import signature
from fairseq_lightrnn.version import __version__

__all__ = ["main"]

logger = logging.getLogger(__name__)

BASES = {"2": 2.0, "e": math.e, "10": 10.0}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightrnn-score",
        description="Score text with a trained language model: perplexity, and log-probabilities "
        "of sentences or words.",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint file, or folder with checkpoint_best.pt")
    add("text", nargs="*", help="text files, a sentence a line (default: the standard input)")
    add("--data", metavar="DIR", help="folder with dict.txt (default: that of the training)")
    add("--split", metavar="NAME", help="score this split of binarised data in --data, not text")
    add("--level", choices=("corpus", "sentence", "word"), default="corpus",
        help="what to write: one summary (default), a line a sentence, or a line a word; "
        "for the latter the summary goes to the standard error")  # fmt: skip
    add("--format", choices=("tsv", "json"), default="tsv",
        help="tab-separated values with a header (default), or a JSON object a line")  # fmt: skip
    add("--output", metavar="FILE", help="write here instead of to the standard output; the file "
        "appears when all is done")  # fmt: skip
    add("--base", choices=tuple(BASES), default="2", help="base of logarithms (default: 2)")
    add("--no-eos", action="store_true", help="do not count ends of sentences as words")
    add("--carry-hidden-state", action="store_true",
        help="predict each sentence from all before it; otherwise each starts afresh")  # fmt: skip
    add("--entropy", action="store_true", help="with --level word: also the entropy of the "
        "distribution each word is predicted from, and the word's rank in it; takes a pass over "
        "the vocabulary for each word")  # fmt: skip
    add_scoring_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Raises:
        UsageError: for mistakes in flags and files (on a command line: one sentence, status 1).
    """
    args = _parser().parse_args(arguments)
    _check(args)
    model = LanguageModel.from_pretrained(args.checkpoint, args.data, args.device)
    scores = tqdm(
        _scores(model, args), unit=" sentences", disable=args.no_progress_bar or None, leave=False
    )
    total = CorpusScore(model.dictionary.unk(), model.dictionary.eos(), not args.no_eos)
    with usage_errors(), whole_file(args.output) as file:
        names = component_names(model.table.num_components)
        writer = _Writer(args, names, total, file)
        for number, score in enumerate(scores, start=1):
            total.add(score.ids, score.component_log_probs)
            writer.sentence(number, score)
        summary = _summary(model, total, args, names)
        if args.level == "corpus":
            _write_summary(summary, args.format, file)
    if args.level != "corpus":
        _write_summary(summary, args.format, sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.split is not None and args.text:
        raise UsageError(f"--split {args.split} and text files exclude each other: {args.text[0]}")
    if args.split is not None and args.data is None:
        raise UsageError(f"--split {args.split} needs --data, the folder of the binarised data")
    if args.entropy and args.level != "word":
        raise UsageError(f"--entropy needs --level word, not --level {args.level}")
    if args.batch_words < 1:
        raise UsageError(f"--batch-words {args.batch_words}: must be at least 1")


def _scores(model: LanguageModel, args: argparse.Namespace) -> Iterator[SentenceScore]:
    options: dict[str, Any] = {
        "carry_hidden_state": args.carry_hidden_state,
        "details": args.entropy,
        "batch_words": args.batch_words,
    }
    if args.split is None:
        return model.score_lines(read_texts(args.text), **options)
    return model.score_ids(_binarised(args.data, args.split, model), **options)


def _binarised(data: str, split: str, model: LanguageModel) -> Iterable[np.ndarray]:
    """Yields the sentences of a split, each with its end."""
    dataset = data_utils.load_indexed_dataset(f"{data}/{split}", model.dictionary)
    if dataset is None:
        raise UsageError(f"--split {split}: there is no {data}/{split}.bin and .idx")
    for index in range(len(dataset)):
        yield dataset[index].numpy().astype(np.int64)


class _Writer:
    """Writes a line for each sentence or word."""

    def __init__(
        self, args: argparse.Namespace, names: list[str], total: CorpusScore, file: TextIO
    ) -> None:
        self.level, self.format, self.file = args.level, args.format, file
        self.total = total
        self.unit = math.log(BASES[args.base])
        self.columns = [f"{name}_logprob" for name in names]
        self.details = ["entropy", "rank"] if args.entropy else []
        if self.format == "tsv" and self.level == "sentence":
            self._line("sentence_id", "words", "unknown", "logprob", *self.columns, "perplexity")
        if self.format == "tsv" and self.level == "word":
            self._line(
                "sentence_id", "token_id", "token", "logprob", "surprisal", *self.columns,
                *self.details,
            )  # fmt: skip

    def sentence(self, number: int, score: SentenceScore) -> None:
        """Writes what was asked for of a sentence."""
        if self.level == "corpus":
            return
        words = list(self._words(score)) if self.level == "word" else None
        record = {"sentence_id": number, **self._sentence(score)}
        if self.format == "json":
            if words is not None:
                record["tokens"] = words
            print(json.dumps(record, ensure_ascii=False), file=self.file)
        elif words is None:
            self._line(*record.values())
        else:
            for word in words:
                del word["unknown"]
                self._line(number, *word.values())

    def _sentence(self, score: SentenceScore) -> dict[str, Any]:
        one = CorpusScore(self.total.unk, self.total.eos, self.total.count_eos)
        one.add(score.ids, score.component_log_probs)
        parts = np.broadcast_to(one.components, len(self.columns)) / self.unit
        return {
            "words": one.words,
            "unknown": one.unknown,
            "logprob": one.log_prob / self.unit,
            **dict(zip(self.columns, parts.tolist(), strict=True)),
            "perplexity": one.perplexity,
        }

    def _words(self, score: SentenceScore) -> Iterator[dict[str, Any]]:
        for index, (token, word) in enumerate(zip(score.tokens, score.ids.tolist(), strict=True)):
            if word == self.total.eos and not self.total.count_eos:
                continue
            parts = score.component_log_probs[index] / self.unit
            log_prob = float(parts.sum())
            record = {"token_id": index + 1, "token": token, "logprob": log_prob,
                      "surprisal": -log_prob,
                      **dict(zip(self.columns, parts.tolist(), strict=True))}  # fmt: skip
            if score.entropy is not None and score.rank is not None:
                record["entropy"] = float(score.entropy[index]) / self.unit
                record["rank"] = int(score.rank[index])
            record["unknown"] = word == self.total.unk
            yield record

    def _line(self, *values: Any) -> None:
        print("\t".join(map(_text, values)), file=self.file)


def _text(value: Any) -> str:
    if value is None:
        return "NA"
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _summary(
    model: LanguageModel, total: CorpusScore, args: argparse.Namespace, names: list[str]
) -> dict[str, Any]:
    parts = total.component_perplexities
    components = parts if len(parts) == len(names) else [None] * len(names)
    return {
        "sentences": total.sentences,
        "words": total.words,
        "unknown": total.unknown,
        "logprob": total.log_prob / math.log(BASES[args.base]),
        "perplexity": total.perplexity,
        "perplexity_without_unknown": total.perplexity_without_unknown,
        **{f"{name}_perplexity": part for name, part in zip(names, components, strict=True)},
        "signature": _signature(model, args),
    }


def _signature(model: LanguageModel, args: argparse.Namespace) -> str:
    return signature(
        {
            "model": model.parameter_digest(),
            "words": len(model.dictionary),
            "vocabulary": model.vocabulary_digest(),
            "table": model.table.table().digest(),
            "unk": "scored",
            "eos": "out" if args.no_eos else "in",
            "state": "carried" if args.carry_hidden_state else "reset",
            "base": args.base,
            "version": __version__,
        }
    )


def _write_summary(summary: dict[str, Any], form: str, file: TextIO) -> None:
    if form == "json":
        print(json.dumps(summary, ensure_ascii=False), file=file)
        return
    for key, value in summary.items():
        print(f"{key}\t{_text(value)}", file=file)


if __name__ == "__main__":
    sys.exit(main())
