"""Recurrent decoders against the equations, one word and one component at a time."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from tiny_models import CONDITIONERS, DIM, HIDDEN, build, log_probs
from torch import Tensor, nn

from fairseq_lightrnn.core.conditioning import Recurrent
from fairseq_lightrnn.core.distribution import next_word_log_probs
from fairseq_lightrnn.core.reader import ComponentVectors
from fairseq_lightrnn.core.table import WordTable

TABLES = [(9, (9,)), (11, (11,)), (12, (3, 4)), (10, (3, 4)), (24, (2, 3, 4)), (17, (2, 3, 4))]


class StepByStep:
    """Scores one text by the definitions: a word, a component and a value at a time."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.softmax = decoder, decoder.head.softmax
        self.conditioner, self.reader = decoder.head.conditioner, decoder.reader
        self.shape = decoder.head.table.shape
        self.coordinates = decoder.head.table.table().coordinates.tolist()
        self.read_by = decoder.reader.seats.table().coordinates.tolist()
        features = list(self.softmax.features)
        self.bias, self.own, self.further = features if features else (None, None, None)
        self.state: tuple[Tensor, Tensor] | None = None

    def __call__(self, words: list[int]) -> Tensor:
        recurrent = isinstance(self.conditioner, Recurrent)
        step = self.recurrent_word if recurrent else self.gated_word
        return torch.stack([step(*pair) for pair in itertools.pairwise(words)])

    def vector(self, vectors: ComponentVectors, component: int, value: int) -> Tensor:
        return vectors.weight[sum(self.shape[:component]) + value]

    def further_cells(self, word: int, tables: Any) -> list[int]:
        """The vectors that a word has in some further tables."""
        places = []
        for number, table in enumerate(tables):
            start = number * sum(self.shape)
            for component, value in enumerate(table.table().coordinates[word].tolist()):
                places.append(start + sum(self.shape[:component]) + value)
        return places

    def features_read(self, word: int) -> Tensor | float:
        if self.own is None:
            return 0.0
        vector = self.own.projection.weight @ self.own.numbers[word]
        read_by = self.further.kept_tables or self.further.tables
        return vector + self.further.input_vectors[self.further_cells(word, read_by)].sum(0)

    def read(self, vector: Tensor) -> Tensor:
        output, self.state = self.decoder.network(vector.view(1, 1, -1), self.state)
        output = output.view(-1)
        ffn = self.conditioner.ffn
        if ffn is None:
            return output
        units = (ffn.inner.weight @ output + ffn.inner.bias).clamp(min=0)
        return output + ffn.outer.weight @ units + ffn.outer.bias

    def recurrent_word(self, word: int, upcoming: int) -> Tensor:
        """The paper's equations: the state after each component predicts the next one."""
        last = len(self.shape) - 1
        # Of a word that was predicted, all but the last component have been read already.
        for component in range(len(self.shape)) if self.state is None else [last]:
            vector = self.vector(self.reader.vectors, component, self.read_by[word][component])
            if component == last:
                vector = vector + self.features_read(word)
            base = output = self.read(vector)
        score = torch.zeros((), dtype=torch.float64)
        for component in range(len(self.shape)):
            score = score + self.component(component, output, base, upcoming)
            if component < last:
                value = self.coordinates[upcoming][component]
                output = self.read(self.vector(self.reader.vectors, component, value))
        return score

    def gated_word(self, word: int, upcoming: int) -> Tensor:
        """One step a word; later components through the gates of the earlier ones."""
        vectors = [
            self.vector(self.reader.vectors, component, value)
            for component, value in enumerate(self.read_by[word])
        ]
        base = self.read(sum(vectors) + self.features_read(word))
        score = self.component(0, base, base, upcoming)
        for component in range(1, len(self.shape)):
            gate, shift = torch.zeros(HIDDEN).double(), torch.zeros(HIDDEN).double()
            for earlier in range(component):
                value = self.coordinates[upcoming][earlier]
                both = self.vector(self.conditioner.gates[component - 1], earlier, value)
                gate, shift = gate + both[:HIDDEN], shift + both[HIDDEN:]
            transform = self.conditioner.transforms[component - 1]
            inner = (transform.weight @ base + transform.bias) * 2 * torch.sigmoid(gate) + shift
            score = score + self.component(component, torch.tanh(inner), base, upcoming)
        return score

    def component(self, component: int, output: Tensor, base: Tensor, word: int) -> Tensor:
        """Returns log P(component of the word), over the values that lead to a word."""
        prefix = self.coordinates[word][:component]
        start = sum(self.shape[:component])
        logits = {}
        for other, row in enumerate(self.coordinates):
            if row[:component] == prefix:
                value = row[component]
                weight, bias = self.softmax.vectors.weight, self.softmax.bias
                logit = weight[start + value] @ output + bias[start + value]
                if component == len(self.shape) - 1 and self.own is not None:
                    query = self.own.query.weight @ base
                    logit = logit + self.bias.bias[other] + self.own.numbers[other] @ query
                    places = self.further_cells(other, self.further.tables)
                    vectors = self.further.output_vectors[places].sum(0)
                    logit = logit + vectors @ (self.further.query.weight @ base)
                logits[value] = logit
        chosen = logits[self.coordinates[word][component]]
        return chosen - torch.logsumexp(torch.stack(list(logits.values())), 0)


@pytest.fixture(params=CONDITIONERS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("words", "shape"), TABLES)
@pytest.mark.parametrize("layers", [1, 2])
def test_one_call_equals_the_equations_step_by_step(
    words: int, shape: tuple[int, ...], layers: int, kind: Any, extras: bool
) -> None:
    model = build(kind, words, shape, words, extras=extras, layers=layers)
    text = torch.randint(words, (2, 5))
    expected = torch.stack([StepByStep(model)(row.tolist()) for row in text])
    torch.testing.assert_close(log_probs(model, text), expected)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_every_context_has_a_distribution_over_the_words(
    words: int, shape: tuple[int, ...], kind: Any, extras: bool
) -> None:
    """Σ_w P(w | context) = 1 by brute force: every word in turn as the target."""
    model = build(kind, words, shape, extras=extras, layers=1)
    contexts = torch.randint(words, (4, 3))
    texts = torch.cat(
        [contexts.repeat_interleave(words, 0), torch.arange(words).repeat(4)[:, None]], dim=1
    )
    brute_force = log_probs(model, texts)[:, -1].view(4, words)
    assert torch.isfinite(brute_force).all()
    torch.testing.assert_close(brute_force.exp().sum(1), torch.ones(4, dtype=torch.float64))
    fast = next_word_log_probs(model.head, model.read(contexts))
    torch.testing.assert_close(fast, brute_force, check_dtype=False)


@pytest.mark.parametrize(("words", "shape"), TABLES)
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_carried_state_makes_blocks_one_text(
    words: int, shape: tuple[int, ...], length: int, kind: Any
) -> None:
    model = build(kind, words, shape)
    text = torch.randint(words, (3, 14))
    whole = model(text).hidden
    state, parts = None, []
    for start in range(0, 13, length):
        block = text[:, start : start + length + 1]
        hidden, state, *_ = model(block, state)
        assert hidden.shape == (3, block.size(1) - 1, len(shape), HIDDEN)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_reading_in_steps_equals_reading_at_once(
    words: int, shape: tuple[int, ...], kind: Any
) -> None:
    model = build(kind, words, shape)
    text = torch.randint(words, (3, 6))
    whole = model.read(text)
    context = model.read(text[:, :4])
    for word in range(4, 6):
        context = model.read(text[:, word : word + 1], context)
    torch.testing.assert_close(context.output, whole.output)
    torch.testing.assert_close(context.queries, whole.queries)
    torch.testing.assert_close(context.state, whole.state)


def test_selecting_contexts_repeats_and_drops_texts(kind: Any) -> None:
    model = build(kind, 10, (3, 4))
    context = model.read(torch.randint(10, (3, 4)))
    index = torch.tensor([2, 0, 2, 2])
    every = next_word_log_probs(model.head, context)
    chosen = next_word_log_probs(model.head, context.select(index))
    torch.testing.assert_close(chosen, every[index])


def test_copies_and_pickles_work(kind: Any) -> None:
    """Of decoders whose parts share tables, vectors and features: copies share them alike."""
    model = build(kind, 10, (3, 4))
    text = torch.randint(10, (2, 6))
    expected = log_probs(model, text)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(log_probs(other, text), expected)
        assert len(list(other.parameters())) == len(list(model.parameters()))
        table = other.head.table.table()
        other.head.table.seat(WordTable.from_cells(table.cells[::-1].copy(), table.shape))
        assert not torch.equal(log_probs(other, text), expected)
        assert torch.equal(log_probs(model, text), expected)


def test_one_component_is_an_ordinary_softmax_lstm(kind: Any) -> None:
    """k = 1: the loss and the gradients of nn.Embedding, nn.LSTM, nn.Linear and cross-entropy."""
    words = 11
    model = build(kind, words, (words,), extras=False)
    embedding = nn.Embedding(words, DIM).double()
    lstm = nn.LSTM(DIM, HIDDEN, 2, batch_first=True).double()
    output = nn.Linear(HIDDEN, words).double()
    softmax, cells = model.head.softmax, model.head.table.cells
    with torch.no_grad():
        embedding.weight.copy_(model.reader.vectors.weight[cells])
        lstm.load_state_dict(model.network.state_dict())
        output.weight.copy_(softmax.vectors.weight[cells])
        output.bias.copy_(softmax.bias[cells])
    text = torch.randint(words, (4, 9))
    loss = -log_probs(model, text).sum()
    logits = output(lstm(embedding(text[:, :-1]))[0])
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), text[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    pairs = [
        (model.reader.vectors.weight.grad[cells], embedding.weight.grad),
        (softmax.vectors.weight.grad[cells], output.weight.grad),
        (softmax.bias.grad[cells], output.bias.grad),
        *(
            (ours.grad, theirs.grad)
            for ours, theirs in zip(model.network.parameters(), lstm.parameters(), strict=True)
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_shared_vectors_of_another_width_are_a_tied_softmax_of_projected_outputs(kind: Any) -> None:
    """k = 1, and the loss and gradients of a tied softmax whose vectors are narrower."""
    words = 11
    model = build(kind, words, (words,), extras=False, shared=True)
    embedding = nn.Embedding(words, DIM).double()
    lstm = nn.LSTM(DIM, HIDDEN, 2, batch_first=True).double()
    project = nn.Linear(HIDDEN, DIM).double()
    state, cells = model.network.state_dict(), model.head.table.cells
    with torch.no_grad():
        embedding.weight.copy_(model.reader.vectors.weight[cells])
        project.load_state_dict(model.network.project.state_dict())
        lstm.load_state_dict({name: state[name] for name in lstm.state_dict()})
    bias = model.head.softmax.bias.detach()[cells]
    text = torch.randint(words, (4, 9))
    loss = -log_probs(model, text).sum()
    logits = project(lstm(embedding(text[:, :-1]))[0]) @ embedding.weight.T + bias
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), text[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(model.reader.vectors.weight.grad[cells], embedding.weight.grad)
    torch.testing.assert_close(model.network.project.weight.grad, project.weight.grad)


def test_swapping_words_and_back_changes_nothing(kind: Any) -> None:
    model = build(kind, 10, (3, 4), layers=1)
    text = torch.randint(10, (2, 8))
    before = log_probs(model, text)
    table = model.head.table.table()
    swapped = table.cells.copy()
    swapped[[2, 7]] = swapped[[7, 2]]
    model.head.table.seat(WordTable.from_cells(swapped, table.shape))
    assert not torch.equal(log_probs(model, text), before)
    model.head.table.seat(table)
    assert torch.equal(log_probs(model, text), before)


def test_padding_after_a_text_changes_nothing(kind: Any) -> None:
    model = build(kind, 10, (3, 4), layers=1)
    text = torch.randint(10, (2, 8))
    padded = torch.cat([text, torch.randint(10, (2, 3))], dim=1)
    torch.testing.assert_close(log_probs(model, padded)[:, :7], log_probs(model, text))
