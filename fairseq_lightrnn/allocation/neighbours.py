"""What the presence of a word costs those that it sits beside: the third part of a cell's cost.

See :mod:`fairseq_lightrnn.allocation.cell_costs` for the derivation. It is measured on
occurrences of the words that have a prefix now, for every word that might get it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairseq_lightrnn.allocation.occurrences import Occurrences
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.softmax import at_least_float32

__all__ = ["MOST_LOGIT", "Neighbours"]

# Of each word, whatever its row: it is a few words of a row that a new one is taken for, and a
# sample that misses them makes the row look better than it is to all that are like them.
_OCCURRENCES = 64
MOST_LOGIT = 30.0  # exp of more would leave nothing of what it is added to


class Neighbours:
    """Occurrences of the words that have each prefix now, and what another word costs them.

    Args:
        head: predicts words.
        counts: (V,) occurrences of the words.
        memory: bytes that the sample may take.
    """

    def __init__(self, head: ComponentHead, counts: Tensor, memory: float = math.inf) -> None:
        self.head = head
        self.occurrences = Occurrences(head, counts, _OCCURRENCES, memory)

    @torch.no_grad()
    def costs(self, prefix: int, words: Tensor) -> Tensor:
        """Returns what words cost others that have a prefix now, in each of its cells.

        Args:
            prefix: its number.
            words: (W,).

        Returns:
            Nats over the whole text, (W, R_k) in float64 on the CPU; 0 in empty cells.
        """
        seen = self.occurrences.of(prefix)
        if not len(seen.words):
            return torch.zeros(len(words), self.head.table.shape[-1], dtype=torch.float64)
        words = words.to(seen.words.device)
        norm = torch.logsumexp(seen.logits, dim=1, keepdim=True)
        own = at_least_float32(self.head.softmax.feature_logits_of(seen.queries, words))
        mistaken = own.clamp(max=MOST_LOGIT).exp().expand(len(seen.words), -1)  # (n, W)
        taken = (seen.base - norm).exp() * seen.weights[:, None]
        # A feature that is the same in all contexts needs no product.
        costs = mistaken[:1].T * taken.sum(0) if len(own) == 1 else mistaken.T @ taken
        # No word is taken for itself.
        place = words.new_full((self.head.table.num_words,), -1)
        place[words] = torch.arange(len(words), device=words.device)
        itself = (place[seen.words] >= 0).nonzero().squeeze(1)
        which = place[seen.words[itself]]
        costs.index_add_(0, which, mistaken[itself, which][:, None] * taken[itself], alpha=-1)
        return costs.double().cpu()
