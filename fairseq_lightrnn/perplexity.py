"""Perplexity, from summed log-probabilities."""

from __future__ import annotations

import math

__all__ = ["perplexity"]


def perplexity(log_prob: float, words: int) -> float | None:
    """Returns the perplexity of words; infinity where it is too large a number, None of no words.

    Args:
        log_prob: their summed log-probability in nats.
        words: how many they are.
    """
    if not words:
        return None
    try:
        return math.exp(-log_prob / words)
    except OverflowError:
        return math.inf
