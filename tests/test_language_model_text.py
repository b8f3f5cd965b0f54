"""Texts of benchmarks: rare words that are hidden, and words split into pieces."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from benchmark_language_model import check_system, parse  # noqa: E402
from hide_rare_words import hide_rare_words  # noqa: E402
from language_model_text import (  # noqa: E402
    count_tokens,
    require_known_words,
    split_words,
)


@pytest.fixture()
def text(tmp_path: Path) -> Path:
    lines = ["the lower house", "the <unk> house ½", "lower and lower ½"] * 20
    for split, some in (("train", lines), ("valid", ["the flower house"]), ("test", ["häuser"])):
        (tmp_path / f"{split}.txt").write_text("\n".join(some) + "\n", encoding="utf-8")
    return tmp_path


def test_rare_words_are_hidden_in_every_split(text: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hide_rare_words(text, hidden, 40)
    train = (hidden / "train.txt").read_text(encoding="utf-8").splitlines()
    assert train[:3] == ["the lower house", "the <unk> house ½", "lower <unk> lower ½"]
    assert (hidden / "valid.txt").read_text(encoding="utf-8") == "the <unk> house\n"
    assert (hidden / "test.txt").read_text(encoding="utf-8") == "<unk>\n"
    assert count_tokens(hidden) == count_tokens(text) == 20 * (4 + 5 + 5)
    require_known_words(hidden, "kenlm")
    with pytest.raises(SystemExit, match=r"kenlm: 'flower' in .*valid.txt is not in .*train.txt"):
        require_known_words(text, "kenlm")


def test_pieces_spell_every_word(text: Path, tmp_path: Path) -> None:
    folder, per_word = split_words(text, tmp_path / "pieces", 275)
    for split in ("train", "valid", "test"):
        original = (text / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        split_lines = (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        for line, pieces in zip(original, split_lines, strict=True):
            if "<0x" not in pieces:
                assert pieces.replace(" ", "").replace("▁", " ").strip() == line
        ratio = sum(len(one.split()) + 1 for one in split_lines) / count_tokens(text, split)
        assert per_word[split] == ratio >= 1
    assert "▁<unk>" in (folder / "train.txt").read_text(encoding="utf-8").split()
    # A character that the training text has not is spelt in bytes.
    assert "<0xC3> <0xA4>" in (folder / "test.txt").read_text(encoding="utf-8")
    before = (folder / "train.txt").stat().st_mtime_ns
    assert split_words(text, tmp_path / "pieces", 275) == (folder, per_word)
    assert (folder / "train.txt").stat().st_mtime_ns == before  # nothing is done twice


def test_pieces_of_long_lines_are_learnt(text: Path, tmp_path: Path) -> None:
    """A space that is no blank separates words as it does for fairseq."""
    (text / "train.txt").write_text("zebra\u00a0okapi " * 1000 + "\n", encoding="utf-8")
    split_words(text, tmp_path / "pieces", 272)
    pieces = (tmp_path / "pieces" / "train.txt").read_text(encoding="utf-8").split()
    assert "".join(pieces[:40]).startswith("▁zebra▁okapi▁zebra") and "<0x" not in "".join(pieces)


def test_so_many_pieces_there_are_not(text: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="90000 pieces: .*Vocabulary size too high"):
        split_words(text, tmp_path / "pieces", 90_000)


def test_what_moves_no_words_is_not_for_seconds(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--for-seconds", "9", "--systems", "authors@800"]
    monkeypatch.setattr(sys, "argv", ["benchmark_language_model.py", str(text), "out", *flags])
    with pytest.raises(SystemExit):
        parse()
    assert "leave authors out of --systems" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kenlm", "lstm_lm", "lstm_lm-adaptive@32000", "gated@800"])
def test_systems(name: str) -> None:
    assert check_system(name) == name


@pytest.mark.parametrize("name", ["best", "kenlm@800", "lstm_lm@", "lstm_lm@many", "lstm@800"])
def test_names_of_no_system(name: str) -> None:
    with pytest.raises(ArgumentTypeError, match=name):
        check_system(name)
