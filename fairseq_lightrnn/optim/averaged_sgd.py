"""Averaged SGD that begins to average when validation stops getting better.

NT-ASGD of AWD-LSTM (arXiv 1708.02182, section 3 and algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["AveragedSGD", "is_nonmonotone"]


def is_nonmonotone(losses: Sequence[float], interval: int) -> bool:
    """Tells whether the last loss is worse than the best of those more than N checks before it.

    Args:
        losses: of all validations so far, the last one included.
        interval: N.
    """
    earlier = losses[: max(len(losses) - 1 - interval, 0)]
    return len(earlier) > 0 and losses[-1] > min(earlier)


class AveragedSGD(torch.optim.SGD):
    """SGD whose parameters are, between its steps, the average of the iterates.

    Before :meth:`start_averaging` this is ``torch.optim.SGD``. From then on, what is found in the
    parameters after a step is the mean of the iterates, to be validated and saved, while
    :meth:`zero_grad`, which begins the next step, puts the last iterate back. Iterates and averages
    change places without copying.

    The state of a parameter holds the one of both that is not in the parameter: ``iterate`` or
    ``average``. Groups hold ``averaged``, the number of iterates in the average, 0 before.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group.setdefault("averaged", 0)

    @property
    def averaging(self) -> bool:
        """Whether averaging has begun."""
        return any(group["averaged"] for group in self.param_groups)

    @torch.no_grad()
    def start_averaging(self) -> None:
        """Makes the parameters as they are the first iterate of the average."""
        if self.averaging:
            raise ValueError("averaging has begun already")
        for group in self.param_groups:
            group["averaged"] = 1
            for parameter in group["params"]:
                self.state[parameter]["average"] = parameter.detach().clone()
        self._exchange("average")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes a step from the last iterate and adds the new one to the average."""
        self._exchange("iterate")
        loss = super().step(closure)
        for group in self.param_groups:
            if not group["averaged"]:
                continue
            group["averaged"] += 1
            for parameter in group["params"]:
                average = self.state[parameter]["average"]
                average.lerp_(parameter.detach(), 1 / group["averaged"])
        self._exchange("average")
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients and puts the last iterate into the parameters."""
        super().zero_grad(set_to_none)
        self._exchange("iterate")

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; the parameters must be those that were saved with it."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "iterate" in state:
                    # Iterates belong into the parameters' own memory, where an LSTM of cuDNN
                    # wants its weights side by side.
                    average = parameter.detach().clone()
                    parameter.data.copy_(state.pop("iterate"))
                    state["average"] = average
        self._exchange("average")

    def _exchange(self, wanted: str) -> None:
        """Puts averages, or iterates, into the parameters if they are not there."""
        other = {"average": "iterate", "iterate": "average"}[wanted]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter] if group["averaged"] else {}
                if wanted in state:
                    state[other] = parameter.data
                    parameter.data = state.pop(wanted)
