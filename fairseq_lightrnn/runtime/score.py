"""The score of a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fairseq_lightrnn.perplexity import perplexity

__all__ = ["Score"]


@dataclass(frozen=True)
class Score:
    """The score of a sentence of n words, the end of sentence among them.

    Attributes:
        tokens: the words as they were written, n of them.
        ids: their numbers in the vocabulary, (n,); that of the unknown word for others.
        component_log_probs: in nats, (n, k), of each coordinate given those before it.
    """

    tokens: list[str]
    ids: np.ndarray
    component_log_probs: np.ndarray

    @property
    def log_probs(self) -> np.ndarray:
        """The words' log-probabilities in nats, (n,)."""
        return np.asarray(self.component_log_probs.sum(axis=1))

    @property
    def log_prob(self) -> float:
        """The sentence's log-probability in nats."""
        return float(self.component_log_probs.sum())

    @property
    def perplexity(self) -> float:
        """The sentence's perplexity per word, its end counted as a word; NaN of no words."""
        found = perplexity(self.log_prob, len(self.tokens))
        return math.nan if found is None else found
