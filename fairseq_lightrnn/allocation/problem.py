"""A balanced assignment as a solver sees it: which words matter, and what they know of places."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.allocation import kernels
from fairseq_lightrnn.allocation.costs import CostSource, require_finite

__all__ = ["HeldCosts", "Problem"]

_FLOAT64_LIMIT = 1 << 27  # entries up to which costs are held in float64
_KEEP = 24  # cheapest places that a word knows where memory does not hold all
_BLOCK_ENTRIES = 1 << 19  # temporaries stay in the cache
_BLOCK_WORDS = 1 << 11
_UNIT = 2.0**-52
_SINGLE = 2.0**-23


class Problem:
    """Costs and capacities, none of them 0, and which words are not indifferent between places."""

    def __init__(
        self, source: CostSource, capacities: np.ndarray, symbols: Sequence[str] | None
    ) -> None:
        self.source, self.capacities, self.symbols = source, capacities, symbols
        idle = source.indifferent()
        self.active = np.flatnonzero(~idle.cpu().numpy())
        words = torch.nonzero(idle).squeeze(1)
        self.constant = self.rounding = 0.0  # what the others pay, wherever they are
        if len(words):
            # In pieces: of a matrix that is held, those that are selected are a copy.
            pieces = words.split(_BLOCK_WORDS)
            paid = torch.cat(
                [source.select(some).chosen(torch.zeros_like(some)) for some in pieces]
            )
            require_finite(paid, "the cost", words.cpu().numpy(), symbols)
            self.constant = float(paid.sum())
            self.rounding = _UNIT * (8 + source.terms) * float(paid.abs().sum())

    @property
    def spare(self) -> int:
        """Units that may lie anywhere at no cost: free capacity and indifferent words."""
        return int(self.capacities.sum()) - len(self.active)


class HeldCosts:
    """What places cost the words that are not indifferent, each row less its least entry.

    Attributes:
      listed, bases, thresholds: see `kernels.bid`.
      lows: (n,) the least entries; NaN while the costs of a word were never formed.
      mean_cost: expected cost of a random assignment of these words.
      spread: the largest difference between two costs of one word.
    """

    def __init__(self, problem: Problem, memory: int) -> None:
        self.problem = problem
        n, m = len(problem.active), problem.source.shape[1]
        entries = problem.source.shape[0] * m
        self.whole = entries * 4 <= memory
        exact = self.whole and entries <= _FLOAT64_LIMIT and entries * 8 <= memory
        keep = min(_KEEP, m)
        self.listed = np.full((n, 0 if self.whole else keep), -1, np.int32)
        shape = (n, m if self.whole else keep)
        self.bases = np.full(shape, np.inf, np.float64 if exact else np.float32)
        self.thresholds = np.full(n, np.inf if self.whole else -np.inf)
        self.lows = np.full(n, np.nan)
        shares = problem.capacities / max(1, problem.capacities.sum())
        self.shares = torch.from_numpy(shares).to(problem.source.device)
        self.mean_cost = self.rounding = self.spread = 0.0

    def look_at_all(self) -> None:
        """Forms the costs of all words that have none yet."""
        self.look(np.flatnonzero(np.isnan(self.lows)), np.zeros(len(self.problem.capacities)))

    def look(self, words: np.ndarray, prices: np.ndarray) -> None:
        """Forms the costs of some words, given by their number among these, at current prices."""
        source = self.problem.source
        step = min(max(1, _BLOCK_ENTRIES // max(1, source.shape[1])), _BLOCK_WORDS)
        price = torch.from_numpy(prices).to(source.device)
        for start in range(0, len(words), step):
            some = words[start : start + step]
            ids = self.problem.active[some]
            block = source.block(torch.from_numpy(ids).to(source.device))
            new = np.isnan(self.lows[some])
            if new.any():
                require_finite(block, "the cost", ids, self.problem.symbols)
                self._measure(some, new, block)
            low = torch.from_numpy(self.lows[some]).to(source.device)
            # The same product in another block may round otherwise, and nothing may be negative.
            block = (block - low[:, None]).clamp_(min=0.0)
            if self.whole:
                self.bases[some] = block.cpu().numpy()
            else:
                self._list(some, block, price)

    def _measure(self, some: np.ndarray, new: np.ndarray, block: Tensor) -> None:
        fresh = block if new.all() else block[torch.from_numpy(new).to(block.device)]
        low, high = fresh.amin(dim=1), fresh.amax(dim=1)
        self.spread = max(self.spread, float((high - low).max()))
        self.mean_cost += float((fresh @ self.shares).sum())
        largest = torch.maximum(low.abs(), high.abs())
        self.rounding += _UNIT * (8 + self.problem.source.terms) * float(largest.sum())
        self.lows[some[new]] = low.cpu().numpy()

    def _list(self, some: np.ndarray, block: Tensor, price: Tensor) -> None:
        keep = self.listed.shape[1]
        values, places = (block + price).topk(min(keep + 1, block.shape[1]), dim=1, largest=False)
        rest = values[:, keep] if values.shape[1] > keep else torch.full_like(values[:, 0], np.inf)
        # A word may always bid for the best it has just seen, or it would look for ever.
        rest = torch.maximum(rest, values[:, 0] * (1 + 4 * _SINGLE))
        self.listed[some] = places[:, :keep].to(torch.int32).cpu().numpy()
        self.bases[some] = block.gather(1, places[:, :keep]).cpu().numpy()
        self.thresholds[some] = rest.cpu().numpy()

    def bound(self, prices: np.ndarray) -> tuple[float, float]:
        """Returns the dual value of the prices and its rounding error."""
        problem = self.problem
        values = np.empty(len(self.lows))
        kernels.least_values(self.listed, self.bases, self.thresholds, prices, values)
        # Free units and indifferent words are at the cheapest price.
        total = self.lows.sum() + values.sum() + problem.spare * prices.min(initial=0.0)
        dual = problem.constant + total - (problem.capacities * prices).sum()
        rounding = problem.rounding + self.rounding
        if self.bases.dtype == np.float32:
            rounding += 8 * _SINGLE * float(np.abs(values).sum())
        return float(dual), rounding
