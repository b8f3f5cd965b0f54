"""What it costs the training loss to seat a word in a cell, measured over a text.

With the parameters fixed, and words read by a table that stays, moving words changes no hidden
state. What a word w pays in the cell with prefix p and last coordinate c has three parts. Let h be
the state before an occurrence of a word, ``base_c(h)`` what the vectors alone give the value c
after the prefix p, ``own_w(h)`` what the features of w add wherever it sits, and Z_p(h) the sum of
``exp(base + own)`` over the words that have the prefix now:

* the prefix: ``Σ −log P(p | h)`` over the occurrences of w;
* its own last coordinate, itself in the normaliser:
  ``Σ log(1 + Z⁻(h) exp(−s(h)))`` over the occurrences of w, with ``s = base_c + own_w`` and Z⁻ the
  sum over the others that would be there. Which word leaves the cell to w is not known before all
  are assigned; on average it takes the share ``β_c = exp(base_c) / Σ exp(base)`` along, so that
  ``Z⁻ = Z_p (1 − β_c)``. Of its present prefix w itself leaves first:
  ``Z⁻ = (Z_p − exp(s_now)) (1 − β_c) / (1 − β_now)``, which is exact for its present cell;
* the words that it sits beside: how much more often than an average word in that cell it is taken
  for them, ``Σ exp(s(h)) / Z_p(h) − β_c(h)`` over the occurrences of other words with the prefix p,
  to first order.

Words without features have ``own = 0``: then ``Z⁻ + exp(s) = Z_p``, the third part is zero, and the
cost is the loss itself for any table with the same occupied cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.search import component_log_probs
from fairseq_lightrnn.core.softmax import at_least_float32

__all__ = [
    "RESOLUTION",
    "CellLosses",
    "last_component",
    "occurrence_shares",
    "prefix_coordinates",
    "vector_logits",
]

# Losses are kept as integers, so that sums of them are the same in every order and for any number
# of workers: multiples of 2**-16 nats. 400 losses of 64 nats stay within 32 bits.
RESOLUTION = 1 << 16
_MOST_NATS = 64.0
_OCCURRENCES = 256  # of a word that are looked at: of frequent words a sample


def occurrence_shares(counts: Tensor) -> Tensor:
    """Returns the share of each word's occurrences that is looked at, (V,) in float64."""
    return (_OCCURRENCES / counts.double().clamp(min=1)).clamp(max=1.0)


def prefix_coordinates(prefixes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the coordinates (N, k - 1) of prefixes (N,) given by their row-major number."""
    return torch.stack(torch.unravel_index(prefixes, shape[:-1]), dim=1)


def last_component(
    head: ComponentHead, context: Context, prefix: Tensor, first: Tensor
) -> tuple[Tensor, Context]:
    """Conditions contexts on all components of the next word but the last.

    Args:
        head: predicts words.
        context: of N texts, before any component is known.
        prefix: these components, integers of shape (N, k - 1).
        first: log-probabilities of the first one, (N, R_1).

    Returns:
        The log-probabilities of the prefixes, (N,), and the contexts that predict the last
        component.
    """
    log_probs = first.gather(1, prefix[:, :1]).squeeze(1)
    for component, value in enumerate(prefix.unbind(1)):
        if component > 0:
            scores = component_log_probs(head, context, prefix[:, :component])
            log_probs = log_probs + scores.gather(1, value[:, None]).squeeze(1)
        context = head.extend(context, component, value)
    return log_probs, context


def vector_logits(head: ComponentHead, hidden: Tensor, prefix: Tensor) -> Tensor:
    """Returns what vectors alone give the last component after prefixes, (N, R_k)."""
    last = head.table.num_components - 1
    logits = at_least_float32(F.linear(hidden, *head.softmax.component(last)))
    occupied = head.table.occupied(last, prefix)
    return logits if occupied is None else logits.masked_fill(~occupied, float("-inf"))


class CellLosses:
    """The first two parts of words' costs in the cells of candidate prefixes, summed over a text.

    Args:
        head: predicts words; its parameters and its table stay as they are meanwhile.
        candidates: the numbers of the prefixes that each word may get, (V, K); the first is its
            present one; -1 for none.
        shares: of each word's occurrences that is looked at, (V,).
        word_range: only words ``lo <= w < hi`` are looked at.

    Attributes:
        losses: int32 of shape (hi - lo, K, R_k), in multiples of 2^-16 nats.
        kept: int64 of shape (hi - lo,): how many occurrences were looked at.
    """

    def __init__(
        self,
        head: ComponentHead,
        candidates: Tensor,
        shares: Tensor,
        word_range: tuple[int, int],
    ) -> None:
        low, high = word_range
        self.head = head
        self.candidates = candidates
        self.shares = shares
        self.word_range = word_range
        size = high - low, candidates.size(1), head.table.shape[-1]
        self.losses = torch.zeros(size, dtype=torch.int32, device=candidates.device)
        self.kept = torch.zeros(high - low, dtype=torch.int64, device=candidates.device)

    @staticmethod
    def bytes_needed(candidates: int, columns: int) -> int:
        """Returns the bytes that the losses of a word take."""
        return candidates * columns * torch.int32.itemsize + torch.int64.itemsize

    @torch.no_grad()
    def add(self, words: Tensor, context: Context, draws: Tensor) -> None:
        """Adds occurrences.

        Args:
            words: (N,) that were to be predicted.
            context: of the N texts before them.
            draws: (N,) numbers from 0 to 1, which choose the occurrences that are looked at.
        """
        low, high = self.word_range
        chosen = (words >= low) & (words < high) & (draws < self.shares[words])
        index = chosen.nonzero().squeeze(1)
        words, context = words[index], self.head.to_extend(context).select(index)
        no_prefix = words.new_empty(len(words), 0)
        first = component_log_probs(self.head, context, no_prefix)
        losses, own = self._losses(words, context, self.candidates[words, 0], first)
        self._keep(words, 0, losses)
        for slot in range(1, self.candidates.size(1)):
            prefixes = self.candidates[words, slot]
            if (prefixes >= 0).all():
                losses, _ = self._losses(words, context, prefixes, first, own)
                self._keep(words, slot, losses)
            else:
                some = (prefixes >= 0).nonzero().squeeze(1)
                known = None if own is None else own[some]
                parts = words[some], context.select(some), prefixes[some], first[some], known
                self._keep(words[some], slot, self._losses(*parts)[0])
        self.kept += torch.bincount(words - low, minlength=high - low)

    def _losses(
        self,
        words: Tensor,
        context: Context,
        prefixes: Tensor,
        first: Tensor,
        own: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the losses of words in the cells of one prefix each.

        Args:
            words: (N,).
            context: of the texts before them.
            prefixes: (N,); without ``own`` these are the present ones.
            first: log-probabilities of first components, (N, R_1).
            own: (N,) what features add to the words' logits.

        Returns:
            The losses (N, R_k), and ``own``.
        """
        head = self.head
        prefix = prefix_coordinates(prefixes, head.table.shape)
        of_prefix, context = last_component(head, context, prefix, first)
        base = vector_logits(head, context.output, prefix)
        shares = torch.log_softmax(base, dim=1)  # log β
        if not len(head.softmax.features):
            return -shares - of_prefix[:, None], None
        rest = _log_one_minus(shares)  # log (1 - β)
        featured = at_least_float32(head.softmax.feature_logits(context.queries, prefix))
        logits = base + featured
        norm = torch.logsumexp(logits, dim=1)  # log Z
        if own is None:
            now = head.table(words)[:, -1:]
            own = featured.gather(1, now).squeeze(1)
            log_prob = logits.gather(1, now).squeeze(1) - norm
            norm = norm + _log_one_minus(log_prob) - rest.gather(1, now).squeeze(1)
        others = (norm - own)[:, None] + rest - base  # log Z⁻ exp(-s)
        return F.softplus(others) - of_prefix[:, None], own

    def _keep(self, words: Tensor, slot: int, losses: Tensor) -> None:
        rounded = losses.clamp(max=_MOST_NATS).mul_(RESOLUTION).round_().int()
        self.losses[:, slot].index_add_(0, words - self.word_range[0], rounded)


def _log_one_minus(log_probs: Tensor) -> Tensor:
    """Returns log(1 - p) of log p, finite where p rounds to 1."""
    return torch.log(-torch.expm1(log_probs.clamp(max=-1e-7)))
