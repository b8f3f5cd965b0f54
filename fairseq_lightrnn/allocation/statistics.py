"""Sufficient statistics of a reallocation: summed hidden states and counts per word."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["AllocationStatistics"]

# Hidden states are rounded to multiples of 2**-24 before they are added. Sums of such numbers are
# exact in float64 while they stay below 2**29, so the order of the additions - batches, threads,
# workers - does not matter.
_RESOLUTION = 2.0**24


class AllocationStatistics:
    """Summed hidden states and occurrences of words, gathered with the parameters fixed.

    The loss of giving word ``w`` the coordinate ``a`` of component ``i``, summed over the
    occurrences of ``w``, is ``const - (sums[i, w] @ vectors[i][a] + counts[w] * biases[i][a])``:
    the sums stand for V x sqrt(V) losses (arXiv 1610.09893, section 3.3, where the losses are
    summed one by one).

    In float64 they are exact, and therefore the same for every order of the text and every number
    of workers, as long as no sum leaves 2**29.

    Args:
      num_words: V, size of the dictionary.
      num_components: k, coordinates of a word.
      dim: d, width of the hidden states.
      word_range: only words ``lo <= w < hi`` are kept, others are skipped; all by default.
      dtype: of the sums. float32 halves the memory; each batch is summed in float64 before it is
        added.
      storage: directory in which the sums are kept as a memory-mapped file instead of in memory.

    Raises:
      ValueError: a size is not positive, or ``word_range`` is not within the dictionary.
    """

    def __init__(
        self,
        num_words: int,
        num_components: int,
        dim: int,
        *,
        word_range: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float64,
        storage: str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value in (
            ("num_words", num_words),
            ("num_components", num_components),
            ("dim", dim),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        low, high = (0, num_words) if word_range is None else word_range
        if not 0 <= low < high <= num_words:
            raise ValueError(
                f"word_range {word_range} must be a non-empty part of (0, {num_words})"
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype of the statistics must be float32 or float64, got {dtype}")
        self.num_words = num_words
        self.num_components = num_components
        self.dim = dim
        self.word_range = (low, high)
        shape = (num_components, high - low, dim)
        if storage is None:
            self.sums = torch.zeros(shape, dtype=dtype)
        else:
            self.sums = _memory_mapped(Path(storage), shape, dtype, low, high)
        self.counts = torch.zeros(high - low, dtype=torch.float64)

    @staticmethod
    def bytes_needed(
        num_words: int, num_components: int, dim: int, dtype: torch.dtype = torch.float64
    ) -> int:
        """Returns the bytes that statistics of this size take, wherever they are kept."""
        return num_words * (num_components * dim * dtype.itemsize + torch.float64.itemsize)

    @torch.no_grad()
    def add(self, words: Tensor, hidden: Tensor) -> None:
        """Adds occurrences.

        Args:
          words: (N,) word ids that were to be predicted.
          hidden: (N, k, d) output states; ``hidden[:, i]`` is the state that predicted component
            ``i``.

        Raises:
          ValueError: the shapes do not fit, or an id is not in the dictionary.
        """
        expected = (words.shape[0], self.num_components, self.dim)
        if words.dim() != 1 or tuple(hidden.shape) != expected:
            raise ValueError(
                f"words {tuple(words.shape)} and hidden {tuple(hidden.shape)} do not fit; expected "
                f"(N,) and (N, {self.num_components}, {self.dim})"
            )
        if words.numel() == 0:
            return
        lowest, highest = int(words.min()), int(words.max())
        if lowest < 0 or highest >= self.num_words:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"word id {wrong} is not in the dictionary of {self.num_words} words")
        low, high = self.word_range
        words, hidden = words.to(self.sums.device), hidden.to(self.sums.device)
        if (low, high) != (0, self.num_words):
            kept = (words >= low) & (words < high)
            words, hidden = words[kept] - low, hidden[kept]
        distinct, inverse = torch.unique(words, return_inverse=True)
        states = hidden.to(torch.float64).mul(_RESOLUTION).round_().div_(_RESOLUTION)
        batch = states.new_zeros((distinct.numel(), self.num_components, self.dim))
        batch.index_add_(0, inverse, states)
        counts = torch.bincount(inverse, minlength=distinct.numel()).to(torch.float64)
        for component in range(self.num_components):
            total = self.sums[component].index_select(0, distinct).to(torch.float64)
            total += batch[:, component]
            self.sums[component].index_copy_(0, distinct, total.to(self.sums.dtype))
        self.counts[distinct] += counts

    def __repr__(self) -> str:
        sizes = f"{self.num_words}, {self.num_components}, {self.dim}"
        return f"AllocationStatistics({sizes}, word_range={self.word_range}, {self.sums.dtype})"


def _memory_mapped(
    directory: Path, shape: tuple[int, int, int], dtype: torch.dtype, low: int, high: int
) -> Tensor:
    """Returns a zero tensor backed by a new file in ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"sums-{low}-{high}.npy"
    name = "float64" if dtype == torch.float64 else "float32"
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=name, shape=shape)
    return torch.from_numpy(mapped)
