"""Which words a model was trained with, so that it is not used with others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lightrnn.errors import LoadError

__all__ = ["Vocabulary", "vocabulary_digest"]


def vocabulary_digest(symbols: Sequence[str]) -> int:
    """Returns a number of 48 bits that tells vocabularies apart, the order of their words too."""
    content = "\n".join(symbols).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big")


class Vocabulary(nn.Module):
    """Knows a vocabulary by its digest, and refuses the parameters of a model of another one.

    Parameters that come without a digest are taken to be of this one.

    Args:
        dictionary: of fairseq.

    Attributes:
        digest: int64 scalar buffer, see :func:`vocabulary_digest`. 48 bits, so that fairseq's
            average of checkpoints does not overflow.
    """

    digest: Tensor

    def __init__(self, dictionary: Any) -> None:
        super().__init__()
        self.register_buffer("digest", torch.tensor(vocabulary_digest(dictionary.symbols)))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *more: Any) -> None:
        name = f"{prefix}digest"
        here, there = int(self.digest), int(state.setdefault(name, self.digest))
        if here != there:
            raise LoadError(
                f"the dictionary has the digest {here:012x}, that of the model's training had "
                f"{there:012x}: it has other words, or the same in another order; give the data "
                "that the model was trained on, or text binarised with its dict.txt (--srcdict)"
            )
        super()._load_from_state_dict(state, prefix, *more)
