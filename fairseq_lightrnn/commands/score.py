"""``lightrnn-score``: what a language model thinks of a text, in words, sentences or as a whole.

Text is read from files or the standard input (or a binarised split), scored in input order, and
memory depends on neither the vocabulary nor the length of lines. See ``lightrnn-score --help``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat, tee
from typing import IO, Any

import numpy as np
from fairseq.data import data_utils
from tqdm import tqdm

from fairseq_lightrnn.checkpoint import find_checkpoint
from fairseq_lightrnn.commands.run import command
from fairseq_lightrnn.commands.text import (
    add_scoring_flags,
    check_texts,
    one_line,
    read_chunks,
    read_texts,
)
from fairseq_lightrnn.core.scoring import CorpusScore
from fairseq_lightrnn.core.table import component_names
from fairseq_lightrnn.data.binarised import check_binarised
from fairseq_lightrnn.files import STANDARD, check_outputs, whole_file
from fairseq_lightrnn.language_model import LanguageModel, SentenceScore
from fairseq_lightrnn.signature import signature
from fairseq_lightrnn.version import __version__

__all__ = ["main"]

logger = logging.getLogger(__name__)

BASES = {"2": 2.0, "e": math.e, "10": 10.0}


# Nothing in our tab-separated values is quoted, since their tokens hold neither tabs nor newlines.
_NOTHING_QUOTED = (
    "Tab-separated values are not quoted: a token may be a quotation mark, or NA. Read them with "
    "pandas.read_csv(FILE, sep='\\t', quoting=3, keep_default_na=False), or in R with "
    "read.delim(FILE, quote='', na.strings=NULL)."
)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lightrnn-score",
        description="Score text with a trained language model: perplexity, and log-probabilities "
        "of sentences or words.",
        epilog=_NOTHING_QUOTED,
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint file, or folder with checkpoint_best.pt")
    add("text", nargs="*", help="text files, plain or .gz, a sentence a line; - is the standard "
        "input (default)")  # fmt: skip
    add(
        "--data",
        metavar="DIR",
        help="folder with dict.txt (default: that of the training, or "
        "what lies beside the checkpoint)",
    )
    add("--split", metavar="NAME", help="score this split of binarised data in --data, not text")
    add("--level", choices=("corpus", "sentence", "word"), default="corpus",
        help="what to write: one summary (default), a line a sentence, or a line a word; "
        "for the latter the summary goes to the standard error, and each line of the standard "
        "input is answered as soon as it comes")  # fmt: skip
    add("--format", choices=("tsv", "json"), default="tsv",
        help="tab-separated values with a header (default), or a JSON object a line")  # fmt: skip
    add("--output", default=STANDARD, metavar="FILE", help="write here instead of to the standard "
        "output; the file appears when all is done")  # fmt: skip
    add("--base", choices=tuple(BASES), default="2", help="base of logarithms (default: 2)")
    add("--no-eos", action="store_true", help="do not count ends of sentences as words")
    add("--carry-hidden-state", action=argparse.BooleanOptionalAction,
        help="predict each sentence from all before it, or start each afresh (default: as the "
        "model was trained)")  # fmt: skip
    add("--entropy", action="store_true", help="with --level word: also the entropy of the "
        "distribution each word is predicted from, and the word's rank in it; takes a pass over "
        "the vocabulary for each word")  # fmt: skip
    add("--context", metavar="FILE", help="score each sentence given the line of this file with "
        "its number, which comes before it and is not scored")  # fmt: skip
    add("--full", action="store_true", help="with --level word: also the log-probabilities of all "
        "words at each place, V numbers a line")  # fmt: skip
    add_scoring_flags(parser)
    return parser.parse_intermixed_args(arguments)


@command("lightrnn-score", _parse)
def main(args: argparse.Namespace) -> None:
    """Scores text as the flags ask for."""
    _check(args)
    model = LanguageModel.from_pretrained(args.checkpoint, args.data, args.device)
    _settle_state(model, args)
    left = read_texts([args.context]) if args.context else repeat("")
    contexts = _contexts(left, args.context)
    again = contexts
    if args.full:  # reads them once more, sentence by sentence
        contexts, again = tee(contexts)
    scores = tqdm(
        _scores(model, args, contexts if args.context else None),
        unit=" sentences",
        disable=args.no_progress_bar or None,
        leave=False,
    )
    total = CorpusScore(model.dictionary.unk(), model.dictionary.eos(), not args.no_eos)
    with whole_file(args.output) as file:
        names = component_names(model.table.num_components)
        writer = _Writer(args, names, total, file, model.dictionary.symbols)
        if args.full:
            writer.write_all(model, again)
        for number, score in enumerate(scores, start=1):
            total.add(score.ids, score.component_log_probs)
            writer.sentence(number, score)
        if args.context and next(left, None) is not None:
            raise ValueError(f"--context {args.context}: has more lines than the text")
        summary = _summary(model, total, args, names)
        if args.level == "corpus":
            _write_summary(summary, args.format, file)
    if args.level != "corpus":
        _write_summary(summary, args.format, sys.stderr)


def _check(args: argparse.Namespace) -> None:
    if args.split is not None and args.text:
        raise ValueError(f"--split {args.split} and text files exclude each other: {args.text[0]}")
    if args.split is not None and args.data is None:
        raise ValueError(f"--split {args.split} needs --data, the folder of the binarised data")
    if args.entropy and args.level != "word":
        raise ValueError(f"--entropy needs --level word, not --level {args.level}")
    if args.full and args.level != "word":
        raise ValueError(f"--full needs --level word, not --level {args.level}")
    if args.split is not None and (args.context is not None or args.full):
        flag = "--full" if args.context is None else "--context"
        raise ValueError(f"{flag} is for text, not for --split {args.split}")
    if args.context is not None and args.carry_hidden_state:
        raise ValueError(
            "--context and --carry-hidden-state: give one of them; a sentence that goes on from "
            "the one before has a context already"
        )
    if args.full and args.carry_hidden_state:
        raise ValueError("--full needs --no-carry-hidden-state: each sentence starts afresh")
    if args.context == STANDARD and STANDARD in (args.text or [STANDARD]):
        raise ValueError("--context -: the text is the standard input; give a file for one of them")
    if args.batch_words < 1:
        raise ValueError(f"--batch-words {args.batch_words}: must be at least 1")
    check_texts(args.text)
    inputs = [find_checkpoint(args.checkpoint), args.context, *args.text]
    check_outputs({"--output": args.output}, inputs)


def _settle_state(model: LanguageModel, args: argparse.Namespace) -> None:
    """Decides whether the hidden state is carried, and says so where no flag did."""
    if not model.decoder.carries_state:
        if args.carry_hidden_state:
            raise ValueError(
                "--carry-hidden-state: this model, a transformer, has no hidden state to carry; "
                "leave the flag out"
            )
        args.carry_hidden_state = False
    elif args.context is not None or args.full:
        args.carry_hidden_state = False
    elif args.carry_hidden_state is None:
        args.carry_hidden_state = model.carried_hidden_state
        what = (
            "as in training, each sentence is predicted from all before it (otherwise: "
            "--no-carry-hidden-state)"
            if args.carry_hidden_state
            else "each sentence starts afresh (otherwise: --carry-hidden-state)"
        )
        print(what, file=sys.stderr)


def _scores(
    model: LanguageModel, args: argparse.Namespace, contexts: Iterator[str] | None
) -> Iterator[SentenceScore]:
    options: dict[str, Any] = {
        "carry_hidden_state": args.carry_hidden_state,
        "details": args.entropy,
        "batch_words": args.batch_words,
    }
    if args.split is None:
        return model.score_lines(_lines(args), contexts=contexts, **options)
    return model.score_ids(_binarised(args.data, args.split, model), **options)


def _lines(args: argparse.Namespace) -> Iterator[str | None]:
    """Yields lines; where each is to be answered, None whenever the next is still to come."""
    for chunk in read_chunks(args.text):
        yield from chunk
        if args.level != "corpus":
            yield None


def _contexts(lines: Iterator[str], path: str) -> Iterator[str]:
    """Yields the context of each sentence, as long as there is one."""
    yield from lines
    raise ValueError(f"--context {path}: has fewer lines than the text")


def _binarised(data: str, split: str, model: LanguageModel) -> Iterable[np.ndarray]:
    """Yields the sentences of a split, each with its end."""
    try:
        check_binarised(f"{data}/{split}", len(model.dictionary))
    except ValueError as error:
        raise ValueError(f"--split {split}: {error}") from None
    try:
        dataset = data_utils.load_indexed_dataset(f"{data}/{split}", model.dictionary)
    except (AssertionError, struct.error, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--split {split}: {data}/{split}.idx is damaged ({reason})") from None
    if dataset is None:
        raise ValueError(f"--split {split}: there is no {data}/{split}.bin and .idx")
    if getattr(dataset, "supports_prefetch", False):
        dataset.prefetch(range(len(dataset)))  # of --dataset-impl cached
    for index in range(len(dataset)):
        yield dataset[index].numpy().astype(np.int64)


class _Writer:
    """Writes a line for each sentence or word."""

    def __init__(
        self,
        args: argparse.Namespace,
        names: list[str],
        total: CorpusScore,
        file: IO[str],
        symbols: list[str],
    ) -> None:
        self.level, self.format, self.file = args.level, args.format, file
        self.live = args.split is None
        self.total = total
        self.unit = math.log(BASES[args.base])
        self.columns = [f"{name}_logprob" for name in names]
        self.details = ["entropy", "rank"] if args.entropy else []
        self.all: Callable[[SentenceScore], Iterator[np.ndarray]] | None = None
        self.words = symbols if args.full else []
        if self.format == "tsv" and self.level == "sentence":
            self._line("sentence_id", "words", "unknown", "logprob", *self.columns, "perplexity")
        if self.format == "tsv" and self.level == "word":
            self._line(
                "sentence_id", "token_id", "token", "logprob", "surprisal", *self.columns,
                *self.details, "unknown", *self.words,
            )  # fmt: skip

    def write_all(self, model: LanguageModel, contexts: Iterator[str]) -> None:
        """Has the log-probabilities of all words written too."""

        def at_each_place(score: SentenceScore) -> Iterator[np.ndarray]:
            return model.log_probs(" ".join(score.tokens[:-1]), context=next(contexts))

        self.all = at_each_place

    def sentence(self, number: int, score: SentenceScore) -> None:
        """Writes what was asked for of a sentence."""
        if self.level == "corpus":
            return
        words = self._words(score) if self.level == "word" else None
        record = {"sentence_id": number, **self._sentence(score)}
        if self.format == "json":
            if words is not None:
                record["tokens"] = list(words)
            print(_json(record), file=self.file)
        elif words is None:
            self._line(*record.values())
        else:
            for word in words:
                every = word.pop("all_logprobs", ())
                self._line(number, *word.values(), *every)
        if self.live:
            self.file.flush()

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
        every = None if self.all is None else self.all(score)
        for index, (token, word) in enumerate(zip(score.tokens, score.ids.tolist(), strict=True)):
            of_all = None if every is None else next(every)
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
            if of_all is not None:
                record["all_logprobs"] = (of_all / self.unit).tolist()
            yield record

    def _line(self, *values: Any) -> None:
        print("\t".join(map(_text, values)), file=self.file)


def _json(record: dict[str, Any]) -> str:
    """Returns a JSON object; it knows no infinite numbers, which become null."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(record), ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    if value is None:
        return "NA"
    if isinstance(value, float):
        return f"{value:.6f}"
    return str(int(value)) if isinstance(value, bool) else one_line(str(value))


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
            "table": model.table_digest(),
            "unk": "scored",
            "eos": "out" if args.no_eos else "in",
            "state": _state(args),
            "base": args.base,
            "version": __version__,
        }
    )


def _state(args: argparse.Namespace) -> str:
    """Returns what sentences are predicted from besides their own words."""
    if args.context is not None:
        return "context"
    return "carried" if args.carry_hidden_state else "reset"


def _write_summary(summary: dict[str, Any], form: str, file: IO[str]) -> None:
    if form == "json":
        print(_json(summary), file=file)
        return
    for key, value in summary.items():
        print(f"{key}\t{_text(value)}", file=file)


if __name__ == "__main__":
    sys.exit(main())
