"""Costs of cells of further tables, and steps in them, against losses computed from scratch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_true_loss import Sample, swapped

from fairseq_lightrnn.allocation.descent import lower_loss
from fairseq_lightrnn.allocation.further_costs import further_costs
from fairseq_lightrnn.allocation.gathering import gather_occurrences
from fairseq_lightrnn.allocation.occurrences import Occurrences
from fairseq_lightrnn.allocation.true_loss import Market
from fairseq_lightrnn.core.conditioning import Gated, Recurrent
from fairseq_lightrnn.core.features import FurtherTables
from fairseq_lightrnn.core.table import WordTable

KINDS = [Gated, "transformer"]
TABLES = [(24, (5, 5)), (20, (4, 5)), (24, (3, 3, 3))]


pytestmark = pytest.mark.usefixtures("no_gradients")


class Costs:
    """What all cells of a further table cost the words that occur in a text."""

    def __init__(self, sample: Sample, number: int) -> None:
        self.sample, self.number = sample, number
        self.counts = sample.statistics().counts.long()
        self.words = self.counts.nonzero().squeeze(1)
        self.further: FurtherTables = sample.further
        self.seats = self.further.tables[number]
        occurrences = Occurrences(sample.head, self.counts, 999)
        gather_occurrences(sample.contexts(), occurrences, "cpu")
        self.candidates, self.costs = further_costs(
            occurrences, self.further, number, self.words, count=999
        )

    def of(self, word: int, cell: int) -> float:
        prefix, last = divmod(cell, self.seats.shape[-1])
        n = int((self.words == word).nonzero())
        slot = (self.candidates[n] == prefix).nonzero()
        return float(self.costs[n, int(slot), last])

    def loss_with(self, table: WordTable) -> float:
        old = self.seats.table()
        self.seats.seat(table)
        loss = self.sample.loss()
        self.seats.seat(old)
        return loss


def slow_cost(costs: Costs, word: int, cell: int) -> float:
    """What a word in a cell costs itself and others, token by token."""
    sample, further = costs.sample, costs.further
    table, softmax = sample.head.table, sample.head.softmax
    place = list(softmax.features).index(further)
    shape = costs.seats.shape
    start = costs.number * sum(shape) + np.cumsum([0, *shape[:-1]])
    vector = sum(
        further.output_vectors[at + int(i)]
        for at, i in zip(start, np.unravel_index(cell, shape), strict=True)
    )
    now = sum(
        further.output_vectors[at + int(i)]
        for at, i in zip(start, costs.seats(torch.tensor(word)), strict=True)
    )
    prefix = table(torch.tensor(word))[:-1]
    total = 0.0
    for _, targets, contexts in sample.contexts():
        for at, target in enumerate(targets.tolist()):
            if not torch.equal(table(torch.tensor(target))[:-1], prefix):
                continue
            known = torch.tensor([target])
            context = contexts.select(torch.tensor([at]))
            hidden = sample.head.hidden_of(context, known)[:, -1]
            numbers = softmax.logits(len(shape) - 1, hidden, prefix[None], context.queries)[0]
            masses = numbers.exp()
            column = int(table(torch.tensor(word))[-1])
            query = context.queries[place][0]
            score = numbers[column] + query @ (vector - now)
            if target == word:
                rest = masses.sum() - masses[column]
                total += math.log(1 + float(rest * torch.exp(-score)))
            else:
                total += float(score.exp() / masses.sum())
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_costs_are_those_of_the_definition(kind, words, shape):
    sample = Sample(kind, words, shape, extras=True, scale=0.5)
    for number in range(2):
        costs = Costs(sample, number)
        cells = costs.seats.table().cells
        random = np.random.default_rng(number)
        for word in random.choice(costs.words.numpy(), 4, replace=False).tolist():
            cell = int(random.choice(cells))
            expected = slow_cost(costs, word, cell) - slow_cost(costs, word, int(cells[word]))
            assert costs.of(word, cell) == pytest.approx(expected, rel=1e-6, abs=1e-4)
            assert costs.of(word, int(cells[word])) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("words", "shape"), TABLES)
@pytest.mark.parametrize("scale", [0.15, 0.4])
def test_a_swap_keeps_what_its_costs_promise(kind, words, shape, scale):
    """Of words that the first table gives different prefixes, for log(1 + x) <= x."""
    sample = Sample(kind, words, shape, extras=True, scale=scale)
    costs = Costs(sample, 0)
    old, before = costs.seats.table(), sample.loss()
    first = sample.head.table.table().coordinates[:, :-1]
    tried = 0
    order = np.random.default_rng(0).permutation(costs.words.numpy())
    for one, two in zip(order[::2], order[1::2], strict=False):
        if (first[one] == first[two]).all():
            continue
        new = swapped(old, one, two)
        predicted = sum(costs.of(word, int(new.cells[word])) for word in (one, two))
        assert costs.loss_with(new) - before <= predicted + 1e-3
        tried += 1
    assert tried >= 4


@pytest.mark.parametrize("rows", [0, 7, 60, 10**6])
def test_a_sample_keeps_its_memory_and_has_most_of_words_that_may_move(rows: int) -> None:
    sample = Sample(Gated, 24, (5, 5), extras=True)
    counts = sample.statistics().counts.long()
    first = counts.topk(5).indices
    memory = rows * 4 * Occurrences(sample.head, counts, 1).row_size
    occurrences = Occurrences(sample.head, counts, 8, memory, first)
    expected = (occurrences.chances * counts).float()
    assert expected.sum() <= rows
    expected_first = expected[first].sum()
    assert expected.sum() - expected_first <= rows / 4
    if rows == 10**6:
        torch.testing.assert_close(expected, counts.clamp(max=8).float())
    elif rows:
        assert expected_first > rows / 4
    gather_occurrences(sample.contexts(), occurrences, "cpu")
    seen = sum(len(occurrences.of(prefix).words) for prefix in range(5))
    assert seen <= 2 * rows + 5


def test_a_sample_of_nothing_is_one() -> None:
    """As of several workers whose memory has room for none."""
    sample = Sample(Gated, 24, (5, 5), extras=True)
    occurrences = Occurrences(sample.head, sample.statistics().counts.long(), 1)
    gather_occurrences([], occurrences, "cpu")
    assert all(len(occurrences.of(prefix).words) == 0 for prefix in range(5))


@pytest.mark.parametrize("kind", KINDS)
def test_words_whose_occurrences_the_sample_misses_have_no_costs(kind) -> None:
    sample = Sample(kind, 24, (5, 5), extras=True)
    counts = sample.statistics().counts.long()
    words = counts.nonzero().squeeze(1)
    occurrences = Occurrences(sample.head, counts, 1, 12 * 4 * 10)
    gather_occurrences(sample.contexts(), occurrences, "cpu")
    known = torch.cat([occurrences.of(prefix).words for prefix in range(5)]).unique()
    assert 0 < len(known) < len(words)
    candidates, costs = further_costs(occurrences, sample.further, 0, words)
    seats = sample.further.tables[0]
    for word, paid in zip(words.tolist(), costs, strict=True):
        now = paid[0, seats.coordinates[word, -1]]
        assert now == 0
        assert int(paid.isfinite().sum()) == (paid.numel() if word in known else 1)
    step = Market(seats.table(), words.numpy(), candidates, costs, 0.0).solve()
    assert set(step.moved) <= set(known.tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_words_move_in_further_tables_and_the_loss_falls(kind, words, shape):
    sample = Sample(kind, words, shape, extras=True, scale=0.7)
    further = sample.further
    tables = [sample.head.table, *further.tables]
    old = [table.table() for table in tables]
    kept = [table.table() for table in further.kept_tables]
    before = sample.loss() / sample.tokens
    done = lower_loss(sample.head, sample.statistics(), sample.text)
    assert len(done) == 3
    for table, was, step in zip(tables, old, done, strict=True):
        assert step.loss_before == pytest.approx(before)
        assert step.loss_after < before if step.moved else step.loss_after == step.loss_before
        assert step.moved == (table.table().cells != was.cells).sum()
        before = step.loss_after
    assert sum(step.moved for step in done[1:]) > 0
    assert before == pytest.approx(sample.loss() / sample.tokens)
    assert [table.table() for table in further.kept_tables] == kept


def test_tables_that_words_are_read_by_stay():
    sample = Sample(Recurrent, 24, (5, 5), extras=True, scale=0.7)
    further = sample.further
    old = [table.table() for table in further.tables]
    assert len(lower_loss(sample.head, sample.statistics(), sample.text)) == 1
    assert [table.table() for table in further.tables] == old
