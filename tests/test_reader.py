"""How words are read: by vectors of their components, and by what else they have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_lightrnn.core.features import FurtherTables, OwnNumbers, WordBias
from fairseq_lightrnn.core.reader import ComponentVectors, Reader, WordEmbedding
from fairseq_lightrnn.core.seats import PredictedTable, Seats
from fairseq_lightrnn.core.table import WordTable

SHAPES = [(12,), (3, 4), (2, 3, 2)]
RATE = 0.4
SCALE = 1 / (1 - RATE)


def own_numbers(words: int, size: int) -> list[Any]:
    """Random numbers of words' own, for a reader of width 5; none of size 0."""
    if not size:
        return []
    feature = OwnNumbers(words, size, 5, 0)
    nn.init.normal_(feature.numbers)
    return [feature]


def test_components_are_kept_apart() -> None:
    vectors = ComponentVectors((2, 3, 4), 5)
    coordinates = torch.tensor([1, 2, 3])
    expected = vectors.weight[[1, 2 + 2, 5 + 3]]
    assert torch.equal(vectors(coordinates), expected)
    assert torch.equal(vectors(coordinates[:2]), expected[:2])
    assert [vectors.of(component).shape for component in range(3)] == [(2, 5), (3, 5), (4, 5)]
    for component, value in enumerate(coordinates.tolist()):
        assert torch.equal(vectors.of(component)[value], expected[component])


def test_a_component_alone_is_no_word_yet() -> None:
    reader = Reader(Seats(11, (3, 4)), ComponentVectors((3, 4), 5), own_numbers(11, 2))
    assert torch.equal(reader.component(0, torch.tensor([2])), reader.vectors.weight[None, 2])


@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 2, 3)])
def test_an_input_table_keeps_what_words_are_read_as(shape: tuple[int, ...], size: int) -> None:
    words, predicted = torch.arange(11).view(1, 11), PredictedTable(11, shape)
    vectors, features = ComponentVectors(shape, 5), own_numbers(11, size)
    reader = Reader(Seats(11, shape), vectors, features)
    with_one_table = Reader(predicted, vectors, features)
    before = reader(words)
    torch.testing.assert_close(with_one_table(words), before)
    cells = np.random.default_rng(1).permutation(predicted.table().cells)
    predicted.seat(WordTable.from_cells(cells, shape))
    assert torch.equal(reader(words), before)
    assert not torch.allclose(with_one_table(words), before)


@pytest.mark.parametrize("shape", SHAPES)
def test_features_are_added_to_the_last_component(shape: tuple[int, ...]) -> None:
    further = FurtherTables(2, 12, shape, 5, 6)
    features = [WordBias(12), *own_numbers(12, 2), further]
    reader = Reader(Seats(12, shape), ComponentVectors(shape, 5), features)
    text = torch.randint(12, (2, 3))
    coordinates = reader.seats(text)
    expected = reader.vectors(coordinates).clone()
    added = features[1].projection(features[1].numbers[text]) + further.read(text)
    expected[..., -1, :] += added
    torch.testing.assert_close(reader(text), expected)
    torch.testing.assert_close(reader.sum(text), expected.sum(-2))


def test_words_are_embedded_as_sums() -> None:
    reader = Reader(Seats(10, (3, 4)), ComponentVectors((3, 4), 5), own_numbers(10, 2))
    words = WordEmbedding(reader, padding_idx=1)
    text = torch.randint(10, (2, 3))
    torch.testing.assert_close(words(text), reader(text).sum(-2))
    assert (words.embedding_dim, words.num_embeddings, words.padding_idx) == (5, 10, 1)
    assert "reader.seats.coordinates" in words.state_dict()


@pytest.mark.parametrize("shape", SHAPES)
def test_component_dropout_drops_vectors_for_all_their_occurrences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    features = own_numbers(12, 3)
    reader = Reader(Seats(12, shape), ComponentVectors(shape, 5), features, RATE).double()
    words = torch.arange(12).repeat(4).view(4, 12)
    vectors = reader(words)
    assert torch.equal(vectors, vectors[:1].expand_as(vectors))  # the same at every occurrence
    residuals = features[0].projection(features[0].numbers)
    scales: dict[tuple[int, int], set[float]] = {}
    residual_scales = []
    for word in range(12):
        for component, value in enumerate(reader.seats(words)[0, word].tolist()):
            whole = reader.vectors.weight[sum(shape[:component]) + value]
            last = component == len(shape) - 1
            parts = torch.stack([whole, residuals[word]] if last else [whole], dim=1)
            found = torch.linalg.lstsq(parts, vectors[0, word, component][:, None]).solution[:, 0]
            torch.testing.assert_close(parts @ found, vectors[0, word, component])
            scales.setdefault((component, value), set()).add(round(found[0].item(), 6))
            if last:
                residual_scales.append(round(found[1].item(), 6))
    assert all(len(found) == 1 for found in scales.values())
    possible = {0.0, round(SCALE, 6)}
    assert {abs(scale) for found in scales.values() for scale in found} == possible
    assert {abs(scale) for scale in residual_scales} == possible
    assert torch.equal(reader.eval()(words), reader(words))


def test_component_dropout_of_further_tables_drops_vectors_wherever_they_are_read() -> None:
    torch.manual_seed(2)
    further = FurtherTables(1, 12, (3, 4), 5, 6).double()
    reader = Reader(Seats(12, (3, 4)), ComponentVectors((3, 4), 5), [further], RATE).double()
    nn.init.zeros_(reader.vectors.weight)
    words = torch.arange(12).repeat(4).view(4, 12)
    vectors = reader.sum(words)
    assert torch.equal(vectors, vectors[:1].expand_as(vectors))
    scales: dict[tuple[int, int], set[float]] = {}
    for word, (row, column) in enumerate(further.tables[0](words[0]).tolist()):
        parts = torch.stack([further.input_vectors[row], further.input_vectors[3 + column]], dim=1)
        found = torch.linalg.lstsq(parts, vectors[0, word][:, None]).solution[:, 0]
        torch.testing.assert_close(parts @ found, vectors[0, word])
        for key, scale in zip([(0, row), (1, column)], found.tolist(), strict=True):
            scales.setdefault(key, set()).add(abs(round(scale, 6)))
    assert all(len(found) == 1 for found in scales.values())
    assert set.union(*scales.values()) == {0.0, round(SCALE, 6)}
    assert torch.equal(reader.eval().sum(words), reader.sum(words))


def test_component_dropout_keeps_the_expectation() -> None:
    torch.manual_seed(1)
    reader = Reader(Seats(1900, (40, 50)), ComponentVectors((40, 50), 3), dropout=RATE)
    words = torch.arange(0, 1900, 47)
    whole = reader.eval()(words)
    reader.train()
    ratios = torch.stack([reader(words) / whole for _ in range(200)])
    assert ratios.mean().item() == pytest.approx(1, abs=0.02)
