"""One training a folder: two would write each other's checkpoints over."""

from __future__ import annotations

import fcntl
import logging
import os

from fairseq_lightrnn.errors import UsageError

__all__ = ["lock_folder"]

logger = logging.getLogger(__name__)

_NAME = ".lock"
# A process has one lock of a folder, and would lose it with the first file of it that it closes.
_open: dict[str, int] = {}


def lock_folder(folder: str) -> None:
    """Keeps other processes from training in a folder as long as this one lives.

    Where the file system knows no locks, or the folder cannot be written to, it does nothing.

    Raises:
        UsageError: another training is at work there.
    """
    path = os.path.realpath(os.path.join(folder, _NAME))
    try:
        os.makedirs(folder, exist_ok=True)
        if path not in _open or not os.path.exists(path):
            _open[path] = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        fcntl.lockf(_open[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"--save-dir {folder}: another training writes there; wait for it to end, or give this "
            "one a folder of its own"
        ) from None
    except OSError as error:
        logger.debug("%s cannot be locked: %s", folder, error)
