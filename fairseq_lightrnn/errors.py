"""Errors for users of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UsageError", "usage_errors"]


class UsageError(SystemExit, ValueError):
    """A mistake in flags or files: on the command line one clear sentence, without a traceback.

    For callers in Python it is a ValueError like any other.
    """

    def __str__(self) -> str:
        return str(self.code)


@contextmanager
def usage_errors(prefix: str = "") -> Iterator[None]:
    """Turns ValueErrors of the core into UsageErrors, with the name of a flag before them."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{prefix}: {error}" if prefix else str(error)) from error
