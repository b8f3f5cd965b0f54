from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_lightrnn.components import ComponentEmbedding, ComponentSoftmax, WordEmbedding
from fairseq_lightrnn.table_lookup import TableLookup
from fairseq_lightrnn.word_table import WordTable


def random_table(words: int, shape: tuple[int, ...], seed: int = 0) -> WordTable:
    cells = np.random.default_rng(seed).permutation(int(np.prod(shape)))[:words]
    return WordTable.from_cells(cells, shape)


def test_lookup_follows_the_seated_table() -> None:
    lookup = TableLookup(7, (3, 3))
    table = random_table(7, (3, 3))
    lookup.seat(table)
    words = torch.tensor([[0, 6], [3, 3]])
    assert (lookup(words).numpy() == table.coordinates[words.numpy()]).all()
    assert lookup.cells.tolist() == table.cells.tolist()
    assert lookup.table() == table


def test_lookup_travels_with_state_dicts() -> None:
    table = random_table(7, (3, 3))
    seated, other = TableLookup(7, (3, 3)), TableLookup(7, (3, 3))
    seated.seat(table)
    assert list(seated.state_dict()) == ["coordinates"]
    other.load_state_dict(seated.state_dict())
    assert other.table() == table
    prefix = torch.tensor([[0], [1], [2]])
    assert (other.occupied(1, prefix).numpy() == table.occupied(1)).all()


def test_lookup_refuses_other_shapes_and_vocabularies() -> None:
    lookup = TableLookup(7, (3, 3))
    with pytest.raises(ValueError, match=r"shape \(3, 3\), got 7 words and shape \(1, 7\)"):
        lookup.seat(random_table(7, (1, 7)))
    with pytest.raises(ValueError, match="got 6 words"):
        lookup.seat(random_table(6, (3, 3)))


def test_full_tables_need_no_mask() -> None:
    lookup = TableLookup(9, (3, 3))
    assert lookup.occupied(0, torch.empty(2, 0, dtype=torch.long)) is None
    assert lookup.occupied(1, torch.tensor([[0], [2]])) is None


def test_embedding_keeps_components_apart() -> None:
    embedding = ComponentEmbedding((2, 3, 4), 5)
    coordinates = torch.tensor([1, 2, 3])
    expected = embedding.weight[[1, 2 + 2, 5 + 3]]
    assert torch.equal(embedding(coordinates), expected)
    assert torch.equal(embedding(coordinates[1:], 1), expected[1:])


@pytest.mark.parametrize(
    ("words", "shape"), [(9, (9,)), (12, (3, 4)), (10, (3, 4)), (20, (2, 3, 4))]
)
def test_softmax_is_a_distribution_over_the_words(words: int, shape: tuple[int, ...]) -> None:
    """With hidden outputs that do not depend on the word, the words' probabilities sum to 1."""
    lookup = TableLookup(words, shape)
    lookup.seat(random_table(words, shape))
    softmax = ComponentSoftmax(lookup, 6).double()
    torch.nn.init.normal_(softmax.bias)
    hidden = torch.randn(1, len(shape), 6, dtype=torch.float64).expand(words, -1, -1)
    scores = softmax(hidden, lookup(torch.arange(words)))
    assert scores.shape == (words, len(shape))
    assert torch.isfinite(scores).all()
    assert scores.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_softmax_masks_nothing_but_empty_cells() -> None:
    lookup = TableLookup(3, (2, 2))
    lookup.seat(WordTable.from_cells(np.array([3, 0, 1]), (2, 2)))
    softmax = ComponentSoftmax(lookup, 6)
    logits = softmax.logits(1, torch.randn(2, 6), torch.tensor([[0], [1]]))
    assert torch.isinf(logits).tolist() == [[False, False], [True, False]]


def test_gradients_pass_the_mask() -> None:
    lookup = TableLookup(5, (2, 3))
    lookup.seat(random_table(5, (2, 3)))
    softmax = ComponentSoftmax(lookup, 4).double()
    coordinates = lookup(torch.arange(5))
    hidden = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)

    def scores(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        parameters = {"weight": weight, "bias": softmax.bias}
        return torch.func.functional_call(softmax, parameters, (hidden, coordinates))

    assert torch.autograd.gradcheck(scores, (hidden, softmax.weight))


def test_shared_vectors_must_fit() -> None:
    lookup = TableLookup(9, (3, 3))
    embedding = ComponentEmbedding((3, 3), 4)
    assert ComponentSoftmax(lookup, 4, embedding.weight).weight is embedding.weight
    with pytest.raises(ValueError, match=r"shape \(6, 5\), got \(6, 4\)"):
        ComponentSoftmax(lookup, 5, embedding.weight)


@pytest.mark.parametrize(
    ("words", "shape"), [(9, (9,)), (12, (3, 4)), (10, (4, 3)), (17, (2, 3, 4))]
)
def test_means_are_over_the_words_that_share_a_prefix(words: int, shape: tuple[int, ...]) -> None:
    """What label smoothing spreads over, word by word."""
    torch.manual_seed(0)
    cells = np.random.default_rng(words).permutation(int(np.prod(shape)))[:words]
    table = TableLookup(words, shape)
    table.seat(WordTable.from_cells(cells, shape))
    softmax = ComponentSoftmax(table, 3, None, True, 2).double()
    for parameter in softmax.parameters():
        nn.init.normal_(parameter)
    coordinates = table(torch.arange(words))
    hidden = torch.randn(words, len(shape), 5, dtype=torch.float64)
    scores, means = softmax.forward_with_mean(hidden, coordinates)
    torch.testing.assert_close(scores, softmax(hidden, coordinates))
    for word in range(words):
        for component in range(len(shape)):
            prefix = coordinates[word, :component]
            others = [v for v in range(words) if torch.equal(coordinates[v, :component], prefix)]
            repeated = hidden[word].expand(len(others), -1, -1)
            log_probs = softmax(repeated, coordinates[others])[:, component]
            torch.testing.assert_close(means[word, component], log_probs.mean())


@pytest.mark.parametrize("residual_dim", [0, 2])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 2, 3)])
def test_an_input_table_keeps_what_words_are_read_as(
    shape: tuple[int, ...], residual_dim: int
) -> None:
    table, words = TableLookup(11, shape), torch.arange(11).view(1, 11)
    embedding = ComponentEmbedding(shape, 5, table, residual_dim, own_table=True)
    if embedding.residual is not None:
        nn.init.normal_(embedding.residual.weight)
    before = embedding(table(words))
    with_one_table = ComponentEmbedding(shape, 5, table, residual_dim)
    state = embedding.state_dict()
    assert state.pop("input_table.coordinates").tolist() == table(words)[0].tolist()
    with_one_table.load_state_dict(state)
    torch.testing.assert_close(with_one_table(table(words)), before)
    cells = np.random.default_rng(1).permutation(table.table().cells)
    table.seat(WordTable.from_cells(cells, shape))
    torch.testing.assert_close(embedding(table(words)), before)
    assert not torch.allclose(with_one_table(table(words)), before)


def test_words_are_embedded_as_sums() -> None:
    table = TableLookup(10, (3, 4))
    embedding = ComponentEmbedding((3, 4), 5, table, residual_dim=2)
    nn.init.normal_(embedding.residual.weight)
    words = WordEmbedding(table, embedding, padding_idx=1, owns_table=True)
    text = torch.randint(10, (2, 3))
    torch.testing.assert_close(words(text), embedding(table(text)).sum(-2))
    assert (words.embedding_dim, words.padding_idx) == (5, 1)
    assert "table.coordinates" in words.state_dict()
    assert "table.coordinates" not in WordEmbedding(table, embedding, 1).state_dict()
