"""Costs of cells and steps by the true loss, against losses computed from scratch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CASES, build, log_probs, words_of

from fairseq_lightrnn.allocation import cell_costs
from fairseq_lightrnn.allocation.cell_costs import (
    CellLosses,
    FeaturedCells,
    occurrence_shares,
)
from fairseq_lightrnn.allocation.descent import lower_loss
from fairseq_lightrnn.allocation.gathering import gather_cell_losses, gather_statistics
from fairseq_lightrnn.allocation.neighbours import Neighbours
from fairseq_lightrnn.allocation.reread import Remembered, Text
from fairseq_lightrnn.allocation.true_loss import Market, candidate_prefixes, measured_costs
from fairseq_lightrnn.core.conditioning import Gated, Recurrent
from fairseq_lightrnn.core.features import FurtherTables, find_feature
from fairseq_lightrnn.core.seats import Seats
from fairseq_lightrnn.core.table import WordTable

# The words of a transformer or a gated decoder are read by a table of their own.
KEPT = [case for case in CASES if case[0] is not Recurrent and len(case[2]) > 1]
SEVERAL = [case for case in CASES if len(case[2]) > 1]


pytestmark = pytest.mark.usefixtures("no_gradients")


class Sample:
    """A model and a text, in batches that are read again and again."""

    def __init__(self, kind: Any, words: int, shape: tuple[int, ...], extras: bool, **more: Any):
        self.decoder = build(kind, words, shape, extras=extras, **more)
        self.head = self.decoder.head
        self.texts = [words_of((3, 9), words, seed) for seed in range(4)]

    def outputs(self):
        for text in self.texts:
            hidden = self.decoder(text).hidden.flatten(0, 1)
            yield text[:, 1:].flatten(), hidden

    def log_probs(self):
        for words, hidden in self.outputs():
            yield self.head.softmax(hidden, words)

    def contexts(self):
        for number, text in enumerate(self.texts):
            inner = getattr(self.decoder, "decoder", None)
            if inner is None:
                context, _ = self.decoder.contexts(text[:, :-1])
            else:
                context = inner.contexts(text[:, :-1])
            yield number, text[:, 1:].flatten(), context

    @property
    def further(self) -> Any:
        return find_feature(self.head.softmax.features, FurtherTables)

    @property
    def text(self) -> Text:
        return Text(self.outputs, self.contexts, self.log_probs, "cpu")

    def statistics(self):
        table = self.head.table
        size = table.num_words, table.num_components, self.head.softmax.vectors.dim
        return gather_statistics(self.outputs(), *size, "cpu")

    @property
    def tokens(self) -> int:
        return sum(text[:, 1:].numel() for text in self.texts)

    def loss(self) -> float:
        return -sum(float(log_probs(self.decoder, text).sum()) for text in self.texts)

    def loss_with(self, table: WordTable) -> float:
        old = self.head.table.table()
        self.head.table.seat(table)
        loss = self.loss()
        self.head.table.seat(old)
        return loss

    def cell_losses(self, candidates: int = 99):
        statistics = self.statistics()
        counts = statistics.counts
        words = counts.nonzero().squeeze(1)
        chosen = candidate_prefixes(statistics, self.head.softmax, words, candidates)
        losses = CellLosses(self.head, words, chosen.long(), occurrence_shares(counts)[words])
        neighbours = None
        if len(self.head.softmax.features):
            neighbours = Neighbours(self.head, counts)
        occurrences = None if neighbours is None else neighbours.occurrences
        gather_cell_losses(self.contexts(), losses, occurrences, "cpu")
        return losses, neighbours, counts


@pytest.mark.parametrize(("kind", "words", "shape"), KEPT)
@pytest.mark.parametrize("memory", [math.inf, 2_000, 0])
def test_a_remembered_text_is_the_same_and_read_once(kind, words, shape, memory):
    sample = Sample(kind, words, shape, extras=True)
    reads = []

    def contexts():
        reads.append(1)
        return sample.contexts()

    remembered = Remembered(sample.head, contexts, memory)
    for _ in range(2):
        for found, expected in zip(remembered.log_probs(), sample.log_probs(), strict=True):
            torch.testing.assert_close(found, expected)
    for found, expected in zip(remembered.read(), sample.contexts(), strict=True):
        torch.testing.assert_close(found[2].output, expected[2].output)
    assert len(reads) == (1 if memory == math.inf else 3)
    other = np.random.default_rng(0).permutation(np.array(sample.head.table.table().cells))
    sample.head.table.seat(WordTable.from_cells(other, shape))
    for found, expected in zip(remembered.outputs(), sample.outputs(), strict=True):
        torch.testing.assert_close(found, expected)  # of the table in force


def market_of(sample: Sample, losses: CellLosses, neighbours: Any, counts: torch.Tensor) -> Market:
    table = sample.head.table.table()
    costs = measured_costs(table, counts.long(), losses, neighbours)
    return Market(table, losses.words.numpy(), losses.candidates, costs, worth=1.0)


def swapped(table: WordTable, one: int, two: int) -> WordTable:
    cells = np.array(table.cells)
    cells[[one, two]] = cells[[two, one]]
    return WordTable.from_cells(cells, table.shape)


def slow_costs(sample: Sample, word: int, cell: int) -> tuple[float, float]:
    """What a word pays in a cell, and what it costs the words there: token by token."""
    table, softmax = sample.head.table, sample.head.softmax
    place = WordTable.from_cells(np.arange(math.prod(table.shape)), table.shape).coordinates[cell]
    prefix, column = tuple(place[:-1]), int(place[-1])
    own = others = 0.0
    for _, targets, contexts in sample.contexts():
        for at, target in enumerate(targets.tolist()):
            there = tuple(table(torch.tensor(target))[:-1].tolist())
            if target != word and there != prefix:
                continue
            before = contexts.select(torch.tensor([at]))
            log_prefix, context = 0.0, before
            for component, value in enumerate(prefix):
                known = torch.tensor([list(prefix[:component])], dtype=torch.long)
                known = known.view(1, component)
                logits = softmax.logits(component, context.output, known, context.queries)
                log_prefix += float(torch.log_softmax(logits, 1)[0, value])
                context = sample.head.extend(context, component, torch.tensor([value]))
            vectors, biases = softmax.component(len(prefix))
            base = (context.output @ vectors.T + biases)[0]
            number = int(table.number(torch.tensor([list(prefix)])))
            seated = table.table().words.reshape(-1, table.shape[-1])[number]
            full = [c for c in range(len(seated)) if seated[c] >= 0]
            of_words = (
                softmax.feature_logits_of(before.queries, torch.arange(table.num_words))
                if len(softmax.features)
                else torch.zeros(1, table.num_words)
            )[0].tolist()
            base = base.tolist()
            masses = {c: math.exp(base[c] + of_words[seated[c]]) for c in full}
            total = sum(masses.values())
            score = base[column] + of_words[word]
            if target != word:
                others += math.exp(score) / total
            elif not len(softmax.features):
                own += math.log(total / math.exp(score)) - log_prefix
            else:
                rest = total
                if there == prefix:
                    rest -= masses[int(table(torch.tensor(word))[-1])]
                own += math.log(1 + rest / math.exp(score)) - log_prefix
    return own, others


@pytest.mark.parametrize(("kind", "words", "shape"), SEVERAL)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("at_once", [1 << 21, 1])
def test_costs_are_those_of_the_definition(kind, words, shape, extras, at_once, monkeypatch):
    monkeypatch.setattr(cell_costs, "_AT_ONCE", at_once)
    sample = Sample(kind, words, shape, extras, scale=0.4)
    losses, neighbours, counts = sample.cell_losses()
    random = np.random.default_rng(0)
    for number in random.choice(len(losses.words), 4, replace=False).tolist():
        word = int(losses.words[number])
        slots = torch.nonzero(losses.candidates[number] >= 0)[:, 0].tolist()
        for slot in {0, slots[-1]}:
            prefix = int(losses.candidates[number, slot])
            column = int(
                np.flatnonzero(sample.head.table.table().words.reshape(-1, shape[-1])[prefix] >= 0)[
                    -1
                ]
            )
            own, others = slow_costs(sample, word, prefix * shape[-1] + column)
            measured = float(losses.losses[number, slot, column]) / 2**16
            assert measured == pytest.approx(own, abs=1e-4 * (1 + float(counts[word])))
            if neighbours is not None:
                cost = neighbours.costs(prefix, torch.tensor([word]))[0, column]
                assert float(cost) == pytest.approx(others, abs=1e-4)


@pytest.mark.parametrize(("kind", "words", "shape"), SEVERAL)
def test_vectors_of_cells_are_looked_up_where_they_have_no_room(kind, words, shape):
    sample = Sample(kind, words, shape, extras=True)
    _, _, context = next(iter(sample.contexts()))
    kept, looked_up = FeaturedCells(sample.head), FeaturedCells(sample.head, memory=0)
    assert looked_up._vectors is None
    queries = kept.queries(context)
    prefixes = (torch.arange(len(queries)) % len(sample.head.table.members)).sort().values
    expected = sample.head.softmax.feature_logits_of(context.queries, sample.head.table.words)
    expected = expected.expand(len(queries), -1).unflatten(1, sample.head.table.members.shape)
    for cells in (kept, looked_up):
        found = cells.scores(queries, prefixes)
        torch.testing.assert_close(found, expected[torch.arange(len(queries)), prefixes])


@pytest.mark.parametrize(("kind", "words", "shape"), KEPT)
def test_without_features_any_table_costs_what_its_loss_is(kind, words, shape):
    sample = Sample(kind, words, shape, extras=False, scale=0.7)
    seats = Seats(words, shape)
    seats.seat(sample.head.table.table())
    sample.decoder.reader.seats = seats
    losses, _, counts = sample.cell_losses()
    market = market_of(sample, losses, None, counts)
    old = sample.head.table.table()
    before = sample.loss()
    seen = np.flatnonzero(counts.numpy())  # others stay
    for seed in range(5):
        moved = np.array(old.cells)
        moved[seen] = np.random.default_rng(seed).permutation(moved[seen])
        new = WordTable.from_cells(moved, shape)
        predicted = 0.0
        for number, word in enumerate(market.words):
            at = np.flatnonzero(market.cells[number] == new.cells[word])
            predicted += float(market.costs[number, at[0]])
        assert sample.loss_with(new) - before == pytest.approx(predicted, abs=2e-3)


@pytest.mark.parametrize(("kind", "words", "shape"), SEVERAL)
@pytest.mark.parametrize("extras", [False, True])
def test_a_step_never_raises_the_loss(kind, words, shape, extras):
    sample = Sample(kind, words, shape, extras, scale=0.7)
    before = sample.loss() / sample.tokens
    for done in lower_loss(sample.head, sample.statistics(), sample.text):
        assert done.loss_before == pytest.approx(before)
        assert done.loss_after < before if done.moved else done.loss_after == done.loss_before
        assert done.gap >= 0
        before = done.loss_after
    assert before == pytest.approx(sample.loss() / sample.tokens)


@pytest.mark.parametrize("kind", [Gated, "transformer"])
@pytest.mark.parametrize("shape", [(5, 5), (3, 3, 3)])
@pytest.mark.parametrize("scale", [0.15, 0.4])
def test_a_swap_keeps_what_its_costs_promise(kind, shape, scale):
    """Of words with different prefixes: what is neglected, or of first order, is on the safe side.

    That is log(1 + x) <= x, and that the one leaves the other's normaliser.
    """
    sample = Sample(kind, 24, shape, extras=True, scale=scale)
    losses, neighbours, counts = sample.cell_losses()
    old, before = sample.head.table.table(), sample.loss()
    market = market_of(sample, losses, neighbours, counts)
    tried = 0
    for one, two in np.random.default_rng(0).permutation(24).reshape(-1, 2):
        if (
            not (counts[one] and counts[two])
            or old.cells[one] // shape[-1] == old.cells[two] // shape[-1]
        ):
            continue
        new = swapped(old, one, two)
        predicted = 0.0
        for word in (one, two):
            number = np.flatnonzero(market.words == word)[0]
            at = np.flatnonzero(market.cells[number] == new.cells[word])[0]
            predicted += float(market.costs[number, at])
        assert sample.loss_with(new) - before <= predicted + 2e-3
        tried += 1
    assert tried >= 6


@pytest.mark.parametrize("limit", [10, 3, 0])
def test_a_step_that_does_not_pay_is_halved_or_taken_back(limit):
    """As if the loss rose wherever more than a few words move."""
    sample = Sample(Gated, 24, (5, 5), extras=True, scale=0.7)
    old = sample.head.table.table()

    def log_probs():
        moved = int((sample.head.table.table().cells != old.cells).sum())
        return (scores - (10.0 if moved > limit else 0.0) for scores in sample.log_probs())

    text = Text(sample.outputs, sample.contexts, log_probs, "cpu")
    done, *further = lower_loss(sample.head, sample.statistics(), text)
    new = sample.head.table.table()
    assert done.moved == (new.cells != old.cells).sum() <= limit
    assert done.halvings > 0
    assert (done.loss_after < done.loss_before) == (done.moved > 0)
    assert done.moved > 0 or limit < 10
    assert further[-1].loss_after == pytest.approx(sample.loss() / sample.tokens)


def test_a_sample_is_checked_by_other_text():
    """What fits its own text alone is taken back, and losses are those of the other one."""
    for seed in range(4):
        sample, other = (Sample(Gated, 24, (5, 5), extras=True, scale=0.7) for _ in range(2))
        other.decoder = sample.decoder
        other.head = sample.head
        other.texts = [words_of((3, 9), 24, 9 + seed)]
        before = other.loss() / other.tokens
        text = Text(sample.outputs, sample.contexts, other.log_probs, "cpu")
        for done in lower_loss(sample.head, sample.statistics(), text):
            assert done.loss_before == pytest.approx(before)
            assert done.loss_after < before if done.moved else done.loss_after == done.loss_before
            before = done.loss_after
        assert before == pytest.approx(other.loss() / other.tokens)


WORKER = """
import sys
sys.path.insert(0, sys.argv[4])
import numpy as np, torch
from test_true_loss import Sample
from fairseq_lightrnn.allocation.descent import lower_loss
from fairseq_lightrnn.allocation.reread import Text
from fairseq_lightrnn.allocation.gathering import gather_statistics
from fairseq_lightrnn.core.conditioning import Gated

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if world > 1:
    store = torch.distributed.FileStore(f"{folder}/store{world}", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
sample = Sample(Gated, 24, (5, 5), extras=True, scale=0.7)
def mine(batches):
    return (batch for number, batch in enumerate(batches) if number % world == rank)
with torch.no_grad():
    readers = sample.outputs, sample.contexts, sample.log_probs
    text = Text(*(lambda read=read: mine(read()) for read in readers), "cpu")
    statistics = gather_statistics(text.outputs(), 24, 2, sample.head.softmax.vectors.dim, "cpu")
    done = lower_loss(sample.head, statistics, text)
np.savez(
    f"{folder}/result{world}-{rank}.npz", cells=sample.head.table.cells,
    further=[table.coordinates.numpy() for table in sample.further.tables],
    losses=[(step.loss_before, step.loss_after) for step in done],
    moved=[step.moved for step in done],
)
if world > 1:
    torch.distributed.destroy_process_group()  # or its threads may abort the end of the process
"""


def test_any_number_of_workers_makes_the_same_table(tmp_path: Path) -> None:
    results = []
    for world in (1, 3):
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(rank), str(world), str(tmp_path)]
                + [str(Path(__file__).parent)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        assert [worker.wait(timeout=300) for worker in workers] == [0] * world
        for rank in range(world):
            with np.load(tmp_path / f"result{world}-{rank}.npz") as result:
                results.append(dict(result))
    alone, *together = results
    assert alone["moved"].all()
    for other in together:
        for name in ("cells", "further"):
            np.testing.assert_array_equal(other[name], alone[name])
        np.testing.assert_allclose(other["losses"], alone["losses"], rtol=1e-12)
