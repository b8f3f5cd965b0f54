"""Products of queries with the vectors of a group, where queries that share a group share the work.

Of T words that are to be predicted, many lie in the same row of the table. To look up the vectors
of a row for each of them moves far more numbers than it multiplies, forward and backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["grouped_product"]

# Queries that share one look-up of their group. More would save little, and pad small groups.
_BLOCK = 16


def grouped_product(queries: Tensor, groups: Tensor, members: Tensor, vectors: Tensor) -> Tensor:
    """Multiplies each query with the vectors of all members of its group.

    Args:
        queries: of shape (N, e).
        groups: the group of each, integers of shape (N,).
        members: the members of every group, integers of shape (G, S).
        vectors: of the members, shape (V, e).

    Returns:
        Shape (N, S): ``result[n, s] = queries[n] · vectors[members[groups[n], s]]``.
    """
    order = groups.argsort(stable=True)
    sorted_groups = groups[order]
    sizes = groups.new_zeros(len(members)).index_add_(0, groups, torch.ones_like(groups))
    blocks = (sizes + _BLOCK - 1) // _BLOCK
    # Where each query goes: those of a group fill its blocks one after the other.
    rank = torch.arange(len(groups), device=groups.device) - _before(sizes)[sorted_groups]
    slot = torch.empty_like(order)
    slot[order] = _before(blocks)[sorted_groups] * _BLOCK + rank
    numbers = torch.arange(_count(blocks, len(groups)), device=groups.device)
    block_groups = torch.searchsorted(blocks.cumsum(0), numbers, right=True)
    block_groups = block_groups.clamp(max=len(members) - 1)  # where there are blocks to spare
    in_blocks = queries.new_zeros(len(block_groups) * _BLOCK, queries.size(1))
    in_blocks = in_blocks.index_copy(0, slot, queries).unflatten(0, (-1, _BLOCK))
    # (blocks, 16, e) × (blocks, e, S) -> (blocks · 16, S)
    products = torch.bmm(in_blocks, F.embedding(members[block_groups], vectors).transpose(1, 2))
    return products.flatten(0, 1).index_select(0, slot)


def _count(blocks: Tensor, queries: int) -> int:
    """Returns how many blocks there are; on a GPU a bound, since to ask would wait for it."""
    if blocks.device.type == "cpu":
        return int(blocks.sum())
    # Every group that has a query may have one block that is not full.
    return (queries + (_BLOCK - 1) * min(queries, len(blocks))) // _BLOCK


def _before(counts: Tensor) -> Tensor:
    """Returns how many there are before each, given how many there are of each."""
    return counts.cumsum(0) - counts
