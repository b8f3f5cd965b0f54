from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lightrnn.data.dealt import DealtBatches
from fairseq_lightrnn.errors import UsageError


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def iterators(batches: int, workers: int, **options: Any) -> list[DealtBatches]:
    """Returns the iterators of all workers over batches of a number each."""
    return [
        DealtBatches(
            Numbers(batches), list, [[index] for index in range(batches)], seed=1,
            num_shards=workers, shard_id=worker, **options,
        )
        for worker in range(workers)
    ]  # fmt: skip


def rounds(every: list[DealtBatches]) -> list[int]:
    """Returns what all workers read in this epoch, in the order of the updates."""
    read = zip(*(list(one.next_epoch_itr()) for one in every), strict=True)
    return [batch[0] for together in read for batch in together if batch]


def place(batches: int, workers: int, steps: int) -> dict[str, Any]:
    """Returns what a checkpoint keeps after some updates of the first epoch."""
    first = iterators(batches, workers)[0]
    epoch = first.next_epoch_itr()
    for _ in range(steps):
        next(epoch)
    return first.state_dict()


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.data())
def test_nothing_is_left_out_and_little_read_again(
    batches: int, before: int, after: int, data: st.DataObject
) -> None:
    steps = data.draw(st.integers(0, (batches - 1) // before))
    order = rounds(iterators(batches, 1))
    others = iterators(batches, after)
    for one in others:
        one.load_state_dict(place(batches, before, steps))
    read = rounds(others)
    assert read == order[len(order) - len(read) :]
    again = len(read) - (batches - steps * before)
    assert again == steps * before % after


def test_an_epoch_that_ended_is_followed_by_the_next_one() -> None:
    (one,) = iterators(6, 1)
    one.load_state_dict(place(6, 3, 2))
    assert one.next_epoch_idx == 2
    assert sorted(rounds([one])) == list(range(6))


def test_checkpoints_that_do_not_tell_are_of_as_many_workers() -> None:
    state = place(8, 2, 2)
    del state["workers"]
    others = iterators(8, 2)
    for one in others:
        one.load_state_dict(state)
    assert rounds(others) == rounds(iterators(8, 1))[4:]


def test_an_order_that_workers_make_is_theirs() -> None:
    (one,) = iterators(8, 1, grouped_shuffling=True)
    with pytest.raises(UsageError, match="--grouped-shuffling: the checkpoint is of 2 workers"):
        one.load_state_dict(place(8, 2, 2))
    one.load_state_dict(place(8, 2, 4))  # the end of an epoch


@given(st.integers(2, 12), st.integers(1, 3), st.data())
def test_the_last_batch_alone_is_left_out(batches: int, workers: int, data: st.DataObject) -> None:
    """With --skip-remainder-batch, wherever in the epoch a training goes on."""
    order = [list(one.next_epoch_itr()) for one in iterators(batches, workers)]
    length = len(order[0])
    read = data.draw(st.integers(0, length - 1))
    for one, whole in zip(
        iterators(batches, workers, skip_remainder_batch=True), order, strict=True
    ):
        one.load_state_dict(place(batches, workers, read))
        assert list(one.next_epoch_itr()) == whole[read : length - 1]


def test_epochs_are_shuffled_from_the_one_on_that_is_to_be() -> None:
    """As --curriculum says, in a training that goes on as in one that never stopped."""
    (one,) = iterators(20, 1, reuse_dataloader=True)
    read = [[n for (n,) in one.next_epoch_itr(shuffle=epoch > 1)] for epoch in (1, 2, 3)]
    assert read[0] == list(range(20))
    assert sorted(read[1]) == sorted(read[2]) == read[0]
    assert len({tuple(order) for order in read}) == 3
    (other,) = iterators(20, 1, reuse_dataloader=True)
    other.load_state_dict({"epoch": 3, "iterations_in_epoch": 0, "version": 2, "shuffle": True})
    assert [n for (n,) in other.next_epoch_itr()] == read[2]


def test_a_place_among_other_batches_is_refused() -> None:
    state = place(8, 1, 3)
    (one,) = iterators(9, 1)
    with pytest.raises(UsageError, match="the middle of an epoch of 8 batches, this training has "):
        one.load_state_dict(state)
    with pytest.raises(UsageError, match="an epoch with --carry-hidden-state, which reads text in"):
        one.load_state_dict({**state, "lanes": 4})
    one.load_state_dict(place(8, 1, 8))  # the end of an epoch
    one.load_state_dict({name: state[name] for name in state if name != "batches"})
