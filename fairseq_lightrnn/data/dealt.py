"""Batches that are dealt to workers in turn, of whom there may have been another number before."""

from __future__ import annotations

import logging
from typing import Any

from fairseq.data import iterators

from fairseq_lightrnn.errors import UsageError

__all__ = ["DealtBatches"]

logger = logging.getLogger(__name__)


class DealtBatches(iterators.EpochBatchIterator):
    """fairseq's batches of an epoch, which go on where any number of workers stopped.

    fairseq keeps the number of batches that each worker has read, and lets each of the workers skip
    as many, so that with more workers than before some text would be skipped unread.
    """

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the epoch, and how many workers went there together."""
        return {**super().state_dict(), "workers": self.num_shards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a place in an epoch.

        Raises:
            UsageError: if other workers would read the batches in another order.
        """
        before = state_dict.get("workers", self.num_shards)
        read = state_dict.get("iterations_in_epoch", 0) * before
        if read and before != self.num_shards:
            if self.grouped_shuffling:
                raise UsageError(
                    f"--grouped-shuffling: the checkpoint is of {before} workers in the middle of "
                    f"an epoch, whose order is another one for {self.num_shards}; resume with as "
                    "many workers, from the end of an epoch, or with --reset-dataloader"
                )
            logger.info(
                f"{before} workers read {read} batches of this epoch, {self.num_shards} go on"
                + (f"; {read % self.num_shards} are read again" if read % self.num_shards else "")
            )
        place = {**state_dict, "iterations_in_epoch": read // self.num_shards}
        super().load_state_dict(place)
