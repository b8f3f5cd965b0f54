from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fairseq_lightrnn.components import ComponentEmbedding, ComponentSoftmax
from fairseq_lightrnn.composition import query_layer
from fairseq_lightrnn.distribution import next_word_log_probs
from fairseq_lightrnn.frequent_words import FrequentSize
from fairseq_lightrnn.gated import GatedComposition
from fairseq_lightrnn.recurrent import RecurrentComposition
from fairseq_lightrnn.table_lookup import TableLookup
from fairseq_lightrnn.word_table import WordTable

DIM, HIDDEN = 5, 6
TABLES = [(9, (9,)), (11, (11,)), (12, (3, 4)), (10, (3, 4)), (24, (2, 3, 4)), (17, (2, 3, 4))]


COMPOSITIONS = ["recurrent", "gated"]


class Model(nn.Module):
    """The core modules put together, in float64, with or without words' own numbers and FFN."""

    def __init__(
        self,
        words: int,
        shape: tuple[int, ...],
        layers: int = 1,
        composition: str = "recurrent",
        extras: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(words)
        cells = np.random.default_rng(words).permutation(int(np.prod(shape)))[:words]
        residual_in, residual_out = (3, 2) if extras else (0, 0)
        kind = {"recurrent": RecurrentComposition, "gated": GatedComposition}[composition]
        self.table = TableLookup(words, shape)
        self.table.seat(WordTable.from_cells(cells, shape))
        frequent = FrequentSize(words // 2, 4) if extras else None
        embedding = ComponentEmbedding(shape, DIM, self.table, residual_in, frequent=frequent)
        query = residual_out + (frequent.dim if frequent else 0)
        ffn_dim = 7 if extras else 0
        self.composition = kind(embedding, HIDDEN, layers, query_sizes=[query], ffn_dim=ffn_dim)
        self.softmax = ComponentSoftmax(self.table, HIDDEN, None, extras, residual_out, frequent)
        nn.init.normal_(self.softmax.bias)
        if extras:
            for parameter in (
                embedding.residual.weight, embedding.frequent.residual.weight,
                self.softmax.word_bias, self.softmax.residual, self.softmax.frequent.residual,
            ):  # fmt: skip
                nn.init.normal_(parameter)
        self.double()

    def log_probs(self, words: Tensor) -> Tensor:
        """Scores words 1 … T of texts (B, T+1): (B, T)."""
        hidden, _ = self.composition(self.table(words))
        flat = self.softmax(hidden.flatten(0, 1), self.table(words[:, 1:].reshape(-1)))
        return flat.sum(1).view(words.size(0), -1)


class StepByStep:
    """Scores one text by the definitions: a word, a component and a value at a time."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shape = model.table.shape
        self.coordinates = model.table.table().coordinates.tolist()
        self.state: tuple[Tensor, Tensor] | None = None

    def __call__(self, words: list[int]) -> Tensor:
        recurrent = isinstance(self.model.composition, RecurrentComposition)
        step = self.recurrent_word if recurrent else self.gated_word
        return torch.stack([step(*pair) for pair in itertools.pairwise(words)])

    def vector(self, embedding: ComponentEmbedding, component: int, value: int) -> Tensor:
        return embedding.weight[sum(self.shape[:component]) + value]

    def input_residual(self, word: int) -> Tensor | float:
        embedding = self.model.composition.embedding
        if embedding.residual is None:
            return 0.0
        vector = embedding.projection.weight @ embedding.residual.weight[word]
        wide = embedding.frequent
        if word < len(wide.residual.weight):
            vector = vector + wide.projection.weight @ wide.residual.weight[word]
        return vector

    def read(self, vector: Tensor) -> Tensor:
        composition = self.model.composition
        output, self.state = composition.lstm(vector.view(1, 1, -1), self.state)
        output = output.view(-1)
        if composition.ffn is None:
            return output
        inner, outer = composition.ffn.inner, composition.ffn.outer
        units = (inner.weight @ output + inner.bias).clamp(min=0)
        return output + outer.weight @ units + outer.bias

    def recurrent_word(self, word: int, upcoming: int) -> Tensor:
        """The paper's equations: the state after each component predicts the next one."""
        embedding = self.model.composition.embedding
        last = len(self.shape) - 1
        # Of a word that was predicted, all but the last component have been read already.
        for component in range(len(self.shape)) if self.state is None else [last]:
            vector = self.vector(embedding, component, self.coordinates[word][component])
            if component == last:
                vector = vector + self.input_residual(word)
            base = output = self.read(vector)
        score = torch.zeros((), dtype=torch.float64)
        for component in range(len(self.shape)):
            score = score + self.component(component, output, base, upcoming)
            if component < last:
                value = self.coordinates[upcoming][component]
                output = self.read(self.vector(embedding, component, value))
        return score

    def gated_word(self, word: int, upcoming: int) -> Tensor:
        """One step a word; later components through the gates of the earlier ones."""
        composition = self.model.composition
        vectors = [
            self.vector(composition.embedding, component, value)
            for component, value in enumerate(self.coordinates[word])
        ]
        base = self.read(sum(vectors) + self.input_residual(word))
        score = self.component(0, base, base, upcoming)
        for component in range(1, len(self.shape)):
            gate, shift = torch.zeros(HIDDEN).double(), torch.zeros(HIDDEN).double()
            for earlier in range(component):
                value = self.coordinates[upcoming][earlier]
                both = self.vector(composition.gates[component - 1], earlier, value)
                gate, shift = gate + both[:HIDDEN], shift + both[HIDDEN:]
            transform = composition.transforms[component - 1]
            inner = (transform.weight @ base + transform.bias) * 2 * torch.sigmoid(gate) + shift
            score = score + self.component(component, torch.tanh(inner), base, upcoming)
        return score

    def component(self, component: int, output: Tensor, base: Tensor, word: int) -> Tensor:
        """Returns log P(component of the word), over the values that lead to a word."""
        softmax = self.model.softmax
        prefix = self.coordinates[word][:component]
        start = sum(self.shape[:component])
        logits = {}
        for other, row in enumerate(self.coordinates):
            if row[:component] == prefix:
                value = row[component]
                logit = softmax.weight[start + value] @ output + softmax.bias[start + value]
                if component == len(self.shape) - 1 and softmax.word_bias is not None:
                    query = self.model.composition.query.weight @ base
                    residual, wide = softmax.residual, softmax.frequent.residual
                    own = residual[other] @ query[: residual.size(1)]
                    if other < len(wide):
                        own = own + wide[other] @ query[residual.size(1) :]
                    logit = logit + softmax.word_bias[other] + own
                logits[value] = logit
        chosen = logits[self.coordinates[word][component]]
        return chosen - torch.logsumexp(torch.stack(list(logits.values())), 0)


@pytest.fixture(params=COMPOSITIONS)
def composition(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("words", "shape"), TABLES)
@pytest.mark.parametrize("layers", [1, 2])
def test_one_call_equals_the_equations_step_by_step(
    words: int, shape: tuple[int, ...], layers: int, composition: str, extras: bool
) -> None:
    model = Model(words, shape, layers, composition, extras)
    text = torch.randint(words, (2, 5))
    expected = torch.stack([StepByStep(model)(row.tolist()) for row in text])
    torch.testing.assert_close(model.log_probs(text), expected)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_every_context_has_a_distribution_over_the_words(
    words: int, shape: tuple[int, ...], composition: str, extras: bool
) -> None:
    """Σ_w P(w | context) = 1 by brute force: every word in turn as the target."""
    model = Model(words, shape, 1, composition, extras)
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
    words: int, shape: tuple[int, ...], length: int, composition: str
) -> None:
    model = Model(words, shape, 2, composition, extras=True)
    text = torch.randint(words, (3, 14))
    whole, _ = model.composition(model.table(text))
    state, parts = None, []
    for start in range(0, 13, length):
        block = text[:, start : start + length + 1]
        hidden, state = model.composition(model.table(block), state)
        assert hidden.shape == (3, block.size(1) - 1, len(shape), HIDDEN + 2 + 4)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(("words", "shape"), TABLES)
def test_reading_in_steps_equals_reading_at_once(
    words: int, shape: tuple[int, ...], composition: str
) -> None:
    model = Model(words, shape, 2, composition, extras=True)
    text = model.table(torch.randint(words, (3, 6)))
    whole = model.composition.read(text)
    context = model.composition.read(text[:, :4])
    for word in range(4, 6):
        context = model.composition.read(text[:, word : word + 1], context)
    torch.testing.assert_close(context.output, whole.output)
    torch.testing.assert_close(context.state, whole.state)


def test_selecting_contexts_repeats_and_drops_texts(composition: str) -> None:
    model = Model(10, (3, 4), 2, composition)
    context = model.composition.read(model.table(torch.randint(10, (3, 4))))
    index = torch.tensor([2, 0, 2, 2])
    every = next_word_log_probs(model.composition, model.softmax, context)
    chosen = next_word_log_probs(model.composition, model.softmax, context.select(index))
    torch.testing.assert_close(chosen, every[index])


def test_one_component_is_an_ordinary_softmax_lstm(composition: str) -> None:
    """k = 1: the loss and the gradients of nn.Embedding, nn.LSTM, nn.Linear and cross-entropy."""
    words = 11
    model = Model(words, (words,), 2, composition)
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


def test_swapping_words_and_back_changes_nothing(composition: str) -> None:
    model = Model(10, (3, 4), 1, composition, extras=True)
    text = torch.randint(10, (2, 8))
    before = model.log_probs(text)
    table = model.table.table()
    swapped = table.cells.copy()
    swapped[[2, 7]] = swapped[[7, 2]]
    model.table.seat(WordTable.from_cells(swapped, table.shape))
    assert not torch.equal(model.log_probs(text), before)
    model.table.seat(table)
    assert torch.equal(model.log_probs(text), before)


def test_padding_after_a_text_changes_nothing(composition: str) -> None:
    model = Model(10, (3, 4), 1, composition, extras=True)
    text = torch.randint(10, (2, 8))
    padded = torch.cat([text, torch.randint(10, (2, 3))], dim=1)
    torch.testing.assert_close(model.log_probs(padded)[:, :7], model.log_probs(text))


def test_what_few_numbers_add_to_a_logit_learns_as_fast_as_an_ordinary_softmax() -> None:
    torch.manual_seed(1)
    layer = query_layer(256, [8, 0, 256, 36])
    assert layer is not None and layer.out_features == 300
    outputs = torch.randn(512, 256)
    # By word, what would be its vector in an ordinary softmax, and its numbers here.
    changes = []
    for query in (outputs, *layer(outputs).detach().split([8, 256, 36], dim=1)):
        numbers = nn.Parameter(torch.zeros_like(query))
        optimizer = torch.optim.Adam([numbers], lr=0.1)
        (-numbers * query).sum().backward()
        optimizer.step()
        changes.append((numbers * query).sum(1).mean())
    for change in changes[1:]:
        torch.testing.assert_close(change, changes[0], rtol=0.1, atol=0)


def test_without_residuals_there_is_no_query() -> None:
    assert query_layer(4, []) is None and query_layer(4, [0, 0, 0]) is None
