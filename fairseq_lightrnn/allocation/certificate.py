"""What every solver returns: an assignment, and how far from the best it can be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["CertifiedAssignment"]


@dataclass(frozen=True)
class CertifiedAssignment:
    """An assignment of words and a lower bound on the cost of any.

    Attributes:
      assignment: (n,) what each word is assigned to.
      cost: total cost, summed in float64.
      lower_bound: no assignment costs less than this.
      mean_cost: expected cost of an assignment drawn at random, the yardstick of `relative_gap`.
      optimal: whether cost and bound agree to rounding error.
      seconds: time it took.
    """

    assignment: np.ndarray
    cost: float
    lower_bound: float
    mean_cost: float
    optimal: bool
    seconds: float

    @property
    def gap(self) -> float:
        """Cost minus lower bound: an upper bound on what a better assignment could save."""
        return max(0.0, self.cost - self.lower_bound)

    @property
    def relative_gap(self) -> float:
        """The gap as a share of what the best assignment saves over a random one."""
        gain = self.mean_cost - self.lower_bound
        return self.gap / gain if gain > 0 else 0.0
