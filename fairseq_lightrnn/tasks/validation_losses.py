"""Tells the optimiser the losses of validation, before fairseq writes its checkpoint.

fairseq's own way, the learning rate scheduler, has them after the checkpoint, so that a resumed
training would not know the last one, and not those in mid-epoch.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ValidationLosses"]


class ValidationLosses:
    """Passes validation losses on to an optimiser that has a method ``validated``.

    Of several validation subsets the first one counts, as in fairseq.
    """

    def __init__(self) -> None:
        self._optimizer: Any = None
        self._updates = 0
        self._is_first_subset = True

    def updated(self, optimizer: Any, updates: int) -> None:
        """Takes note of the optimiser and of its updates so far."""
        self._optimizer = optimizer
        self._updates = updates

    def begin(self) -> None:
        """Is called before each validation."""
        self._is_first_subset = True

    def validated(self, loss: float) -> None:
        """Is called after each validation subset."""
        if self._is_first_subset and hasattr(self._optimizer, "validated"):
            self._optimizer.validated(loss, self._updates)
        self._is_first_subset = False
