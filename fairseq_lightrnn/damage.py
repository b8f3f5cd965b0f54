"""Checkpoint files that are not whole: torch loads wrong numbers without a word."""

from __future__ import annotations

import logging
import shutil
import zipfile
from pathlib import Path

from fairseq_lightrnn.files import whole_file

__all__ = ["checkpoint_damage", "put_back_last_checkpoint"]

logger = logging.getLogger(__name__)


def checkpoint_damage(path: str | Path) -> str | None:
    """Tells what is wrong with a checkpoint file, all of which is read, or None."""
    with open(path, "rb") as file:
        start = file.read(2)
    if not start:
        return "is truncated"
    if start != b"PK":  # written by a torch of old
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except zipfile.BadZipFile:
        return "is truncated"
    return None if part is None else f"is damaged: its part {part} does not fit its checksum"


def put_back_last_checkpoint(last: str | Path) -> None:
    """Puts the newest whole checkpoint of a folder in the place of a last one that is not whole.

    fairseq writes one file whole or not at all, and copies it to the others: a training that is
    killed meanwhile leaves a part of a copy.
    """
    last = Path(last)
    damage = checkpoint_damage(last) if last.is_file() else None
    if damage is None:
        return
    others = (path for path in last.parent.glob("checkpoint*.pt") if path != last)
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        if checkpoint_damage(path) is None:
            logger.warning(f"{last}: {damage}; going on from {path.name}, the newest whole one")
            with open(path, "rb") as source, whole_file(last, binary=True) as target:
                shutil.copyfileobj(source, target)
            return
