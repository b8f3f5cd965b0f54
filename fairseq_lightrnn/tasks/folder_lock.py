"""One training a folder: two would write each other's checkpoints over."""

from __future__ import annotations

import fcntl
import logging
import os
import weakref

from fairseq_lightrnn.errors import UsageError

__all__ = ["lock_folder"]

logger = logging.getLogger(__name__)

_NAME = ".lock"


def lock_folder(folder: str, owner: object) -> None:
    """Keeps other processes from training in a folder while an object and this process live.

    Where the file system knows no locks, it does nothing.

    Raises:
        UsageError: another training is at work there.
    """
    os.makedirs(folder, exist_ok=True)
    file = os.open(os.path.join(folder, _NAME), os.O_WRONLY | os.O_CREAT)
    weakref.finalize(owner, os.close, file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UsageError(
            f"--save-dir {folder}: another training writes there; wait for it to end, or give this "
            "one a folder of its own"
        ) from None
    except OSError as error:
        logger.debug("%s cannot be locked: %s", folder, error)
