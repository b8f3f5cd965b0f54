"""What words have beyond row and column, against loops over words."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import KINDS, build, contexts
from torch import Tensor, nn

from fairseq_lightrnn.core.distribution import next_word_log_probs
from fairseq_lightrnn.core.features import (
    FurtherTables,
    OwnNumbers,
    WordBias,
    WordFeature,
    query_layer,
)
from fairseq_lightrnn.core.reader import ComponentVectors, Reader
from fairseq_lightrnn.core.search import top_words
from fairseq_lightrnn.core.seats import PredictedTable
from fairseq_lightrnn.core.softmax import ComponentSoftmax
from fairseq_lightrnn.core.table import WordTable, balanced_cells

WORDS, SHAPE, DIM = 10, (3, 4), 5


def seated(seed: int) -> WordTable:
    cells = np.random.default_rng(seed).permutation(balanced_cells(WORDS, SHAPE))
    return WordTable.from_cells(cells, SHAPE)


@pytest.fixture
def further() -> FurtherTables:
    feature = FurtherTables(2, WORDS, SHAPE, DIM, DIM, query_dim=DIM - 1)
    for seed, table in enumerate(feature.tables, 1):
        table.seat(seated(seed))
    return feature


def rows(word: int) -> list[int]:
    """The rows of the matrix of vectors that a word has: its row and column in either table."""
    first, second = (seated(seed).coordinates[word] for seed in (1, 2))
    return [first[0], 3 + first[1], 7 + second[0], 10 + second[1]]


def table_in_force() -> PredictedTable:
    table = PredictedTable(WORDS, SHAPE)
    table.seat(seated(0))
    return table


def randomised(module: Any) -> Any:
    """The same module in double precision, nothing at its start."""
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter)
    return module


def test_vectors_of_words_are_those_of_their_cells(further: FurtherTables) -> None:
    assert further.input_vectors.shape == (14, DIM)
    words = torch.tensor([[0, 9], [4, 4]])
    expected = [[further.input_vectors[rows(int(word))].sum(0) for word in line] for line in words]
    torch.testing.assert_close(further.read(words), torch.stack([*map(torch.stack, expected)]))


def test_scores_are_summed_for_each_word(further: FurtherTables) -> None:
    randomised(further)
    outputs, words = torch.randn(3, DIM).double(), torch.tensor([[0, 9], [4, 4], [7, 2]])
    query = further.ask(outputs)
    scores = (outputs @ further.query.weight.T) @ further.output_vectors.T
    expected = [
        [scores[n, rows(int(word))].sum().item() for word in line] for n, line in enumerate(words)
    ]
    found = further.score_rows(further.project(query), torch.arange(3), words)
    assert found.tolist() == [pytest.approx(line, abs=1e-12) for line in expected]
    every = further.score_all(query)
    assert every.shape == (3, WORDS)
    torch.testing.assert_close(every.gather(1, words), found)


def test_rows_are_scored_by_the_tables_in_force(further: FurtherTables) -> None:
    """What is kept of tables must not outlive them."""
    randomised(further)
    table, row = table_in_force(), torch.tensor([0, 2, 1])
    query = further.ask(torch.randn(3, DIM).double())
    seen = []

    def check() -> None:
        expected = further.score_all(query).gather(1, table.members[row])
        found = further.score_rows(further.project(query), row, table.members)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            further.score_rows(further.project(query), row, table.members), found
        )
        assert all(not torch.allclose(found, before) for before in seen)
        seen.append(found)

    check()
    further.tables[1].seat(seated(7))
    check()
    table.seat(seated(8))
    check()
    state = {name: value.clone() for name, value in further.state_dict().items()}
    state["tables.0.coordinates"] = torch.from_numpy(seated(9).coordinates.astype(np.int32))
    further.load_state_dict(state)
    check()
    with torch.inference_mode():
        further.score_rows(further.project(query), row, table.members)
    copied = copy.deepcopy(further)
    copied.tables[0].seat(seated(10))
    expected = copied.score_all(query).gather(1, table.members[row])
    torch.testing.assert_close(
        copied.score_rows(copied.project(query), row, table.members), expected
    )


def features_of_every_kind() -> list[Any]:
    further = FurtherTables(2, WORDS, SHAPE, DIM, DIM)
    for seed, table in enumerate(further.tables, 1):
        table.seat(seated(seed))
    shared = FurtherTables(1, WORDS, SHAPE, DIM, DIM, shared=True)
    return [WordBias(WORDS), OwnNumbers(WORDS, 3, DIM, DIM), further, shared]


@pytest.mark.parametrize("number", range(4))
def test_rows_are_scored_as_all_words_are(number: int) -> None:
    feature = randomised(features_of_every_kind()[number])
    table = table_in_force()
    query = feature.ask(torch.randn(6, DIM).double())
    assert (query is None) is isinstance(feature, WordBias)
    every = feature.score_all(query).expand(6, -1)
    row = torch.tensor([0, 2, 1, 1, 0, 2])
    expected = every.gather(1, table.members[row])
    torch.testing.assert_close(
        feature.score_rows(feature.project(query), row, table.members), expected
    )
    torch.testing.assert_close(feature.score_once(query, row, table.members), expected)
    some = torch.tensor([7, 0, 7])
    torch.testing.assert_close(feature.score_words(query, some).expand(6, -1), every[:, some])


def test_own_numbers_word_by_word() -> None:
    feature = randomised(OwnNumbers(WORDS, 3, 4, DIM))
    outputs = torch.randn(2, DIM).double()
    scores, read = feature.score_all(feature.ask(outputs)), feature.read(torch.arange(WORDS))
    for word in range(WORDS):
        numbers = feature.numbers[word]
        torch.testing.assert_close(read[word], feature.projection.weight @ numbers)
        for text in range(2):
            expected = numbers @ (feature.query.weight @ outputs[text])
            torch.testing.assert_close(scores[text, word], expected)


def test_a_bias_is_the_same_in_every_context() -> None:
    feature = randomised(WordBias(WORDS))
    assert feature.read(torch.arange(WORDS)) is None and feature.ask(torch.randn(2, DIM)) is None
    assert feature.score_all(None).tolist() == [feature.bias.tolist()]


def test_features_start_with_nothing_to_add() -> None:
    """But for vectors that words are read by, and those that are shared with them."""
    outputs = torch.randn(2, DIM)
    for feature in features_of_every_kind()[:3]:
        assert not feature.score_all(feature.ask(outputs)).any()
    assert not OwnNumbers(WORDS, 3, DIM, DIM).read(torch.arange(WORDS)).any()
    assert features_of_every_kind()[2].read(torch.arange(WORDS)).abs().sum() > 0


def test_numbers_for_reading_or_predicting_alone() -> None:
    assert OwnNumbers(WORDS, 3, DIM, 0).ask(torch.randn(2, DIM)) is None
    assert OwnNumbers(WORDS, 3, 0, DIM).read(torch.arange(WORDS)) is None


def test_words_are_read_by_all_their_cells(further: FurtherTables) -> None:
    table = table_in_force()
    reader = Reader(table, ComponentVectors(SHAPE, DIM), [further])
    for word in range(WORDS):
        row, column = seated(0).coordinates[word]
        expected = reader.vectors.weight[row] + reader.vectors.weight[3 + column]
        expected = expected + further.input_vectors[rows(word)].sum(0)
        read = reader(torch.tensor([word])).sum(1)[0]
        assert torch.allclose(read, expected, atol=1e-6)
    # A row alone is no word yet.
    assert torch.equal(reader.component(0, torch.tensor([2])), reader.vectors.weight[None, 2])


def test_words_are_predicted_by_all_their_cells(further: FurtherTables) -> None:
    """Against a loop over words: a softmax over rows, then one over the words of the row."""
    bias, own = WordBias(WORDS), OwnNumbers(WORDS, 2, 0, DIM)
    softmax = ComponentSoftmax(table_in_force(), ComponentVectors(SHAPE, DIM), [bias, own, further])
    randomised(softmax)
    hidden = torch.randn(2, DIM, dtype=torch.float64)
    first, second = hidden
    weight = softmax.vectors.weight

    def logit(word: int) -> Tensor:
        column = 3 + seated(0).coordinates[word][1]
        total = weight[column] @ second + softmax.bias[column] + bias.bias[word]
        total = total + own.numbers[word] @ (own.query.weight @ first)
        query = further.query.weight @ first
        return total + sum(further.output_vectors[row] @ query for row in rows(word))

    by_row = torch.log_softmax(weight[:3] @ first + softmax.bias[:3], 0)
    total = 0.0
    for word in range(WORDS):
        row = seated(0).coordinates[word][0]
        others = [other for other in range(WORDS) if seated(0).coordinates[other][0] == row]
        normaliser = torch.logsumexp(torch.stack([logit(other) for other in others]), 0)
        expected = [by_row[row].item(), (logit(word) - normaliser).item()]
        scores = softmax(hidden[None], torch.tensor([word]))[0]
        assert scores.tolist() == pytest.approx(expected, abs=1e-12)
        total += math.exp(sum(expected))
    assert total == pytest.approx(1, abs=1e-12)


def test_gradients(further: FurtherTables) -> None:
    table, words = table_in_force(), torch.arange(WORDS)
    reader = Reader(table, ComponentVectors(SHAPE, DIM), [further]).double()
    softmax = ComponentSoftmax(table, ComponentVectors(SHAPE, DIM), [further]).double()
    hidden = torch.randn(WORDS, 2, DIM, dtype=torch.float64, requires_grad=True)

    def scores(hidden: Tensor, read: Tensor, predict: Tensor) -> Tensor:
        parts = {"features.0.input_vectors": read}
        vectors = torch.func.functional_call(reader, parts, (words,)).sum(1)
        parts = {"features.0.output_vectors": predict}
        outputs = hidden + vectors[:, None]
        return torch.func.functional_call(softmax, parts, (outputs, words))

    read = torch.randn(14, DIM, dtype=torch.float64, requires_grad=True)
    predict = torch.randn(14, DIM - 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scores, (hidden, read, predict))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_words_move_and_keep_their_further_cells(kind: Any) -> None:
    """Seats of the first table are exchanged: what features add follows the words."""
    model = build(kind, 10, (4, 4))
    context, softmax = contexts(model, 3), model.head.softmax
    features: list[WordFeature] = list(softmax.features)
    assert len(features) == 3

    def added() -> list[Tensor]:
        pairs = zip(features, context.queries, strict=True)
        return [feature.score_all(query) for feature, query in pairs]

    before = added()
    cells = np.random.default_rng(5).permutation(softmax.table.table().cells)
    softmax.table.seat(WordTable.from_cells(cells, (4, 4)))
    assert all(torch.equal(one, two) for one, two in zip(added(), before, strict=True))
    in_cells = softmax.feature_logits_of_all(context.queries).flatten(1)[:, softmax.table.cells]
    torch.testing.assert_close(in_cells, sum(before))
    every = next_word_log_probs(model.head, context)
    assert every.exp().sum(1).tolist() == pytest.approx([1] * 3, abs=1e-9)
    best = top_words(model.head, context, 4)
    assert torch.equal(best.words, every.topk(4).indices)


def test_a_number_of_tables() -> None:
    with pytest.raises(ValueError, match="0 further tables: expected at least 1"):
        FurtherTables(0, WORDS, SHAPE, DIM, DIM)


def test_shared_vectors_of_further_tables() -> None:
    feature = FurtherTables(1, WORDS, SHAPE, DIM, DIM, shared=True)
    assert feature.output_vectors is feature.input_vectors
    with pytest.raises(ValueError, match="shared vectors need equal widths, got 5 and 6"):
        FurtherTables(1, WORDS, SHAPE, DIM, 6, shared=True)


def test_what_few_numbers_add_to_a_logit_learns_as_fast_as_an_ordinary_softmax() -> None:
    torch.manual_seed(1)
    outputs = torch.randn(512, 256)
    # By word, what would be its vector in an ordinary softmax, and its numbers here.
    changes = []
    for query in (outputs, *(query_layer(256, size)(outputs).detach() for size in (8, 256, 36))):
        numbers = nn.Parameter(torch.zeros_like(query))
        optimizer = torch.optim.Adam([numbers], lr=0.1)
        (-numbers * query).sum().backward()
        optimizer.step()
        changes.append((numbers * query).sum(1).mean())
    for change in changes[1:]:
        torch.testing.assert_close(change, changes[0], rtol=0.1, atol=0)
