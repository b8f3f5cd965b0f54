"""``lightrnn-run``: asks an exported language model, with numpy and onnxruntime alone."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fairseq_lightrnn.commands.run import command
from fairseq_lightrnn.commands.text import check_texts, one_line, read_chunks
from fairseq_lightrnn.files import STANDARD, check_outputs
from fairseq_lightrnn.perplexity import perplexity
from fairseq_lightrnn.runtime.model import ExportedModel
from fairseq_lightrnn.signature import signature

__all__ = ["main"]

_ACTIONS = ("score", "next", "complete", "sample", "learn")
_ONLY = {
    "k": "next complete", "level": "score", "carry_hidden_state": "score", "temperature": "sample",
    "top_k": "sample", "top_p": "sample", "max_words": "sample", "seed": "sample",
}  # fmt: skip
# Numbers that flags may not be below.
_LEAST = {"threads": 1, "k": 1, "max_words": 1, "top_k": 1, "seed": 0}
# Texts that are continued side by side.
_AT_ONCE = 64


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lightrnn-run",
        description="Ask a language model that lightrnn-export wrote; needs numpy and onnxruntime, "
        "neither fairseq nor torch.",
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="that lightrnn-export wrote")
    add("action", choices=_ACTIONS, help="score text; the most probable next words of each line; "
        "the most probable completions of the last, half-typed word of each line; continue each "
        "line at random; or learn from text that its user wrote")  # fmt: skip
    add("text", nargs="*", help="text files, plain or .gz; - is the standard input (default), of "
        "which each line is answered as soon as it comes")  # fmt: skip
    add("--learnt", metavar="FILE", help="what the model has learnt from its user; learn adds to "
        "it, or begins it")  # fmt: skip
    add("--threads", type=int, default=1, metavar="N", help="of the processor (default: 1)")
    add("-k", type=int, metavar="K", help="next, complete: how many words (default: "
        "10)")  # fmt: skip
    add("--level", choices=("corpus", "sentence", "word"), help="score: one summary (default), a "
        "line a sentence, or a line a word; logarithms are natural ones")  # fmt: skip
    add("--carry-hidden-state", action=argparse.BooleanOptionalAction, help="score: predict each "
        "sentence from all before it, or start each afresh (default: as the model was trained)"
        )  # fmt: skip
    add("--max-words", type=int, metavar="N", help="sample: at most (default: 50)")
    add("--temperature", type=float, metavar="T", help="sample: of the probabilities (default: 1)")
    add("--top-k", type=int, metavar="K", help="sample: from this many most probable words")
    add("--top-p", type=float, metavar="P", help="sample: from the fewest most probable words with "
        "this much probability")  # fmt: skip
    add("--seed", type=int, metavar="N", help="sample: of the random numbers")
    return parser.parse_intermixed_args(arguments)


@command("lightrnn-run", _parse)
def main(args: argparse.Namespace) -> None:
    """Does what the flags ask for."""
    _check(args)
    model = ExportedModel.load(args.folder, args.threads)
    if args.learnt is not None and (args.action != "learn" or Path(args.learnt).exists()):
        model.load_learnt(args.learnt)
    actions = {
        "score": _score, "next": _suggest, "complete": _suggest, "sample": _sample, "learn": _learn,
    }  # fmt: skip
    actions[args.action](model, args)


def _check(args: argparse.Namespace) -> None:
    for name, actions in _ONLY.items():
        if getattr(args, name) is not None and args.action not in actions.split():
            only = " and ".join(actions.split())
            raise ValueError(f"{_flag(name)} is for {only}, not for {args.action}")
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{_flag(name)} {value}: must be at least {least}")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature}: must be above 0")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    if args.top_k is not None and args.top_p is not None:
        raise ValueError("--top-k and --top-p: give one of them")
    if args.action == "learn":
        if args.learnt is None:
            raise ValueError("learn needs --learnt FILE, where it keeps what it learns")
        if args.learnt == STANDARD:
            raise ValueError("--learnt -: give a file; the standard output says what was learnt")
        check_outputs({"--learnt": args.learnt}, args.text)
    check_texts(args.text)


def _flag(name: str) -> str:
    return "-k" if name == "k" else f"--{name.replace('_', '-')}"


def _groups(args: argparse.Namespace, size: int) -> Iterator[list[str]]:
    """Yields so many lines at a time at most, as soon as they come."""
    for chunk in read_chunks(args.text):
        for start in range(0, len(chunk), size):
            yield chunk[start : start + size]


def _score(model: ExportedModel, args: argparse.Namespace) -> None:
    carried = args.carry_hidden_state
    carried = model.carry_hidden_state if carried is None else carried
    level = args.level or "corpus"

    def lines() -> Iterator[str | None]:
        for chunk in read_chunks(args.text):
            yield from chunk
            if level != "corpus":
                yield None

    if level != "corpus":
        columns = {
            "sentence": ("sentence_id", "words", "unknown", "logprob", "perplexity"),
            "word": ("sentence_id", "token_id", "token", "logprob", "unknown"),
        }
        _line(*columns[level])
    sentences = words = unknown = 0
    total = 0.0
    for score in model.score_lines(lines(), carry_hidden_state=carried):
        sentences += 1
        strange = score.ids == model.unknown
        words += len(score.ids)
        unknown += int(strange.sum())
        total += score.log_prob
        if level == "sentence":
            _line(sentences, len(score.ids), int(strange.sum()), score.log_prob, score.perplexity)
        if level == "word":
            values = zip(score.tokens, score.log_probs.tolist(), strange.tolist(), strict=True)
            for number, (token, log_prob, missing) in enumerate(values, 1):
                _line(sentences, number, token, log_prob, int(missing))
        sys.stdout.flush()
    fields = {
        **model.description["signature"],
        "words": len(model.vocabulary),
        **({} if args.learnt is None else {"learnt": model.learnt.digest()}),
        "quantize": model.description["quantize"],
        "unk": "scored",
        "state": "carried" if carried else "reset",
    }
    summary = {
        "sentences": sentences, "words": words, "unknown": unknown, "logprob": total,
        "perplexity": perplexity(total, words) if words else "NA", "signature": signature(fields),
    }  # fmt: skip
    for key, value in summary.items():
        _line(key, value, error=level != "corpus")


def _suggest(model: ExportedModel, args: argparse.Namespace) -> None:
    _line("text_id", "word", "probability")
    count = 10 if args.k is None else args.k
    number = 0
    for chunk in _groups(args, _AT_ONCE):
        if args.action == "complete":
            found = [model.complete(line, count) for line in chunk]
        else:
            found = model.next_words(chunk, count)
        for pairs in found:
            number += 1
            for word, probability in pairs:
                _line(number, word, f"{probability:.6g}")
        sys.stdout.flush()


def _sample(model: ExportedModel, args: argparse.Namespace) -> None:
    options = {
        "temperature": 1.0 if args.temperature is None else args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
    }
    seed = args.seed
    # With a seed each line has random numbers of its own, whenever it comes.
    for chunk in _groups(args, _AT_ONCE if seed is None else 1):
        texts = [line.split() for line in chunk]
        alone = len(chunk) == 1
        if alone:
            print(*texts[0], end="", flush=True)
        for number, word in model.text(chunk).draws(args.max_words or 50, seed=seed, **options):
            texts[number].append(word)
            if alone:
                print(" " * (len(texts[0]) > 1) + word, end="", flush=True)
        print("" if alone else "\n".join(" ".join(text) for text in texts), flush=True)
        seed = None if seed is None else seed + 1


def _learn(model: ExportedModel, args: argparse.Namespace) -> None:
    model.check_learnt(args.learnt)
    lesson = model.learn(line for chunk in read_chunks(args.text) for line in chunk)
    model.save_learnt(args.learnt)
    _line("new words", len(lesson.new))
    _line("words without a cell", len(lesson.left))
    if lesson.left:
        _line(f"no empty cell is left for {', '.join(lesson.left[:3])}; lightrnn-extend gives a "
              "trained model more of them", error=True)  # fmt: skip


def _line(*values: object, error: bool = False) -> None:
    texts = (f"{value:.6f}" if isinstance(value, float) else str(value) for value in values)
    print("\t".join(map(one_line, texts)),
          file=sys.stderr if error else sys.stdout)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
