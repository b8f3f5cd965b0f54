from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lightrnn.data.lanes import LaneDataset, LaneIterator, draw_block_lengths
from fairseq_lightrnn.errors import UsageError

EOS, PAD = 2, 1


def dataset(
    words: int, lanes: int, length: int, workers: int = 1, random_lengths: bool = False
) -> LaneDataset:
    text = np.arange(10, 10 + words)
    return LaneDataset(
        text, "train", lanes, length, eos=EOS, pad=PAD, workers=workers,
        random_lengths=random_lengths,
    )  # fmt: skip


def lane_texts(data: LaneDataset, worker: int) -> tuple[list[list[int]], list[list[int]]]:
    """Joins a worker's blocks into what each of its lanes reads and predicts."""
    sources: list[list[int]] = [[] for _ in range(data.lanes)]
    targets: list[list[int]] = [[] for _ in range(data.lanes)]
    for block in range(data.blocks):
        batch = data[block * data.workers + worker]
        if not batch:
            continue
        assert batch["net_input"]["carried"] == {"stream": "train", "block": block}
        assert batch["ntokens"] == int(batch["target"].ne(PAD).sum())
        assert batch["ntokens"] == data.num_tokens(block * data.workers + worker)
        for lane in range(data.lanes):
            sources[lane] += batch["net_input"]["src_tokens"][lane].tolist()
            targets[lane] += batch["target"][lane].tolist()
    return sources, targets


@given(
    st.integers(1, 60), st.integers(1, 6), st.integers(1, 9), st.integers(1, 3), st.integers(0, 9)
)
def test_every_word_is_predicted_once_from_the_word_before(
    words: int, lanes: int, length: int, workers: int, epoch: int
) -> None:
    """In blocks of one length, and (epoch > 0) of random lengths."""
    data = dataset(words, lanes, length, workers, random_lengths=epoch > 0).of_epoch(1, epoch)
    predicted = []
    for worker in range(workers):
        for source, target in zip(*lane_texts(data, worker), strict=True):
            real = [word for word in target if word != PAD]
            assert target[: len(real)] == real  # padding at the end only
            expected = [word - 1 if word > 10 else EOS for word in real]
            assert source[: len(real)] == expected
            assert all(word == PAD for word in source[len(real) :])
            predicted += real
    assert predicted == list(range(10, 10 + words))
    assert data.sizes.sum() == words


def test_blocks_are_exact() -> None:
    data = dataset(words=47, lanes=4, length=5)  # lanes of 12, 12, 12 and 11 words
    assert [data[block]["target"].shape[1] for block in range(len(data))] == [5, 5, 2]


def test_a_single_lane_is_one_workers_in_batches_of_as_many_words() -> None:
    data = dataset(47, 4, 5, workers=2).in_one_pass()
    assert [data.num_tokens(index) for index in range(len(data))] == [20, 0, 20, 0, 7, 0]
    assert data[1] == {}
    assert data.collater([]) == {}


def test_the_iterator_keeps_the_order_and_deals_whole_lanes() -> None:
    data = dataset(40, 2, 3, workers=2)
    for worker in range(2):
        iterator = LaneIterator(data, num_shards=2, shard_id=worker, seed=1)
        for _ in range(2):
            batches = list(iterator.next_epoch_itr(shuffle=True))
            assert [batch["net_input"]["carried"]["block"] for batch in batches] == [0, 1, 2, 3]
            first = batches[0]["target"][0, 0].item()
            assert first == 10 + 20 * worker


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_all_workers_have_as_many_batches(
    words: int, lanes: int, workers: int, one_pass: bool
) -> None:
    """Even of fewer words than lanes; each has all its lanes in every batch of training."""
    data = dataset(words, lanes, 2, workers)
    data = data.in_one_pass() if one_pass else data
    batches = [
        list(LaneIterator(data, num_shards=workers, shard_id=worker, seed=1).next_epoch_itr())
        for worker in range(workers)
    ]
    assert {len(mine) for mine in batches} == {data.blocks}
    for block in zip(*batches, strict=True):
        carried = [batch["net_input"]["carried"]["block"] for batch in block if batch]
        assert len(set(carried)) == 1 and len(carried) == (1 if one_pass else workers)
        assert {batch["nsentences"] for batch in block if batch} == {data.lanes}


def test_the_dummy_batch_carries_nothing() -> None:
    iterator = LaneIterator(dataset(40, 2, 3), seed=1)
    assert iterator.first_batch["net_input"]["carried"] is None


def slow_block_lengths(length: int, generator: np.random.Generator, count: int) -> list[int]:
    """Lengths as AWD-LSTM draws them, one after the other."""
    lengths = []
    for _ in range(count):
        base = length if generator.random() < 0.95 else length / 2
        lengths.append(max(5, int(generator.normal(base, 5))))
    return lengths


def test_block_lengths_are_distributed_as_in_awd_lstm() -> None:
    drawn = draw_block_lengths(1_000_000, 70, seed=1, epoch=1)[:-1]
    expected = np.array(slow_block_lengths(70, np.random.default_rng(5), 20_000))
    assert drawn.min() >= 5
    for measure in (np.mean, np.std, lambda x: np.mean(x < 52), lambda x: np.quantile(x, 0.9)):
        assert abs(measure(drawn) - measure(expected)) < 0.04 * measure(expected) + 0.005
    short = draw_block_lengths(10_000, 6, seed=1, epoch=1)[:-1]
    assert short.min() == 5


@given(st.integers(1, 500), st.integers(5, 40), st.integers(0, 5), st.integers(1, 5))
def test_block_lengths_add_up(words: int, length: int, seed: int, epoch: int) -> None:
    lengths = draw_block_lengths(words, length, seed, epoch)
    assert lengths.sum() == words
    assert (lengths[:-1] >= 5).all() and lengths[-1] > 0
    assert np.array_equal(lengths, draw_block_lengths(words, length, seed, epoch))


def test_random_blocks_follow_seed_and_epoch_and_are_those_of_all_workers() -> None:
    data = dataset(4000, 4, 20, workers=2, random_lengths=True)
    bounds = [tuple(data.of_epoch(*pair).bounds) for pair in [(1, 1), (1, 2), (2, 1), (1, 1)]]
    assert bounds[0] == bounds[3]
    assert len(set(bounds)) == 3
    one = dataset(4000, 8, 20, random_lengths=True).of_epoch(1, 1)
    assert tuple(one.bounds) == bounds[0]
    two = data.of_epoch(1, 1)
    for block in range(one.blocks):
        parts = [two[2 * block + worker]["target"] for worker in range(2)]
        assert np.array_equal(np.concatenate(parts), one[block]["target"])
    assert tuple(data.bounds) == tuple(range(0, 500, 20)) + (500,)  # itself as it was


def test_evaluation_has_no_random_blocks() -> None:
    data = dataset(300, 4, 20, random_lengths=True).in_one_pass()
    assert data.of_epoch(1, 1) is data
    assert np.diff(data.bounds).tolist() == [80, 80, 80, 60]


def test_a_place_in_the_lanes_is_found_or_refused() -> None:
    """Blocks of random lengths begin elsewhere in another epoch, and with another seed."""
    data = dataset(400, 2, 10, random_lengths=True)

    def state(blocks: LaneDataset, read: int) -> dict[str, int]:
        iterator = LaneIterator(blocks)
        epoch = iterator.next_epoch_itr()
        for _ in range(read):
            next(epoch)
        return iterator.state_dict()

    first = data.of_epoch(1, 1)
    known = state(first, 3)
    assert known["place"] == first.bounds[3] and known["iterations_in_epoch"] == 3
    for other in (data.of_epoch(2, 1), dataset(400, 2, 10)):
        assert known["place"] not in other.bounds
        with pytest.raises(UsageError, match="where no block of this training begins: resume with"):
            LaneIterator(other).load_state_dict(known)
    with pytest.raises(UsageError, match="where no block of this training begins: resume with"):
        LaneIterator(dataset(400, 2, 10)).load_state_dict(state(first, first.blocks - 1))
    iterator = LaneIterator(dataset(400, 2, 10))
    with pytest.raises(UsageError, match="stands after 200 words of each lane, where no block of"):
        iterator.load_state_dict({**known, "iterations_in_epoch": 40, "place": 200})
    iterator.load_state_dict({**known, "place": 50})
    assert next(iterator.next_epoch_itr())["net_input"]["carried"]["block"] == 5
    with pytest.raises(UsageError, match="an epoch without it, in which text was read in another"):
        iterator.load_state_dict({"epoch": 1, "iterations_in_epoch": 3, "batches": 20})
    end = state(first, first.blocks)
    assert (end["epoch"], end["place"]) == (2, 0)
    iterator.load_state_dict(end)
