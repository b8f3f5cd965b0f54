"""Compositions with attention, against the equations one word and one component at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fairseq_lightrnn.attentive import (
    AttentiveComposition,
    AttentiveGatedComposition,
    AttentiveRecurrentComposition,
    Memory,
)
from fairseq_lightrnn.components import ComponentEmbedding, ComponentSoftmax
from fairseq_lightrnn.distribution import next_word_log_probs
from fairseq_lightrnn.table_lookup import TableLookup
from fairseq_lightrnn.top_words import top_words
from fairseq_lightrnn.word_table import WordTable

DIM, HIDDEN, MEMORY = 5, 6, 7
KINDS = [AttentiveRecurrentComposition, AttentiveGatedComposition]
TABLES = [(9, (9,)), (12, (3, 4)), (10, (3, 4)), (17, (2, 3, 4))]
CASES = [(kind, words, shape) for kind in KINDS for words, shape in TABLES]


class Decoder(nn.Module):
    """The core modules put together in float64, with biases and residuals of words, and an FFN."""

    def __init__(self, kind: type[AttentiveComposition], words: int, shape: tuple[int, ...]):
        super().__init__()
        torch.manual_seed(words)
        cells = np.random.default_rng(words).permutation(int(np.prod(shape)))[:words]
        self.table = TableLookup(words, shape)
        self.table.seat(WordTable.from_cells(cells, shape))
        embedding = ComponentEmbedding(shape, DIM, self.table, 3)
        more = {"query_sizes": [2], "ffn_dim": 7}
        self.composition = kind(embedding, HIDDEN, 2, memory_dim=MEMORY, **more)
        self.softmax = ComponentSoftmax(self.table, HIDDEN, None, True, 2)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.7)

    def log_probs(self, words: Tensor, state: Any, memory: Memory) -> Tensor:
        """Scores words 1 … T of targets (B, T+1): (B, T)."""
        hidden, _ = self.composition.translate(self.table(words), state, memory)
        flat = self.softmax(hidden.flatten(0, 1), self.table(words[:, 1:].reshape(-1)))
        return flat.sum(1).view(words.size(0), -1)


def sources(texts: int, seed: int = 0) -> tuple[Any, Memory]:
    """A state and a memory of texts, the second of which is shorter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    padding = torch.zeros(texts, 4, dtype=torch.bool)
    padding[1:2, 2:] = True
    return (draw(2, texts, HIDDEN), draw(2, texts, HIDDEN)), Memory(draw(texts, 4, MEMORY), padding)


def slow_log_prob(decoder: Decoder, words: list[int], state: Any, memory: Memory) -> Tensor:
    """log P of words 1 … T of one target by the definitions: (T,)."""
    composition, table = decoder.composition, decoder.table
    shape, attention = table.shape, composition.attention
    coordinates = table.table().coordinates.tolist()
    components = len(shape)

    def vector(component: int, value: int) -> Tensor:
        return composition.embedding.weight[sum(shape[:component]) + value]

    def residual(word: int) -> Tensor:
        embedding = composition.embedding
        return embedding.projection.weight @ embedding.residual.weight[word]

    def read(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = composition.lstm(x.view(1, 1, -1), state)
        return output.view(-1), state

    def look(output: Tensor) -> Tensor:
        real = [place for place in range(4) if not memory.padding[0, place]]
        values = memory.values[0, real]
        return torch.softmax(values @ (attention.key.weight @ output), 0) @ values

    def combine(output: Tensor, source: Tensor) -> Tensor:
        output = torch.tanh(attention.combination.weight @ torch.cat([output, source]))
        inner, outer = composition.ffn.inner, composition.ffn.outer
        units = (inner.weight @ output + inner.bias).clamp(min=0)
        return output + outer.weight @ units + outer.bias

    def score(component: int, output: Tensor, base: Tensor, word: int) -> Tensor:
        softmax, prefix = decoder.softmax, coordinates[word][:component]
        logits = {}
        for other, row in enumerate(coordinates):
            if row[:component] == prefix:
                index = sum(shape[:component]) + row[component]
                logit = softmax.weight[index] @ output + softmax.bias[index]
                if component == components - 1:
                    query = composition.query.weight @ base
                    logit = logit + softmax.word_bias[other] + softmax.residual[other] @ query
                logits[row[component]] = logit
        total = torch.logsumexp(torch.stack(list(logits.values())), 0)
        return logits[coordinates[word][component]] - total

    recurrent = isinstance(composition, AttentiveRecurrentComposition)
    result = []
    for number, upcoming in enumerate(words[1:]):
        word = words[number]
        values = coordinates[word]
        if recurrent:
            for component in range(components):
                # Of a word that was predicted, all but the last component have been read already.
                if number == 0 or component == components - 1:
                    x = vector(component, values[component])
                    x = x + residual(word) if component == components - 1 else x
                    output, state = read(x, state)
        else:
            x = sum(vector(component, value) for component, value in enumerate(values))
            output, state = read(x + residual(word), state)
        source = look(output)
        base = output = combine(output, source)
        total = score(0, output, base, upcoming)
        for component in range(1, components):
            earlier = coordinates[upcoming][:component]
            if recurrent:
                output, state = read(vector(component - 1, earlier[-1]), state)
                output = combine(output, source)
            else:
                both = sum(
                    composition.gates[component - 1].weight[sum(shape[:place]) + value]
                    for place, value in enumerate(earlier)
                )
                transform = composition.transforms[component - 1]
                inner = transform(base) * 2 * torch.sigmoid(both[:HIDDEN]) + both[HIDDEN:]
                output = torch.tanh(inner)
            total = total + score(component, output, base, upcoming)
        result.append(total)
    return torch.stack(result)


def one(state: Any, memory: Memory, text: int) -> tuple[Any, Memory]:
    hidden, cell = state
    part = slice(text, text + 1)
    return (
        (hidden[:, part].contiguous(), cell[:, part].contiguous()),
        Memory(memory.values[part], memory.padding[part]),
    )


@pytest.mark.parametrize(("kind", "words", "shape"), CASES)
def test_one_call_equals_the_equations(kind: Any, words: int, shape: tuple[int, ...]) -> None:
    decoder = Decoder(kind, words, shape)
    state, memory = sources(2)
    text = torch.randint(words, (2, 5))
    expected = [
        slow_log_prob(decoder, text[row].tolist(), *one(state, memory, row)) for row in range(2)
    ]
    torch.testing.assert_close(decoder.log_probs(text, state, memory), torch.stack(expected))


@pytest.mark.parametrize(("kind", "words", "shape"), CASES)
def test_every_context_has_a_distribution(kind: Any, words: int, shape: tuple[int, ...]) -> None:
    """Brute force, every word in turn as the target, equals the distribution, which sums to 1."""
    decoder = Decoder(kind, words, shape)
    state, memory = sources(2)
    past = torch.randint(words, (2, 3))
    texts = torch.cat([past.repeat_interleave(words, 0), torch.arange(words).repeat(2)[:, None]], 1)
    index = torch.arange(2).repeat_interleave(words)
    repeated = (state[0][:, index], state[1][:, index])
    all_memory = Memory(memory.values[index], memory.padding[index])
    brute_force = decoder.log_probs(texts, repeated, all_memory)[:, -1].view(2, words)
    torch.testing.assert_close(brute_force.exp().sum(1), torch.ones(2, dtype=torch.float64))
    context, weights = decoder.composition.read_beside(decoder.table(past), state, memory)
    fast = next_word_log_probs(decoder.composition, decoder.softmax, context)
    torch.testing.assert_close(fast, brute_force)
    assert weights.shape == (2, 1, 4)
    assert (weights[1, 0, 2:] == 0).all()
    with torch.no_grad():
        context, _ = decoder.composition.read_beside(decoder.table(past), state, memory)
        best = top_words(decoder.composition, decoder.softmax, context, 3)
    torch.testing.assert_close(best.log_probs, brute_force.topk(3).values)


@pytest.mark.parametrize(("kind", "words", "shape"), CASES)
def test_steps_with_reordering_equal_one_call(
    kind: Any, words: int, shape: tuple[int, ...]
) -> None:
    decoder = Decoder(kind, words, shape)
    state, memory = sources(3)
    text = torch.randint(words, (3, 6))
    expected = decoder.log_probs(text, state, memory)
    order = torch.tensor([2, 0])
    for step in range(5):
        context, _ = decoder.composition.read_beside(
            decoder.table(text[:, step : step + 1]), state, memory
        )
        log_probs = next_word_log_probs(decoder.composition, decoder.softmax, context)
        chosen = log_probs.gather(1, text[:, step + 1, None]).squeeze(1)
        torch.testing.assert_close(chosen, expected[:, step])
        if step == 2:
            context = context.select(order)
            text, expected = text[order], expected[order]
            memory = Memory(memory.values[order], memory.padding[order])
        state = context.state


@pytest.mark.parametrize("kind", KINDS)
def test_weights_say_where_a_word_was_looked_up(kind: Any) -> None:
    """Training and generation agree on them, they sum to 1, and padding gets none."""
    decoder = Decoder(kind, 12, (3, 4))
    state, memory = sources(2)
    text = torch.randint(12, (2, 4))
    _, whole = decoder.composition.translate(decoder.table(text), state, memory)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert (whole[1, :, 2:] == 0).all()
    for length in range(1, 4):
        _, weights = decoder.composition.read_beside(decoder.table(text[:, :length]), state, memory)
        torch.testing.assert_close(weights[:, 0], whole[:, length - 1])
