"""Sums of hidden states: one by one, in any order, over shards, and of very frequent words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_lightrnn.allocation.statistics import AllocationStatistics


def occurrences(seed: int, size: int, num_words: int = 7, k: int = 2, dim: int = 3):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(num_words, (size,), generator=generator)
    return words, torch.rand(size, k, dim, generator=generator) * 2 - 1


def test_sums_equal_states_added_one_by_one():
    words, hidden = occurrences(0, 50)
    statistics = AllocationStatistics(7, 2, 3)
    statistics.add(words[:20], hidden[:20])
    statistics.add(words[20:], hidden[20:])
    slow = torch.zeros(2, 7, 3, dtype=torch.float64)
    for word, state in zip(words.tolist(), hidden, strict=True):
        slow[:, word] += state.double()
    assert torch.allclose(statistics.sums, slow, atol=50 * 2.0**-25, rtol=0)
    assert statistics.counts.tolist() == np.bincount(words, minlength=7).tolist()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_order_and_batches_do_not_matter_bit_for_bit(seed, size, cuts):
    words, hidden = occurrences(seed, size)
    whole = AllocationStatistics(7, 2, 3)
    whole.add(words, hidden)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    total = AllocationStatistics(7, 2, 3)
    for part in np.split(order.numpy(), sorted(min(cut, size) for cut in cuts)):
        total.add(words[part], hidden[part])
    assert torch.equal(total.sums, whole.sums)
    assert torch.equal(total.counts, whole.counts)


def test_word_ranges_together_hold_what_one_holds():
    words, hidden = occurrences(3, 80)
    whole = AllocationStatistics(7, 2, 3)
    parts = [
        AllocationStatistics(7, 2, 3, word_range=bounds) for bounds in ((0, 2), (2, 3), (3, 7))
    ]
    for statistics in (whole, *parts):
        statistics.add(words, hidden)
    assert torch.equal(torch.cat([part.sums for part in parts], dim=1), whole.sums)
    assert torch.equal(torch.cat([part.counts for part in parts]), whole.counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_mapped_sums_equal_those_in_memory(tmp_path, dtype):
    words, hidden = occurrences(4, 40)
    kept = AllocationStatistics(7, 2, 3, dtype=dtype)
    spilled = AllocationStatistics(7, 2, 3, dtype=dtype, storage=tmp_path / "sums")
    for statistics in (kept, spilled):
        statistics.add(words, hidden)
    assert torch.equal(kept.sums, spilled.sums)
    (file,) = (tmp_path / "sums").iterdir()
    assert np.array_equal(np.load(file, mmap_mode="r"), kept.sums.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_very_frequent_word_keeps_its_sum(dtype):
    # One state at a time in float32, a sum of 3e7 times 0.8 would be off by 30 %.
    statistics = AllocationStatistics(2, 1, 1, dtype=dtype)
    words = torch.zeros(1 << 20, dtype=torch.long)
    states = torch.full((1 << 20, 1, 1), 0.8)
    for _ in range(29):
        statistics.add(words, states)
    exact = 29 * (1 << 20) * float(states[0, 0, 0])
    assert statistics.sums[0, 0, 0].item() == pytest.approx(
        exact, rel=1e-5 if dtype == torch.float32 else 1e-12
    )


def test_float32_statistics_take_half_the_bytes():
    assert AllocationStatistics.bytes_needed(10, 2, 4) == 10 * (2 * 4 * 8 + 8)
    assert AllocationStatistics.bytes_needed(10, 2, 4, torch.float32) == 10 * (2 * 4 * 4 + 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_words": 0}, "num_words must be at least 1, got 0"),
        ({"word_range": (3, 3)}, "word_range"),
        ({"word_range": (0, 9)}, "word_range"),
        ({"dtype": torch.float16}, "float32 or float64"),
    ],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AllocationStatistics(**{"num_words": 7, "num_components": 2, "dim": 3, **arguments})


def test_words_outside_the_dictionary_and_wrong_shapes_are_refused():
    statistics = AllocationStatistics(7, 2, 3)
    with pytest.raises(ValueError, match="word id 7 is not in the dictionary of 7 words"):
        statistics.add(torch.tensor([1, 7]), torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="do not fit"):
        statistics.add(torch.tensor([1]), torch.zeros(1, 2, 4))
