"""What it costs the training loss to seat a word in another cell of a further table.

Words are read by tables that stay, so that no hidden state changes, and a further table has no say
in prefixes: a word keeps its prefix p, and all that changes is its logit among the words of p. In
the cell (a, c) of a further table, a standing for all coordinates but the last, that is

    s(h) = s0(h) + u_a(h) + v_c(h)

with u and v the products of a query with the table's vectors, and s0 what the word has besides.
With Z(h) the sum of ``exp(s)`` over the words of p, and Z⁻ that sum without the word, it costs

* ``Σ log(1 + Z⁻(h) exp(-s(h)))`` over the occurrences of the word;
* ``Σ exp(s(h)) / Z(h)`` over those of the other words of p, which is to first order how much their
  loss rises with it.

These are the last two parts of :mod:`fairseq_lightrnn.allocation.cell_costs`. Words of one prefix
that move at the same time change each other's Z, which is not known before all are seated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_lightrnn.allocation.cell_costs import (
    log_one_minus,
    prefix_coordinates,
    prefix_sums,
)
from fairseq_lightrnn.allocation.neighbours import MOST_LOGIT
from fairseq_lightrnn.allocation.occurrences import Occurrences
from fairseq_lightrnn.allocation.true_loss import CANDIDATES, choose_prefixes
from fairseq_lightrnn.core.features import FurtherTables
from fairseq_lightrnn.core.seats import PredictedTable, Seats
from fairseq_lightrnn.core.softmax import at_least_float32

__all__ = ["further_costs"]

_AT_ONCE = 1 << 20  # numbers


@torch.no_grad()
def further_costs(
    occurrences: Occurrences,
    further: FurtherTables,
    number: int,
    words: Tensor,
    count: int = CANDIDATES,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Measures what cells of a further table cost words, by a sample of all words' occurrences.

    Args:
        occurrences: by the words' prefixes in the first table.
        further: the further tables.
        number: which of them, from 0.
        words: those that may move, (n,).
        count: K, how many prefixes of the table each may get: the present one, half of the others
            where the loss falls most steeply, and half by chance.
        seed: of chance.

    Returns:
        The numbers of these prefixes, int32 of shape (n, K), -1 for none, and the costs in nats
        over the whole text less that of the present cell, (n, K, R_k); on the CPU. Words without
        an occurrence in the sample have no costs but 0 in their present cells: the others are nan.
    """
    head, seats = occurrences.head, cast(Seats, further.tables[number])
    prefixes, last_of = seats.prefixes, seats.coordinates[:, -1].long()
    taken = seats.taken_prefixes
    count = min(count, int(taken.sum()))
    candidates = words.new_full((len(words), count), -1)
    candidates[:, 0] = prefixes[words]
    costs = torch.full((len(words), count, seats.shape[-1]), math.nan, device=words.device)
    costs[torch.arange(len(words)), 0, last_of[words]] = 0.0
    index = words.new_full((seats.num_words,), -1)
    index[words] = torch.arange(len(words), device=words.device)
    place = list(head.softmax.features).index(further)
    generator = torch.Generator().manual_seed(seed)
    columns = head.table.coordinates[:, -1].long()
    for prefix in range(math.prod(head.table.shape[:-1])):
        seen, movers = occurrences.of(prefix), _movers(head.table, prefix, index)
        if not len(seen.words) or not len(movers.words):
            continue
        *parts, of_last = further.score_table(cast(Tensor, seen.queries[place]), number)
        of_prefixes = at_least_float32(prefix_sums(parts))
        present, last = prefixes[movers.words], last_of[movers.words]
        mover_of = words.new_full((head.table.shape[-1],), -1)
        mover_of[movers.columns] = torch.arange(len(last), device=words.device)
        logits = seen.logits[:, movers.columns]
        of_last = at_least_float32(of_last)
        effects = _Effects(
            logits,
            rest=logits - of_prefixes[:, present] - of_last[:, last],
            norm=torch.logsumexp(seen.logits, dim=1),
            which=mover_of[columns[seen.words]],
            weights=seen.weights,
            of_prefixes=of_prefixes,
            of_last=of_last,
        )
        steep = effects.slopes().masked_fill_(~taken, math.inf)
        chosen = choose_prefixes(steep, present, count, generator)
        found = effects.own(chosen) + effects.others(chosen)
        now = found[torch.arange(len(last)), 0, last]
        candidates[movers.numbers] = chosen
        known = effects.which[effects.which >= 0].unique()
        costs[movers.numbers[known]] = (found - now[:, None, None])[known].float()
    return candidates.int().cpu(), costs.cpu()


class _Movers(NamedTuple):
    """Words of one prefix of the first table that may move in a further one.

    Attributes:
        words: (W,).
        numbers: theirs among all that may move, (W,).
        columns: their last coordinates in the first table, (W,).
    """

    words: Tensor
    numbers: Tensor
    columns: Tensor


def _movers(table: PredictedTable, prefix: int, index: Tensor) -> _Movers:
    words = table.members[prefix]
    there = index[words] >= 0
    numbers = torch.full((1,), prefix, device=words.device)
    coordinates = prefix_coordinates(numbers, table.shape)
    occupied = table.occupied(table.num_components - 1, coordinates)
    if occupied is not None:
        there = there & occupied[0]
    columns = there.nonzero().squeeze(1)
    return _Movers(words[columns], index[words[columns]], columns)


@dataclass(frozen=True)
class _Effects:
    """What the cells of W words of one prefix do to n occurrences of words of that prefix.

    Attributes:
        logits: of the W words where they are now, (n, W).
        rest: without what the further table gives them, (n, W).
        norm: log Z, (n,).
        which: of the W words each is an occurrence of, (n,), -1 for none.
        weights: how many occurrences each stands for, (n,).
        of_prefixes: what the table's prefixes give a word, (n, A).
        of_last: what its last coordinates give a word, (n, R_k).
    """

    logits: Tensor
    rest: Tensor
    norm: Tensor
    which: Tensor
    weights: Tensor
    of_prefixes: Tensor
    of_last: Tensor

    def slopes(self) -> Tensor:
        """Returns how the loss rises with what each prefix gives each word, (W, A)."""
        taken = (self.logits - self.norm[:, None]).exp() * self.weights[:, None]
        slopes = taken.T @ self.of_prefixes
        own = (self.which >= 0).nonzero().squeeze(1)
        known = self.of_prefixes[own] * self.weights[own, None]
        return slopes.index_add_(0, self.which[own], known, alpha=-1)

    def own(self, prefixes: Tensor) -> Tensor:
        """Returns what words cost themselves with prefixes (W, K): (W, K, R_k)."""
        costs = self.of_last.new_zeros(*prefixes.shape, self.of_last.size(1))
        known = (self.which >= 0).nonzero().squeeze(1)
        for some in known.split(max(1, _AT_ONCE // costs[0].numel())):
            words, norm = self.which[some], self.norm[some]
            # log Z⁻ - s0
            left = norm + log_one_minus(self.logits[some, words] - norm) - self.rest[some, words]
            given = self.of_prefixes[some].gather(1, prefixes[words])[:, :, None]
            given = given + self.of_last[some][:, None]
            losses = F.softplus(left[:, None, None] - given)
            costs.index_add_(0, words, losses.mul_(self.weights[some, None, None]))
        return costs

    def others(self, prefixes: Tensor) -> Tensor:
        """Returns what words cost others with prefixes (W, K): (W, K, R_k)."""
        # Scaled by the largest of each occurrence, which may be far from the others'.
        most_prefix = self.of_prefixes.amax(dim=1, keepdim=True)
        most_last = self.of_last.amax(dim=1, keepdim=True)
        of_prefixes = (self.of_prefixes - most_prefix).exp_().T.contiguous()  # (A, n)
        of_last = (self.of_last - most_last).exp_()
        # What each word would take of each occurrence but its own.
        most = most_prefix + most_last - self.norm[:, None]
        rest = (self.rest + most).clamp_(max=MOST_LOGIT).exp_()
        own = (self.which >= 0).nonzero().squeeze(1)
        rest[own, self.which[own]] = 0.0
        rest = rest.mul_(self.weights[:, None]).T.contiguous()  # (W, n)
        costs = self.of_last.new_empty(*prefixes.shape, self.of_last.size(1))
        numbers = torch.arange(len(prefixes), device=prefixes.device)
        for some in numbers.split(max(1, _AT_ONCE // (len(self.norm) * prefixes.size(1)))):
            taken = of_prefixes[prefixes[some]].mul_(rest[some, None])  # (w, K, n)
            torch.matmul(taken, of_last, out=costs[some[0] : some[-1] + 1])
        return costs
