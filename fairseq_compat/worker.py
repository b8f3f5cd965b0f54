"""Where a spawned training worker begins.

A fresh interpreter imports this module to find :func:`run`, before it imports anything of fairseq
to find the arguments.  So the finder is installed here on import, for the case that no ``.pth``
file has done it.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import fairseq_compat

__all__ = ["run"]

fairseq_compat.install()


def run(index: int, main: Any, cfg: Any, kwargs: dict[str, Any]) -> None:
    """Runs worker ``index`` of this machine: ``main(cfg)`` after joining the process group."""
    from fairseq.distributed.utils import distributed_main

    # A spawned process spawns in turn.  Its data loaders would so import torch and fairseq anew
    # for every epoch, and leave semaphores behind; let them start as in a process of its own.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    distributed_main(index, main, cfg, kwargs)
