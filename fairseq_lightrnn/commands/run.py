"""The one way in which the commands of this package start and end."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fairseq_lightrnn.errors import UsageError

__all__ = ["command"]

# What a shell sees of a program that a signal ended: 128 + SIGINT, 128 + SIGPIPE.
_INTERRUPTED, _BROKEN_PIPE = 130, 141


class Main(Protocol):
    """Runs a command; returns the exit status."""

    def __call__(self, arguments: Sequence[str] | None = None) -> int: ...


def command(
    name: str,
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
) -> Callable[[Callable[[argparse.Namespace], None]], Main]:
    """Makes a command of a function of its flags.

    A mistake ends in one sentence on the standard error and the status 1: the command raises a
    UsageError, a SystemExit as argparse's own with status 2.

    Args:
        name: of the command, which its messages begin with.
        parse: reads the command line.
    """

    def wrap(run: Callable[[argparse.Namespace], None]) -> Main:
        @functools.wraps(run)
        def main(arguments: Sequence[str] | None = None) -> int:
            args = parse(arguments)
            _speak_utf8()
            try:
                run(args)
                if sys.stdout is not None:
                    sys.stdout.flush()
            except KeyboardInterrupt:
                return _INTERRUPTED
            except BrokenPipeError:
                _close_output()
                return _BROKEN_PIPE
            except (OSError, ValueError, MemoryError, FloatingPointError) as error:
                _close_output_if_full()
                raise UsageError(f"{name}: {_sentence(error)}") from error
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":  # torch's, of a device
                    raise
                raise UsageError(f"{name}: {_sentence(error)}") from error
            return 0

        return main

    return wrap


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text or f"{type(error).__name__}: no memory is left"


def _speak_utf8() -> None:
    """Writes UTF-8 whatever the locale, as text is read."""
    stdout: Any = sys.stdout
    if hasattr(stdout, "reconfigure"):
        stdout.reconfigure(encoding="utf-8")


def _close_output_if_full() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _close_output()


def _close_output() -> None:
    """Keeps Python from writing to a pipe without a reader once more, when it ends."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # no file of the operating system's
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
