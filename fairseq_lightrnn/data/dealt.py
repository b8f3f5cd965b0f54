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

    skip_remainder_batch: bool

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the epoch, of how many batches, and how many workers went there."""
        return {
            **super().state_dict(),
            "workers": self.num_shards,
            "batches": len(self.frozen_batches),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a place in an epoch.

        Raises:
            UsageError: if its text was read in other batches, or if other workers would read them
                in another order.
        """
        before = state_dict.get("workers", self.num_shards)
        read = state_dict.get("iterations_in_epoch", 0) * before
        if read:
            self._check_batches(state_dict)
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

    def _check_batches(self, state_dict: dict[str, Any]) -> None:
        """Refuses a place among other batches, after which other text is left."""
        if "lanes" in state_dict:
            raise UsageError(
                "the checkpoint is from the middle of an epoch with --carry-hidden-state, which "
                "reads text in another order: give the flag again, resume from the end of an "
                "epoch, or with --reset-dataloader"
            )
        batches = len(self.frozen_batches)
        if state_dict.get("batches", batches) != batches:
            raise UsageError(
                f"the checkpoint is from the middle of an epoch of {state_dict['batches']} "
                f"batches, this training has {batches}: resume with the same --batch-size, "
                "--max-tokens and --tokens-per-sample, from the end of an epoch, or with "
                "--reset-dataloader"
            )

    def _get_iterator_for_epoch(
        self, epoch: int, shuffle: bool, fix_batches_to_gpus: bool = False, offset: int = 0
    ) -> Any:
        """Returns an epoch's batches from a place in it on.

        fairseq's own leaves out too many with ``--skip-remainder-batch`` when it goes on in an
        epoch, and shuffles all epochs as it does the first, whatever ``--curriculum`` says.
        """
        if self.reuse_dataloader and self.dataloader is not None:
            self.batch_sampler.shuffle = shuffle
        skipped, self.skip_remainder_batch = self.skip_remainder_batch, False
        batches = super()._get_iterator_for_epoch(epoch, shuffle, fix_batches_to_gpus, offset)
        self.skip_remainder_batch = skipped
        if skipped and batches is not None:
            batches.take(offset + len(self.batch_sampler) - 1)
        return batches
