"""Starts the commands that need fairseq, or says in one sentence that it is missing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from fairseq_compat.fixes import wait_briefly
from fairseq_lightrnn.errors import UsageError

__all__ = ["export", "extend", "flags", "reallocate", "require_fairseq", "rescore", "score"]


def require_fairseq(name: str) -> None:
    """Ends a command in a sentence where fairseq is missing.

    Args:
        name: of the command, without ``lightrnn-``.
    """
    if find_spec("fairseq") is None:
        raise UsageError(
            f"lightrnn-{name}: fairseq is not installed: pip install '.[fairseq]' in the plugin's "
            "checkout, then pip install --no-deps fairseq==0.12.2"
        )


def _starter(name: str) -> Callable[[], int]:
    def start() -> int:
        require_fairseq(name)
        wait_briefly()
        status: int = import_module(f"fairseq_lightrnn.commands.{name}").main()
        return status

    return start


export = _starter("export")
extend = _starter("extend")
flags = _starter("flags")
reallocate = _starter("reallocate")
rescore = _starter("rescore")
score = _starter("score")
