"""An exported language model: from its folder to answers, with numpy and onnxruntime alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_lightrnn.runtime.cells import decode_cells
from fairseq_lightrnn.runtime.folder import WORDS, model_digest, read_folder, unpack
from fairseq_lightrnn.runtime.learning import (
    Lesson,
    blocks,
    read_each,
    unknown_words,
    with_words_moved,
)
from fairseq_lightrnn.runtime.learnt import Learnt, load, save
from fairseq_lightrnn.runtime.memory import memory_of
from fairseq_lightrnn.runtime.network import Graphs, Network, OnnxGraphs, Position
from fairseq_lightrnn.runtime.new_words import with_new_words
from fairseq_lightrnn.runtime.score import Score
from fairseq_lightrnn.runtime.seating import Seating
from fairseq_lightrnn.runtime.text import READ_AT_ONCE, Text, TextModel
from fairseq_lightrnn.runtime.vocabulary import Vocabulary

__all__ = ["ExportedModel"]

_PREDICTED_AT_ONCE = 256
# Batches' worth of sentences that are sorted by length together.
_BUFFERED_BATCHES = 8


class ExportedModel(TextModel):
    """A language model that ``lightrnn-export`` wrote; takes what :class:`TextModel` does.

    Attributes:
        learnt: what it has learnt from its user.
    """

    def __init__(
        self, description: dict[str, Any], vocabulary: Vocabulary, network: Network
    ) -> None:
        super().__init__(description, vocabulary, network)
        self._shipped = vocabulary, network
        self._folder: Path | None = None
        self.forget()

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
            model = cls.from_parts(description, files, threads)
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"{folder}: is not a complete export ({type(error).__name__}: {error}); export "
                "the model again"
            ) from None
        model._folder = Path(folder)
        return model

    @classmethod
    def from_parts(
        cls, description: dict[str, Any], files: dict[str, bytes], threads: int = 1
    ) -> ExportedModel:
        """Puts a model together from what its JSON file says and the contents of the others."""
        numbers, arrays = description["model"], unpack(files[WORDS])
        vocabulary = Vocabulary(arrays["shared"], arrays["rest"])
        further = decode_cells(arrays, math.prod(numbers["shape"]))
        read_by = arrays.get("input_cells")
        seating = Seating(numbers["shape"], arrays["cells"], read_by, *further)
        graphs: Graphs
        if description["graphs"] == "torch":
            try:
                from fairseq_lightrnn.runtime.torch_graphs import TorchGraphs
            except ImportError:
                raise ValueError(
                    "the export is one of --format torch, and torch is not installed: "
                    "pip install torch"
                ) from None

            graphs = TorchGraphs(files)
        else:
            graphs = OnnxGraphs(files, threads)
        network = Network(
            graphs, seating, numbers["composition"], memory_of(description), numbers["width"]
        )
        return cls(description, vocabulary, network)

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

        Raises:
            ValueError: if a transformer is to carry a hidden state, or a sentence is longer than
                what it can look back on.
        """
        if carry_hidden_state and not self.network.memory.carries:
            raise ValueError(
                "--carry-hidden-state: this model, a transformer, has no hidden state to carry; "
                "leave it out"
            )
        limit = READ_AT_ONCE * (1 if carry_hidden_state else _BUFFERED_BATCHES)
        position = self.begin(1)
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
                    position, scores = self._score(
                        position, together[None], [len(together)], goes_on=True
                    )
                    ends = np.cumsum([len(ids) for _, ids in group])[:-1]
                    parts = np.split(scores[0], ends)
                else:
                    parts = self._score_apart([ids for _, ids in group])
                for (tokens, ids), part in zip(group, parts, strict=True):
                    yield Score(tokens, ids, part)
                group, words = [], 0

    def _score_apart(self, sentences: list[np.ndarray]) -> list[np.ndarray]:
        results: list[np.ndarray] = [np.zeros((0, self.network.components))] * len(sentences)
        order = sorted(range(len(sentences)), key=lambda number: -len(sentences[number]))
        while order:
            longest = len(sentences[order[0]])
            size = max(1, READ_AT_ONCE // longest)
            batch, order = order[:size], order[size:]
            words = np.full((len(batch), longest), self.end, dtype=np.int64)
            for row, number in zip(words, batch, strict=True):
                row[: len(sentences[number])] = sentences[number]
            lengths = [len(sentences[number]) for number in batch]
            _, scores = self._score(self.begin(len(batch)), words, lengths)
            for number, length, score in zip(batch, lengths, scores, strict=True):
                results[number] = score[:length]
        return results

    def _score(
        self,
        position: Position,
        words: np.ndarray,
        lengths: Sequence[int],
        goes_on: bool = False,
    ) -> tuple[Position, np.ndarray]:
        """Scores words (N, T), of each text so many: (N, T, k).

        The position is that after them where the text goes on.
        """
        texts, longest = words.shape
        result = np.zeros((texts, longest, self.network.components))
        real = np.arange(longest) < np.array(lengths)[:, None]
        step = max(1, READ_AT_ONCE // texts)
        for start in range(0, longest, step):
            block = words[:, start : start + step]
            if goes_on or start + step < longest:
                position, outputs = self.network.read(position, block)
            else:
                outputs = self.network.outputs(position, block)
            text, place = np.nonzero(real[:, start : start + step])
            for first in range(0, len(text), _PREDICTED_AT_ONCE):
                where = text[first : first + _PREDICTED_AT_ONCE]
                at = place[first : first + _PREDICTED_AT_ONCE]
                scores = self.network.score(outputs[where, at], block[where, at])
                result[where, start + at] = scores
        return position, result

    def learn(self, text: str | Iterable[str]) -> Lesson:
        """Learns from a small text that the user wrote, beside what was learnt before.

        Words that the model does not know get empty cells, the most frequent ones first, where the
        text is the most probable. Then the biases of the words that occur, and the numbers of their
        own if the model has them, take a few steps down the gradient of the text's loss. Nothing
        else changes, nor do any files.

        Args:
            text: lines, each a sentence of words between spaces.

        Returns:
            The new words, and those that no empty cell was left for.
        """
        lines = text.removesuffix("\n").split("\n") if isinstance(text, str) else text
        lesson = Lesson([], [])
        for sentences in blocks(lines):
            tokens, words, position = read_each(self, sentences)
            places = unknown_words(self.vocabulary, tokens)
            if places:
                learnt, left = with_new_words(self._shipped[1], self.learnt, places, position)
                lesson.new.extend(learnt.words[len(self.learnt.words) :])
                lesson.left.extend(word for word in left if word not in lesson.left)
                self._take(learnt)
                _, words, position = read_each(self, sentences)
            known = words != self.unknown
            if known.any():
                words, position = words[known], position.select(known)
                self._take(with_words_moved(self.network, self.learnt, words, position))
        return lesson

    def forget(self) -> None:
        """Forgets all that was learnt: the model is the one that was shipped."""
        self.vocabulary, self.network = self._shipped
        self.learnt = Learnt.nothing(self.network.seating.tables, self.network.own_numbers)

    def _take(self, learnt: Learnt) -> None:
        vocabulary, network = self._shipped
        self.learnt = learnt
        self.vocabulary = vocabulary.with_words(learnt.words)
        self.network = network.with_learnt(learnt)

    def save_learnt(self, path: str | Path) -> None:
        """Writes what was learnt into a file of its own.

        Raises:
            ValueError: as :meth:`check_learnt`.
        """
        self.check_learnt(path)
        save(self.learnt, path, model_digest(self.description))

    def check_learnt(self, path: str | Path) -> None:
        """Refuses a file that what was learnt is not to be written to.

        Raises:
            ValueError: if it would be one of the model's folder.
        """
        folder = self._folder
        if folder is not None and Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path}: is in the folder of the model, which stays as it is")

    def load_learnt(self, path: str | Path) -> None:
        """Reads what :meth:`save_learnt` wrote, in place of what was learnt since.

        Raises:
            ValueError: if there is no such file, or it is damaged or belongs to another model.
        """
        self._take(load(path, model_digest(self.description), self.learnt))

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
