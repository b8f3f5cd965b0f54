"""The score of a sentence, with what is known of the distributions that it was predicted from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fairseq_lightrnn.runtime.score import Score

__all__ = ["SentenceScore"]


@dataclass(frozen=True)
class SentenceScore(Score):
    """The score of a sentence of n words, the end of sentence among them.

    Attributes:
        entropy: of the distribution that each word was predicted from, in nats, or None.
        rank: of each word in that distribution, from 1, or None.
    """

    entropy: np.ndarray | None = None
    rank: np.ndarray | None = None

    def after(self, words: int) -> SentenceScore:
        """Returns the score of what follows the first words."""
        parts = (self.tokens, self.ids, self.component_log_probs, self.entropy, self.rank)
        return SentenceScore(*(part if part is None else part[words:] for part in parts))  # type: ignore[arg-type]
