"""The Python interface, on a small trained model of each composition."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq_run import train
from scipy.stats import chisquare

from fairseq_lightrnn.language_model import LanguageModel
from fairseq_lightrnn.models.lightrnn_lm import LightRNNLanguageModel


@pytest.fixture(scope="module", params=["recurrent", "gated"])
def folder(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    save_dir = tmp_path_factory.mktemp("trained")
    extras = {}
    if request.param == "gated":
        extras = {"input_residual_dim": 2, "output_residual_dim": 2}
    train(data, save_dir, max_epoch=2, sample_break_mode="eos", composition=request.param, **extras)
    return save_dir


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(folder)


def test_five_lines_from_checkpoint_to_answer(
    folder: Path, model: LanguageModel, data: Path
) -> None:
    same = LightRNNLanguageModel.from_pretrained(folder, data=data)
    assert same.score("w1 w8").perplexity == model.score("w1 w8").perplexity
    assert same.next_words("w1", 3) == model.next_words("w1", 3)
    assert same.sample("w1", seed=1) == model.sample("w1", seed=1)
    assert torch.equal(same.embedding("w1"), model.embedding("w1"))


def test_score_of_one_sentence(model: LanguageModel) -> None:
    score = model.score("w1 w8 unheard-of")
    assert score.tokens == ["w1", "w8", "unheard-of", "</s>"]
    assert score.ids.tolist()[2:] == [model.dictionary.unk(), model.dictionary.eos()]
    assert score.component_log_probs.shape == (4, 2)
    assert score.perplexity == pytest.approx(math.exp(-score.log_probs.sum() / 4))
    assert score.entropy is None


def test_scores_agree_with_next_words(model: LanguageModel) -> None:
    score = model.score("w1 w8", details=True)
    for index, (prefix, word) in enumerate([("", "w1"), ("w1", "w8"), ("w1 w8", "</s>")]):
        every = model.next_words(prefix, len(model.dictionary))
        words = [word for word, _ in every]
        assert sum(p for _, p in every) == pytest.approx(1, abs=1e-5)
        assert score.log_probs[index] == pytest.approx(math.log(dict(every)[word]), abs=1e-5)
        assert score.rank[index] == 1 + words.index(word)
        assert model.next_words(prefix, 3) == [
            (found, pytest.approx(p, abs=1e-6)) for found, p in every[:3]
        ]


def test_several_sentences_and_carried_state(model: LanguageModel) -> None:
    sentences = ["w1 w8", "", "w3"]
    apart = model.score(sentences)
    assert [len(score.tokens) for score in apart] == [3, 1, 2]
    single = [model.score(sentence) for sentence in sentences]
    for one, two in zip(apart, single, strict=True):
        np.testing.assert_allclose(one.log_probs, two.log_probs, atol=1e-5)
    carried = model.score(sentences, carry_hidden_state=True)
    assert carried[0].log_prob == pytest.approx(apart[0].log_prob, abs=1e-5)
    assert carried[2].log_prob != pytest.approx(apart[2].log_prob, abs=1e-5)


def test_samples_follow_the_distribution(model: LanguageModel) -> None:
    texts = model.sample("w1", max_words=1, count=3000, seed=1)
    every = model.next_words("w1", len(model.dictionary))
    names = ["" if word == "</s>" else word for word, _ in every]
    counts = Counter(text.removeprefix("w1").strip() for text in texts)
    assert counts.keys() <= set(names)
    expected = np.array([p for _, p in every]) * len(texts)
    common = expected >= 5
    assert common.sum() > 20
    observed = np.array([counts[name] for name in names])
    # The rare words together are one more class, unless there are none.
    classes = [*observed[common], observed[~common].sum()][: common.sum() + (~common).any()]
    hoped = np.array([*expected[common], expected[~common].sum()][: len(classes)])
    assert chisquare(classes, hoped * len(texts) / hoped.sum()).pvalue > 1e-4


def test_samples_follow_their_seed(model: LanguageModel) -> None:
    draws = [model.sample("w1 w8", seed=seed, count=3, max_words=8) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert all(text.startswith("w1 w8") for text in draws[0])
    assert all(len(text.split()) <= 10 for text in draws[0])


def test_the_coldest_sample_is_the_most_probable_word(model: LanguageModel) -> None:
    words: list[str] = []
    while len(words) < 5:
        word, _ = model.next_words(" ".join(words), 1)[0]
        if word == "</s>":
            break
        words.append(word)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}):
        assert model.sample(max_words=5, seed=3, **options) == [" ".join(words)]


def test_long_prompts_are_read_in_parts(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "w1 w8 w15 w3 " * 20
    whole = model.next_words(prompt, 5)
    monkeypatch.setattr("fairseq_lightrnn.language_model._READ_AT_ONCE", 7)
    parts = model.next_words(prompt, 5)
    assert [word for word, _ in parts] == [word for word, _ in whole]
    assert [p for _, p in parts] == pytest.approx([p for _, p in whole], abs=1e-6)


def test_words_of_a_row_share_half_of_their_embedding(model: LanguageModel) -> None:
    table = model.table.table()
    words = [w for w in np.flatnonzero(table.coordinates[:, 0] == 2) if w > 3][:2]
    one, two = (model.embedding(model.dictionary[word]) for word in words)
    half = len(one) // 2
    assert torch.equal(one[:half], two[:half])
    assert not torch.equal(one[half:], two[half:])
    with pytest.raises(ValueError, match="'unheard-of' is not in the dictionary"):
        model.embedding("unheard-of")


@pytest.mark.parametrize("options", [{"count": 0}, {"temperature": -1.0}, {"top_k": 0}])
def test_impossible_samples(model: LanguageModel, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        model.sample(**options)
