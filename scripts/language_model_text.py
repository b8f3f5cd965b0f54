"""Texts of benchmarks of language models: their splits, and pieces of their words."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pieces import make_splitter, write_pieces
from side_by_side import call

__all__ = [
    "UNKNOWN",
    "binarise",
    "count_tokens",
    "count_words",
    "find_text",
    "require_known_words",
    "split_words",
]

SPLITS = ("train", "valid", "test")
UNKNOWN = "<unk>"
"""What texts have for words that they do not tell."""
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


def count_words(path: Path) -> Counter[str]:
    """Counts the words of a file, which come in the order of their first occurrences."""
    counts: Counter[str] = Counter()
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            counts.update(line.split())
    return counts


def require_known_words(text: Path, system: str) -> None:
    """Ends in a sentence if the training text lacks a word of another split.

    A model of words predicts one word, ``<unk>``, for all that it does not know; pieces spell them.
    """
    files = find_text(text)
    known = count_words(files["train"])
    for split in SPLITS[1:]:
        unknown = [word for word in count_words(files[split]) if word not in known]
        if unknown:
            raise SystemExit(
                f"{system}: {unknown[0]!r} in {files[split]} is not in {files['train']}, so "
                "that it cannot be compared with models of words; compare them on what "
                "scripts/hide_rare_words.py makes of the text"
            )


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
    if not (to / "complete").exists():
        for split, path in files.items():
            write_pieces(splitter, path, to / f"{split}.txt")
        (to / "complete").touch()
    return to, {split: count_tokens(to, split) / count_tokens(text, split) for split in SPLITS}


def binarise(text: Path, out: Path) -> Path:
    """Makes fairseq's binary data, unless they are there."""
    data = out / "bin"
    if not (data / "complete").exists():
        files = find_text(text)
        pairs = [part for split in SPLITS for part in (f"--{split}pref", files[split])]
        call("preprocess", "--only-source", *pairs, "--destdir", data)
        (data / "complete").touch()
    return data
