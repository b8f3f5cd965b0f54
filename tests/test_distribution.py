"""The exact distribution of the next word, against a twin that conditions word by word."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny_models import (
    CASES,
    CONDITIONERS,
    build,
    contexts,
    log_probs,
    single_precision,
    slow_log_probs,
    words_of,
)
from torch import Tensor

from fairseq_lightrnn.core.conditioning import Gated, Recurrent
from fairseq_lightrnn.core.distribution import (
    coordinate_log_probs,
    next_word_entropy_and_rank,
    next_word_log_probs,
    sample_words,
)
from fairseq_lightrnn.core.search import top_words


def sort_words(log_probs: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole vocabulary sorted: by probability, then by id."""
    words, scores = [], []
    for row in log_probs.numpy():
        order = np.lexsort((np.arange(len(row)), -row))[:count]
        words.append(order)
        scores.append(row[order])
    return np.stack(words), np.stack(scores)


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize(("kind", "words", "shape"), CASES)
class TestEveryTable:
    def test_log_probs(self, kind: Any, words: int, shape: tuple[int, ...]) -> None:
        model = build(kind, words, shape)
        context = contexts(model, 4)
        fast = next_word_log_probs(model.head, context)
        torch.testing.assert_close(fast, slow_log_probs(model, context))
        torch.testing.assert_close(fast.exp().sum(1), torch.ones(4, dtype=torch.float64))

    def test_what_training_scores(self, kind: Any, words: int, shape: tuple[int, ...]) -> None:
        """Every word in turn as the target, from whole texts in one call."""
        model = build(kind, words, shape)
        texts = torch.cat(
            [words_of((4, 3), words).repeat_interleave(words, 0),
             torch.arange(words).repeat(4)[:, None]], dim=1,
        )  # fmt: skip
        brute_force = log_probs(model, texts)[:, -1].view(4, words)
        torch.testing.assert_close(next_word_log_probs(model.head, contexts(model, 4)), brute_force)

    def test_a_given_word(self, kind: Any, words: int, shape: tuple[int, ...]) -> None:
        model = build(kind, words, shape)
        context, given_words = contexts(model, 4), torch.tensor([0, 5, 9, 1])
        scores = coordinate_log_probs(model.head, context, given_words)
        assert scores.shape == (4, len(shape))
        expected = next_word_log_probs(model.head, context)[torch.arange(4), given_words]
        torch.testing.assert_close(scores.sum(1), expected)

    def test_top_words(self, kind: Any, words: int, shape: tuple[int, ...]) -> None:
        model = build(kind, words, shape)
        context = contexts(model, 6)
        every = slow_log_probs(model, context)
        for count in (1, 3, words, words + 5):
            found = top_words(model.head, context, count)
            expected_words, expected_scores = sort_words(every, count)
            assert (found.words.numpy() == expected_words).all()
            np.testing.assert_allclose(found.log_probs.numpy(), expected_scores, atol=1e-9)

    def test_entropy_and_rank(self, kind: Any, words: int, shape: tuple[int, ...]) -> None:
        model = build(kind, words, shape)
        context, given_words = contexts(model, 4), torch.tensor([0, 5, 9, 1])
        every = slow_log_probs(model, context)
        expected = -(every.exp() * every).sum(1)
        entropy, rank = next_word_entropy_and_rank(model.head, context, given_words)
        torch.testing.assert_close(entropy, expected)
        own = every[torch.arange(4), given_words]
        assert rank.tolist() == (1 + (every > own[:, None] + 1e-9).sum(1)).tolist()

    @pytest.mark.parametrize(
        "options",
        [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.7},
         {"temperature": 2.0, "top_k": 4}, {"temperature": 0.7, "top_p": 0.7}],
    )  # fmt: skip
    def test_samples(
        self, kind: Any, words: int, shape: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        model = build(kind, words, shape)
        draws = 4000
        context = contexts(model, 1).select(torch.zeros(draws, dtype=torch.long))
        generator = torch.Generator().manual_seed(3)
        drawn = sample_words(model.head, context, **options, generator=generator)
        expected = truncated(slow_log_probs(model, contexts(model, 1))[0], **options)
        counts = np.bincount(drawn.numpy(), minlength=words)
        assert (counts[expected == 0] == 0).all()
        common = expected * draws >= 5
        observed = [*counts[common], counts[~common].sum()]
        hoped = [*(expected[common] * draws), expected[~common].sum() * draws]
        if hoped[-1] < 1e-6:
            observed, hoped = observed[:-1], hoped[:-1]
        if len(hoped) > 1:
            assert chisquare(observed, hoped).pvalue > 1e-4

    def test_single_precision(self, kind: Any, words: int, shape: tuple[int, ...]) -> None:
        model = build(kind, words, shape)
        every = next_word_log_probs(model.head, contexts(model, 4))
        single = single_precision(model)
        context = contexts(single, 4)
        torch.testing.assert_close(
            next_word_log_probs(single.head, context).double(), every, atol=1e-5, rtol=1e-4
        )
        found = top_words(single.head, context, 5)
        assert found.log_probs.dtype == torch.float32
        expected = every.topk(5).values
        torch.testing.assert_close(found.log_probs.double(), expected, atol=1e-5, rtol=1e-4)


def truncated(
    log_probs: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:
    """The distribution that a sample must follow, from the whole vocabulary."""
    probs = torch.softmax(log_probs / temperature, 0).numpy()
    order = np.argsort(-probs, kind="stable")
    if top_k is not None:
        probs[order[top_k:]] = 0
    if top_p is not None:
        reached = np.cumsum(probs[order]) >= top_p
        probs[order[int(reached.argmax()) + 1 :]] = 0
    return np.asarray(probs / probs.sum())


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(CONDITIONERS),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    empty=st.integers(0, 5),
    count=st.integers(1, 12),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    seed=st.integers(0, 1000),
)
def test_top_words_are_those_of_brute_force(
    kind: Any, shape: list[int], empty: int, count: int, scale: float, seed: int
) -> None:
    """With scale 0 all words of a full table are equally probable: the ids break the ties."""
    sizes = tuple(shape)
    words = max(1, int(np.prod(sizes)) - empty)
    model = build(kind, words, sizes, seed, scale, extras=bool(seed % 2))
    context = contexts(model, 3, seed)
    every = next_word_log_probs(model.head, context)
    found = top_words(model.head, context, count)
    expected_words, expected_scores = sort_words(every, count)
    np.testing.assert_allclose(found.log_probs.numpy(), expected_scores, atol=1e-9)
    chosen = every.gather(1, found.words).numpy()
    np.testing.assert_allclose(chosen, expected_scores, atol=1e-9)
    assert all(len(set(row)) == len(row) for row in found.words.tolist())
    if scale == 0.0:
        assert (found.words.numpy() == expected_words).all()


def test_ties_across_rows_are_broken_by_the_id() -> None:
    model = build(Recurrent, 12, (3, 4), scale=0.0)
    found = top_words(model.head, contexts(model, 2), 7)
    assert found.words.tolist() == [list(range(7))] * 2


def test_a_peaked_row_is_all_that_is_expanded() -> None:
    model = build(Gated, 100, (10, 10), scale=0.1)
    model.head.softmax.bias[3] = 50.0
    found = top_words(model.head, contexts(model, 3), 5)
    # So many rows are opened in the first round, however improbable.
    assert (found.expanded <= 4).all()
    assert (model.head.table(found.words)[..., 0] == 3).all()


def test_expansions_do_not_exceed_the_rows() -> None:
    model = build(Recurrent, 100, (10, 10), scale=0.0)
    found = top_words(model.head, contexts(model, 3), 100)
    assert found.expanded.tolist() == [10] * 3


def test_rows_are_expanded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Recurrent, 20, (3, 3, 3))
    context = contexts(model, 5)
    whole, top = next_word_log_probs(model.head, context), top_words(model.head, context, 4)
    for module in ("distribution", "search"):
        monkeypatch.setattr(f"fairseq_lightrnn.core.{module}.EXPANSIONS", 2)
    torch.testing.assert_close(next_word_log_probs(model.head, context), whole)
    found = top_words(model.head, context, 4)
    assert torch.equal(found.words, top.words)
    torch.testing.assert_close(found.log_probs, top.log_probs)


def test_a_search_is_given_up_where_predictions_are_flat() -> None:
    model = build(Gated, 100, (10, 10), scale=0.01)
    context = contexts(model, 3)
    assert top_words(model.head, context, 5, 9) is None
    found = top_words(model.head, context, 5, 10)
    assert found is not None
    assert torch.equal(found.words, top_words(model.head, context, 5).words)


@pytest.mark.parametrize("texts", [[0], [0, 1, 2]])
def test_predictions_that_are_no_numbers(texts: list[int]) -> None:
    model = build(Gated, 100, (10, 10))
    context = contexts(model, 3)
    context.output[texts] = torch.nan
    with pytest.raises(FloatingPointError, match="parameters are nan or infinite"):
        top_words(model.head, context, 5)


@pytest.mark.parametrize("shape", [(10, 10), (100,)])
@pytest.mark.parametrize("texts", [[0], [0, 1, 2]])
def test_a_model_of_no_numbers_is_not_certain_of_every_word(
    shape: tuple[int, ...], texts: list[int]
) -> None:
    """No word is more probable than one of probability NaN."""
    model = build(Gated, 100, shape)
    context = contexts(model, 3)
    context.output[texts] = torch.nan
    with pytest.raises(FloatingPointError, match="parameters are nan or infinite"):
        next_word_entropy_and_rank(model.head, context, torch.tensor([4, 5, 6]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0: must be above 0"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": 0}, "top_k 0: must be at least 1"),
        ({"top_p": 0.0}, "top_p 0.0: must be above 0"),
        ({"top_p": 1.5}, "top_p 1.5: must be above 0 and at most 1"),
        ({"top_p": 0.5, "top_k": 2}, "exclude each other"),
    ],
)
def test_samples_refuse(options: dict[str, Any], message: str) -> None:
    model = build(Recurrent, 12, (3, 4))
    with pytest.raises(ValueError, match=message):
        sample_words(model.head, contexts(model, 1), **options)


def test_top_words_refuses_no_words() -> None:
    model = build(Recurrent, 12, (3, 4))
    with pytest.raises(ValueError, match="count 0"):
        top_words(model.head, contexts(model, 1), 0)
