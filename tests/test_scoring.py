"""Scores of given texts, against reading them word by word."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    CASES,
    CONDITIONERS,
    KINDS,
    build,
    single_precision,
    slow_log_probs,
    words_of,
)

from fairseq_lightrnn.core.scoring import CorpusScore, Scorer, WordScores

START = 2


def sentences(words: int, seed: int = 0, count: int = 7) -> list[np.ndarray]:
    lengths = [1, 9, 0, 4, 4, 12, 2][:count]
    return [
        words_of((length,), words, 100 * seed + number).numpy()
        for number, length in enumerate(lengths)
    ]


@torch.no_grad()
def slow_scores(model: Any, texts: list[np.ndarray], carried: bool) -> list[WordScores]:
    """Every word from its whole past, one at a time."""
    results = []
    past: list[int] = [START]
    for text in texts:
        if not carried:
            past = [START]
        log_probs, entropies, ranks = [], [], []
        for word in text.tolist():
            context = model.read(torch.tensor([past]))
            every = slow_log_probs(model, context)[0]
            log_probs.append(float(every[word]))
            entropies.append(float(-(every.exp() * every).sum()))
            ranks.append(1 + int((every > every[word]).sum()))
            past.append(word)
        results.append(
            WordScores(np.array(log_probs), np.array(entropies), np.array(ranks, dtype=int))
        )
    return results


@pytest.mark.parametrize(
    ("kind", "words", "shape", "carried"),
    [
        (*case, carried)
        for case in CASES
        for carried in (False, True)
        if not carried or case[0] in CONDITIONERS
    ],
)
def test_scores_are_those_of_reading_word_by_word(
    kind: Any, words: int, shape: tuple[int, ...], carried: bool
) -> None:
    model = build(kind, words, shape)
    texts = sentences(words)
    expected = slow_scores(model, texts, carried)
    scorer = Scorer(model, START, batch_words=6, details=True)
    scores = list(scorer.score(texts, carried))
    assert len(scores) == len(texts)
    for ours, slow, text in zip(scores, expected, texts, strict=True):
        assert len(ours.log_probs) == len(text)
        np.testing.assert_allclose(ours.log_probs.sum(axis=1), slow.log_probs, atol=1e-9)
        if len(text):
            assert ours.log_probs.shape[1] == len(shape)
            assert ours.entropy is not None and ours.rank is not None
            np.testing.assert_allclose(ours.entropy, slow.entropy, atol=1e-9)
            assert ours.rank.tolist() == slow.rank.tolist()


@pytest.mark.parametrize(
    ("kind", "carried"),
    [*((kind, False) for kind in KINDS), *((kind, True) for kind in CONDITIONERS)],
)
def test_results_do_not_depend_on_the_batch(kind: Any, carried: bool) -> None:
    model = build(kind, 20, (5, 5), scale=0.5)  # float32 rounds sums of larger scores too coarsely
    model = single_precision(model)
    texts = [text for seed in range(5) for text in sentences(20, seed)]
    results = []
    for batch_words in (1, 7, 50, 4096):
        scores = Scorer(model, START, batch_words=batch_words).score(texts, carried)
        results.append([score.log_probs.sum(axis=1) for score in scores])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-5)


def test_long_texts_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the network is given more words than asked for, plus the one before."""
    model = build(CONDITIONERS[0], 20, (5, 5))
    widths = []
    forward = model.forward

    def spy(words: torch.Tensor, state: Any = None) -> Any:
        widths.append(words.shape[0] * (words.shape[1] - 1))
        return forward(words, state)

    monkeypatch.setattr(model, "forward", spy)
    text = np.random.default_rng(0).integers(20, size=1000)
    scorer = Scorer(model, START, batch_words=64)
    (scores,) = scorer.score([text])
    assert len(scores.log_probs) == 1000
    assert max(widths) == 64
    (whole,) = Scorer(model, START, batch_words=1000).score([text])
    np.testing.assert_allclose(scores.log_probs, whole.log_probs, atol=1e-9)


def test_scores_come_as_sentences_go() -> None:
    """Endless input is scored while it comes."""
    model = build(CONDITIONERS[1], 20, (5, 5))

    def endless() -> Iterator[np.ndarray]:
        while True:
            yield np.array([1, 2, 3])

    for carried in (False, True):
        scores = Scorer(model, START, batch_words=8).score(endless(), carried)
        assert next(scores).log_probs.shape == (3, 2)


def test_a_transformer_carries_no_state() -> None:
    scorer = Scorer(build("transformer", 20, (5, 5)), START)
    with pytest.raises(ValueError, match="carries no hidden state from sentence to sentence"):
        scorer.score(sentences(20), carried=True)


def test_a_text_beyond_what_a_transformer_looks_back_on() -> None:
    model = build("transformer", 20, (5, 5))
    longest, longer = (np.full(length, 7) for length in (64, 65))
    assert model.decoder.max_positions() == 64
    (scores,) = Scorer(model, START, batch_words=8).score([longest])
    assert len(scores.log_probs) == 64
    with pytest.raises(ValueError, match="a text of 65 words, its beginning included, is longer"):
        list(Scorer(model, START).score([longer]))


def test_no_batch_size() -> None:
    with pytest.raises(ValueError, match="batch_words 0"):
        Scorer(build(CONDITIONERS[0], 20, (5, 5)), START, batch_words=0)


class TestCorpusScore:
    words = np.array([7, 3, 8, 2])
    log_probs = np.array([[-1.0, -0.5], [-2.0, -1.0], [-0.25, -0.25], [-0.5, -0.125]])

    def score(self, count_eos: bool = True) -> CorpusScore:
        score = CorpusScore(unk=3, eos=2, count_eos=count_eos)
        score.add(self.words, self.log_probs)
        score.add(np.array([], dtype=int), np.zeros((0, 0)))
        return score

    def test_all_words(self) -> None:
        score = self.score()
        assert (score.sentences, score.words, score.unknown) == (2, 4, 1)
        assert score.perplexity == pytest.approx(math.exp(5.625 / 4))
        assert score.perplexity_without_unknown == pytest.approx(math.exp(2.625 / 3))
        assert math.prod(score.component_perplexities) == pytest.approx(score.perplexity)

    def test_without_ends_of_sentence(self) -> None:
        score = self.score(count_eos=False)
        assert (score.words, score.unknown) == (3, 1)
        assert score.perplexity == pytest.approx(math.exp(5.0 / 3))
        assert score.perplexity_without_unknown == pytest.approx(math.exp(2.0 / 2))

    def test_no_words(self) -> None:
        score = CorpusScore(unk=3, eos=2)
        assert score.perplexity is None
        assert score.perplexity_without_unknown is None


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    score = CorpusScore(unk=3, eos=2)
    score.add(np.array([5]), np.array([[-500.0, -500.0]]))
    assert score.perplexity == math.inf
