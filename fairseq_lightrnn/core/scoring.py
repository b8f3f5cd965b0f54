"""Log-probabilities of the words of given texts, in bounded memory.

Sentences are scored in batches of similar length, or, with the hidden state carried from each to
the next, as one consecutive text. Neither builds a tensor as wide as the vocabulary, and a long
sentence is read piece by piece, so memory depends on neither vocabulary nor length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.decoder import Decoded
from fairseq_lightrnn.core.distribution import next_word_entropy_and_rank
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.search import require_numbers
from fairseq_lightrnn.perplexity import perplexity

__all__ = ["DEFAULT_BATCH_WORDS", "CorpusScore", "Scorer", "TextDecoder", "WordScores"]

DEFAULT_BATCH_WORDS = 2048
# Batches' worth of sentences that are sorted by length together.
_BUFFERED_BATCHES = 32


class TextDecoder(Protocol):
    """What a language model is to its scorer; a recurrent ``Decoder`` is one.

    Attributes:
        head: predicts words.
        carries_state: whether a text can be read in pieces, each from the state after the one
            before.
        most_words: how many words of a text, its beginning included, it can read; None for any
            number.
    """

    head: ComponentHead
    carries_state: bool
    most_words: int | None

    def __call__(self, words: Tensor, state: Any = None) -> Decoded:
        """Predicts each word of consecutive text, (B, T+1), but the first."""

    def read(self, words: Tensor, context: Context | None = None) -> Context:
        """Reads words (B, T) that follow a context."""


class WordScores(NamedTuple):
    """The scores of the n words of a sentence.

    Attributes:
        log_probs: in nats, float64 of shape (n, k): of each coordinate given all before it. A
            word's is their sum.
        entropy: of the distribution that each word was predicted from, in nats, shape (n,); None
            where it was not asked for.
        rank: of each word in that distribution, from 1; None where it was not asked for.
    """

    log_probs: np.ndarray
    entropy: np.ndarray | None = None
    rank: np.ndarray | None = None

    def part(self, text: int, start: int, end: int) -> WordScores:
        """Of a batch's scores, (B, T, …), returns those of some words of a text."""
        log_probs = self.log_probs[text, start:end]
        if self.entropy is None or self.rank is None:
            return WordScores(log_probs)
        return WordScores(log_probs, self.entropy[text, start:end], self.rank[text, start:end])


class Scorer:
    """Scores sentences with a trained model.

    Args:
        decoder: reads and predicts words; in evaluation mode.
        start: the word, or words, that the first word of a text is predicted from (an end of
            sentence, with fairseq's language models).
        batch_words: words, with padding, that are scored at once. Results do not depend on it.
        details: compute entropies and ranks too. They cost a pass over the vocabulary for each
            word.

    Raises:
        ValueError: if ``batch_words`` is below 1.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        start: int | Sequence[int],
        *,
        batch_words: int = DEFAULT_BATCH_WORDS,
        details: bool = False,
    ) -> None:
        if batch_words < 1:
            raise ValueError(f"batch_words {batch_words}: must be at least 1")
        self.decoder = decoder
        self.start = np.atleast_1d(np.array(start, dtype=np.int64))
        self.batch_words = batch_words
        self.details = details

    def score(
        self, sentences: Iterable[Sequence[int] | np.ndarray | None], carried: bool = False
    ) -> Iterator[WordScores]:
        """Scores sentences in their order.

        Raises:
            ValueError: if sentences are to be carried on by a decoder that carries no state.

        Args:
            sentences: word ids of each, the end of sentence among them where it is to be scored.
                None asks for the scores of all sentences before it, without a further one.
            carried: let each sentence be predicted from all that came before it; otherwise each
                starts afresh.
        """
        if carried and not self.decoder.carries_state:
            raise ValueError("this model carries no hidden state from sentence to sentence")
        arrays = (
            None if sentence is None else np.asarray(sentence, dtype=np.int64)
            for sentence in sentences
        )
        return self._consecutive(arrays) if carried else self._independent(arrays)

    def _independent(self, sentences: Iterator[np.ndarray | None]) -> Iterator[WordScores]:
        for group in _groups(sentences, self.batch_words * _BUFFERED_BATCHES):
            results: list[WordScores] = [_NO_WORDS] * len(group)
            for indices in _batches([len(sentence) for sentence in group], self.batch_words):
                batch = self._batch([group[index] for index in indices])
                for index, scores in zip(indices, batch, strict=True):
                    results[index] = scores
            yield from results

    def _batch(self, sentences: list[np.ndarray]) -> list[WordScores]:
        """Scores sentences, the longest first; a single one may be of any length."""
        first = len(self.start) - 1  # of the start itself, all words but the first are predicted
        ends = [first + len(sentence) for sentence in sentences]
        words = np.full((len(sentences), ends[0] + 1), self.start[-1])
        words[:, : len(self.start)] = self.start
        for row, sentence, end in zip(words, sentences, ends, strict=True):
            row[len(self.start) : end + 1] = sentence
        reader = _Reader(self)
        scores = reader.score(torch.from_numpy(words), ends)
        return [scores.part(row, first, end) for row, end in enumerate(ends)]

    def _consecutive(self, sentences: Iterator[np.ndarray | None]) -> Iterator[WordScores]:
        reader, last = _Reader(self), self.start
        for group in _groups(sentences, self.batch_words):
            words = np.concatenate([last, *group])
            pieces = [len(sentence) for sentence in group]
            ends = len(last) - 1 + np.cumsum(pieces)
            last = words[-1:]
            scores = reader.score(torch.from_numpy(words[None]), [len(words) - 1])
            for start, end in zip(ends - pieces, ends, strict=True):
                yield scores.part(0, start, end)


class _Reader:
    """Reads consecutive blocks of the same texts, and remembers where it is."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.device = scorer.decoder.head.table.cells.device
        self.state: Any = None
        self.context: Context | None = None

    @torch.no_grad()
    def score(self, words: Tensor, lengths: Sequence[int]) -> WordScores:
        """Scores all words of (B, T+1) but the first; the results have shapes (B, T, …)."""
        batch, width = words.shape[0], words.shape[1] - 1
        components = self.scorer.decoder.head.table.num_components
        result = WordScores(
            np.zeros((batch, width, components)),
            np.zeros((batch, width)) if self.scorer.details else None,
            np.zeros((batch, width), dtype=np.int64) if self.scorer.details else None,
        )
        step = max(
            1, self.scorer.batch_words // batch if self.scorer.decoder.carries_state else width
        )
        for start in range(0, width, step):
            block = words[:, start : start + step + 1].to(self.device)
            part = slice(start, start + block.size(1) - 1)
            result.log_probs[:, part] = self._log_probs(block).cpu().numpy()
            if result.entropy is not None and result.rank is not None:
                entropy, rank = self._details(block, np.array(lengths) - start)
                result.entropy[:, part] = entropy.cpu().numpy()
                result.rank[:, part] = rank.cpu().numpy()
        return result

    def _log_probs(self, words: Tensor) -> Tensor:
        hidden, self.state, *_ = self.scorer.decoder(words, self.state)
        softmax = self.scorer.decoder.head.softmax
        scores: Tensor = softmax(hidden.flatten(0, 1), words[:, 1:].flatten())
        require_numbers(scores)
        return scores.reshape(*hidden.shape[:2], -1).double()

    def _details(self, words: Tensor, left: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns entropies and ranks; ``left`` tells how many words of each text there are."""
        decoder = self.scorer.decoder
        shape = (words.size(0), words.size(1) - 1)
        entropy = torch.zeros(shape, dtype=torch.float64, device=self.device)
        rank = torch.zeros(shape, dtype=torch.long, device=self.device)
        for step in range(shape[1]):
            self.context = decoder.read(words[:, step : step + 1], self.context)
            # Texts that have ended are still read, but what follows them is not computed.
            active = torch.from_numpy(np.flatnonzero(left > step)).to(self.device)
            found = next_word_entropy_and_rank(
                decoder.head, self.context.select(active), words[active, step + 1]
            )
            entropy[active, step], rank[active, step] = found
        return entropy, rank


_NO_WORDS = WordScores(np.zeros((0, 0)))


def _groups(sentences: Iterator[np.ndarray | None], words: int) -> Iterator[list[np.ndarray]]:
    """Yields sentences in groups of about so many words; None ends a group."""
    group: list[np.ndarray] = []
    size = 0
    for sentence in sentences:
        if sentence is not None:
            group.append(sentence)
            size += len(sentence) + 1
        if size >= words or (sentence is None and group):
            yield group
            group, size = [], 0
    if group:
        yield group


def _batches(lengths: list[int], words: int) -> Iterator[list[int]]:
    """Yields the indices of sentences that make a batch of so many words, padding included.

    The longest sentence of a batch comes first. Empty sentences are left out.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] == 0:
            continue
        if batch and (len(batch) + 1) * lengths[batch[0]] > words:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass
class CorpusScore:
    """Adds up the scores of sentences.

    Args:
        unk: id of the unknown word.
        eos: id of the end of sentence.
        count_eos: whether the end of sentence is among the words scored.

    Attributes:
        sentences: how many.
        words: how many words were counted, unknown ones and, if asked for, ends of sentences too.
        unknown: how many of them are unknown.
        log_prob: of all words counted, in nats.
        unknown_log_prob: of the unknown ones, in nats.
        components: of all words counted, in nats, by component.
    """

    unk: int
    eos: int
    count_eos: bool = True
    sentences: int = 0
    words: int = 0
    unknown: int = 0
    log_prob: float = 0.0
    unknown_log_prob: float = 0.0
    components: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def add(self, words: np.ndarray, log_probs: np.ndarray) -> None:
        """Counts a sentence.

        Args:
            words: ids of shape (n,).
            log_probs: in nats, shape (n, k).
        """
        self.sentences += 1
        if not len(words):
            return
        counted = np.ones(len(words), dtype=bool) if self.count_eos else words != self.eos
        unknown = words == self.unk
        self.words += int(counted.sum())
        self.unknown += int(unknown.sum())
        by_component = log_probs[counted].sum(axis=0)
        self.components = self.components + by_component
        self.log_prob += float(by_component.sum())
        self.unknown_log_prob += float(log_probs[unknown].sum())

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the words counted; None of no words."""
        return perplexity(self.log_prob, self.words)

    @property
    def perplexity_without_unknown(self) -> float | None:
        """Perplexity of the words counted but for the unknown ones; None of no words."""
        return perplexity(self.log_prob - self.unknown_log_prob, self.words - self.unknown)

    @property
    def component_perplexities(self) -> list[float | None]:
        """The factors whose product is the perplexity, one for each component."""
        return [perplexity(float(part), self.words) for part in self.components]
