"""The words of an exported model, front-coded: few bytes, and no list of strings in memory.

Words are sorted by their UTF-8 bytes and numbered in this order. Of each is stored how many bytes
it shares with the word before it, and the rest; every 32nd word is whole, so that a word is found
by bisection among those, and by reading on from there.
"""

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["Vocabulary", "front_code"]

_BLOCK = 32
_MOST_SHARED = 255
_END = 0x0A  # a newline, which no word can hold
_REMEMBERED = 1 << 14


def front_code(words: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorts and codes words.

    Args:
        words: V words; of equal ones the last is found again.

    Returns:
        The sorted words' places among those given, integers of shape (V,); how many bytes each
        shares with the one before it, uint8 of shape (V,); the rest of each and a newline, uint8.

    Raises:
        ValueError: if a word holds a newline.
    """
    coded = [word.encode("utf-8", "surrogateescape") for word in words]
    order = sorted(range(len(coded)), key=lambda word: coded[word])
    shared = np.zeros(len(coded), dtype=np.uint8)
    rests = []
    before = b""
    for place, number in enumerate(order):
        word = coded[number]
        if b"\n" in word:
            raise ValueError(f"the word {words[number]!r} holds a newline")
        length = 0
        if place % _BLOCK:
            most = min(len(before), len(word), _MOST_SHARED)
            while length < most and before[length] == word[length]:
                length += 1
        shared[place] = length
        rests.append(word[length:] + b"\n")
        before = word
    rest = np.frombuffer(b"".join(rests), dtype=np.uint8)
    return np.array(order, dtype=np.int64), shared, rest


class Vocabulary:
    """Words by their numbers, numbers by their words, and all words that begin in some way.

    Args:
        shared: see :func:`front_code`.
        rest: likewise.

    Raises:
        ValueError: if they do not belong together.
    """

    find: Callable[[str], int | None]

    def __init__(self, shared: np.ndarray, rest: np.ndarray) -> None:
        ends = np.flatnonzero(rest == _END)
        if len(ends) != len(shared) or shared[::_BLOCK].any():
            raise ValueError("the words are damaged")
        self._shared = shared
        self._rest = rest.tobytes()
        self._ends = ends.astype(np.int32)
        self._blocks = range((len(shared) + _BLOCK - 1) // _BLOCK)
        self._more: list[str] = []
        self.find = lru_cache(_REMEMBERED)(self._find)

    def with_words(self, words: Sequence[str]) -> Vocabulary:
        """Returns a vocabulary with further words, which are numbered from V on as they come."""
        result = copy.copy(self)
        result._more = [*self._more, *words]
        result.find = lru_cache(_REMEMBERED)(result._find)
        return result

    def __len__(self) -> int:
        return len(self._shared) + len(self._more)

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(f"word {number} of {len(self)}")
        if number >= len(self._shared):
            return self._more[number - len(self._shared)]
        block, place = divmod(number, _BLOCK)
        return self._block(block)[place].decode("utf-8", "surrogateescape")

    def _find(self, word: str) -> int | None:
        if word in self._more:
            return len(self._shared) + self._more.index(word)
        coded = word.encode("utf-8", "surrogateescape")
        number = self._rank(coded, bisect_right) - 1
        return number if number >= 0 and self[number] == word else None

    def with_prefix(self, prefix: str) -> np.ndarray:
        """Returns the numbers of all words that begin with a prefix, (W,), in their order."""
        coded = prefix.encode("utf-8", "surrogateescape")
        first = self._rank(coded, bisect_left)
        # No byte of UTF-8 is 0xff.
        last = self._rank(coded + b"\xff", bisect_left)
        more = [place for place, word in enumerate(self._more) if word.startswith(prefix)]
        further = len(self._shared) + np.array(more, dtype=np.int64)
        return np.concatenate([np.arange(first, last), further])

    def _rank(self, coded: bytes, bisect: Any) -> int:
        """Returns how many words are below some bytes, or not above them."""
        block = bisect(self._blocks, coded, key=self._head) - 1
        rank: int = 0 if block < 0 else block * _BLOCK + bisect(self._block(block), coded)
        return rank

    def _start(self, number: int) -> int:
        return int(self._ends[number - 1]) + 1 if number else 0

    def _head(self, block: int) -> bytes:
        number = block * _BLOCK
        return self._rest[self._start(number) : int(self._ends[number])]

    def _block(self, block: int) -> list[bytes]:
        first = block * _BLOCK
        ends = self._ends[first : first + _BLOCK].tolist()
        start, word, words = self._start(first), b"", []
        shared = self._shared[first : first + _BLOCK].tolist()
        for end, length in zip(ends, shared, strict=True):
            word = word[:length] + self._rest[start:end]
            words.append(word)
            start = end + 1
        return words
