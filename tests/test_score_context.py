"""Scores given a context, all words' log-probabilities, and many prompts at once."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fairseq_run import TINY_TRANSFORMER, train

from fairseq_lightrnn.commands import score as score_command
from fairseq_lightrnn.language_model import LanguageModel

TEXTS = ["w1 w8", "", "w3"]
CONTEXTS = ["w2", "w5 w9 w1", ""]
KINDS: dict[str, dict[str, Any]] = {
    "lightrnn_lm": {},
    "lightrnn_transformer_lm": {
        name: value for name, value in TINY_TRANSFORMER.items() if not name.startswith("encoder")
    },
}


@pytest.fixture(scope="module", params=KINDS)
def folder(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    save_dir = tmp_path_factory.mktemp("trained")
    train(data, save_dir, max_epoch=2, arch=request.param, **KINDS[request.param])
    return save_dir


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(folder)


def test_given_a_context(model: LanguageModel) -> None:
    found = model.score(TEXTS, context=CONTEXTS, details=True)
    for text, context, score in zip(TEXTS, CONTEXTS, found, strict=True):
        whole = model.score(f"{context} {text}", details=True)
        start = len(context.split())
        assert score.tokens == whole.tokens[start:] == [*text.split(), "</s>"]
        np.testing.assert_allclose(score.log_probs, whole.log_probs[start:], atol=1e-5)
        assert score.rank.tolist() == whole.rank[start:].tolist()
    assert model.score("w1", context="w2").log_prob == pytest.approx(
        model.score(["w1"], context="w2")[0].log_prob
    )


def test_contexts_that_make_no_sense(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="sentence 2 has no context"):
        list(model.score_lines(["w1", "w2"], contexts=["w1"]))
    for contexts in (["w1"], ["w1", "w2", "w3"]):
        with pytest.raises(ValueError, match=f"2 sentences need as many .* not {len(contexts)}"):
            model.score(["w1", "w2"], context=contexts)
    with pytest.raises(ValueError, match="exclude each other"):
        model.score(["w1"], context=["w1"], carry_hidden_state=True)


def test_all_log_probabilities(model: LanguageModel) -> None:
    score = model.score("w1 w8", context="w2", details=True)
    every = list(model.log_probs("w1 w8", context="w2"))
    assert len(every) == 3
    for index, (log_probs, word) in enumerate(zip(every, score.ids, strict=True)):
        assert log_probs.shape == (len(model.dictionary),)
        assert np.exp(log_probs.astype(float)).sum() == pytest.approx(1, abs=1e-5)
        assert log_probs[word] == pytest.approx(score.log_probs[index], abs=1e-5)
        assert score.rank[index] == 1 + (log_probs > log_probs[word]).sum()


def test_many_prompts_at_once(model: LanguageModel) -> None:
    prompts = ["w1", "", "w3 w8", "w9", "w1 w1 w1"]
    for prompt, found in zip(prompts, model.next_words(prompts, 4), strict=True):
        alone = model.next_words(prompt, 4)
        assert [word for word, _ in found] == [word for word, _ in alone]
        assert [p for _, p in found] == pytest.approx([p for _, p in alone], abs=1e-6)
    options: dict[str, Any] = {"top_k": 1, "max_words": 4, "count": 2}
    texts = model.sample(prompts, **options)
    assert texts == [model.sample(prompt, **options) for prompt in prompts]
    options = {"seed": 3, "max_words": 4}
    assert model.sample(prompts, **options) == model.sample(prompts, **options)


def run(folder: Path, *arguments: Any) -> None:
    score_command.main([str(folder), "--no-progress-bar", *map(str, arguments)])


def test_the_command(
    folder: Path, model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, context = tmp_path / "text", tmp_path / "context"
    text.write_text("\n".join(TEXTS) + "\n")
    context.write_text("\n".join(CONTEXTS) + "\n")
    flags = text, "--context", context, "--level", "word", "--full", "--base", "e"
    run(folder, *flags)
    header, *lines = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert header[-len(model.dictionary) :] == model.dictionary.symbols
    expected = model.score(TEXTS, context=CONTEXTS)
    assert [line[2] for line in lines] == [token for score in expected for token in score.tokens]
    for line in lines:
        word = header.index(line[2], len(header) - len(model.dictionary))
        assert float(line[word]) == pytest.approx(float(line[3]), abs=1e-4)
    run(folder, *flags, "--format", "json")
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records[0]["tokens"][0]["all_logprobs"]) == len(model.dictionary)
    run(folder, text, "--context", context)
    summary = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert "|state:context|" in summary["signature"]
    assert summary["words"] == str(sum(len(score.tokens) for score in expected))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--full"], "--full needs --level word"),
        (["--context", "few"], "--context few: has fewer lines than the text"),
        (["--context", "many"], "--context many: has more lines than the text"),
        (["--context", "many", "--full", "--level", "word"], "many: has more lines than the text"),
        (["--context", "few", "--carry-hidden-state"], "give one of them"),
        (["--context", "-"], "--context -: the text is the standard input"),
        (["absent", "--context", "few"], "lightrnn-score: absent: no such text file"),
        (["--full", "--level", "word", "--carry-hidden-state"], "--full needs --no-carry"),
    ],
)
def test_mistakes_end_in_a_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").write_text("w1\n")
    (tmp_path / "many").write_text("w1\n" * 3)
    stdin = SimpleNamespace(buffer=io.BytesIO(b"w1\nw2\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(SystemExit, match=message):
        run(folder, *flags)


def test_all_words_at_a_place_are_those_of_the_word_beside_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a line has an end of sentence in its middle, and ends do not count."""
    text = tmp_path / "text"
    text.write_text("w1 </s> w8 w3\n")
    run(folder, text, "--level", "word", "--full", "--no-eos", "--base", "e")
    header, *lines = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert [line[2] for line in lines] == ["w1", "w8", "w3"]
    for line in lines:
        word = header.index(line[2], header.index("unknown") + 1)
        assert float(line[word]) == pytest.approx(float(line[3]), abs=1e-4)
