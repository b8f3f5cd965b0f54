"""``--task lightrnn_language_modeling``: fairseq's language modelling with a word table."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import FairseqDataset, LMContextWindowDataset, data_utils
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_lightrnn.criterions import two_component_cross_entropy  # noqa: F401  (registers)
from fairseq_lightrnn.data.lanes import SHORTEST_BLOCK, LaneDataset, LaneIterator
from fairseq_lightrnn.data.target_input import TargetInputDataset, consecutive_text
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.tasks._seating import SeatingMixin
from fairseq_lightrnn.tasks._seating_config import SeatingConfig
from fairseq_lightrnn.tasks._statistics import world_size
from fairseq_lightrnn.tasks._validation_losses import ValidationLossMixin

__all__ = ["LightRNNLanguageModelingConfig", "LightRNNLanguageModelingTask"]


@dataclass
class LightRNNLanguageModelingConfig(SeatingConfig, LanguageModelingConfig):
    carry_hidden_state: bool = field(
        default=False,
        metadata={
            "help": "go on from the hidden state of the batch before: the text is cut into "
            "--batch-size lanes for each worker, read in order in blocks of --tokens-per-sample; "
            "validation and fairseq-eval-lm read it in one pass"
        },
    )
    random_block_lengths: bool = field(
        default=False,
        metadata={
            "help": "with --carry-hidden-state, draw the length of every block of training as "
            "AWD-LSTM does: around --tokens-per-sample, once in twenty around half of it, with a "
            "standard deviation of 5 and at least 5 words. The learning rate is not scaled by "
            "the length: fairseq's loss is a mean over words, of short blocks as of long ones"
        },
    )


@register_task("lightrnn_language_modeling", dataclass=LightRNNLanguageModelingConfig)
class LightRNNLanguageModelingTask(SeatingMixin, ValidationLossMixin, LanguageModelingTask):
    """Language modelling in which words are seated in a table."""

    architectures = ("lightrnn_lm",)
    stock_task = "language_modeling"

    @property
    def in_order(self) -> bool:  # type: ignore[override]
        """Whether batches go on where the one before stopped."""
        return bool(self.args.carry_hidden_state)

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> Any:
        """Sets the task up, after checking the flags and the dictionary."""
        for flag in ("self_target", "past_target"):
            if getattr(args, flag, False):
                raise UsageError(
                    f"--{flag.replace('_', '-')}: a LightRNN language model predicts the next "
                    "word only; leave the flag out"
                )
        if args.carry_hidden_state:
            _check_carried(args)
        elif args.random_block_lengths:
            raise UsageError(
                "--random-block-lengths draws the blocks of --carry-hidden-state; give that flag "
                "too, or neither"
            )
        return super().setup_task(args, **kwargs)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> Any:
        """Loads a split."""
        path = os.path.join(self._data_path(epoch), f"{split}.bin")
        if os.path.exists(path) and os.path.getsize(path) == 0:
            raise UsageError(f"{path}: the split has no text; give fairseq-preprocess some")
        if self.args.carry_hidden_state:
            self.datasets[split] = self._lanes(split, epoch, combine)
            return
        super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)
        self.datasets[split] = TargetInputDataset(self.datasets[split])

    def _lanes(self, split: str, epoch: int, combine: bool) -> LaneDataset:
        path = os.path.join(self._data_path(epoch), split)
        sentences = data_utils.load_indexed_dataset(
            path, self.dictionary, self.args.dataset_impl, combine=combine
        )
        if sentences is None:
            raise UsageError(f"{path}: no such split; was it preprocessed?")
        lanes = LaneDataset(
            np.concatenate([sentence.numpy() for sentence in sentences]),
            split,
            self.args.batch_size or 1,
            self.args.tokens_per_sample,
            eos=self.dictionary.eos(),
            pad=self.dictionary.pad(),
            workers=world_size(),
            random_lengths=self.args.random_block_lengths,
        )
        return lanes if split == self.args.train_subset else lanes.single_lane()

    def get_batch_iterator(self, dataset: FairseqDataset, *args: Any, **kwargs: Any) -> Any:
        """Returns batches; lanes come in order and are dealt to workers whole."""
        if not isinstance(dataset, LaneDataset):
            return super().get_batch_iterator(dataset, *args, **kwargs)
        known = ("seed", "num_shards", "shard_id", "num_workers", "epoch")
        options = {name: kwargs[name] for name in known if name in kwargs}
        dataset = dataset.of_epoch(options.get("seed", 1), options.get("epoch", 1))
        buffer_size = kwargs.get("data_buffer_size", 0)
        return LaneIterator(dataset, buffer_size=buffer_size, **options)

    def _data_path(self, epoch: int) -> str:
        paths: list[str] = utils.split_paths(self.args.data)
        return paths[(epoch - 1) % len(paths)]

    def training_text(self) -> Iterator[np.ndarray]:
        """Yields the training split as arrays of consecutive text."""
        path = os.path.join(self._data_path(1), self.args.train_subset)
        sentences = data_utils.load_indexed_dataset(path, self.dictionary, self.args.dataset_impl)
        yield from consecutive_text(sentences)

    def eval_lm_dataloader(
        self, dataset: FairseqDataset, context_window: int = 0, **kwargs: Any
    ) -> Any:
        """Returns batches for ``fairseq-eval-lm``."""
        if isinstance(dataset, LaneDataset):
            if context_window > 0:
                raise UsageError(
                    f"--context-window {context_window}: a carried hidden state has all the text "
                    "before as context; leave one of the flags out"
                )
            dataset = dataset.single_lane()
        elif context_window > 0:
            # The window changes the targets, so they become input after it, not before.
            window = LMContextWindowDataset(
                dataset=dataset,
                tokens_per_sample=self.args.tokens_per_sample,
                context_window=context_window,
                pad_idx=self.source_dictionary.pad(),
            )
            dataset = TargetInputDataset(window)
        return super().eval_lm_dataloader(dataset, context_window=0, **kwargs)


def _check_carried(args: Any) -> None:
    """Refuses flags that a carried hidden state cannot heed."""
    if str(args.sample_break_mode) != "none":
        raise UsageError(
            f"--sample-break-mode {args.sample_break_mode}: a carried hidden state crosses the "
            "ends of sentences; leave the flag out, or --carry-hidden-state"
        )
    if args.add_bos_token:
        raise UsageError("--add-bos-token and --carry-hidden-state exclude each other")
    if args.tokens_per_sample < 1:
        raise UsageError(f"--tokens-per-sample {args.tokens_per_sample}: must be at least 1")
    if args.random_block_lengths and args.tokens_per_sample < SHORTEST_BLOCK:
        raise UsageError(
            f"--tokens-per-sample {args.tokens_per_sample}: blocks of --random-block-lengths have "
            f"at least {SHORTEST_BLOCK} words; raise the one or leave the other out"
        )
    if args.batch_size is None and args.max_tokens is not None:
        raise UsageError(
            "--carry-hidden-state needs the number of lanes of a worker: give --batch-size rather "
            "than --max-tokens"
        )
