"""The score of a sentence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["SentenceScore"]


@dataclass(frozen=True)
class SentenceScore:
    """The score of a sentence of n words, the end of sentence among them.

    Attributes:
        tokens: the words as they were written, n of them.
        ids: their ids, shape (n,); that of ``<unk>`` for words that the model does not know.
        component_log_probs: in nats, shape (n, k), of each coordinate given those before it.
        entropy: of the distribution that each word was predicted from, in nats, or None.
        rank: of each word in that distribution, from 1, or None.
    """

    tokens: list[str]
    ids: np.ndarray
    component_log_probs: np.ndarray
    entropy: np.ndarray | None = None
    rank: np.ndarray | None = None

    def after(self, words: int) -> SentenceScore:
        """Returns the score of what follows the first words."""
        parts = (self.tokens, self.ids, self.component_log_probs, self.entropy, self.rank)
        return SentenceScore(*(part if part is None else part[words:] for part in parts))  # type: ignore[arg-type]

    @property
    def log_probs(self) -> np.ndarray:
        """The words' log-probabilities in nats, shape (n,)."""
        return np.asarray(self.component_log_probs.sum(axis=1))

    @property
    def log_prob(self) -> float:
        """The sentence's log-probability in nats."""
        return float(self.component_log_probs.sum())

    @property
    def perplexity(self) -> float:
        """The sentence's perplexity per word, its end counted as a word."""
        return float(np.exp(-self.log_prob / len(self.tokens)))
