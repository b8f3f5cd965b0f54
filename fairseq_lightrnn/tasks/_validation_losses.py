"""Tells the optimiser the losses of validation, before fairseq writes its checkpoint.

fairseq's own way, the learning rate scheduler, has them after the checkpoint, so that a resumed
training would not know the last one, and not those in mid-epoch.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ValidationLossMixin"]


class ValidationLossMixin:
    """Adds to a task that an optimiser with a method ``validated`` hears of validation losses.

    Mix in before the task. Of several validation subsets the first one counts, as in fairseq.
    """

    _optimizer: Any = None
    _updates = 0
    _is_first_subset = True

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """Takes an optimisation step."""
        super().optimizer_step(optimizer, model=model, update_num=update_num)  # type: ignore[misc]
        self._optimizer = optimizer
        self._updates = update_num + 1

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """Is called before each validation."""
        super().begin_valid_epoch(epoch, model)  # type: ignore[misc]
        self._is_first_subset = True

    def post_validate(self, model: Any, stats: dict[str, Any], agg: Any) -> None:
        """Is called after each validation subset, with what will be logged of it."""
        if self._is_first_subset and hasattr(self._optimizer, "validated"):
            self._optimizer.validated(float(stats["loss"]), self._updates)
        self._is_first_subset = False
