"""What the tasks give their models beside fairseq's batches, and text as one long array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from fairseq.data import BaseWrapperDataset

__all__ = ["TargetInputDataset", "consecutive_text"]

_CHUNK = 1 << 20


class TargetInputDataset(BaseWrapperDataset):
    """Gives the model the words to be predicted, whose first components are input too."""

    def collater(self, samples: list[Any], **kwargs: Any) -> dict[str, Any]:
        """Merges samples into a batch whose ``net_input`` has ``target_tokens``.

        A batch without targets, as of a text to be translated, stays as it is.
        """
        batch: dict[str, Any] = self.dataset.collater(samples, **kwargs)
        if batch and batch.get("target") is not None:
            batch["net_input"]["target_tokens"] = batch["target"]
        return batch

    @property
    def src(self) -> Any:
        """The source texts of pairs, whose words take the place of unknown ones."""
        return self.dataset.src

    @property
    def tgt(self) -> Any:
        """The target texts of pairs."""
        return self.dataset.tgt

    def ordered_indices(self) -> np.ndarray:
        """Returns the order of the wrapped dataset."""
        return self.dataset.ordered_indices()


def consecutive_text(sentences: Sequence[Any]) -> Iterator[np.ndarray]:
    """Yields sentences (tensors of word ids), one after the other, as int32 arrays of many words.

    Args:
        sentences: a dataset of fairseq's; one of ``--dataset-impl cached`` is read into memory.
    """
    if getattr(sentences, "supports_prefetch", False):
        sentences.prefetch(range(len(sentences)))  # type: ignore[attr-defined]
    chunk: list[np.ndarray] = []
    size = 0
    for index in range(len(sentences)):
        chunk.append(sentences[index].numpy().astype(np.int32))
        size += len(chunk[-1])
        if size >= _CHUNK or index + 1 == len(sentences):
            yield np.concatenate(chunk)
            chunk, size = [], 0
