"""Hidden states that a decoder carries from one block of a text to the next."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from fairseq_lightrnn.core.network import State

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

    def before(self, stream: str, block: int, lanes: int) -> State | None:
        """Returns the state of this worker's lanes before a block, or None before the first.

        Raises:
            ValueError: if the block is not the next one of its stream, or of other lanes.
        """
        if block == 0:
            return None
        last, states = (
            (int(self.block), self._own_lanes())
            if self.training
            else self._evaluation.get(stream, (-1, torch.empty(2, 1, 0, 1)))
        )
        if last != block - 1 or states.size(2) != lanes:
            raise ValueError(
                f"block {block} of {lanes} lanes of {stream!r} cannot follow block {last} of "
                f"{states.size(-2)} lanes: resume with the --batch-size, --tokens-per-sample and "
                "number of workers that the checkpoint was trained with, or with --reset-dataloader"
            )
        return states[0].contiguous(), states[1].contiguous()

    def after(self, stream: str, block: int, state: State) -> None:
        """Keeps the state after a block, cut off from its gradients."""
        states = torch.stack(state).detach()
        if not self.training:
            self._evaluation[stream] = (block, states)
            return
        if _workers() > 1:
            parts = [torch.empty_like(states) for _ in range(_workers())]
            torch.distributed.all_gather(parts, states)
            states = torch.cat(parts, dim=2)
        self.states = states
        self.block.fill_(block)

    def _own_lanes(self) -> Tensor:
        """Returns this worker's part of the states."""
        workers = _workers()
        if self.states.size(2) % workers:
            raise ValueError(
                f"the checkpoint carries states of {self.states.size(2)} lanes, which {workers} "
                "workers cannot share; resume with as many workers as before"
            )
        rank = torch.distributed.get_rank() if workers > 1 else 0
        return self.states.chunk(workers, dim=2)[rank]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes states of any size."""
        saved = state_dict.get(f"{prefix}states")
        if saved is not None:
            self.states = torch.empty_like(saved, device=self.states.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _workers() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
