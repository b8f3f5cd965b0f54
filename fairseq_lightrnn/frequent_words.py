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

__all__ = ["FrequentInput", "FrequentOutput", "FrequentSize", "words_of_groups"]


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

    def forward(self, query: Tensor, words: Tensor, places: Tensor, size: int) -> Tensor:
        """Returns what is added to the logits of the last component, (N, R).

        Args:
            query: the part of the outputs that residuals are multiplied with, (N, e).
            words: the frequent words of N groups, (N, F); M where there are fewer.
            places: their last coordinates, (N, F); R where there are fewer.
            size: R.
        """
        residuals = F.embedding(words.clamp(max=len(self.residual) - 1), self.residual)
        scores = torch.einsum("nfe,ne->nf", residuals, query)
        logits = scores.new_zeros(len(scores), size + 1).scatter(1, places, scores)
        return logits[:, :size]


def words_of_groups(cells: Tensor, num_groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Lists the frequent words that share all coordinates but the last.

    Args:
        cells: the cells of the M frequent words, (M,).
        num_groups: G, the groups of cells that differ in the last coordinate only.
        size: R, the size of the last component.

    Returns:
        The words (G, F) of each group and their last coordinates (G, F), F being the largest
        number in a group; M and R where there are fewer.
    """
    groups, places = cells // size, cells % size
    order = torch.argsort(groups, stable=True)
    sizes = torch.bincount(groups, minlength=num_groups)
    groups = groups[order]
    starts = sizes.cumsum(0) - sizes
    position = torch.arange(len(cells), device=cells.device) - starts[groups]
    listed = cells.new_full((2, num_groups, int(sizes.max())), size)
    listed[0] = len(cells)
    listed[0, groups, position] = order
    listed[1, groups, position] = places[order]
    return listed[0], listed[1]
