"""An exported language model: from its folder to answers, with numpy and onnxruntime alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_lightrnn.runtime.cells import decode_cells
from fairseq_lightrnn.runtime.folder import WORDS, read_folder, unpack
from fairseq_lightrnn.runtime.network import Graphs, Network, OnnxGraphs, Position, Seating
from fairseq_lightrnn.runtime.search import draw, draw_words, every_word, top_words
from fairseq_lightrnn.runtime.vocabulary import Vocabulary

__all__ = ["ExportedModel", "Score", "Text"]

# Words that are read at once, and words that are predicted at once.
_READ_AT_ONCE = 2048
_PREDICTED_AT_ONCE = 256
# Batches' worth of sentences that are sorted by length together.
_BUFFERED_BATCHES = 8


@dataclass(frozen=True)
class Score:
    """The score of a sentence of n words, the end of sentence among them.

    Attributes:
        tokens: the words as they were written, n of them.
        ids: their numbers in the exported vocabulary, (n,); that of the unknown word for others.
        component_log_probs: in nats, (n, k), of each coordinate given those before it.
    """

    tokens: list[str]
    ids: np.ndarray
    component_log_probs: np.ndarray

    @property
    def log_probs(self) -> np.ndarray:
        """The words' log-probabilities in nats, (n,)."""
        return np.asarray(self.component_log_probs.sum(axis=1))

    @property
    def log_prob(self) -> float:
        """The sentence's log-probability in nats."""
        return float(self.component_log_probs.sum())

    @property
    def perplexity(self) -> float:
        """The sentence's perplexity per word, its end counted as a word."""
        return math.exp(-self.log_prob / len(self.tokens))


class ExportedModel:
    """A language model that ``lightrnn-export`` wrote.

    Args:
        description: what its JSON file says.
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

    @classmethod
    def load(cls, folder: str | Path, threads: int = 1) -> ExportedModel:
        """Reads and checks an exported model.

        Args:
            folder: that ``lightrnn-export`` wrote.
            threads: of the processor, at most.

        Raises:
            ValueError: if a file of it is missing, damaged or of another export; it is named.
        """
        description, files = read_folder(folder)
        try:
            return cls.from_parts(description, files, threads)
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"{folder}: is not a complete export ({type(error).__name__}: {error}); export "
                "the model again"
            ) from None

    @classmethod
    def from_parts(
        cls, description: dict[str, Any], files: dict[str, bytes], threads: int = 1
    ) -> ExportedModel:
        """Puts a model together from what its JSON file says and the contents of the others."""
        numbers, arrays = description["model"], unpack(files[WORDS])
        vocabulary = Vocabulary(arrays["shared"], arrays["rest"])
        seating = Seating(
            numbers["shape"],
            arrays["cells"],
            arrays.get("input_cells"),
            decode_cells(arrays, math.prod(numbers["shape"])),
        )
        graphs: Graphs
        if description["graphs"] == "torch":
            from fairseq_lightrnn.runtime.torch_graphs import TorchGraphs

            graphs = TorchGraphs(files)
        else:
            graphs = OnnxGraphs(files, threads)
        network = Network(
            graphs, seating, numbers["composition"], numbers["layers"], numbers["width"]
        )
        return cls(description, vocabulary, network)

    def encode(self, text: str) -> tuple[list[str], np.ndarray]:
        """Returns the words of a text and their numbers, without an end of sentence."""
        tokens = text.split()
        numbers = (self.vocabulary.find(token) for token in tokens)
        ids = [self.unknown if number is None else number for number in numbers]
        return tokens, np.array(ids, dtype=np.int64)

    def score(self, text: str | Sequence[str], *, carry_hidden_state: bool = False) -> Any:
        """Scores a sentence, or several.

        Args:
            text: words between spaces; the end of sentence is added.
            carry_hidden_state: of several sentences, predict each from all before it.

        Returns:
            A :class:`Score`, or a list of them if a list was given.
        """
        sentences = [text] if isinstance(text, str) else text
        scores = list(self.score_lines(sentences, carry_hidden_state=carry_hidden_state))
        return scores[0] if isinstance(text, str) else scores

    def score_lines(
        self, lines: Iterable[str | None], *, carry_hidden_state: bool = False
    ) -> Iterator[Score]:
        """Scores any number of sentences in bounded memory; see :meth:`score`.

        None among the lines asks for the scores of all before it, of a text whose next line may be
        long in coming.
        """
        limit = _READ_AT_ONCE * (1 if carry_hidden_state else _BUFFERED_BATCHES)
        position = self._begin(1)
        group: list[tuple[list[str], np.ndarray]] = []
        words = 0
        for line in (*lines, None) if isinstance(lines, Sequence) else _and_none(lines):
            if line is not None:
                tokens, ids = self.encode(line)
                group.append(([*tokens, self.vocabulary[self.end]], np.append(ids, self.end)))
                words += len(ids) + 1
            if group and (line is None or words >= limit):
                if carry_hidden_state:
                    together = np.concatenate([ids for _, ids in group])
                    position, scores = self._score(position, together[None], [len(together)])
                    ends = np.cumsum([len(ids) for _, ids in group])[:-1]
                    parts = np.split(scores[0], ends)
                else:
                    parts = self._score_apart([ids for _, ids in group])
                for (tokens, ids), part in zip(group, parts, strict=True):
                    yield Score(tokens, ids, part)
                group, words = [], 0

    def _begin(self, texts: int) -> Position:
        """Returns where texts are after the words that all texts begin with."""
        start = np.repeat(self._start[None], texts, axis=0)
        return self.network.read(self.network.begin(texts), start)[0]

    def _score_apart(self, sentences: list[np.ndarray]) -> list[np.ndarray]:
        results: list[np.ndarray] = [np.zeros((0, self.network.components))] * len(sentences)
        order = sorted(range(len(sentences)), key=lambda number: -len(sentences[number]))
        while order:
            longest = len(sentences[order[0]])
            size = max(1, _READ_AT_ONCE // longest)
            batch, order = order[:size], order[size:]
            words = np.full((len(batch), longest), self.end, dtype=np.int64)
            for row, number in zip(words, batch, strict=True):
                row[: len(sentences[number])] = sentences[number]
            lengths = [len(sentences[number]) for number in batch]
            _, scores = self._score(self._begin(len(batch)), words, lengths)
            for number, length, score in zip(batch, lengths, scores, strict=True):
                results[number] = score[:length]
        return results

    def _score(
        self, position: Position, words: np.ndarray, lengths: Sequence[int]
    ) -> tuple[Position, np.ndarray]:
        """Scores words (N, T), of each text so many: (N, T, k)."""
        texts, longest = words.shape
        result = np.zeros((texts, longest, self.network.components))
        real = np.arange(longest) < np.array(lengths)[:, None]
        step = max(1, _READ_AT_ONCE // texts)
        for start in range(0, longest, step):
            block = words[:, start : start + step]
            position, outputs = self.network.read(position, block)
            text, place = np.nonzero(real[:, start : start + step])
            for first in range(0, len(text), _PREDICTED_AT_ONCE):
                where = text[first : first + _PREDICTED_AT_ONCE]
                at = place[first : first + _PREDICTED_AT_ONCE]
                scores = self.network.score(outputs[where, at], block[where, at])
                result[where, start + at] = scores
        return position, result

    def text(self, prefix: str | Sequence[str] = "") -> Text:
        """Returns a text, or several, that can be asked for its next words and grow by them."""
        return Text(self, [prefix] if isinstance(prefix, str) else prefix)

    def next_words(self, prefix: str | Sequence[str] = "", k: int = 10) -> list[Any]:
        """Returns the k most probable next words with their probabilities, exactly.

        Args:
            prefix: what comes before, from the beginning of a sentence; or several of these.
            k: how many words.

        Returns:
            Pairs of a word and its probability; a list of such lists if several were given.
        """
        found = self.text(prefix).next_words(k)
        return found[0] if isinstance(prefix, str) else found

    def complete(self, text: str, k: int = 10) -> list[tuple[str, float]]:
        """Completes the last, half-typed word of a text.

        Args:
            text: up to where the typing is; after a space, any next word.
            k: how many words.

        Returns:
            The k most probable words that begin so, or all if they are fewer, with their
            probabilities as next words.
        """
        typed = "" if not text or text[-1].isspace() else text.split()[-1]
        return self.text(text[: len(text) - len(typed)]).complete(typed, k)[0]

    def sample(
        self,
        prefix: str = "",
        *,
        max_words: int = 50,
        count: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """Continues a text at random; see ``LanguageModel.sample`` for the arguments.

        Returns:
            The texts, prefix included, without the end of sentence.
        """
        if count < 1:
            raise ValueError(f"count {count}: at least 1 text must be asked for")
        texts = [prefix.split() for _ in range(count)]
        words = self.text([prefix] * count).draws(
            max_words, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        for number, word in words:
            texts[number].append(word)
        return [" ".join(text) for text in texts]


def _and_none(lines: Iterable[str | None]) -> Iterator[str | None]:
    yield from lines
    yield None


class Text:
    """Some texts that grow word by word.

    Args:
        model: predicts their next words.
        prefixes: what there is of each, from the beginning of a sentence.

    Attributes:
        position: where they are: hidden states to be kept, or put back.
    """

    def __init__(self, model: ExportedModel, prefixes: Sequence[str]) -> None:
        if not prefixes:
            raise ValueError("no text was given")
        self.model = model
        self.position = model._begin(len(prefixes))
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
        parts = [part.copy() for part in self.position]
        lengths = np.array([len(one) for one in words])
        longest = int(lengths.max())
        padded = np.zeros((len(words), longest), dtype=np.int64)
        for row, one in zip(padded, words, strict=True):
            row[: len(one)] = one
        done = 0
        for length in np.unique(lengths[lengths > 0]).tolist():
            active = np.flatnonzero(lengths >= length)
            position = Position(*(part[active] for part in parts))
            step = max(1, _READ_AT_ONCE // len(active))
            for start in range(done, length, step):
                block = padded[active, start : min(start + step, length)]
                position, _ = self.model.network.read(position, block)
            for part, new in zip(parts, position, strict=True):
                part[active] = new
            done = length
        self.position = Position(*parts)

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
            if not len(going):
                return
            position, _ = self.model.network.read(self.position.select(going), words[:, None])
            for part, new in zip(self.position, position, strict=True):
                part[going] = new

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
