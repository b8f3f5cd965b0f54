"""Hidden states that a decoder carries from one block of a text to the next."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from fairseq_lightrnn.core.network import State
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.workers import rank, world_size

__all__ = ["CarriedState"]


class CarriedState(nn.Module):
    """Keeps the state after the last block of every stream of text.

    The state of training is a buffer, the lanes of all workers together, so that a training resumed
    in mid-epoch goes on from it. Streams of evaluation are kept apart and are not saved.

    Attributes:
        block: int64 scalar buffer, the last block of training; -1 if there was none.
        states: buffer of shape (2, layers, lanes, d); empty if there was none.
    """

    block: Tensor
    states: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("block", torch.tensor(-1))
        self.register_buffer("states", torch.empty(2, 1, 0, 1))
        self._evaluation: dict[str, tuple[int, Tensor]] = {}
        # Of training: the last block, without asking the device; states of blocks since the last
        # update; whether this process has read a block.
        self._last, self._recent, self._reading = -1, dict[int, Tensor](), False

    def before(self, stream: str, block: int, lanes: int) -> State | None:
        """Returns the state of this worker's lanes before a block, or None before the first.

        Raises:
            UsageError: if the block is not the next one of its stream, or of other lanes.
        """
        if block == 0:
            return None
        if self.training:
            (last, states), workers = self._reached(block), world_size()
        else:
            last, states = self._evaluation.get(stream, (-1, torch.empty(2, 1, 0, 1)))
            workers = 1
        if last != block - 1 or states.size(2) != lanes * workers:
            raise UsageError(
                f"block {block} of {lanes * workers} lanes of {stream!r} cannot follow block "
                f"{last} of {states.size(2)} lanes: resume with the --batch-size, "
                "--tokens-per-sample and number of workers that the checkpoint was trained with, "
                "or with --reset-dataloader"
            )
        if workers > 1:
            states = states.chunk(workers, dim=2)[rank()]
        return states[0].contiguous(), states[1].contiguous()

    def after(self, stream: str, block: int, state: State) -> None:
        """Keeps the state after a block, cut off from its gradients."""
        states = torch.stack(state).detach()
        if not self.training:
            self._evaluation[stream] = (block, states)
            return
        if world_size() > 1:
            parts = [torch.empty_like(states) for _ in range(world_size())]
            torch.distributed.all_gather(parts, states)
            states = torch.cat(parts, dim=2)
        self.states = states
        self.block.fill_(block)
        self._last, self._recent[block], self._reading = block, states, True

    def forget_update(self) -> None:
        """Forgets what is needed to read the blocks of an update again, for the next one begins."""
        self._recent = {self._last: self.states}

    def _reached(self, block: int) -> tuple[int, Tensor]:
        """Returns which block a block of training is to follow, and the states after it.

        fairseq reads the blocks of an update again if gradients overflow or are no numbers, and
        leaves out a block that it has no memory for.
        """
        if block - 1 in self._recent:
            return block - 1, self._recent[block - 1]
        if self._reading and block - 1 > self._last:
            return block - 1, self.states
        return self._last, self.states

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes states of any size."""
        saved = state_dict.get(f"{prefix}states")
        if saved is not None:
            # fairseq saves half precision as single.
            self.states = torch.empty(saved.shape).to(self.states)
            self._last, self._recent = int(state_dict.get(f"{prefix}block", self.block)), {}
            self._reading = False
        super()._load_from_state_dict(state_dict, prefix, *args)
