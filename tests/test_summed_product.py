"""Products with sums of vectors, against sums of vectors that are looked up word by word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fairseq_lightrnn.core import summed_product as summed_product_module
from fairseq_lightrnn.core.summed_product import summed_product

SIZES = (3, 4, 2)


def one_by_one(
    queries: Tensor, rows: Tensor, places: list[Tensor], vectors: Tensor, sizes: tuple[int, ...]
) -> Tensor:
    """The twin: the vectors of each word of each row are summed first."""
    groups = vectors.split(list(sizes))
    summed = sum(group[known.long()] for group, known in zip(groups, places, strict=True))
    return torch.einsum("ne,nce->nc", queries, summed[rows])


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Queries, rows, places and vectors; five rows of six words."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(count, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(sum(SIZES), 4, generator=generator, dtype=torch.float64)
    places = [torch.randint(size, (5, 6), generator=generator, dtype=torch.int32) for size in SIZES]
    rows = torch.randint(5, (count,), generator=generator)
    return queries, rows, places, vectors.requires_grad_()


@given(count=st.integers(0, 20), at_once=st.integers(1, 30), seed=st.integers(0, 99))
def test_values_and_gradients_are_those_of_one_by_one(count: int, at_once: int, seed: int) -> None:
    queries, rows, places, vectors = drawn(count, seed)
    weight = torch.randn(count, 6, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summed_product_module, "_LEAST", 1)
        patch.setattr(summed_product_module, "_AT_ONCE", at_once * sum(SIZES))
        found = []
        for product in (summed_product, one_by_one):
            result = product(queries, rows, places, vectors, SIZES)
            gradients = torch.autograd.grad((result * weight).sum(), (queries, vectors))
            found.append((result, *gradients))
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow)


def test_gradients_by_finite_differences() -> None:
    queries, rows, places, vectors = drawn(7, 1)
    assert torch.autograd.gradcheck(
        lambda queries, vectors: summed_product(queries, rows, places, vectors, SIZES),
        (queries, vectors),
    )


def test_queries_of_half_precision_have_vectors_of_full_precision() -> None:
    queries, rows, places, vectors = drawn(7, 1)
    half = queries.detach().bfloat16().requires_grad_()
    whole = vectors.detach().float().requires_grad_()
    found = summed_product(half, rows, places, whole, SIZES)
    assert found.dtype == torch.bfloat16
    expected = one_by_one(queries, rows, places, vectors, SIZES)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.1)
    found.sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    assert whole.grad is not None and whole.grad.dtype == torch.float32
