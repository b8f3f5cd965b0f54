"""When words are reallocated."""

from __future__ import annotations

from collections.abc import Callable

from fairseq_lightrnn.errors import UsageError

__all__ = ["reallocation_epochs"]


def reallocation_epochs(
    epochs: str | None, interval: int | None, max_epoch: int
) -> Callable[[int], bool]:
    """Reads ``--reallocate-epochs`` and ``--reallocate-interval``.

    Args:
        epochs: numbers joined by commas, or None.
        interval: a number of epochs, or None.
        max_epoch: the last epoch of training; 0 if it is not known.

    Returns:
        A function that tells of an epoch whether a reallocation follows it.

    Raises:
        UsageError: if a flag has no such meaning, both are given, or training would end with a
            reallocation (after which the model must be trained) or before it.
    """
    last = max_epoch - 1 if max_epoch > 0 else float("inf")
    if epochs and interval is not None:
        raise UsageError("--reallocate-epochs and --reallocate-interval exclude each other")
    if interval is not None:
        if interval < 1:
            raise UsageError(f"--reallocate-interval {interval}: must be at least 1")
        if interval > last:
            raise UsageError(
                f"--reallocate-interval {interval}: no reallocation before the last epoch, "
                f"--max-epoch is {max_epoch}; lower the one or raise the other"
            )
        return lambda epoch: 0 < epoch <= last and epoch % interval == 0
    try:
        numbers = {int(number) for number in epochs.split(",")} if epochs else set()
    except ValueError:
        raise UsageError(
            f"--reallocate-epochs {epochs}: expected numbers joined by commas, such as 3,6"
        ) from None
    for number in sorted(numbers):
        if not 0 < number <= last:
            raise UsageError(
                f"--reallocate-epochs {epochs}: after epoch {number} no epoch of training follows"
                if number > 0
                else f"--reallocate-epochs {epochs}: epochs are counted from 1"
            )
    return lambda epoch: epoch in numbers
