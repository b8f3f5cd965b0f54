"""Learns on the device from a small text: gradient steps on what its words have of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fairseq_lightrnn.runtime.learnt import Learnt
from fairseq_lightrnn.runtime.network import Network, Position
from fairseq_lightrnn.runtime.text import READ_AT_ONCE, TextModel
from fairseq_lightrnn.runtime.vocabulary import Vocabulary

__all__ = ["Lesson", "Rows", "blocks", "read_each", "unknown_words", "with_words_moved"]

# Of gradient descent on the summed loss of the text.
_STEPS = 5
# Counts that each word is held by to what it has been.
_HOLD = 1.0
# What is added to a word's bias lies within ± this, and what its own numbers add about as well.
_MOST = 3.0


class Lesson(NamedTuple):
    """What became of the words of a text that a model did not know.

    Attributes:
        new: that it knows now.
        left: that no empty cell was left for.
    """

    new: list[str]
    left: list[str]


def blocks(lines: Iterable[str]) -> Iterator[list[list[str]]]:
    """Yields the words of lines, as many lines at a time as are learnt from at once."""
    block: list[list[str]] = []
    for line in lines:
        block.append(line.split())
        if sum(map(len, block)) + len(block) >= READ_AT_ONCE:
            yield block
            block = []
    if block:
        yield block


def read_each(
    model: TextModel, sentences: Sequence[Sequence[str]]
) -> tuple[list[str], np.ndarray, Position]:
    """Reads sentences word by word, as the model was trained to: each afresh, or these as one
    text.

    Returns:
        Their n words, ends of sentences included; the words' numbers, (n,); and where each of them
        is predicted.
    """
    tokens: list[str] = []
    numbers: list[int] = []
    positions: list[Position] = []
    position = start = model.begin(1)
    last: int | None = None  # is read where a word comes after it
    for sentence in sentences:
        if not model.carry_hidden_state:
            position, last = start, None
        ids = [*model.encode(" ".join(sentence))[1].tolist(), model.end]
        for number in ids:
            if last is not None:
                position, _ = model.network.read(position, np.array([[last]]))
            positions.append(model.network.to_predict(position))
            last = number
        tokens += [*sentence, model.vocabulary[model.end]]
        numbers += ids
    every = Position(
        np.concatenate([one.output for one in positions]),
        {
            name: np.concatenate([one.state[name] for one in positions])
            for name in positions[0].state
        },
    )
    return tokens, np.array(numbers, dtype=np.int64), every


def unknown_words(vocabulary: Vocabulary, tokens: Sequence[str]) -> dict[str, list[int]]:
    """Returns where words stand that are not in a vocabulary, the most frequent ones first."""
    places: dict[str, list[int]] = {}
    for place, token in enumerate(tokens):
        if vocabulary.find(token) is None:
            places.setdefault(token, []).append(place)
    return dict(sorted(places.items(), key=lambda item: -len(item[1])))


class Rows:
    """The last components of n words, each predicted among the words of its row.

    Args:
        log_probs: of the columns of each one's row, (n, C).
        members: the words in these, (n, C), -1 where there is none.
        words: that stand there, (n,).
        queries: what own numbers are multiplied with, (n, e).
        taught: U words, in their order, to whose logits something is added; all that stand there
            are among them.
    """

    def __init__(
        self,
        log_probs: np.ndarray,
        members: np.ndarray,
        words: np.ndarray,
        queries: np.ndarray,
        taught: np.ndarray,
    ) -> None:
        self._log_probs = log_probs.astype(np.float64)
        place = np.searchsorted(taught, members).clip(max=len(taught) - 1)
        self._row, self._column = np.nonzero(taught[place] == members)
        self._which = place[self._row, self._column]
        self._observed = members[self._row, self._column] == words[self._row]
        self._queries = queries[self._row].astype(np.float64)
        self._size = len(taught)

    def gradient(
        self, biases: np.ndarray, numbers: np.ndarray
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Returns the loss with something added, and its gradient: expected less observed counts.

        Args:
            biases: added to those of the taught words, (U,).
            numbers: added to their own numbers, (U, e).

        Returns:
            The summed loss in nats; its gradients by biases and by numbers.
        """
        logits = self._log_probs.copy()
        of_numbers = (numbers[self._which] * self._queries).sum(axis=1)
        logits[self._row, self._column] += biases[self._which] + of_numbers
        totals = np.logaddexp.reduce(logits, axis=1)
        log_probs = logits[self._row, self._column] - totals[self._row]
        error = np.exp(log_probs) - self._observed
        by_numbers = np.zeros(numbers.shape)
        np.add.at(by_numbers, self._which, error[:, None] * self._queries)
        by_biases = np.bincount(self._which, error, self._size)
        return -float(log_probs[self._observed].sum()), by_biases, by_numbers


def with_words_moved(
    network: Network, learnt: Learnt, words: np.ndarray, position: Position
) -> Learnt:
    """Moves the biases, and the numbers of their own, of the words of a text.

    Args:
        network: with what was learnt so far.
        learnt: so far.
        words: of the text, (n,), n > 0.
        position: where each is predicted.
    """
    coordinates, every = network.seating.coordinates[words], np.arange(len(words))
    context = network.first(position)
    for component in range(1, network.components):
        context = network.extend(context.carried, every, coordinates[:, :component])
    members = network.seating.words[network.seating.number(coordinates[:, :-1])]
    queries = context.carried.get("query") if learnt.numbers.shape[1] else None
    queries = np.zeros((len(words), 0)) if queries is None else queries
    taught = np.unique(words)
    rows = Rows(context.log_probs, members, words, queries, taught)
    moved = np.union1d(learnt.moved, taught)
    before, now = np.searchsorted(moved, learnt.moved), np.searchsorted(moved, taught)
    biases, numbers = np.zeros(len(moved)), np.zeros((len(moved), queries.shape[1]))
    biases[before], numbers[before] = learnt.added, learnt.numbers
    first, first_numbers = biases[now], numbers[now]
    # As large as a query is, numbers are to move a logit about as far as a bias does.
    square = max(float((queries.astype(np.float64) ** 2).sum(axis=1).mean()), 1e-6)
    bound = _MOST / square**0.5
    counts = np.bincount(np.searchsorted(taught, words), minlength=len(taught))
    for _ in range(_STEPS):
        change, of_numbers = biases[now] - first, numbers[now] - first_numbers
        _, by_biases, by_numbers = rows.gradient(change, of_numbers)
        # No less than the curvature: the more often a word is expected, the shorter the step.
        curvature = by_biases + counts + _HOLD
        by_biases += _HOLD * change
        by_numbers = by_numbers / square + _HOLD * of_numbers
        biases[now] = (biases[now] - by_biases / curvature).clip(-_MOST, _MOST)
        numbers[now] = (numbers[now] - by_numbers / curvature[:, None]).clip(-bound, bound)
    return replace(
        learnt, moved=moved, added=biases.astype(np.float32), numbers=numbers.astype(np.float32)
    )
