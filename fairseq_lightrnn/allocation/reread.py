"""A text that a reallocation reads again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.head import ComponentHead

__all__ = ["Remembered", "Text", "scored"]


@dataclass(frozen=True)
class Text:
    """A text that can be read again and again; each worker has batches of its own.

    Attributes:
        outputs: reads what :func:`gather_statistics` takes.
        contexts: reads what :func:`gather_cell_losses` takes.
        check: reads what :func:`measure_loss` takes, of what a new table is measured by.
        device: through which workers exchange tensors.
    """

    outputs: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    contexts: Callable[[], Iterable[tuple[int, Tensor, Context]]]
    check: Callable[[], Iterable[Tensor]]
    device: torch.device | str


def scored(head: ComponentHead, outputs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Yields the log-probabilities (N, k) of words (N,) that hidden outputs (N, k, d) predict."""
    for words, hidden in outputs:
        yield head.softmax(hidden, words)


class Remembered:
    """Contexts that are kept once they have been read, unless they take too much memory.

    Args:
        head: predicts words, which are read by another table than the one that moves.
        contexts: reads what :func:`gather_cell_losses` takes.
        memory: bytes that contexts may take; a text of more is read again each time.
    """

    def __init__(
        self,
        head: ComponentHead,
        contexts: Callable[[], Iterable[tuple[int, Tensor, Context]]],
        memory: float,
    ) -> None:
        self.head = head
        self._contexts = contexts
        self._memory = memory
        self._kept: list[tuple[int, Tensor, Context]] | None = None

    def read(self) -> Iterator[tuple[int, Tensor, Context]]:
        """Yields the same contexts each time, without what only reading on needs."""
        if self._kept is not None:
            yield from self._kept
            return
        kept, left = [], self._memory
        for number, words, context in self._contexts():
            context = self.head.to_extend(context)
            left -= context.num_bytes
            if left >= 0:
                kept.append((number, words, context))
            else:  # too much: the text is read again each time
                kept.clear()
                self._memory = left = -math.inf
            yield number, words, context
        if left >= 0:
            self._kept = kept

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the words (N,) and the hidden outputs (N, k, d) that predict them."""
        for _, words, context in self.read():
            yield words, self.head.hidden_of(context, words)

    def log_probs(self) -> Iterator[Tensor]:
        """Yields the log-probabilities of their components, (N, k), with the table in force."""
        return scored(self.head, self.outputs())
