"""What commands share: some flags, and reading lines of text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from fairseq_lightrnn.files import STANDARD, read_lines, text_chunks

__all__ = ["add_scoring_flags", "check_texts", "one_line", "read_chunks", "read_texts"]

_NO_SPACE = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of commands that score text."""
    from fairseq_lightrnn.core.scoring import DEFAULT_BATCH_WORDS  # lightrnn-run has no torch

    add = parser.add_argument
    add("--batch-words", type=int, default=DEFAULT_BATCH_WORDS, metavar="N",
        help="words scored at once (default: %(default)s); no result depends on it")  # fmt: skip
    add("--device", default="cpu", help="where to compute: cpu (default), cuda, …")
    add("--no-progress-bar", action="store_true", help="show no progress on the standard error")


def read_texts(paths: Sequence[str]) -> Iterator[str]:
    """Yields the lines of files one after the other; ``-``, or no file, is the standard input."""
    for path in check_texts(paths):
        yield from read_lines(path)


def read_chunks(paths: Sequence[str]) -> Iterator[list[str]]:
    """Yields the lines of files, as many at a time as are there without waiting for more."""
    for path in check_texts(paths):
        yield from text_chunks(path)


def one_line(text: str) -> str:
    """Returns a text that can be a value among tab-separated ones."""
    return text.translate(_NO_SPACE)


def check_texts(paths: Sequence[str]) -> Sequence[str]:
    """Returns what to read; a file that is missing is told before the first is read."""
    if list(paths).count(STANDARD) > 1:
        raise ValueError("-: the standard input can be read once; name it once")
    for path in paths:
        if path != STANDARD and not Path(path).exists():
            raise ValueError(
                f"{path}: no such text file; texts are files, or come from the standard input"
            )
    return paths or [STANDARD]
