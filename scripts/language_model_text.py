"""Texts of benchmarks of language models: their splits, rare words, and pieces of words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pieces import make_splitter, write_pieces
from side_by_side import call

__all__ = ["binarise", "count_tokens", "find_text", "hide_rare_words", "split_words"]

SPLITS = ("train", "valid", "test")
UNKNOWN = "<unk>"
# Sentencepiece marks the start of a word with this.
_START = "▁"


def find_text(folder: Path) -> dict[str, Path]:
    """Returns the files of the splits."""
    files = {}
    for split in SPLITS:
        found = sorted(folder.glob(f"*{split}.txt")) or sorted(folder.glob(f"*{split}.tokens"))
        if len(found) != 1:
            raise SystemExit(f"{folder}: expected one file *{split}.txt, found {len(found)}")
        files[split] = found[0]
    return files


def count_tokens(text: Path, split: str = "train") -> int:
    """Returns the words of a split and the ends of its lines."""
    with open(find_text(text)[split], encoding="utf-8") as file:
        return sum(len(line.split()) + 1 for line in file)


def hide_rare_words(text: Path, to: Path, least: int) -> Path:
    """Writes a text with ``<unk>`` for every word that its training part has less often.

    Args:
        text: folder of the splits.
        to: folder to write, unless it is there.
        least: how often a word must occur there.

    Returns:
        The folder.
    """
    files = find_text(text)
    counts: Counter[str] = Counter()
    with open(files["train"], encoding="utf-8") as lines:
        for line in lines:
            counts.update(line.split())

    def write(source: Path, target: Path) -> None:
        with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as file:
            for line in lines:
                words = line.split()
                print(*(one if counts[one] >= least else UNKNOWN for one in words), file=file)

    return _prepare(files, to, write)


def split_words(text: Path, to: Path, count: int) -> tuple[Path, dict[str, float]]:
    """Splits a text into so many pieces of sentencepiece, learnt of its training part.

    The text is taken as it is, rare characters as bytes. ``<unk>`` stays one piece.

    Args:
        text: folder of the splits.
        to: folder to write, unless it is there.
        count: of the pieces.

    Returns:
        The folder, and for each split the pieces that a word has, ends of lines counted as both.
    """
    files = find_text(text)
    splitter = make_splitter(
        to / "model", [files["train"]], count, normalization_rule_name="identity",
        byte_fallback=True, user_defined_symbols=[_START + UNKNOWN], unk_piece="<unknown>",
    )  # fmt: skip
    _prepare(files, to, lambda source, target: write_pieces(splitter, source, target))
    return to, {split: count_tokens(to, split) / count_tokens(text, split) for split in SPLITS}


def _prepare(files: dict[str, Path], to: Path, write: Callable[[Path, Path], None]) -> Path:
    """Writes what becomes of each split, unless that is done."""
    to.mkdir(parents=True, exist_ok=True)
    if not (to / "complete").exists():
        for split, path in files.items():
            write(path, to / f"{split}.txt")
        (to / "complete").touch()
    return to


def binarise(text: Path, out: Path) -> Path:
    """Makes fairseq's binary data, unless they are there."""
    data = out / "bin"
    if not (data / "complete").exists():
        files = find_text(text)
        pairs = [part for split in SPLITS for part in (f"--{split}pref", files[split])]
        call("preprocess", "--only-source", *pairs, "--destdir", data)
        (data / "complete").touch()
    return data
