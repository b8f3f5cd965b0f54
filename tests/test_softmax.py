"""Component softmaxes as distributions over words, with every feature that words can have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_lightrnn.core.features import FurtherTables, OwnNumbers, WordBias
from fairseq_lightrnn.core.reader import ComponentVectors
from fairseq_lightrnn.core.seats import PredictedTable
from fairseq_lightrnn.core.softmax import ComponentSoftmax
from fairseq_lightrnn.core.table import WordTable

DIM = 6
TABLES = [(9, (9,)), (12, (3, 4)), (10, (4, 3)), (17, (2, 3, 4))]


def random_table(words: int, shape: tuple[int, ...], seed: int = 0) -> PredictedTable:
    table = PredictedTable(words, shape)
    cells = np.random.default_rng(seed).permutation(int(np.prod(shape)))[:words]
    table.seat(WordTable.from_cells(cells, shape))
    return table


def build(words: int, shape: tuple[int, ...], extras: bool = False) -> ComponentSoftmax:
    """A random softmax in double precision, perhaps with all features."""
    torch.manual_seed(words)
    features: list[Any] = []
    if extras:
        further = FurtherTables(2, words, shape, 4, DIM)
        for seed, table in enumerate(further.tables, 1):
            cells = np.random.default_rng(seed).permutation(table.table().cells)
            table.seat(WordTable.from_cells(cells, shape))
        features = [WordBias(words), OwnNumbers(words, 2, 4, DIM), further]
    softmax = ComponentSoftmax(random_table(words, shape), ComponentVectors(shape, DIM), features)
    softmax.double()
    for parameter in softmax.parameters():
        nn.init.normal_(parameter)
    return softmax


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(
    ("words", "shape"), [(9, (9,)), (12, (3, 4)), (10, (3, 4)), (20, (2, 3, 4))]
)
def test_softmax_is_a_distribution_over_the_words(
    words: int, shape: tuple[int, ...], extras: bool
) -> None:
    """With hidden outputs that do not depend on the word, the words' probabilities sum to 1."""
    softmax = build(words, shape, extras)
    hidden = torch.randn(1, len(shape), DIM, dtype=torch.float64).expand(words, -1, -1)
    scores = softmax(hidden, torch.arange(words))
    assert scores.shape == (words, len(shape))
    assert torch.isfinite(scores).all()
    assert scores.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_softmax_masks_nothing_but_empty_cells() -> None:
    table = PredictedTable(3, (2, 2))
    table.seat(WordTable.from_cells(np.array([3, 0, 1]), (2, 2)))
    softmax = ComponentSoftmax(table, ComponentVectors((2, 2), DIM))
    logits = softmax.logits(1, torch.randn(2, DIM), torch.tensor([[0], [1]]))
    assert torch.isinf(logits).tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("extras", [False, True])
def test_gradients_pass_the_mask(extras: bool) -> None:
    softmax = build(5, (2, 3), extras)
    names = [name for name, _ in softmax.named_parameters()]
    hidden = torch.randn(5, 2, DIM, dtype=torch.float64, requires_grad=True)

    def scores(hidden: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(softmax, parameters, (hidden, torch.arange(5)))

    # Reading has parameters of its own, which do not act here.
    acting = [
        parameter.detach().requires_grad_(not name.endswith(("projection.weight", "input_vectors")))
        for name, parameter in softmax.named_parameters()
    ]
    assert torch.autograd.gradcheck(scores, (hidden, *acting))


def test_shared_vectors_must_fit() -> None:
    vectors = ComponentVectors((3, 3), 4)
    assert ComponentSoftmax(PredictedTable(9, (3, 3)), vectors).vectors is vectors
    with pytest.raises(ValueError, match=r"vectors of shape \(3, 3\) for a table of \(3, 4\)"):
        ComponentSoftmax(PredictedTable(9, (3, 4)), vectors)


@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_means_are_over_the_words_that_share_a_prefix(words: int, shape: tuple[int, ...]) -> None:
    """What label smoothing spreads over, word by word."""
    softmax = build(words, shape, extras=True)
    coordinates = softmax.table(torch.arange(words))
    hidden = torch.randn(words, len(shape), DIM, dtype=torch.float64)
    scores, means = softmax.forward_with_mean(hidden, torch.arange(words))
    torch.testing.assert_close(scores, softmax(hidden, torch.arange(words)))
    for word in range(words):
        for component in range(len(shape)):
            prefix = coordinates[word, :component]
            others = [v for v in range(words) if torch.equal(coordinates[v, :component], prefix)]
            repeated = hidden[word].expand(len(others), -1, -1)
            log_probs = softmax(repeated, torch.tensor(others))[:, component]
            torch.testing.assert_close(means[word, component], log_probs.mean())


@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_features_are_scored_for_all_words_as_for_those_of_a_row(
    words: int, shape: tuple[int, ...]
) -> None:
    softmax = build(words, shape, extras=True)
    hidden = torch.randn(3, DIM, dtype=torch.float64)
    queries = softmax.ask(hidden)
    every = softmax.feature_logits_of_all(queries)
    last, prefixes = len(shape) - 1, int(np.prod(shape[:-1]))
    assert every.shape == (3, prefixes, shape[-1])
    for number, prefix in enumerate(np.ndindex(*shape[:-1])):
        given = torch.tensor(prefix, dtype=torch.long).expand(3, last)
        expected = softmax.logits(last, hidden, given, queries)
        known = softmax.logits(last, hidden, given, None, every[:, number])
        torch.testing.assert_close(known, expected)


def test_the_last_component_needs_the_queries_of_the_first() -> None:
    softmax = build(12, (3, 4), extras=True)
    with pytest.raises(ValueError, match="the last component is predicted with features: give"):
        softmax.logits(1, torch.randn(1, DIM, dtype=torch.float64), torch.tensor([[0]]))
    hidden = torch.randn(2, DIM, dtype=torch.float64)
    one = build(9, (9,), extras=True)  # its only component is the first
    prefix = torch.empty(2, 0, dtype=torch.long)
    torch.testing.assert_close(
        one.logits(0, hidden, prefix), one.logits(0, hidden, prefix, one.ask(hidden))
    )
