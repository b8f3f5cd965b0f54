"""``--task lightrnn_language_modeling``: fairseq's language modelling with a word table."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import FairseqDataset, LMContextWindowDataset, data_utils
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from omegaconf import open_dict
from torch import nn

from fairseq_lightrnn.criterions import two_component_cross_entropy  # noqa: F401  (registers)
from fairseq_lightrnn.data.lanes import SHORTEST_BLOCK, LaneDataset, LaneIterator
from fairseq_lightrnn.data.target_input import TargetInputDataset, consecutive_text
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.models.carried_state import CarriedState
from fairseq_lightrnn.tasks.flags import TableTaskConfig
from fairseq_lightrnn.tasks.table_task import TableTask
from fairseq_lightrnn.workers import world_size

__all__ = ["LightRNNLanguageModelingConfig", "LightRNNLanguageModelingTask"]

logger = logging.getLogger(__name__)

# How a training reads text, as far as whoever evaluates the model has to do the same.
_KNOWN_TO_CHECKPOINT = ("carry_hidden_state", "add_bos_token")


@dataclass
class LightRNNLanguageModelingConfig(TableTaskConfig, LanguageModelingConfig):
    carry_hidden_state: bool = field(
        default=False,
        metadata={
            "help": "go on from the hidden state of the batch before: the text is cut into "
            "--batch-size lanes for each worker, read in order in blocks of --tokens-per-sample; "
            "validation and fairseq-eval-lm (which knows it from the checkpoint) read it in one "
            "pass"
        },
    )
    random_block_lengths: bool = field(
        default=False,
        metadata={
            "help": "with --carry-hidden-state, draw the length of every block of training as "
            "AWD-LSTM does: around --tokens-per-sample, once in twenty around half of it, with a "
            "standard deviation of 5 and at least 5 words. The learning rate is scaled by the "
            "length of a block over --tokens-per-sample"
        },
    )


@register_task("lightrnn_language_modeling", dataclass=LightRNNLanguageModelingConfig)
class LightRNNLanguageModelingTask(TableTask, LanguageModelingTask):
    """Language modelling in which words are seated in a table."""

    architectures = ("lightrnn_lm", "lightrnn_transformer_lm")
    stock_task = "language_modeling"
    threshold_flag = "--thresholdsrc"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of the batches of an update, and of which: one that overflows 16 bits is tried again.
        self._block_lengths: list[int] = []
        self._update: tuple[int, Any] = (-1, None)

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
        if args.output_dictionary_size >= 0:
            raise UsageError(
                f"--output-dictionary-size {args.output_dictionary_size}: a word table seats all "
                "words of the dictionary; leave the flag out, and give fairseq-preprocess "
                "--nwordssrc"
            )
        if args.carry_hidden_state:
            _check_carried(args)
        dictionary = os.path.join(utils.split_paths(args.data)[0], "dict.txt")
        if not os.path.isfile(dictionary):
            raise UsageError(f"{dictionary}: no such dictionary; was the data preprocessed?")
        return super().setup_task(args, **kwargs)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> nn.Module:
        """Builds a model, which must carry hidden states if the task does."""
        most = self.args.max_target_positions
        if not from_checkpoint and most is not None and not hasattr(cfg, "max_target_positions"):
            raise UsageError(
                f"--max-target-positions {most}: an LSTM reads texts of any length; leave it out, "
                "and give --tokens-per-sample for shorter ones"
            )
        model = super().build_model(cfg, from_checkpoint)
        if self.args.carry_hidden_state and not hasattr(model.decoder, "carried_state"):
            raise UsageError(
                f"--carry-hidden-state: --arch {cfg._name} has no hidden state to carry; leave the "
                "flag out"
            )
        return model

    def state_dict(self) -> dict[str, Any]:
        """Returns what evaluation has to know of the training; fairseq puts it into checkpoints."""
        return {**super().state_dict(), **{name: self.args[name] for name in _KNOWN_TO_CHECKPOINT}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Reads text as the training did, from which fairseq-eval-lm loads a checkpoint."""
        known = "add_bos_token" in state_dict
        trained = {name: state_dict.pop(name, False) for name in _KNOWN_TO_CHECKPOINT}
        if known and self.args.add_bos_token and not trained["add_bos_token"]:
            raise UsageError("--add-bos-token: the model was trained without it; leave it out")
        if trained["add_bos_token"] and not self.args.add_bos_token:
            # fairseq-eval-lm itself looks at the flag, and leaves the beginnings of texts out.
            raise UsageError(
                "the model was trained with --add-bos-token, without which its scores mean "
                "nothing: give the flag here too"
            )
        if trained["carry_hidden_state"] and not self.args.carry_hidden_state:
            mode = str(self.args.sample_break_mode)
            if mode == "none":
                logger.info("--carry-hidden-state: the model was trained so")
                with open_dict(self.args):
                    self.args.carry_hidden_state = True
            else:
                logger.info(
                    f"--sample-break-mode {mode}: every sentence begins anew, though the model was "
                    "trained with --carry-hidden-state"
                )
        super().load_state_dict(state_dict)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> Any:
        """Loads a split."""
        path = os.path.join(self._data_path(epoch), f"{split}.bin")
        if os.path.exists(path) and os.path.getsize(path) == 0:
            raise UsageError(f"{path}: the split has no text; give fairseq-preprocess some")
        training = split == self.args.train_subset
        folders = utils.split_paths(self.args.data) if training else [self._data_path(epoch)]
        self.check_parts(split, folders, self.dictionary)
        if self.args.carry_hidden_state:
            self.datasets[split] = self._lanes(split, epoch, combine)
            return
        try:
            super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)
        except FileNotFoundError as error:
            raise UsageError(f"{error}; was it preprocessed?") from None
        self.datasets[split] = TargetInputDataset(self.datasets[split])

    def build_dataset_for_inference(self, *args: Any, **kwargs: Any) -> TargetInputDataset:
        """Returns texts to go on from, or to score as fairseq's hub interface does."""
        return TargetInputDataset(super().build_dataset_for_inference(*args, **kwargs))

    def _lanes(self, split: str, epoch: int, combine: bool) -> LaneDataset:
        path = os.path.join(self._data_path(epoch), split)
        sentences = data_utils.load_indexed_dataset(
            path, self.dictionary, self.args.dataset_impl, combine=combine
        )
        if sentences is None:
            raise UsageError(f"{path}: no such split; was it preprocessed?")
        lanes = LaneDataset(
            np.concatenate(list(consecutive_text(sentences))),
            split,
            self.args.batch_size or 1,
            self.args.tokens_per_sample,
            eos=self.dictionary.eos(),
            pad=self.dictionary.pad(),
            workers=world_size(),
            random_lengths=self.args.random_block_lengths,
        )
        return lanes if split == self.args.train_subset else lanes.in_one_pass()

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

    def text(self, split: str) -> Iterator[np.ndarray]:
        """Yields a split as arrays of consecutive text."""
        folders: list[str] = utils.split_paths(self.args.data)
        training = split == self.args.train_subset
        for folder in folders if training else folders[:1]:
            path = os.path.join(folder, split)
            # fairseq trains on further parts too (train1, train2 ...).
            sentences = data_utils.load_indexed_dataset(
                path, self.dictionary, self.args.dataset_impl, combine=training
            )
            if sentences is None:
                raise UsageError(f"{path}: no such split; was it preprocessed?")
            yield from consecutive_text(sentences)

    def train_step(
        self,
        sample: Any,
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
    ) -> Any:
        """Computes gradients of a batch, whose length the step of the optimiser heeds."""
        update = update_num, getattr(getattr(optimizer, "scaler", None), "loss_scale", None)
        if self.args.carry_hidden_state and update_num != self._update[0]:
            for module in model.modules():
                if isinstance(module, CarriedState):
                    module.forget_update()
        if update != self._update:
            self._update, self._block_lengths = update, []
        self._block_lengths.append(sample.get("block_length", self.args.tokens_per_sample))
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """Takes a step, longer for blocks of more words (arXiv 1708.02182, section 4.1)."""
        if not self.args.random_block_lengths:
            super().optimizer_step(optimizer, model, update_num)
            return
        rate = optimizer.get_lr()
        optimizer.set_lr(rate * float(np.mean(self._block_lengths)) / self.args.tokens_per_sample)
        super().optimizer_step(optimizer, model, update_num)
        optimizer.set_lr(rate)

    def eval_lm_dataloader(
        self, dataset: FairseqDataset, context_window: int = 0, **kwargs: Any
    ) -> Any:
        """Returns batches for ``fairseq-eval-lm``.

        Of several workers fairseq reports what the first has read, which is all of the text.
        """
        if isinstance(dataset, LaneDataset):
            if context_window > 0:
                raise UsageError(
                    f"--context-window {context_window}: a carried hidden state has all the text "
                    "before as context; leave one of the flags out"
                )
            if kwargs.get("num_shards", 1) != world_size():
                raise UsageError(
                    f"--num-shards {kwargs['num_shards']}: a carried hidden state reads the text "
                    "in one pass; leave it out, or give --sample-break-mode eos"
                )
            dataset = dataset.in_one_pass()
        elif context_window > 0:
            # The window changes the targets, so they become input after it, not before.
            window = LMContextWindowDataset(
                dataset=dataset,
                tokens_per_sample=self.args.tokens_per_sample,
                context_window=context_window,
                pad_idx=self.source_dictionary.pad(),
            )
            dataset = TargetInputDataset(window)
        if not isinstance(dataset, LaneDataset) and kwargs.get("num_shards", 1) == world_size():
            kwargs |= {"num_shards": 1, "shard_id": 0}
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
    for name, value in (("tokens-per-sample", args.tokens_per_sample),
                        ("batch-size", args.batch_size)):  # fmt: skip
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if args.random_block_lengths and args.tokens_per_sample < SHORTEST_BLOCK:
        raise UsageError(
            f"--tokens-per-sample {args.tokens_per_sample}: blocks of --random-block-lengths have "
            f"at least {SHORTEST_BLOCK} words; raise the one or leave the other out"
        )
