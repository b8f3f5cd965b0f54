"""Wide residuals of the most frequent words.

A word's residual is a few numbers of its own beside its component vectors. Few words make most of a
text: wide residuals for those, and thin ones or none for the others, cost little however many words
there are. The frequent words are the first of the dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FrequentInput", "FrequentOutput", "FrequentSize", "WordLists"]


class FrequentSize(NamedTuple):
    """How many words are frequent, and how wide their residuals are.

    Attributes:
        words: M; the words 0 … M-1.
        dim: numbers of each.
    """

    words: int
    dim: int

    def check(self, num_words: int) -> None:
        """Raises ValueError if there are not so many words, or nothing to give them."""
        if not 0 < self.words <= num_words or self.dim < 1:
            raise ValueError(
                f"{self.words} frequent words with {self.dim} numbers each: expected 1 to "
                f"{num_words} words and at least 1 number"
            )


class FrequentInput(nn.Module):
    """What frequent words add to their input vectors: numbers of their own, projected.

    Args:
        size: M words with e numbers each, which start at zero.
        dim: d, the width of an input vector.
    """

    def __init__(self, size: FrequentSize, dim: int) -> None:
        super().__init__()
        self.residual = nn.Embedding(*size)
        nn.init.zeros_(self.residual.weight)
        self.projection = nn.Linear(size.dim, dim, bias=False)

    def forward(self, words: Tensor, look_up: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Returns vectors (..., d) of words (...), zero for those that are not frequent.

        Args:
            words: integers of shape (...).
            look_up: returns the rows of a matrix at an index.
        """
        last = self.residual.num_embeddings - 1
        residuals = look_up(words.clamp(max=last), self.residual.weight)
        return self.projection(residuals * (words <= last)[..., None])


class FrequentOutput(nn.Module):
    """What frequent words add to their logits: numbers of their own times part of the output.

    Args:
        size: M words with e numbers each, which start at zero.
    """

    def __init__(self, size: FrequentSize) -> None:
        super().__init__()
        self.residual = nn.Parameter(torch.zeros(*size))

    def forward(
        self, query: Tensor, words: Tensor, text: Tensor, places: Tensor, size: int
    ) -> Tensor:
        """Returns what is added to the logits of the last component, (N, R).

        Args:
            query: the part of the outputs that residuals are multiplied with, (N, e).
            words: frequent words, (T,).
            text: the output that each of them is to be predicted from, (T,).
            places: their last coordinates, (T,).
            size: R.
        """
        scores = (F.embedding(words, self.residual) * query.index_select(0, text)).sum(-1)
        return scores.new_zeros(len(query), size).index_put((text, places), scores)


class WordLists:
    """The frequent words of every group of words that share all coordinates but the last.

    Args:
        cells: the cells of the M frequent words, (M,).
        num_groups: G, the groups of cells that differ in the last coordinate only.
        size: R, the size of the last component.
    """

    def __init__(self, cells: Tensor, num_groups: int, size: int) -> None:
        groups = cells // size
        self.words = torch.argsort(groups, stable=True)
        self.places = (cells % size)[self.words]
        self.sizes = torch.bincount(groups, minlength=num_groups)
        self.starts = self.sizes.cumsum(0) - self.sizes

    def of(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Joins the lists of N groups.

        Returns:
            The words, which of the N groups each is from, and their last coordinates, all (T,).
        """
        sizes = self.sizes[groups]
        which = torch.repeat_interleave(sizes)
        first = self.starts[groups] - (sizes.cumsum(0) - sizes)
        at = torch.arange(len(which), device=which.device) + first[which]
        return self.words[at], which, self.places[at]
