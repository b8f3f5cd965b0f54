"""Texts that grow word by word, and the model that they ask."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fairseq_lightrnn.runtime.network import Network, Position
from fairseq_lightrnn.runtime.search import draw, draw_words, every_word, top_words
from fairseq_lightrnn.runtime.vocabulary import Vocabulary

__all__ = ["READ_AT_ONCE", "Text", "TextModel"]

READ_AT_ONCE = 2048
"""Words."""


class TextModel:
    """Words, and a network that reads and predicts them.

    Args:
        description: what the JSON file of an exported model says.
        vocabulary: its words.
        network: predicts them.

    Attributes:
        carry_hidden_state: whether it was trained to go on from the hidden state of the text
            before.
        end: the number of the end of a sentence.
        unknown: the number of the word that stands for all others.
    """

    def __init__(
        self, description: dict[str, Any], vocabulary: Vocabulary, network: Network
    ) -> None:
        self.description = description
        self.vocabulary = vocabulary
        self.network = network
        self.carry_hidden_state: bool = description["carry_hidden_state"]
        self.end: int = description["end"]
        self.unknown: int = description["unknown"]
        self._start = np.array(description["start"], dtype=np.int64)

    def encode(self, text: str) -> tuple[list[str], np.ndarray]:
        """Returns the words of a text and their numbers, without an end of sentence."""
        tokens = text.split()
        numbers = (self.vocabulary.find(token) for token in tokens)
        ids = [self.unknown if number is None else number for number in numbers]
        return tokens, np.array(ids, dtype=np.int64)

    def begin(self, texts: int) -> Position:
        """Returns where texts are after the words that all texts begin with."""
        start = np.repeat(self._start[None], texts, axis=0)
        return self.network.read(self.network.begin(texts), start)[0]


class Text:
    """Some texts that grow word by word.

    Args:
        model: predicts their next words.
        prefixes: what there is of each, from the beginning of a sentence.

    Attributes:
        position: where they are: what the network keeps of them, to be kept, or put back.
    """

    def __init__(self, model: TextModel, prefixes: Sequence[str]) -> None:
        if not prefixes:
            raise ValueError("no text was given")
        self.model = model
        self.position = model.begin(len(prefixes))
        self.add(prefixes)

    def add(self, words: str | Sequence[str]) -> None:
        """Appends words: to each text its own, or to all the same."""
        count = len(self.position.output)
        each = [words] * count if isinstance(words, str) else words
        if len(each) != count:
            raise ValueError(f"words for {len(each)} texts were given, there are {count}")
        self._read([self.model.encode(one)[1] for one in each])

    def _read(self, words: Sequence[np.ndarray]) -> None:
        """Reads texts of different lengths: all as far as the shortest, and so on."""
        lengths = np.array([len(one) for one in words])
        longest = int(lengths.max())
        padded = np.zeros((len(words), longest), dtype=np.int64)
        for row, one in zip(padded, words, strict=True):
            row[: len(one)] = one
        whole, done = self.position, 0
        for length in np.unique(lengths[lengths > 0]).tolist():
            active = np.flatnonzero(lengths >= length)
            position = whole.select(active)
            step = max(1, READ_AT_ONCE // len(active))
            for start in range(done, length, step):
                block = padded[active, start : min(start + step, length)]
                position, _ = self.model.network.read(position, block)
            whole, done = whole.put(active, position), length
        self.position = whole

    def next_words(self, k: int = 10) -> list[list[tuple[str, float]]]:
        """Returns each text's k most probable next words with their probabilities, exactly."""
        return self._named(top_words(self.model.network, self.position, k))

    def complete(self, typed: str, k: int = 10) -> list[list[tuple[str, float]]]:
        """Returns each text's k most probable next words that begin as typed, exactly."""
        within = self.model.vocabulary.with_prefix(typed)
        return self._named(top_words(self.model.network, self.position, k, within))

    def _named(self, found: list[tuple[np.ndarray, np.ndarray]]) -> list[list[tuple[str, float]]]:
        name = self.model.vocabulary.__getitem__
        return [
            [
                (name(word), p)
                for word, p in zip(words.tolist(), np.exp(scores).tolist(), strict=True)
            ]
            for words, scores in found
        ]

    def log_probs(self) -> np.ndarray:
        """Returns the log-probabilities of all words as next ones, in nats, (texts, V)."""
        return every_word(self.model.network, self.position)

    def draws(
        self,
        max_words: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Draws words one after the other, until the sentence ends or there are so many.

        A transformer's text also ends where it can look back no further; its last word is then not
        part of what :attr:`position` has read.

        Args:
            max_words: of each text.
            temperature: t; words are drawn with probability proportional to P(word)^(1/t).
            top_k: draw from this many most probable words only.
            top_p: draw from the fewest most probable words with this much probability.
            seed: of the random numbers; None takes another each time.

        Yields:
            The number of a text, and its next word.

        Raises:
            ValueError: if a number is out of its range, or two exclude each other.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature {temperature}: must be above 0")
        if top_k is not None and top_p is not None:
            raise ValueError("top_k and top_p exclude each other")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k {top_k}: must be at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p {top_p}: must be above 0 and at most 1")
        generator = np.random.default_rng(seed)
        going = np.arange(len(self.position.output))
        for _ in range(max_words):
            words = self._draw(going, temperature, top_k, top_p, generator)
            left = words != self.model.end
            going, words = going[left], words[left]
            for number, word in zip(going.tolist(), words.tolist(), strict=True):
                yield number, self.model.vocabulary[word]
            room = ~self.model.network.memory.full(self.position.state)[going]
            going, words = going[room], words[room]
            if not len(going):
                return
            position, _ = self.model.network.read(self.position.select(going), words[:, None])
            self.position = self.position.put(going, position)

    def _draw(
        self,
        texts: np.ndarray,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: np.random.Generator,
    ) -> np.ndarray:
        network, position = self.model.network, self.position.select(texts)
        if top_k is not None:
            found = top_words(network, position, top_k)
            words, scores = (np.stack(parts) for parts in zip(*found, strict=True))
            chosen = draw(scores / temperature, generator)
            return np.asarray(np.take_along_axis(words, chosen[:, None], 1)[:, 0])
        if temperature == 1 and top_p is None:
            return draw_words(network, position, generator)
        weights = every_word(network, position).astype(np.float64) / temperature
        if top_p is not None:
            order = np.argsort(-weights, axis=1, kind="stable")
            ordered = np.take_along_axis(weights, order, 1)
            mass = np.exp(ordered - np.logaddexp.reduce(ordered, axis=1, keepdims=True))
            outside = mass.cumsum(axis=1) - mass >= top_p
            ordered[outside] = -np.inf
            np.put_along_axis(weights, order, ordered, 1)
        return draw(weights, generator)
