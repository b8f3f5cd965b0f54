"""What commands share: some flags, reading lines of text and writing whole files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.scoring import DEFAULT_BATCH_WORDS

__all__ = ["add_scoring_flags", "read_lines", "read_texts", "whole_file"]


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of commands that score text."""
    add = parser.add_argument
    add("--batch-words", type=int, default=DEFAULT_BATCH_WORDS, metavar="N",
        help="words scored at once (default: %(default)s); no result depends on it")  # fmt: skip
    add("--device", default="cpu", help="where to compute: cpu (default), cuda, …")
    add("--no-progress-bar", action="store_true", help="show no progress on the standard error")


def read_texts(paths: Sequence[str]) -> Iterator[str]:
    """Yields the lines of files one after the other; ``-``, or no file, is the standard input."""
    for path in paths:
        if path != "-" and not Path(path).is_file():
            raise UsageError(f"{path}: no such text file")
    for path in paths or ["-"]:
        if path == "-":
            yield from read_lines(sys.stdin.buffer, "standard input")
        else:
            with open(path, "rb") as file:
                yield from read_lines(file, path)


def read_lines(file: BinaryIO | Iterable[bytes], name: str) -> Iterator[str]:
    """Yields the lines of a file without their ends; only a newline ends a line.

    Raises:
        UsageError: if a line is not UTF-8; the file, line and byte are named.
    """
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{name}: line {number} is not UTF-8 (byte {line[error.start]:#04x} at column "
                f"{error.start + 1}); convert it, for example with iconv -t utf-8"
            ) from None
        yield text.removesuffix("\n").removesuffix("\r")


@contextmanager
def whole_file(path: str | None) -> Iterator[TextIO]:
    """Opens a file for writing that appears whole or not at all; None is the standard output."""
    if path is None or path == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    target = Path(path)
    if not target.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {target.parent} to write into")
    partial = target.with_name(f"{target.name}.tmp{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
