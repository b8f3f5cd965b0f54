"""Whether the files that fairseq-preprocess wrote are whole, and of the words of a dictionary."""

from __future__ import annotations

import itertools
import os
import struct

import numpy as np
from fairseq.data.indexed_dataset import MMapIndexedDataset, _code_to_dtype

__all__ = ["check_binarised"]

_MAGIC = MMapIndexedDataset.Index._HDR_MAGIC
_HEADER = struct.Struct(f"<{len(_MAGIC)}sQBQ")  # magic, version, type of the words, texts
_WORDS_AT_ONCE = 1 << 24
_AGAIN = "binarise the text again with fairseq-preprocess"


def check_binarised(path: str, num_words: int, suffix: str = "") -> None:
    """Reads a binarised split through, with its further parts (``train1``, ``train2`` …).

    fairseq reads words that no dictionary has, and texts that a file does not hold.

    Args:
        path: of the split, without what follows the number of a part; one that does not exist, or
            has another format than the default, is not looked at.
        num_words: of the dictionary.
        suffix: what follows the number of a part, such as ``.en-de.de``.

    Raises:
        ValueError: the index or the words are damaged, or not of this dictionary.
    """
    for number in itertools.count():
        part = f"{path}{number or ''}{suffix}"
        if not (os.path.exists(f"{part}.idx") and os.path.exists(f"{part}.bin")):
            return
        with open(f"{part}.idx", "rb") as file:
            index = file.read()
        if index[: len(_MAGIC)] != _MAGIC:
            return
        words = _words(part, index)
        for start in range(0, len(words), _WORDS_AT_ONCE):
            some = words[start : start + _WORDS_AT_ONCE]
            if some.min() < 0 or some.max() >= num_words:
                wrong = int(some[(some < 0) | (some >= num_words)][0])
                raise ValueError(
                    f"{part}.bin: has a word of number {wrong}, and the dictionary {num_words} "
                    f"words: it is damaged, or belongs to another dictionary; {_AGAIN}"
                )


def _words(part: str, index: bytes) -> np.ndarray:
    """Returns all words of a file, if it is as long as its index says."""
    damaged = ValueError(f"{part}.idx: is damaged or truncated; {_AGAIN}")
    if len(index) < _HEADER.size:
        raise damaged
    _, version, code, texts = _HEADER.unpack_from(index)
    expected = _HEADER.size + texts * (4 + 8)
    if version != 1 or code not in _code_to_dtype or len(index) != expected:
        raise damaged
    kind = np.dtype(_code_to_dtype[code])
    sizes = np.frombuffer(index, np.int32, texts, _HEADER.size).astype(np.int64)
    pointers = np.frombuffer(index, np.int64, texts, _HEADER.size + 4 * texts)
    ends = sizes.cumsum() * kind.itemsize
    if (sizes < 0).any() or (pointers != ends - sizes * kind.itemsize).any():
        raise damaged
    whole, found = int(ends[-1]) if texts else 0, os.path.getsize(f"{part}.bin")
    if found != whole:
        raise ValueError(
            f"{part}.bin: has {found} bytes, its index speaks of {whole}: it is truncated, or of "
            f"another text; {_AGAIN}"
        )
    return np.memmap(f"{part}.bin", kind, "r") if whole else np.zeros(0, kind)
