"""When words are reallocated."""

from __future__ import annotations

import re

from fairseq_lightrnn.errors import UsageError

__all__ = ["reallocation_epochs"]


def reallocation_epochs(epochs: str | None, max_epoch: int) -> frozenset[int]:
    """Reads ``--reallocate-epochs``.

    Args:
        epochs: numbers and ranges joined by commas, such as ``3,6`` or ``2-5``, or None.
        max_epoch: the last epoch of training; 0 if it is not known.

    Returns:
        The epochs that a reallocation follows.

    Raises:
        UsageError: if it has no such meaning, or training would end with a reallocation (after
            which the model must be trained) or before it.
    """
    last = max_epoch - 1 if max_epoch > 0 else float("inf")
    found: set[int] = set()
    for part in epochs.split(",") if epochs else ():
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UsageError(
                f"--reallocate-epochs {epochs}: expected numbers and ranges joined by commas, such "
                "as 3,6 or 2-5"
            )
        first, end = int(match[1]), int(match[2] or match[1])
        if first < 1:
            raise UsageError(f"--reallocate-epochs {epochs}: epochs are counted from 1")
        if end < first:
            raise UsageError(f"--reallocate-epochs {epochs}: the range {part.strip()} is empty")
        if end > last:
            raise UsageError(
                f"--reallocate-epochs {epochs}: after epoch {end} no epoch of training follows"
            )
        found.update(range(first, end + 1))
    return frozenset(found)
