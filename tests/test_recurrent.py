from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fairseq_lightrnn.components import ComponentEmbedding, ComponentSoftmax, TableLookup
from fairseq_lightrnn.distribution import next_word_log_probs
from fairseq_lightrnn.recurrent import RecurrentComposition
from fairseq_lightrnn.word_table import WordTable

DIM, HIDDEN = 5, 6
TABLES = [(9, (9,)), (11, (11,)), (12, (3, 4)), (10, (3, 4)), (24, (2, 3, 4)), (17, (2, 3, 4))]


class Model(nn.Module):
    """The core modules put together, in float64."""

    def __init__(self, words: int, shape: tuple[int, ...], layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(words)
        cells = np.random.default_rng(words).permutation(int(np.prod(shape)))[:words]
        self.table = TableLookup(words, shape)
        self.table.seat(WordTable.from_cells(cells, shape))
        self.composition = RecurrentComposition(ComponentEmbedding(shape, DIM), HIDDEN, layers)
        self.softmax = ComponentSoftmax(self.table, HIDDEN)
        nn.init.normal_(self.softmax.bias)
        self.double()

    def log_probs(self, words: Tensor) -> Tensor:
        """Scores words 1 … T of texts (B, T+1): (B, T)."""
        hidden, _ = self.composition(self.table(words))
        flat = self.softmax(hidden.flatten(0, 1), self.table(words[:, 1:].reshape(-1)))
        return flat.sum(1).view(words.size(0), -1)


def step_by_step(model: Model, words: list[int]) -> Tensor:
    """Scores words 1 … T of one text by the paper's equations, a step at a time."""
    shape = model.table.shape
    offsets = [sum(shape[:component]) for component in range(len(shape))]
    coordinates = [model.table.table().coordinates[word].tolist() for word in words]
    state = None
    scores = []
    for word, upcoming in itertools.pairwise(range(len(words))):
        for component in range(len(shape) if word == 0 else 1):
            # Of later words, all but the last component was read while it was predicted.
            component = component if word == 0 else len(shape) - 1
            row = offsets[component] + coordinates[word][component]
            vector = model.composition.embedding.weight[row]
            output, state = model.composition.lstm(vector.view(1, 1, -1), state)
        score = torch.zeros((), dtype=torch.float64)
        for component, size in enumerate(shape):
            rows = slice(offsets[component], offsets[component] + size)
            logits = model.softmax.weight[rows] @ output.view(-1) + model.softmax.bias[rows]
            target = coordinates[upcoming][component]
            prefix = coordinates[upcoming][:component]
            reachable = [
                value
                for value in range(size)
                if any(
                    row[: component + 1].tolist() == [*prefix, value]
                    for row in model.table.table().coordinates
                )
            ]
            score = score + logits[target] - torch.logsumexp(logits[reachable], 0)
            if component + 1 < len(shape):
                vector = model.composition.embedding.weight[offsets[component] + target]
                output, state = model.composition.lstm(vector.view(1, 1, -1), state)
        scores.append(score)
    return torch.stack(scores)


@pytest.mark.parametrize(("words", "shape"), TABLES)
@pytest.mark.parametrize("layers", [1, 2])
def test_one_call_equals_the_equations_step_by_step(
    words: int, shape: tuple[int, ...], layers: int
) -> None:
    model = Model(words, shape, layers)
    text = torch.randint(words, (2, 7))
    expected = torch.stack([step_by_step(model, row.tolist()) for row in text])
    torch.testing.assert_close(model.log_probs(text), expected)


@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_every_context_has_a_distribution_over_the_words(
    words: int, shape: tuple[int, ...]
) -> None:
    """Σ_w P(w | context) = 1 by brute force: every word in turn as the target."""
    model = Model(words, shape)
    contexts = torch.randint(words, (4, 3))
    texts = torch.cat(
        [contexts.repeat_interleave(words, 0), torch.arange(words).repeat(4)[:, None]], dim=1
    )
    brute_force = model.log_probs(texts)[:, -1].view(4, words)
    assert torch.isfinite(brute_force).all()
    torch.testing.assert_close(brute_force.exp().sum(1), torch.ones(4, dtype=torch.float64))
    context = model.composition.read(model.table(contexts))
    fast = next_word_log_probs(model.composition, model.softmax, context)
    torch.testing.assert_close(fast, brute_force, check_dtype=False)


@pytest.mark.parametrize(("words", "shape"), TABLES)
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_carried_state_makes_blocks_one_text(
    words: int, shape: tuple[int, ...], length: int
) -> None:
    model = Model(words, shape, layers=2)
    text = torch.randint(words, (3, 14))
    whole, _ = model.composition(model.table(text))
    state, parts = None, []
    for start in range(0, 13, length):
        block = text[:, start : start + length + 1]
        hidden, state = model.composition(model.table(block), state)
        assert hidden.shape == (3, block.size(1) - 1, len(shape), HIDDEN)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_reading_in_steps_equals_reading_at_once(words: int, shape: tuple[int, ...]) -> None:
    model = Model(words, shape, layers=2)
    text = model.table(torch.randint(words, (3, 6)))
    whole = model.composition.read(text)
    context = model.composition.read(text[:, :4])
    for word in range(4, 6):
        context = model.composition.read(text[:, word : word + 1], context)
    torch.testing.assert_close(context.output, whole.output)
    torch.testing.assert_close(context.state, whole.state)


def test_selecting_contexts_repeats_and_drops_texts() -> None:
    model = Model(10, (3, 4), layers=2)
    context = model.composition.read(model.table(torch.randint(10, (3, 4))))
    index = torch.tensor([2, 0, 2, 2])
    every = next_word_log_probs(model.composition, model.softmax, context)
    chosen = next_word_log_probs(model.composition, model.softmax, context.select(index))
    torch.testing.assert_close(chosen, every[index])


def test_one_component_is_an_ordinary_softmax_lstm() -> None:
    """k = 1: the loss and the gradients of nn.Embedding, nn.LSTM, nn.Linear and cross-entropy."""
    words = 11
    model = Model(words, (words,), layers=2)
    embedding = nn.Embedding(words, DIM).double()
    lstm = nn.LSTM(DIM, HIDDEN, 2, batch_first=True).double()
    output = nn.Linear(HIDDEN, words).double()
    cells = model.table.cells
    with torch.no_grad():
        embedding.weight.copy_(model.composition.embedding.weight[cells])
        lstm.load_state_dict(model.composition.lstm.state_dict())
        output.weight.copy_(model.softmax.weight[cells])
        output.bias.copy_(model.softmax.bias[cells])
    text = torch.randint(words, (4, 9))
    loss = -model.log_probs(text).sum()
    logits = output(lstm(embedding(text[:, :-1]))[0])
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), text[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    pairs = [
        (model.composition.embedding.weight.grad[cells], embedding.weight.grad),
        (model.softmax.weight.grad[cells], output.weight.grad),
        (model.softmax.bias.grad[cells], output.bias.grad),
        *(
            (ours.grad, theirs.grad)
            for ours, theirs in zip(
                model.composition.lstm.parameters(), lstm.parameters(), strict=True
            )
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_swapping_words_and_back_changes_nothing() -> None:
    model = Model(10, (3, 4))
    text = torch.randint(10, (2, 8))
    before = model.log_probs(text)
    table = model.table.table()
    swapped = table.cells.copy()
    swapped[[2, 7]] = swapped[[7, 2]]
    model.table.seat(WordTable.from_cells(swapped, table.shape))
    assert not torch.equal(model.log_probs(text), before)
    model.table.seat(table)
    assert torch.equal(model.log_probs(text), before)


def test_padding_after_a_text_changes_nothing() -> None:
    model = Model(10, (3, 4))
    text = torch.randint(10, (2, 8))
    padded = torch.cat([text, torch.randint(10, (2, 3))], dim=1)
    torch.testing.assert_close(model.log_probs(padded)[:, :7], model.log_probs(text))
