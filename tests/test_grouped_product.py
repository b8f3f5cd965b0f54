"""Products with the vectors of a group, against one look-up for each query."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lightrnn.core import grouped_product as grouped_product_module
from fairseq_lightrnn.core.grouped_product import grouped_product


def one_by_one(queries, groups, members, vectors):
    """The twin: looks the members' vectors up for every query."""
    rows = [vectors[members[group]] @ query for query, group in zip(queries, groups, strict=True)]
    return torch.stack(rows) if rows else queries.new_zeros(0, members.size(1))


@given(
    groups=st.lists(st.integers(0, 4), max_size=60),
    size=st.integers(1, 5),
    dim=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_one_by_one(groups, size, dim, seed):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    groups = torch.tensor(groups, dtype=torch.long)
    # Empty cells name a word that sits elsewhere: members may repeat.
    members = torch.randint(7, (5, size), generator=generator)
    queries, vectors = numbers(len(groups), dim), numbers(7, dim)
    weight = torch.randn(len(groups), size, generator=generator, dtype=torch.float64)

    def run(product):
        result = product(queries, groups, members, vectors)
        return result, *torch.autograd.grad((result * weight).sum(), (queries, vectors))

    if not len(groups):
        assert grouped_product(queries, groups, members, vectors).shape == (0, size)
        return
    for fast, slow in zip(run(grouped_product), run(one_by_one), strict=True):
        torch.testing.assert_close(fast, slow)


@given(groups=st.lists(st.integers(0, 4), min_size=1, max_size=120))
def test_blocks_to_spare_change_nothing(groups):
    """As on a GPU, which is not asked how many blocks there are."""
    groups = torch.tensor(groups)
    sizes = torch.bincount(groups, minlength=5)
    blocks = (sizes + 15) // 16
    most = grouped_product_module._count(blocks.to("meta"), len(groups))
    assert int(blocks.sum()) <= most
    queries, vectors = torch.randn(len(groups), 3), torch.randn(7, 3)
    members = torch.randint(7, (5, 4))
    expected = grouped_product(queries, groups, members, vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_product_module, "_count", lambda *arguments: most)
        assert torch.equal(grouped_product(queries, groups, members, vectors), expected)


@pytest.mark.parametrize("count", [15, 16, 17, 33])
def test_a_group_may_fill_blocks_exactly(count):
    groups = torch.tensor([1] * count + [0])
    queries = torch.arange(float(count + 1))[:, None]
    members, vectors = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[1.0], [10.0], [100.0]])
    expected = one_by_one(queries, groups, members, vectors)
    assert torch.equal(grouped_product(queries, groups, members, vectors), expected)
