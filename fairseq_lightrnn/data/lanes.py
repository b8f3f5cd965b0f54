"""Lanes of consecutive text, for hidden states that are carried from batch to batch.

The text is laid out as parallel lanes of consecutive words. Batch n+1 of a lane goes on where batch
n stopped, so that the state after one is the state before the other.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset, iterators

from fairseq_lightrnn.errors import UsageError

__all__ = ["SHORTEST_BLOCK", "LaneDataset", "LaneIterator", "draw_block_lengths"]

# How AWD-LSTM draws the lengths of blocks (arXiv 1708.02182, section 4.1).
SHORTEST_BLOCK = 5
_HALF_LENGTH_PROBABILITY = 0.05
_LENGTH_DEVIATION = 5


def draw_block_lengths(words: int, length: int, seed: int, epoch: int) -> np.ndarray:
    """Draws the lengths of the blocks of an epoch (arXiv 1708.02182, section 4.1).

    Args:
        words: of the longest lane.
        length: about which lengths are distributed, or half of which with a probability of 0.05.
        seed: fairseq's.
        epoch: its number.

    Returns:
        Integers of at least 5, but for the last, which add up to ``words``.
    """
    generator = np.random.default_rng([seed, epoch])
    most = -(-words // SHORTEST_BLOCK)
    halved = generator.random(most) < _HALF_LENGTH_PROBABILITY
    drawn = generator.normal(np.where(halved, length / 2, length), _LENGTH_DEVIATION)
    ends = drawn.astype(np.int64).clip(min=SHORTEST_BLOCK).cumsum().clip(max=words)
    lengths = np.diff(ends, prepend=0)
    return lengths[lengths > 0]


class LaneDataset(FairseqDataset):
    """Blocks of parallel lanes; an item is a whole batch, cut out in one slice.

    Every word is predicted exactly once: lanes differ by at most one word, and the last block is as
    short as what remains. The first word of the first lane is predicted from the end of a sentence,
    the first of every other lane from the word before it.

    Items come in the order in which fairseq deals batches to workers: item n·W + s is block n of
    the lanes of worker s.

    Args:
        text: word ids, integers of shape (N,).
        stream: the name under which a model keeps the state, such as the split's.
        lanes: lanes of a worker.
        length: words of a block.
        eos: the word before the text.
        pad: what fills the shorter lanes at the end.
        workers: W.
        one_pass: the first worker reads the text as a single lane, for evaluation; the others get
            empty batches.
        random_lengths: draw the lengths of the blocks for each epoch; see :meth:`of_epoch`.
    """

    def __init__(
        self,
        text: np.ndarray,
        stream: str,
        lanes: int,
        length: int,
        *,
        eos: int,
        pad: int,
        workers: int = 1,
        one_pass: bool = False,
        random_lengths: bool = False,
    ) -> None:
        self.text = np.asarray(text, dtype=np.int32)
        self.stream = stream
        self.length = length
        self.random_lengths = random_lengths
        self.eos, self.pad = eos, pad
        self.workers = workers
        self.busy_workers = 1 if one_pass else workers
        self.lanes = lanes = 1 if one_pass else lanes
        total = lanes * self.busy_workers
        share, extra = divmod(len(self.text), total)
        # The first `extra` lanes hold one word more.
        self.starts = np.arange(total) * share + np.minimum(np.arange(total), extra)
        self.ends = np.append(self.starts[1:], len(self.text))
        self.longest = share + (extra > 0)
        # Block n of every lane holds its words from bounds[n] to bounds[n + 1].
        self.bounds = np.append(np.arange(0, self.longest, length), self.longest)

    @property
    def blocks(self) -> int:
        """The number of blocks of a lane."""
        return len(self.bounds) - 1

    def of_epoch(self, seed: int, epoch: int) -> LaneDataset:
        """Returns the same lanes, in the blocks of an epoch if their lengths are random."""
        if not self.random_lengths:
            return self
        other = copy.copy(self)
        lengths = draw_block_lengths(self.longest, self.length, seed, epoch)
        other.bounds = np.append(0, lengths.cumsum())
        return other

    def in_one_pass(self) -> LaneDataset:
        """Returns the same text as one lane, for evaluation, in batches of as many words."""
        return LaneDataset(
            self.text,
            self.stream,
            1,
            self.length * self.lanes,
            eos=self.eos,
            pad=self.pad,
            workers=self.workers,
            one_pass=True,
        )

    def __len__(self) -> int:
        return self.blocks * self.workers

    @property
    def sizes(self) -> np.ndarray:
        """The words of each item, as an array of shape (items,)."""
        return np.array([self.num_tokens(index) for index in range(len(self))])

    def num_tokens(self, index: int) -> int:
        """Returns the words of an item."""
        block, worker = divmod(index, self.workers)
        if worker >= self.busy_workers:
            return 0
        chosen = slice(worker * self.lanes, (worker + 1) * self.lanes)
        start, end = self.bounds[block : block + 2]
        rest = self.ends[chosen] - self.starts[chosen] - start
        return int(rest.clip(0, end - start).sum())

    size = num_tokens

    def __getitem__(self, index: int) -> dict[str, Any]:
        block, worker = divmod(index, self.workers)
        if worker >= self.busy_workers:
            return {}
        chosen = slice(worker * self.lanes, (worker + 1) * self.lanes)
        start, end = self.bounds[block : block + 2].tolist()
        begin = self.starts[chosen, None] + start  # (B, 1)
        width = min(end - start, int((self.ends[chosen] - begin[:, 0]).max(initial=0)))
        positions = begin + np.arange(max(width, 1))  # (B, T)
        inside = positions < self.ends[chosen, None]
        target = np.where(inside, self.text[positions.clip(max=len(self.text) - 1)], self.pad)
        before = np.where(positions > 0, self.text[(positions - 1).clip(min=0)], self.eos)
        source = np.where(inside, before, self.pad)
        tokens = torch.from_numpy(target).long()
        return {
            "id": torch.arange(self.lanes),
            "nsentences": self.lanes,
            "ntokens": int(inside.sum()),
            "net_input": {
                "src_tokens": torch.from_numpy(source).long(),
                "src_lengths": torch.from_numpy(inside.sum(axis=1)),
                "target_tokens": tokens,
                "carried": {"stream": self.stream, "block": block},
            },
            "target": tokens,
            # Of the longest lane, alike for all workers.
            "block_length": end - start,
        }

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the only sample; items are batches already."""
        return samples[0] if samples else {}

    def ordered_indices(self) -> np.ndarray:
        """Returns the items in the order of the text."""
        return np.arange(len(self))


class LaneIterator(iterators.EpochBatchIterator):
    """Iterates over lanes in order, whatever fairseq would shuffle."""

    def __init__(self, dataset: LaneDataset, **kwargs: Any) -> None:
        super().__init__(
            dataset=dataset,
            collate_fn=dataset.collater,
            batch_sampler=[[index] for index in range(len(dataset))],
            disable_shuffling=True,
            **kwargs,
        )

    @property
    def first_batch(self) -> dict[str, Any]:
        """The batch that fairseq uses where a worker has none; it touches no carried state."""
        batch = self.dataset[0]
        batch["net_input"]["carried"] = None
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the epoch and in the lanes, and how the text was laid out."""
        state = super().state_dict()
        place = int(self.dataset.bounds[state["iterations_in_epoch"]])
        return {**state, "lanes": self._lanes, "length": self.dataset.length, "place": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a place in an epoch, with any number of workers that have as many lanes.

        Raises:
            UsageError: if the text was laid out in another way.
        """
        lanes, length = self._lanes, self.dataset.length
        read = state_dict.get("iterations_in_epoch", 0)
        if read and "batches" in state_dict:
            raise UsageError(
                "--carry-hidden-state: the checkpoint is from the middle of an epoch without it, "
                "in which text was read in another order; leave it out, resume from the end of an "
                "epoch, or with --reset-dataloader"
            )
        before = state_dict.get("lanes", lanes), state_dict.get("length", length)
        if read and before != (lanes, length):
            raise UsageError(
                f"the checkpoint is from the middle of an epoch of {before[0]} lanes in blocks of "
                f"{before[1]} words, this training has {lanes} lanes in blocks of {length}: "
                "resume with as many (workers times --batch-size, and --tokens-per-sample), from "
                "the end of an epoch, or with --reset-dataloader"
            )
        if "place" in state_dict:
            (blocks,) = np.nonzero(self.dataset.bounds[:-1] == state_dict["place"])
            if not len(blocks):
                raise UsageError(
                    f"the checkpoint stands after {state_dict['place']} words of each lane, where "
                    "no block of this training begins: resume with the same "
                    "--random-block-lengths and --seed, from the end of an epoch, or with "
                    "--reset-dataloader"
                )
            read = int(blocks[0])
        super().load_state_dict({**state_dict, "iterations_in_epoch": read})

    @property
    def _lanes(self) -> int:
        """The lanes of all workers."""
        return len(self.dataset.starts)
