"""The runner's searches and draws, against sorting the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare
from tiny_exports import Exported, export
from tiny_models import KINDS

from fairseq_lightrnn.core.conditioning import Gated
from fairseq_lightrnn.runtime.network import Position
from fairseq_lightrnn.runtime.search import draw, draw_words, every_word, top_words

CASES = [
    (kind, words, shape)
    for kind in KINDS
    for words, shape in [(13, (13,)), (90, (10, 10)), (110, (5, 5, 5))]
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def found(request: pytest.FixtureRequest) -> Exported:
    return export(*request.param, scale=0.5)


def positions(found: Exported, texts: int) -> Position:
    words = np.random.default_rng(1).integers(len(found.order) - 1, size=(texts, 3))
    return found.network.read(found.network.begin(texts), words)[0]


@pytest.mark.parametrize("count", [1, 7, 1000])
@pytest.mark.parametrize("within", [None, [*range(4, 11), 12], [], [12]])
def test_the_most_probable_words(found: Exported, count: int, within: list[int] | None) -> None:
    position = positions(found, 5)
    every = every_word(found.network, position).astype(np.float64)
    if within is not None:
        mask = np.ones(every.shape[1], dtype=bool)
        mask[within] = False
        every[:, mask] = -np.inf
    some = None if within is None else np.array(within, dtype=np.int64)
    results = top_words(found.network, position, count, some)
    for log_probs, (words, scores) in zip(every, results, strict=True):
        size = min(count, int(np.isfinite(log_probs).sum()))
        expected = np.sort(log_probs)[::-1][:size]
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        np.testing.assert_allclose(log_probs[words], scores, atol=1e-5)
        assert len(set(words.tolist())) == size


def test_few_prefixes_are_opened() -> None:
    found = export(Gated, 90, (10, 10), scale=2.0)
    opened = []
    extend = found.network.extend
    found.network.extend = lambda carried, texts, prefix: (  # type: ignore[method-assign]
        opened.append(len(prefix)) or extend(carried, texts, prefix)  # type: ignore[func-returns-value]
    )
    top_words(found.network, positions(found, 1), 1)
    assert 0 < sum(opened) < 10


def test_draws_follow_the_distribution(found: Exported) -> None:
    position = positions(found, 1)
    probabilities = np.exp(every_word(found.network, position)[0].astype(np.float64))
    generator = np.random.default_rng(0)
    draws = draw_words(found.network, position.select(np.zeros(4000, dtype=int)), generator)
    counts = np.bincount(draws, minlength=len(probabilities))
    expected = probabilities / probabilities.sum() * len(draws)
    common = expected >= 5
    classes = [*counts[common], counts[~common].sum()]
    hoped = [*expected[common], expected[~common].sum()]
    if hoped[-1] < 1e-9:
        classes, hoped = classes[:-1], hoped[:-1]
    assert chisquare(classes, hoped).pvalue > 1e-4


def test_impossible_values_are_never_drawn() -> None:
    weights = np.array([[-np.inf, 0.0, -np.inf]] * 100)
    assert (draw(weights, np.random.default_rng(0)) == 1).all()


def test_at_least_one_word_must_be_asked_for(found: Exported) -> None:
    with pytest.raises(ValueError, match="count 0"):
        top_words(found.network, positions(found, 1), 0)
