"""Mistakes of users, in three places.

The library (core, allocation, checkpoints, :class:`LanguageModel`) raises ValueError, which a
program can catch and an event loop survives. The commands of this package turn every ValueError
into one sentence and an exit status (:mod:`fairseq_lightrnn.commands.run`). Between them stand the
adapters (models, tasks, criterions, optimisers), which fairseq's own commands call: these catch
nothing, so adapters raise :class:`UsageError`, which Python itself ends with one sentence.
Where the library calls adapters, :func:`value_errors` stands around the call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

__all__ = ["LoadError", "UsageError", "show_worker_errors", "usage_errors", "value_errors"]


class UsageError(SystemExit, ValueError):
    """A mistake in flags or files, raised where fairseq's commands are the callers."""

    def __str__(self) -> str:
        return str(self.code)


class LoadError(SystemExit):
    """One that comes to light while fairseq loads a model: it makes another of every Exception."""

    def __str__(self) -> str:
        return str(self.code)


@contextmanager
def usage_errors(prefix: str = "") -> Iterator[None]:
    """Turns ValueErrors of the library into UsageErrors, with the name of a flag before them."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{prefix}: {error}" if prefix else str(error)) from error


@contextmanager
def value_errors() -> Iterator[None]:
    """Turns what adapters would end a command with into ValueErrors, for callers in Python."""
    try:
        yield
    except SystemExit as error:
        raise ValueError(str(error)) from error


def show_worker_errors() -> None:
    """Lets a command whose spawned worker ended in a sentence end in that alone.

    Of a UsageError torch hands the worker's whole traceback on, as the text of an exception of its
    own. A LoadError the worker has printed itself. Any other exception is shown as before.
    """
    show = sys.excepthook
    name = f"{UsageError.__module__}.{UsageError.__qualname__}: "

    def show_sentence(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        _, found, sentence = str(error).rpartition(f"\n{name}")
        if found and kind.__name__ == "ProcessRaisedException":
            print(sentence.strip(), file=sys.stderr)
        elif kind.__name__ == "ProcessExitedException" and getattr(error, "exit_code", 0) == 1:
            print(error, file=sys.stderr)
        else:
            show(kind, error, trace)

    sys.excepthook = show_sentence
