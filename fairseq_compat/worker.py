"""Where a spawned training worker begins.

A fresh interpreter imports this module to find :func:`run`, before it imports anything of fairseq
to find the arguments.  So the finder is installed here on import, for the case that no ``.pth``
file has done it.
"""

from __future__ import annotations

from typing import Any

import fairseq_compat

__all__ = ["run"]

fairseq_compat.install()


def run(index: int, main: Any, cfg: Any, kwargs: dict[str, Any]) -> None:
    """Runs worker ``index`` of this machine: ``main(cfg)`` after joining the process group."""
    from fairseq.distributed.utils import distributed_main

    distributed_main(index, main, cfg, kwargs)
