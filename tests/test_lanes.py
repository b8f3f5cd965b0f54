from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lightrnn.data.lanes import LaneDataset, LaneIterator

EOS, PAD = 2, 1


def dataset(words: int, lanes: int, length: int, workers: int = 1) -> LaneDataset:
    text = np.arange(10, 10 + words)
    return LaneDataset(text, "train", lanes, length, eos=EOS, pad=PAD, workers=workers)


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


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 9), st.integers(1, 3))
def test_every_word_is_predicted_once_from_the_word_before(
    words: int, lanes: int, length: int, workers: int
) -> None:
    data = dataset(words, lanes, length, workers)
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
    data = dataset(47, 4, 5, workers=2).single_lane()
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


def test_the_dummy_batch_carries_nothing() -> None:
    iterator = LaneIterator(dataset(40, 2, 3), seed=1)
    assert iterator.first_batch["net_input"]["carried"] is None
