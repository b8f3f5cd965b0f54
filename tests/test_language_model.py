"""The Python interface, on a small trained model of each kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq_run import TINY_TRANSFORMER, train
from scipy.stats import chisquare

from fairseq_lightrnn.core.table import WordTable, balanced_cells
from fairseq_lightrnn.language_model import LanguageModel

KINDS = {
    "lightrnn_lm": {},
    "lightrnn_lm_gated": {"word_dim": 3},
    "lightrnn_transformer_lm": {
        name: value for name, value in TINY_TRANSFORMER.items() if not name.startswith("encoder")
    },
}


@pytest.fixture(scope="module", params=KINDS)
def folder(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    save_dir = tmp_path_factory.mktemp("trained")
    train(
        data, save_dir, max_epoch=2, sample_break_mode="eos", arch=request.param,
        **{"tokens_per_sample": 600, **KINDS[request.param]},
    )  # fmt: skip
    return save_dir


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(folder)


def test_five_lines_from_checkpoint_to_answer(
    folder: Path, model: LanguageModel, data: Path
) -> None:
    same = LanguageModel.from_pretrained(folder, data=data)
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
    if not model.decoder.carries_state:
        with pytest.raises(ValueError, match="carries no hidden state"):
            model.score(sentences, carry_hidden_state=True)
        return
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


def test_embeddings(model: LanguageModel) -> None:
    """What words are read by, of which the words of a row share a part."""
    table = model.table.table()
    words = [w for w in np.flatnonzero(table.coordinates[:, 0] == 2) if w > 3][:2]
    parts = model.decoder.reader(torch.tensor(np.array(words)))
    assert torch.equal(parts[0, 0], parts[1, 0])
    assert not torch.equal(parts[0, 1], parts[1, 1])
    one, two = (model.embedding(model.dictionary[word]) for word in words)
    assert torch.allclose(torch.stack([one, two]), parts.sum(1), atol=1e-6)
    distances = model.distances(model.dictionary[words[0]])
    assert distances.shape == (len(model.dictionary),)
    assert distances[words[1]] == pytest.approx(float((one - two).norm()), abs=1e-6)
    with pytest.raises(ValueError, match="'unheard-of' is not in the dictionary"):
        model.embedding("unheard-of")


@pytest.mark.parametrize("options", [{"count": 0}, {"temperature": -1.0}, {"top_k": 0}])
def test_impossible_samples(model: LanguageModel, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        model.sample(**options)


class TestWords:
    """A checkpoint alone will do, with the words of the table file beside it."""

    @pytest.fixture
    def moved(self, folder: Path, data: Path, tmp_path: Path) -> Iterator[Path]:
        """The files of a training whose data are gone."""
        for name in ("checkpoint_best.pt", "word_table.txt"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        hidden = data.with_name("hidden")
        data.rename(hidden)
        yield tmp_path
        hidden.rename(data)

    def test_of_a_table_file(self, model: LanguageModel, moved: Path) -> None:
        found = LanguageModel.from_pretrained(moved)
        assert found.dictionary.symbols == model.dictionary.symbols
        assert found.dictionary.indices == model.dictionary.indices
        assert found.score("w1 w8").log_prob == model.score("w1 w8").log_prob
        assert found.vocabulary_digest() == model.vocabulary_digest()
        assert found.table_digest() == model.table_digest() == model.table.table().digest()

    def test_of_the_table_of_another_round(self, model: LanguageModel, moved: Path) -> None:
        """The newest table is another one, the model's own lies under the number of its epoch."""
        symbols, old = model.dictionary.symbols, model.table.table()
        (moved / "word_table.txt").rename(moved / "word_table.epoch0.txt")
        other = WordTable.from_cells(balanced_cells(len(symbols), old.shape), old.shape)
        other.save(moved / "word_table.txt", symbols[::-1])
        assert LanguageModel.from_pretrained(moved).dictionary.symbols == symbols

    @pytest.mark.parametrize("kind", ["other cells", "other count", "no table", "none"])
    def test_of_another_model(self, model: LanguageModel, moved: Path, kind: str) -> None:
        symbols, file = model.dictionary.symbols, moved / "word_table.txt"
        if kind == "other cells":
            cells = model.table.table().cells[::-1].copy()
            WordTable.from_cells(cells, model.table.shape).save(file, symbols)
        elif kind == "other count":
            WordTable.from_cells(np.arange(9), (3, 3)).save(file, symbols[:9])
        elif kind == "no table":
            file.write_text("nothing\n")
        else:
            file.unlink()
        with pytest.raises(ValueError, match="no word table file of the model lies beside"):
            LanguageModel.from_pretrained(moved)


def test_what_training_did_is_known(data: Path, tmp_path: Path) -> None:
    assert not LanguageModel.from_pretrained(_carrying(data, tmp_path / "1")).carried_hidden_state
    folder = _carrying(data, tmp_path / "2", "--carry-hidden-state")
    assert LanguageModel.from_pretrained(folder).carried_hidden_state


def _carrying(data: Path, folder: Path, *flags: str) -> Path:
    train(data, folder, *flags, max_epoch=1, initial_table="random")
    return folder


class TestDamagedCheckpoints:
    """Each ends in a ValueError of one sentence that names the file."""

    def refused(self, path: Path, data: Path) -> None:
        with pytest.raises(ValueError) as caught:
            LanguageModel.from_pretrained(path, data)
        assert type(caught.value) is ValueError
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_cut_short(self, folder: Path, data: Path, tmp_path: Path) -> None:
        whole = (folder / "checkpoint_last.pt").read_bytes()
        for length in (0, 1, 100, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
            (tmp_path / "cut.pt").write_bytes(whole[:length])
            self.refused(tmp_path / "cut.pt", data)

    @pytest.mark.parametrize("other", [None, [1], {}, {"model": {}}, torch.zeros(2)])
    def test_something_else(self, other: Any, data: Path, tmp_path: Path) -> None:
        torch.save(other, tmp_path / "other.pt")
        self.refused(tmp_path / "other.pt", data)

    def test_other_flags_and_values(self, folder: Path, data: Path, tmp_path: Path) -> None:
        path = tmp_path / "changed.pt"
        for change in (
            lambda state: state.update(cfg=None, args=None),
            lambda state: state["cfg"].update(task=None),
            lambda state: state["cfg"].update(model=None),
            lambda state: state["cfg"]["model"].update(dropout="x"),
            lambda state: state["cfg"]["model"].update(table_shape="2x2"),
            lambda state: state["model"].update(
                (name, value * 0) for name, value in state["model"].items()
                if name.endswith(".coordinates")
            ),
            lambda state: state["model"].update((name, "x") for name in state["model"]),
            lambda state: state["model"].popitem(),
        ):  # fmt: skip
            state = torch.load(folder / "checkpoint_last.pt", weights_only=False)
            change(state)
            torch.save(state, path)
            self.refused(path, data)
