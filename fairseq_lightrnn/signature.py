"""A line that says how a figure came about, so that it can be had again.

In the spirit of sacrebleu's signatures: ``key:value`` pairs joined by ``|``.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["signature"]


def signature(fields: Mapping[str, object]) -> str:
    """Joins fields into a signature.

    Raises:
        ValueError: if a value would make the signature ambiguous.
    """
    for key, value in fields.items():
        if any(mark in f"{key}{value}" for mark in ":|\n"):
            raise ValueError(f"{key} {value!r}: a signature's field holds no colon, bar or newline")
    return "|".join(f"{key}:{value}" for key, value in fields.items())
