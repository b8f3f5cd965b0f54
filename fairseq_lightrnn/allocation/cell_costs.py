"""What it costs the training loss to seat a word in a cell, measured over a text.

With the parameters fixed, and words read by a table that stays, moving words changes no hidden
state. Let h be the state before an occurrence of the word w, ``base_c(h)`` what the vectors alone
give the last coordinate c after a prefix p (for two components: a row), ``own_w(h)`` what the
features of w add wherever it sits, and Z_p(h) the sum of ``exp(base + own)`` over the words that
have the prefix now. In the cell (p, c), with ``s = base_c + own_w``, w costs

* the prefix: ``Σ -log P(p | h)`` over the occurrences of w;
* its last coordinate, itself in the normaliser: ``Σ log(1 + Z⁻(h) exp(-s(h)))`` over the
  occurrences of w, Z⁻ being Z_p without w where w has the prefix now, and Z_p elsewhere;
* what its presence costs others: ``Σ exp(s(h)) / Z_p(h)`` over the occurrences of the other words
  that have the prefix now, which is to first order how much their loss rises with it there, or
  falls once it has left (:mod:`fairseq_lightrnn.allocation.neighbours`).

As many words leave a prefix as come to it, and each is charged for its coming and credited for its
leaving; what those that come cost each other is not known before all are assigned.

Words without features have ``own = 0``. A normaliser then depends on which cells are occupied, not
on who sits there: the third part is the same for all, the second is ``-log softmax(base)_c``, and
the sum over words is the loss itself of any table with the same occupied cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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
    "FeaturedCells",
    "last_component",
    "log_one_minus",
    "occurrence_shares",
    "prefix_coordinates",
    "prefix_sums",
]

# Losses are kept as integers, so that sums of them are the same in every order and for any number
# of workers: multiples of 2**-16 nats. 400 losses of 64 nats stay within 32 bits.
RESOLUTION = 1 << 16
_MOST_NATS = 64.0
_AT_ONCE = 1 << 21  # numbers
OCCURRENCES = 64  # of a word that are looked at: of frequent words a sample


def occurrence_shares(counts: Tensor, most: int = OCCURRENCES) -> Tensor:
    """Returns the share of each word's occurrences that makes at most so many, (V,) in float64."""
    return (most / counts.double().clamp(min=1)).clamp(max=1.0)


def prefix_coordinates(prefixes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the coordinates (N, k - 1) of prefixes (N,) given by their row-major number."""
    return torch.stack(torch.unravel_index(prefixes, shape[:-1]), dim=1)


def prefix_sums(parts: Sequence[Tensor]) -> Tensor:
    """Adds up what coordinates give their prefixes: (n, R_i) of each to (n, prefixes)."""
    total = parts[0]
    for part in parts[1:]:
        total = (total[:, :, None] + part[:, None]).flatten(1)
    return total


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


class CellLosses:
    """The first two parts of words' costs in the cells of candidate prefixes, summed over a text.

    Args:
        head: predicts words; its parameters and its table stay as they are meanwhile.
        words: those that may move, (n,).
        candidates: the numbers of the prefixes that each of them may get, (n, K); the first is its
            present one; -1 for none.
        shares: of each of their occurrences that is looked at, (n,).
        memory: bytes that vectors of all cells may take.

    Attributes:
        losses: int32 of shape (n, K, R_k), in multiples of 2^-16 nats.
        kept: int64 of shape (n,): how many occurrences were looked at.
    """

    def __init__(
        self,
        head: ComponentHead,
        words: Tensor,
        candidates: Tensor,
        shares: Tensor,
        memory: float = math.inf,
    ) -> None:
        self.head = head
        self.words = words
        self.candidates = candidates
        self.shares = shares
        self._index = words.new_full((head.table.num_words,), -1)
        self._index[words] = torch.arange(len(words), device=words.device)
        self._features = FeaturedCells(head, memory) if len(head.softmax.features) else None
        size = *candidates.shape, head.table.shape[-1]
        self.losses = torch.zeros(size, dtype=torch.int32, device=words.device)
        self.kept = torch.zeros(len(words), dtype=torch.int64, device=words.device)

    @torch.no_grad()
    def add(self, words: Tensor, context: Context, draws: Tensor) -> None:
        """Adds occurrences.

        Args:
            words: (N,) that were to be predicted.
            context: of the N texts before them.
            draws: (N,) numbers from 0 to 1, which choose the occurrences that are looked at.
        """
        index = self._index[words]
        chosen = ((index >= 0) & (draws < self.shares[index])).nonzero().squeeze(1)
        words, index = words[chosen], index[chosen]
        context = self.head.to_extend(context).select(chosen)
        first = component_log_probs(self.head, context, words.new_empty(len(words), 0))
        read = self._read(words, context)
        # Each occurrence with each of its prefixes, those of a prefix side by side.
        context = context._replace(queries=())  # all that they are needed for is read
        count, last = self.losses.shape[1:]
        prefixes, pairs = self.candidates[index].flatten().sort(stable=True)
        known = prefixes >= 0
        # A pair takes some eight states besides its scores of components.
        size = max(last, first.size(1), 8 * self.head.softmax.vectors.dim)
        step = max(1, _AT_ONCE // size)
        for some, prefix in zip(pairs[known].split(step), prefixes[known].split(step), strict=True):
            occurrence, slot = some // count, some % count
            coordinates = prefix_coordinates(prefix, self.head.table.shape)
            of_prefix, longer = last_component(
                self.head, context.select(occurrence), coordinates, first[occurrence]
            )
            losses = self._last_losses(longer, coordinates, prefix, slot == 0, occurrence, read)
            sums = self.losses.view(-1, last)
            sums.index_add_(0, index[occurrence] * count + slot, _rounded(losses, of_prefix))
        self.kept += torch.bincount(index, minlength=len(self.kept))

    def _read(self, words: Tensor, context: Context) -> _Read | None:
        if self._features is None:
            return None
        queries = self._features.queries(context)
        columns = self.head.table(words)[:, -1]
        return _Read(queries, self._features.own(queries, words), columns)

    def _last_losses(
        self,
        context: Context,
        coordinates: Tensor,
        prefix: Tensor,
        present: Tensor,
        occurrence: Tensor,
        read: _Read | None,
    ) -> Tensor:
        """Returns the losses of words' last coordinates after prefixes, (N, R_k).

        Args:
            context: after these prefixes.
            coordinates: of the prefixes, (N, k - 1).
            prefix: their numbers, (N,) in order.
            present: whether it is where the word sits now, (N,).
            occurrence: which of those that were read it is, (N,).
            read: these, or None where words have no features.
        """
        last = self.head.table.num_components - 1
        base = self.head.softmax.vector_logits(last, context.output, coordinates)
        base = at_least_float32(base)
        if self._features is None or read is None:
            return torch.log_softmax(base, dim=1).neg_()
        logits = self._features.scores(read.queries[occurrence], prefix).add_(base)
        norm = torch.logsumexp(logits, dim=1)  # log Z⁻, but where the word sits there
        there = present.nonzero().squeeze(1)
        columns = read.columns[occurrence[there]]
        norm[there] += log_one_minus(logits[there, columns] - norm[there])
        return F.softplus(base.neg_().add_((norm - read.own[occurrence])[:, None]))


class _Read(NamedTuple):
    """Occurrences of words with features.

    Attributes:
        queries: what the vectors of words are multiplied with, (N, E).
        own: what the features of the words themselves add, (N,).
        columns: where the words sit in their prefixes, (N,).
    """

    queries: Tensor
    own: Tensor
    columns: Tensor


class FeaturedCells:
    """What features give the words of all cells, scored many queries of one prefix at a time.

    Args:
        head: predicts words, with features; nothing of it changes meanwhile.
        memory: bytes that vectors of all cells may take; beyond, they are looked up again and
            again.
    """

    def __init__(self, head: ComponentHead, memory: float = math.inf) -> None:
        self.head = head
        self._vectors: Tensor | None = None  # (prefixes, R_k, E)
        if self.bytes_kept(head, memory):
            members = head.table.members
            one = self._vectors_of(members[0, :1])
            vectors = one.new_empty(*members.shape, one.size(1))
            for number, words in enumerate(members):
                vectors[number] = self._vectors_of(words)
            self._vectors = vectors

    @staticmethod
    def bytes_kept(head: ComponentHead, memory: float) -> int:
        """Returns the bytes that vectors of all cells take, 0 where they are not kept."""
        word = head.table.members[0, :1]
        of_one = sum(feature.vectors_of(word).nbytes for feature in head.softmax.features)
        needed = head.table.members.numel() * of_one
        return needed if needed <= memory else 0

    def _vectors_of(self, words: Tensor) -> Tensor:
        """Returns what queries are multiplied with to score words (W,): (W, E)."""
        parts = [feature.vectors_of(words) for feature in self.head.softmax.features]
        return torch.cat(parts, dim=1).detach()

    def queries(self, context: Context) -> Tensor:
        """Returns what the vectors of words are multiplied with, (N, E), of N texts."""
        ones = context.output.new_ones(len(context.output), 1)
        return torch.cat([ones if one is None else one for one in context.queries], dim=1)

    def own(self, queries: Tensor, words: Tensor) -> Tensor:
        """Scores one word for each query: (N,)."""
        return at_least_float32((queries * self._vectors_of(words)).sum(dim=1))

    def scores(self, queries: Tensor, prefixes: Tensor) -> Tensor:
        """Scores the words of a prefix for each query.

        Args:
            queries: (N, E).
            prefixes: their numbers, (N,) in order.

        Returns:
            Shape (N, R_k).
        """
        members = self.head.table.members
        found = queries.new_empty(len(queries), members.size(1))
        numbers, sizes = torch.unique_consecutive(prefixes, return_counts=True)
        start = 0
        for number, size in zip(numbers.tolist(), sizes.tolist(), strict=True):
            some = slice(start, start + size)
            if self._vectors is None:
                vectors = self._vectors_of(members[number])
            else:
                vectors = self._vectors[number]
            torch.mm(queries[some], vectors.T, out=found[some])
            start += size
        return at_least_float32(found)


def _rounded(losses: Tensor, of_prefix: Tensor) -> Tensor:
    """Returns losses (N, R), less log-probabilities (N,), in multiples of 2^-16 nats."""
    losses = losses.mul_(RESOLUTION).add_((0.5 - RESOLUTION * of_prefix)[:, None])
    return losses.clamp_(max=_MOST_NATS * RESOLUTION).int()


def log_one_minus(log_probs: Tensor) -> Tensor:
    """Returns log(1 - p) of log p, finite where p rounds to 1."""
    return torch.log(-torch.expm1(log_probs.clamp(max=-1e-7)))
