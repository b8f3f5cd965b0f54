"""Products of queries with sums of vectors: those of all places that a word has.

The products of queries with the vectors of all places, the indices that gather them and the
gradients of both are many times as large as what comes of them. A few queries at a time they stay
in the processor's cache, and nothing of them is kept for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["summed_product"]

# Products that are computed at once on a CPU, but for at least so many queries.
_AT_ONCE = 1 << 19
_LEAST = 64


def summed_product(
    queries: Tensor,
    rows: Tensor,
    places: Sequence[Tensor],
    vectors: Tensor,
    sizes: Sequence[int],
) -> Tensor:
    """Multiplies each query with the sum of vectors of every word of its row.

    Args:
        queries: shape (N, e).
        rows: the row of each, integers of shape (N,).
        places: of each of several groups of vectors, which one each word of each row has: integers
            of shape (R, C).
        vectors: of all groups, shape (Σ sizes, e).
        sizes: how many vectors each group has.

    Returns:
        Shape (N, C): ``result[n, c] = queries[n] · Σ_g vectors_g[places[g][rows[n], c]]``, of the
        type of the queries. It can be differentiated once.
    """
    found: Tensor = _SummedProduct.apply(queries, vectors, rows, tuple(sizes), *places)
    return found


class _SummedProduct(torch.autograd.Function):
    """See :func:`summed_product`."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        vectors: Tensor,
        rows: Tensor,
        sizes: tuple[int, ...],
        *places: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(queries, vectors, rows, *places)
        ctx.sizes = sizes
        found = queries.new_empty(len(queries), places[0].size(1))
        columns = vectors.to(queries.dtype).T
        for some in _chunks(queries, len(vectors)):
            parts = torch.mm(queries[some], columns).split(sizes, dim=1)
            total = found[some]
            for number, (part, known) in enumerate(zip(parts, places, strict=True)):
                index = known.index_select(0, rows[some]).long()
                if number == 0:
                    torch.gather(part, 1, index, out=total)
                else:
                    total += part.gather(1, index)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, vectors, rows, *places = ctx.saved_tensors
        of_queries, of_vectors = torch.empty_like(queries), torch.zeros_like(vectors)
        known_vectors = vectors.to(queries.dtype)
        for some in _chunks(queries, len(vectors)):
            of_products = queries.new_zeros(len(queries[some]), len(vectors))
            for part, known in zip(of_products.split(ctx.sizes, dim=1), places, strict=True):
                index = known.index_select(0, rows[some]).long()
                part.scatter_add_(1, index, grad[some])
            torch.mm(of_products, known_vectors, out=of_queries[some])
            of_vectors += torch.mm(of_products.T, queries[some])
        return of_queries, of_vectors, None, None, *(None for _ in places)


def _chunks(queries: Tensor, vectors: int) -> Iterator[slice]:
    """Yields parts of the queries: few on a CPU, all on another device."""
    most = max(_LEAST, _AT_ONCE // vectors) if queries.device.type == "cpu" else len(queries)
    for start in range(0, len(queries), max(1, most)):
        yield slice(start, start + most)
