"""Next words of which a generation needs few: the most probable ones, or one that is drawn."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.distribution import (
    coordinate_log_probs,
    next_word_log_probs,
    sample_words,
)
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.search import top_words
from fairseq_lightrnn.core.seats import PredictedTable

__all__ = ["FOUND", "WANTED", "Draws", "MostProbable", "Wanted", "find"]

WANTED = "wanted words"
"""Under this name fairseq's store of a generation's states may hold a :class:`Wanted`."""
FOUND = "found words"
"""Under this name a decoder leaves there what it has found, if that is not all words."""
# A search for the most probable words costs more a prefix than a look at all. Predictions that are
# flat beyond this share of the prefixes are looked at whole.
_SEARCHED_SHARE = 0.25
# Words that must not be chosen are drawn again so often; then the others are looked at.
_MOST_DRAWS = 16


class Wanted(NamedTuple):
    """Next words that a generation can make use of.

    What is found begins with the words below ``first``, in their order, those that a generator
    looks at by their numbers (the end of a text).

    Attributes:
        most_probable: so many of the most probable ones; 0 to draw one word,
        words: and these, below ``first``.
        first: see above.
        given: how many words of a text are given; until then all words are wanted.
    """

    most_probable: int
    words: tuple[int, ...]
    first: int
    given: int

    def are_few(self, num_read: int, table: PredictedTable) -> bool:
        """Tells whether a search beats a look at all words, after so many words of a text."""
        return (
            num_read > self.given
            and self.first + self.most_probable < table.num_words
            and table.num_components > 1
        )


class MostProbable(NamedTuple):
    """Some words of B texts.

    Attributes:
        log_probs: in nats, shape (B, W); -inf for what is not wanted.
        words: whose they are, shape (B, W).
    """

    log_probs: Tensor
    words: Tensor


class Draws(NamedTuple):
    """What words of B texts are drawn from.

    Attributes:
        log_probs: zeros of shape (B, first + 1): for the first words, and for all others together.
            A generator may put -inf for what must not be chosen.
        head: predicts words.
        context: of the texts.
    """

    log_probs: Tensor
    head: ComponentHead
    context: Context

    def draw(self, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Draws a word for each text, component by component.

        Args:
            allowed: which words may be chosen, booleans of shape (B, first + 1), as above.

        Returns:
            The words, shape (B,), and their log-probabilities in nats, shape (B,).
        """
        first = allowed.size(1) - 1
        words = allowed.int().argmax(dim=1)  # the only one, where all others are forbidden
        left = allowed[:, first].nonzero().squeeze(1)
        for _ in range(_MOST_DRAWS):
            if not len(left):
                break
            drawn = sample_words(self.head, self.context.select(left))
            good = allowed[left].gather(1, drawn.clamp(max=first)[:, None]).squeeze(1)
            words[left[good]] = drawn[good]
            left = left[~good]
        if len(left):
            probs = next_word_log_probs(self.head, self.context.select(left)).exp()
            probs[:, :first].masked_fill_(~allowed[left, :first], 0.0)
            words[left] = torch.multinomial(probs, 1).squeeze(1)
        return words, coordinate_log_probs(self.head, self.context, words).sum(1)


def find(head: ComponentHead, context: Context, wanted: Wanted) -> MostProbable | Draws | None:
    """Finds what is wanted of the next words of B texts; None if it is hard to find."""
    batch, first = len(context.output), wanted.first
    if not wanted.most_probable:
        return Draws(context.output.new_zeros(batch, first + 1), head, context)
    budget = max(1, round(_SEARCHED_SHARE * math.prod(head.table.shape[:-1])))
    found = top_words(head, context, wanted.most_probable, budget)
    if found is None:
        return None
    early = found.words < first
    # One column more, for those that are not among the first words.
    few = found.log_probs.new_full((batch, first + 1), float("-inf"))
    few = few.scatter_(1, found.words.clamp(max=first), found.log_probs)[:, :first]
    for word in wanted.words:
        words = found.words.new_full((batch,), word)
        few[:, word] = coordinate_log_probs(head, context, words).sum(1)
    others = found.log_probs.masked_fill(early, float("-inf"))
    numbers = torch.arange(first, device=found.words.device).expand(batch, -1)
    return MostProbable(torch.cat([few, others], 1), torch.cat([numbers, found.words], 1))
