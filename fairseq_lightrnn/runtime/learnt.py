"""What a model has learnt on the device, and the file that it is kept in."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from fairseq_lightrnn.files import open_bytes, whole_file

__all__ = ["Learnt", "load", "save"]

_FORMAT = "fairseq_lightrnn learnt 1"


@dataclass(frozen=True)
class Learnt:
    """What a model has learnt from what its user wrote.

    Attributes:
        words: N new words, numbered behind the model's own as they come.
        cells: of these, integers of shape (T, N); see :meth:`Seating.empty`.
        biases: that these were seated with, (N,).
        moved: the numbers of C words, new ones among them, that were moved since, in their order.
        added: to the biases of those, (C,).
        numbers: added to the numbers that they have of their own, (C, e); e is 0 if they have none.
    """

    words: tuple[str, ...]
    cells: np.ndarray
    biases: np.ndarray
    moved: np.ndarray
    added: np.ndarray
    numbers: np.ndarray

    @classmethod
    def nothing(cls, tables: int, size: int) -> Learnt:
        """Returns what a model has learnt at first.

        Args:
            tables: that a word has a cell in, T.
            size: e.
        """
        return cls(
            (),
            np.zeros((tables, 0), dtype=np.int64),
            np.zeros(0, dtype=np.float32),
            np.zeros(0, dtype=np.int64),
            np.zeros(0, dtype=np.float32),
            np.zeros((0, size), dtype=np.float32),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays by their names."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "words"}

    def digest(self) -> str:
        """Returns what tells this from all else that may be learnt, 12 hexadecimal digits."""
        content = hashlib.sha256("\n".join(self.words).encode("utf-8", "surrogateescape"))
        for array in self.arrays().values():
            content.update(array.tobytes())
        return content.hexdigest()[:12]


def save(learnt: Learnt, path: str | Path, model: str) -> None:
    """Writes what a model has learnt.

    Args:
        learnt: that is to be written.
        path: of the file; it appears whole or not at all.
        model: the SHA-256 of the model.
    """
    text = "\n".join((_FORMAT, model, *learnt.words)).encode("utf-8", "surrogateescape")
    content = io.BytesIO()
    arrays = {"text": np.frombuffer(text, dtype=np.uint8), **learnt.arrays()}
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    with whole_file(path, binary=True) as file:
        file.write(content.getvalue())


def load(path: str | Path, model: str, like: Learnt) -> Learnt:
    """Reads what :func:`save` wrote.

    Args:
        path: of the file.
        model: the SHA-256 of the model.
        like: what the model has learnt at first.

    Raises:
        ValueError: if there is no such file, or it is damaged or belongs to another model.
    """
    with open_bytes(path, "file of what a model has learnt") as file:
        content = file.read()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            text = stored["text"].tobytes().decode("utf-8", "surrogateescape")
            form, owner, *words = text.split("\n")
            arrays = {name: stored[name] for name in like.arrays()}
        good = form == _FORMAT and arrays["cells"].shape[1] == len(words)
    except (ValueError, LookupError, TypeError, EOFError, OSError, zipfile.BadZipFile):
        good = False
    if not good:
        raise ValueError(f"{path}: is damaged, or not what a model has learnt")
    if owner != model:
        raise ValueError(f"{path}: belongs to another model, whose words have other numbers")
    return Learnt(tuple(words), **arrays)
