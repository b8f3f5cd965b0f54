"""Checkpoint files that are not whole: torch loads wrong numbers without a word."""

from __future__ import annotations

import logging
import re
import shutil
import zipfile
from pathlib import Path

from fairseq_lightrnn.files import whole_file

__all__ = ["checkpoint_damage", "put_back_last_checkpoint"]

logger = logging.getLogger(__name__)

# Names that fairseq gives the checkpoints of a training; an average, or a model to begin with, has
# another.
_OF_TRAINING = re.compile(r"checkpoint(\d+|_\d+_\d+|_best|\.best_.+)\.pt")


def checkpoint_damage(path: str | Path) -> str | None:
    """Reads a whole checkpoint file and returns what is wrong with it, or None.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(2)
        file.seek(0)
        if start[:1] == b"\x80":  # written by a torch of old, without checksums
            return None
        if start != b"PK":
            return "is damaged" if start else "is truncated"
        try:
            with zipfile.ZipFile(file) as archive:
                part = archive.testzip()
        except zipfile.BadZipFile:
            return "is truncated or damaged"
        except Exception:  # of a damaged directory zipfile raises whatever comes of it
            return "is damaged"
    return None if part is None else f"is damaged: its part {part} does not fit its checksum"


def put_back_last_checkpoint(last: str | Path) -> None:
    """Puts the newest whole checkpoint of a training in the place of a last one that is not whole.

    fairseq writes one file whole or not at all, and copies it to the others: a training that is
    killed meanwhile leaves a part of a copy.
    """
    last = Path(last)
    damage = checkpoint_damage(last) if last.is_file() else None
    if damage is None:
        return
    others = [path for path in last.parent.iterdir() if _OF_TRAINING.fullmatch(path.name)]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        if checkpoint_damage(path) is None:
            logger.warning(f"{last}: {damage}; going on from {path.name}, the newest whole one")
            with open(path, "rb") as source, whole_file(last, binary=True) as target:
                shutil.copyfileobj(source, target)
            return
