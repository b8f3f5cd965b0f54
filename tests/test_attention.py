"""Decoders with attention, against the equations one word and one component at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CONDITIONERS, HIDDEN, build, log_probs
from torch import Tensor

from fairseq_lightrnn.core.attention import Memory
from fairseq_lightrnn.core.conditioning import Recurrent
from fairseq_lightrnn.core.decoder import Decoder
from fairseq_lightrnn.core.distribution import next_word_log_probs
from fairseq_lightrnn.core.search import top_words

MEMORY = 7
TABLES = [(9, (9,)), (12, (3, 4)), (10, (3, 4)), (17, (2, 3, 4))]
CASES = [(kind, words, shape) for kind in CONDITIONERS for words, shape in TABLES]


def decoder_of(kind: Any, words: int, shape: tuple[int, ...]) -> Decoder:
    """A decoder of words with all that they can have of their own, and a feed-forward layer."""
    return build(kind, words, shape, words, 0.7, memory_dim=MEMORY)


def score(decoder: Decoder, words: Tensor, state: Any, memory: Memory) -> Tensor:
    """Scores words 1 … T of targets (B, T+1), which go on from nothing: (B, T)."""
    return log_probs(decoder, words, state, memory, continued=False)


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
    reader, softmax, attention = decoder.reader, decoder.head.softmax, decoder.attention
    conditioner: Any = decoder.head.conditioner
    shape = decoder.head.table.shape
    coordinates = decoder.head.table.table().coordinates.tolist()
    read_by = reader.seats.table().coordinates.tolist()
    components = len(shape)
    bias, own, further = softmax.features

    def vector(component: int, value: int) -> Tensor:
        return reader.vectors.weight[sum(shape[:component]) + value]

    def cells(word: int, tables: Any) -> list[int]:
        found = []
        for number, table in enumerate(tables):
            for component, value in enumerate(table.table().coordinates[word].tolist()):
                found.append(number * sum(shape) + sum(shape[:component]) + value)
        return found

    def features(word: int) -> Tensor:
        vectors = further.input_vectors[cells(word, further.kept_tables or further.tables)].sum(0)
        return own.projection.weight @ own.numbers[word] + vectors

    def read(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = decoder.network(x.view(1, 1, -1), state)
        return output.view(-1), state

    def look(output: Tensor) -> Tensor:
        real = [place for place in range(4) if not memory.padding[0, place]]
        values = memory.values[0, real]
        return torch.softmax(values @ (attention.key.weight @ output), 0) @ values

    def combine(output: Tensor, source: Tensor) -> Tensor:
        output = torch.tanh(attention.combination.weight @ torch.cat([output, source]))
        inner, outer = conditioner.ffn.inner, conditioner.ffn.outer
        units = (inner.weight @ output + inner.bias).clamp(min=0)
        return output + outer.weight @ units + outer.bias

    def score(component: int, output: Tensor, base: Tensor, word: int) -> Tensor:
        prefix = coordinates[word][:component]
        logits = {}
        for other, row in enumerate(coordinates):
            if row[:component] == prefix:
                index = sum(shape[:component]) + row[component]
                logit = softmax.vectors.weight[index] @ output + softmax.bias[index]
                if component == components - 1:
                    logit = logit + bias.bias[other]
                    logit = logit + own.numbers[other] @ (own.query.weight @ base)
                    vectors = further.output_vectors[cells(other, further.tables)].sum(0)
                    logit = logit + vectors @ (further.query.weight @ base)
                logits[row[component]] = logit
        total = torch.logsumexp(torch.stack(list(logits.values())), 0)
        return logits[coordinates[word][component]] - total

    recurrent = isinstance(conditioner, Recurrent)
    result = []
    for number, upcoming in enumerate(words[1:]):
        word = words[number]
        values = read_by[word]
        if recurrent:
            for component in range(components):
                # Of a word that was predicted, all but the last component have been read already.
                if number == 0 or component == components - 1:
                    x = vector(component, values[component])
                    x = x + features(word) if component == components - 1 else x
                    output, state = read(x, state)
        else:
            x = sum(vector(component, value) for component, value in enumerate(values))
            output, state = read(x + features(word), state)
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
                    conditioner.gates[component - 1].weight[sum(shape[:place]) + value]
                    for place, value in enumerate(earlier)
                )
                transform = conditioner.transforms[component - 1]
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
    decoder = decoder_of(kind, words, shape)
    state, memory = sources(2)
    text = torch.randint(words, (2, 5))
    expected = [
        slow_log_prob(decoder, text[row].tolist(), *one(state, memory, row)) for row in range(2)
    ]
    torch.testing.assert_close(score(decoder, text, state, memory), torch.stack(expected))


@pytest.mark.parametrize(("kind", "words", "shape"), CASES)
def test_every_context_has_a_distribution(kind: Any, words: int, shape: tuple[int, ...]) -> None:
    """Brute force, every word in turn as the target, equals the distribution, which sums to 1."""
    decoder = decoder_of(kind, words, shape)
    state, memory = sources(2)
    past = torch.randint(words, (2, 3))
    texts = torch.cat([past.repeat_interleave(words, 0), torch.arange(words).repeat(2)[:, None]], 1)
    index = torch.arange(2).repeat_interleave(words)
    repeated = (state[0][:, index], state[1][:, index])
    all_memory = Memory(memory.values[index], memory.padding[index])
    brute_force = score(decoder, texts, repeated, all_memory)[:, -1].view(2, words)
    torch.testing.assert_close(brute_force.exp().sum(1), torch.ones(2, dtype=torch.float64))
    context, weights = decoder.read_beside(past, state, memory)
    fast = next_word_log_probs(decoder.head, context)
    torch.testing.assert_close(fast, brute_force)
    assert weights.shape == (2, 1, 4)
    assert (weights[1, 0, 2:] == 0).all()
    with torch.no_grad():
        context, _ = decoder.read_beside(past, state, memory)
        best = top_words(decoder.head, context, 3)
    torch.testing.assert_close(best.log_probs, brute_force.topk(3).values)


@pytest.mark.parametrize(("kind", "words", "shape"), CASES)
def test_steps_with_reordering_equal_one_call(
    kind: Any, words: int, shape: tuple[int, ...]
) -> None:
    decoder = decoder_of(kind, words, shape)
    state, memory = sources(3)
    text = torch.randint(words, (3, 6))
    expected = score(decoder, text, state, memory)
    order = torch.tensor([2, 0])
    for step in range(5):
        context, _ = decoder.read_beside(text[:, step : step + 1], state, memory)
        log_probs = next_word_log_probs(decoder.head, context)
        chosen = log_probs.gather(1, text[:, step + 1, None]).squeeze(1)
        torch.testing.assert_close(chosen, expected[:, step])
        if step == 2:
            context = context.select(order)
            text, expected = text[order], expected[order]
            memory = Memory(memory.values[order], memory.padding[order])
        state = context.state


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_weights_say_where_a_word_was_looked_up(kind: Any) -> None:
    """Training and generation agree on them, they sum to 1, and padding gets none."""
    decoder = decoder_of(kind, 12, (3, 4))
    state, memory = sources(2)
    text = torch.randint(12, (2, 4))
    whole = decoder(text, state, memory, continued=False).attention
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert (whole[1, :, 2:] == 0).all()
    for length in range(1, 4):
        _, weights = decoder.read_beside(text[:, :length], state, memory)
        torch.testing.assert_close(weights[:, 0], whole[:, length - 1])


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_components_are_not_predicted_without_the_source(shape: tuple[int, ...]) -> None:
    decoder = decoder_of(Recurrent, 12, shape)
    state, memory = sources(2)
    context, _ = decoder.read_beside(torch.tensor([[2], [3]]), state, memory)
    lost = context._replace(source=None)
    with pytest.raises(ValueError, match="must come from a decoder that read a source"):
        decoder.head.extend(lost, 0, torch.tensor([0, 1]))
