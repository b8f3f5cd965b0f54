"""What every LightRNN task does at fairseq's hooks; the work is done by its parts."""

import glob
import itertools
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from fairseq.criterions import build_criterion
from fairseq.data.iterators import EpochBatchIterator
from fairseq.utils import resolve_max_positions
from omegaconf import OmegaConf
from torch import nn

from fairseq_lightrnn.damage import put_back_last_checkpoint
from fairseq_lightrnn.data.binarised import check_binarised
from fairseq_lightrnn.data.dealt import DealtBatches
from fairseq_lightrnn.errors import UsageError, usage_errors
from fairseq_lightrnn.models.flags import settle
from fairseq_lightrnn.models.moving_average import mend_averages
from fairseq_lightrnn.models.word_head import WordHead
from fairseq_lightrnn.tasks.flags import check_checkpoints, check_flags, check_needs
from fairseq_lightrnn.tasks.folder_lock import lock_folder
from fairseq_lightrnn.tasks.generator import TopWordsGenerator, forbid_repetitions
from fairseq_lightrnn.tasks.reallocator import Reallocator, log_reallocation
from fairseq_lightrnn.tasks.schedule import reallocation_epochs
from fairseq_lightrnn.tasks.tables import TaskTables
from fairseq_lightrnn.tasks.validation_losses import ValidationLosses
from fairseq_lightrnn.workers import count_workers, rank, world_size

__all__ = ["TableTask"]

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "checkpoint_last.pt"  # fairseq looks for it in the save directory
CRITERION = "two_component_cross_entropy"
# fairseq's default, and its name for the same loss with label smoothing.
_SAME_CRITERIONS = ("cross_entropy", "label_smoothed_cross_entropy")


class TableTask:
    """Gives a fairseq task word tables, a reallocator and the criterion that knows components.

    Mix in before the task. ``self.args`` must be a :class:`TableTaskConfig` with the task's own
    fields, and :meth:`text` must be defined.

    Attributes:
        architectures: families of models that the task can train.
        stock_task: fairseq's task without a word table.
        threshold_flag: fairseq-preprocess's, by which rare words become unknown ones.
        in_order: whether batches go on where the one before stopped.
        tables: seats the words of the model's tables.
        validation_losses: passes them on to the optimiser.
    """

    architectures: tuple[str, ...]
    stock_task: str
    threshold_flag: str
    args: Any
    datasets: dict[str, Any]
    in_order = False

    def __init__(self, args: Any, *dictionaries: Any, **kwargs: Any) -> None:
        super().__init__(args, *dictionaries, **kwargs)  # type: ignore[call-arg]
        self.tables = TaskTables(self.args, self.target_dictionary)  # type: ignore[attr-defined]
        self.validation_losses = ValidationLosses()
        self._started: float | None = None
        self._reallocation_seconds = 0.0

    def text(self, split: str) -> Iterable[np.ndarray]:
        """Yields the words to be predicted of a split as arrays of consecutive text."""
        raise NotImplementedError

    def check_parts(
        self, split: str, folders: Iterable[str], dictionary: Any, suffixes: Sequence[str] = ("",)
    ) -> None:
        """Refuses damaged binarised text, when a split is first loaded.

        Args:
            split: its name.
            folders: where its parts lie, those too that later epochs read.
            dictionary: of their words.
            suffixes: that names of its files may have after the split's.
        """
        if split in self.datasets:
            return
        with usage_errors():
            for folder, suffix in itertools.product(folders, suffixes):
                check_binarised(os.path.join(folder, split), len(dictionary), suffix)

    def table_text(self) -> Iterable[np.ndarray]:
        """Yields the text that tables are made from."""
        return self.text(self.args.train_subset)

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> Any:
        """Sets the task up, after checking the flags and the dictionary."""
        check_flags(args)
        check_checkpoints(*(args.path or "").split(os.pathsep))
        task = super().setup_task(args, **kwargs)  # type: ignore[misc]
        dictionary = task.target_dictionary
        words = range(dictionary.nspecial, len(dictionary))
        if all(dictionary[word].startswith("madeupword") for word in words):
            raise UsageError(
                f"{args.data}: the dictionary has no words but fairseq's own symbols; was "
                "fairseq-preprocess given an empty text?"
            )
        return task

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> nn.Module:
        """Builds a model that seats words; the initial table is seated when training begins."""
        if from_checkpoint:
            _check_size(cfg, len(self.tables.dictionary))
        else:
            check_needs(self.args, cfg)
            if self.args.store_ema:
                mend_averages()
            # fairseq is to read it next; evaluation of another model does not.
            self._take_folder()
            self._check_files()
        if not from_checkpoint and hasattr(cfg, "table_shape"):
            self.tables.read_files(cfg)
            moving = self.args.reallocation_objective == "true-loss"
            settle(cfg, len(self.tables.dictionary), moving and bool(self.args.reallocate_epochs))
        model: nn.Module = super().build_model(cfg, from_checkpoint)  # type: ignore[misc]
        if not isinstance(getattr(model.decoder, "words", None), WordHead):
            arch = f"--arch {getattr(cfg, 'arch', None) or cfg._name} has no word table"
            if from_checkpoint and os.pathsep in (self.args.path or ""):
                raise UsageError(
                    f"--path {self.args.path}: {arch}, and models with and without one cannot be "
                    "in one ensemble"
                )
            raise UsageError(
                f"{arch}: use one of --arch {', '.join(self.architectures)} with this task, or "
                f"--task {self.stock_task} with that model"
            )
        return model

    def _check_files(self) -> None:
        """Refuses checkpoints to begin with that are missing or damaged."""
        restored, begun = self._restored(), self.args.finetune_from_model or ""
        if self.args.restore_file != LAST_CHECKPOINT:
            _require(restored, "--restore-file")
        elif restored != self._last():
            begun = ""
            _require(restored, "--continue-once")
        elif begun and not os.path.isfile(restored):
            _require(begun, "--finetune-from-model")
        check_checkpoints(restored, begun)

    def _take_folder(self) -> None:
        """Makes the folder of checkpoints this training's, and its last checkpoint a whole one."""
        if rank() == 0 and not self.args.no_save:
            lock_folder(self.args.save_dir)
            if self.args.restore_file == LAST_CHECKPOINT:
                put_back_last_checkpoint(self._last())
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            self._check_shared_folder()

    def _check_shared_folder(self) -> None:
        """Refuses a checkpoint that some workers alone see: fairseq's would wait for each other."""
        path = self._restored()
        seen = count_workers(os.path.isfile(path))
        if 0 < seen < world_size():
            raise UsageError(
                f"{path}: {seen} of {world_size()} workers see this checkpoint; give all hosts a "
                "--save-dir (or --restore-file) on a file system that they share, or a copy of it"
            )

    def _restored(self) -> str:
        """Returns the checkpoint that a training goes on from, if there is one."""
        if self.args.restore_file != LAST_CHECKPOINT:
            return self._with_suffix(str(self.args.restore_file))
        last, once = self._last(), self.args.continue_once
        return str(once) if once and not os.path.isfile(last) else last

    def _last(self) -> str:
        return os.path.join(self.args.save_dir, self._with_suffix(LAST_CHECKPOINT))

    def _with_suffix(self, file: str) -> str:
        return file.replace(".pt", f"{self.args.checkpoint_suffix}.pt")

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns batches, which go on in an epoch that another number of workers began.

        ``--skip-invalid-size-inputs-valid-test`` skips texts of more than ``--max-tokens`` too, at
        which fairseq would stop.
        """
        if self.args.skip_invalid_size_inputs_valid_test and kwargs.get("ignore_invalid_inputs"):
            limits = kwargs.get("max_positions"), kwargs.get("max_tokens")
            kwargs["max_positions"] = resolve_max_positions(*limits)
        found = super().get_batch_iterator(dataset, *args, **kwargs)  # type: ignore[misc]
        if type(found) is EpochBatchIterator:  # which fairseq names amid what else it does
            found.__class__ = DealtBatches
        return found

    def build_generator(
        self, models: Any, args: Any, seq_gen_cls: Any = None, *more: Any, **kwargs: Any
    ) -> Any:
        """Builds fairseq's generator, which asks for no more words than it can choose."""
        if seq_gen_cls is None and not getattr(args, "print_alignment", None):
            seq_gen_cls = TopWordsGenerator
        generator = super().build_generator(  # type: ignore[misc]
            models, args, seq_gen_cls, *more, **kwargs
        )
        forbid_repetitions(generator)
        return generator

    def build_criterion(self, cfg: Any) -> Any:
        """Builds the criterion that knows components, whichever of fairseq's like it is named."""
        name = getattr(cfg, "_name", None) or getattr(cfg, "criterion", None)
        if name in _SAME_CRITERIONS:
            for flag in ("ignore_prefix_size", "report_accuracy"):
                if getattr(cfg, flag, False):
                    raise UsageError(
                        f"--{flag.replace('_', '-')} is unknown to --criterion {CRITERION}, which "
                        f"takes the place of {name}; leave it out"
                    )
            smoothing = float(getattr(cfg, "label_smoothing", 0.0))
            logger.info(
                f"--criterion {CRITERION}, with label smoothing {smoothing:g}, in place of {name}: "
                "the only one that trains a model with a word table"
            )
            cfg = OmegaConf.create({"_name": CRITERION, "label_smoothing": smoothing})
        elif name != CRITERION:
            raise UsageError(
                f"--criterion {name} cannot train a model with a word table: leave the flag out, "
                f"or use --criterion {CRITERION}"
            )
        return build_criterion(cfg, self)

    def begin_epoch(self, epoch: int, model: nn.Module) -> None:
        """Seats the initial table, or re-seats the words after an epoch of the schedule.

        fairseq calls this again for the same epoch after a resume in mid-epoch; the model's
        buffers tell that the work is done.
        """
        super().begin_epoch(epoch, model)  # type: ignore[misc]
        words: Any = model.decoder.words  # type: ignore[union-attr]
        if self._started is None:
            self._started = time.monotonic()
            self._check_validation(model)
            if words.round >= 0:
                self._go_on(model)
            elif rank() == 0:
                self._warn_of_unknown_words()
        schedule = reallocation_epochs(self.args.reallocate_epochs, self.args.max_epoch)
        if words.round < 0:
            self._seat_initial_tables(model)
        elif epoch - 1 in schedule and words.epoch < epoch - 1:
            self._reallocate(epoch - 1, model)

    def _go_on(self, model: Any) -> None:
        """Takes note of a model that a checkpoint has seated already.

        What belongs to a training does not travel with a model: one that begins from another's
        checkpoint counts its own epochs.
        """
        words: WordHead = model.decoder.words
        goes_on = self.args.continue_once or os.path.isfile(self._last())
        tuned = self.args.finetune_from_model and not goes_on
        if tuned or self.args.reset_dataloader:
            words.round.fill_(0)
            words.epoch.fill_(0)
            self.tables.forget_reports()
        logger.info(
            f"the checkpoint seats the words: {words.table.table()}; --initial-table "
            f"{self.args.initial_table} is not used"
        )
        self._save_tables(model)

    def _save_tables(self, model: Any) -> None:
        """Writes tables that the save directory lacks, or has others of."""
        self.tables.save_others(model.decoder.words)

    def _validated(self) -> list[str]:
        """Returns the splits that this training validates on."""
        names = [] if self.args.disable_validation else str(self.args.valid_subset).split(",")
        return [name for name in names if name in self.datasets]

    def _check_validation(self, model: Any) -> None:
        """Refuses a text that validation would stop at, before anything is trained or saved."""
        if self.in_order or self.args.skip_invalid_size_inputs_valid_test:
            return
        most = resolve_max_positions(
            self.max_positions(),  # type: ignore[attr-defined]
            model.max_positions(),
            self.args.max_tokens_valid,
        )
        for split in self._validated():
            longest, limits = np.max(self.datasets[split].sizes, axis=0), np.array(most)
            if np.any(longest > limits):
                raise UsageError(
                    f"a text of {np.max(longest)} words in the split {split!r} is longer than "
                    f"{np.min(limits)}, the most that --max-tokens-valid and the model allow: "
                    "raise that, or add --skip-invalid-size-inputs-valid-test to leave it out"
                )

    def _warn_of_unknown_words(self) -> None:
        """Warns where validation has unknown words and the training text has none."""
        unknown = self.tables.dictionary.unk()
        for split in self._validated():
            counts = [(int((piece == unknown).sum()), len(piece)) for piece in self.text(split)]
            found, words = map(sum, zip(*counts, strict=True))
            training = self.text(self.args.train_subset)
            if found and not any((piece == unknown).any() for piece in training):
                logger.warning(
                    f"{found / words:.2%} of the words of {split!r} are unknown, and no word of "
                    "the training text is: nothing is learnt of unknown words, so perplexities "
                    f"mean little and rise. Give fairseq-preprocess {self.threshold_flag} 2"
                )
                return

    def _table_maker(self, dictionary: Any, text: Any) -> Any:
        """Returns a maker of tables of a dictionary's words; importing it takes a second."""
        from fairseq_lightrnn.allocation.initial_table import TableMaker

        counts = np.array(dictionary.count, dtype=np.int64)
        return TableMaker(len(dictionary), counts, text, self.args.seed, dictionary.symbols)

    def _seat_initial_tables(self, model: nn.Module) -> None:
        maker = self._table_maker(self.tables.dictionary, self.table_text)
        self.tables.seat_initial(model.decoder.words, maker)  # type: ignore[arg-type,union-attr]

    def _reallocate(self, epoch: int, model: nn.Module) -> None:
        words: Any = model.decoder.words  # type: ignore[union-attr]
        start = time.monotonic()
        title = f"reallocation after epoch {epoch}"
        folder = tempfile.gettempdir() if self.args.no_save else self.args.save_dir
        report = Reallocator(self, as_trained=True).move_words(model, title, folder)
        words.round.add_(1)
        words.epoch.fill_(epoch)
        end = time.monotonic()
        self._reallocation_seconds += end - start
        if report is None:
            return
        share = self._reallocation_seconds / (end - (self._started or start))
        report |= {
            "epoch": epoch,
            "round": int(words.round),
            "seconds": {part: round(spent, 3) for part, spent in report["seconds"].items()},
            "share_of_training": round(share, 5),
        }
        log_reallocation(title, report, words.table.table())
        self.tables.save_all(words, further="tables" in report)  # where they moved
        self.tables.add_report(report)

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """Takes an optimisation step."""
        super().optimizer_step(optimizer, model=model, update_num=update_num)  # type: ignore[misc]
        self.validation_losses.updated(optimizer, update_num + 1)

    def valid_step(self, sample: Any, model: Any, criterion: Any) -> Any:
        """Computes the loss of a batch, which is empty where workers outnumber the batches."""
        if not sample:
            return 0.0, 0, {}
        return super().valid_step(sample, model, criterion)  # type: ignore[misc]

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """Is called before each validation."""
        super().begin_valid_epoch(epoch, model)  # type: ignore[misc]
        self.validation_losses.begin()

    def post_validate(self, model: Any, stats: dict[str, Any], agg: Any) -> None:
        """Is called after each validation subset, with what will be logged of it."""
        self.validation_losses.validated(float(stats["loss"]))


def _require(path: str, flag: str) -> None:
    """Refuses a checkpoint that is not there, whole or in shards."""
    shards = f"{glob.escape(path.removesuffix('.pt'))}-*.pt"
    if "://" not in path and not os.path.isfile(path) and not glob.glob(shards):
        raise UsageError(f"{flag} {path}: no such checkpoint")


def _check_size(cfg: Any, words: int) -> None:
    """Refuses a dictionary of more words than a trained model's table has cells for."""
    sizes = str(getattr(cfg, "table_shape", "")).split("x")
    if all(map(str.isdecimal, sizes)) and math.prod(map(int, sizes)) < words:
        raise UsageError(
            f"the model has at most {math.prod(map(int, sizes))} words, the dictionary {words}: "
            "give the binarised data that the model was trained on, with the same --source-lang "
            "and --target-lang, if any"
        )
