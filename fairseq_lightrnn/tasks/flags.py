"""Flags of the word table that all tasks have, and which values they refuse."""

# ruff: noqa: UP045  (fairseq reads flags from Optional[...], not from X | None)

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from fairseq_lightrnn.damage import checkpoint_damage
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.tasks.schedule import reallocation_epochs

__all__ = [
    "REALLOCATION_MEMORY",
    "NEEDS",
    "Need",
    "TableTaskConfig",
    "check_checkpoints",
    "check_flags",
    "check_needs",
]

logger = logging.getLogger(__name__)

REALLOCATION_MEMORY = 8.0
"""GiB that a reallocation may take unless told otherwise."""


@dataclass
class TableTaskConfig(FairseqDataclass):
    initial_table: str = field(
        default="cooccurrence",
        metadata={
            "help": "how words are seated before training: random, frequency (frequent words "
            "share rows), cooccurrence (words used alike share rows and columns), or a word "
            "table file that this plugin wrote"
        },
    )
    reallocate_epochs: Optional[str] = field(
        default=None,
        metadata={
            "help": "re-seat the words after these epochs, such as 3,6 or 2-5 (default: the tables "
            "stay)"
        },
    )
    reallocation_objective: ChoiceEnum(["true-loss", "row-first", "joint"]) = field(  # type: ignore[valid-type]
        default="true-loss",
        metadata={
            "help": "what a reallocation minimises: the loss that training minimises, moves that "
            "do not lower it being taken back (true-loss); or what was measured before any word "
            "moved: the sum over rows and columns as in the paper (joint), or rows first, then "
            "columns within each row (row-first)"
        },
    )
    reallocation_words: Optional[int] = field(
        default=None,
        metadata={
            "help": "seat words by about this many words of text, spread evenly over the "
            "training split, and measure the new table of true-loss by others (default: "
            "by all, measured by 131,072 of them)"
        },
    )
    reallocation_memory: float = field(
        default=REALLOCATION_MEMORY,
        metadata={
            "help": "GiB that a reallocation's statistics, costs and memories of the text may "
            "take, besides some 300 bytes a word; statistics that do not fit go to a file in the "
            "save directory while they are needed; a text that does not fit is read several times; "
            "where the costs of cells do not fit, frequent words alone are moved"
        },
    )
    max_epoch: int = II("optimization.max_epoch")
    max_tokens: Optional[int] = II("dataset.max_tokens")
    max_tokens_valid: Optional[int] = II("dataset.max_tokens_valid")
    batch_size: Optional[int] = II("dataset.batch_size")
    batch_size_valid: Optional[int] = II("dataset.batch_size_valid")
    num_workers: int = II("dataset.num_workers")  # of checkpoints that have it
    skip_remainder_batch: Optional[bool] = II("optimization.skip_remainder_batch")
    sentence_avg: bool = II("optimization.sentence_avg")
    seed: int = II("common.seed")
    train_subset: str = II("dataset.train_subset")
    save_dir: str = II("checkpoint.save_dir")
    restore_file: str = II("checkpoint.restore_file")
    finetune_from_model: Optional[str] = II("checkpoint.finetune_from_model")
    continue_once: Optional[str] = II("checkpoint.continue_once")
    checkpoint_suffix: str = II("checkpoint.checkpoint_suffix")
    reset_dataloader: bool = II("checkpoint.reset_dataloader")
    path: Optional[str] = II("common_eval.path")
    no_save: bool = II("checkpoint.no_save")
    store_ema: bool = II("ema.store_ema")
    valid_subset: str = II("dataset.valid_subset")
    skip_invalid_size_inputs_valid_test: bool = II("dataset.skip_invalid_size_inputs_valid_test")
    disable_validation: bool = II("dataset.disable_validation")
    update_epoch_batch_itr: bool = II("dataset.update_epoch_batch_itr")
    update_ordered_indices_seed: bool = II("dataset.update_ordered_indices_seed")
    log_format: Optional[str] = II("common.log_format")
    log_interval: int = II("common.log_interval")


def check_flags(args: Any) -> None:
    """Refuses flags of reallocation that have no meaning."""
    reallocation_epochs(args.reallocate_epochs, args.max_epoch)
    for name in ("reallocation_words", "reallocation_memory"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be above 0")


class Need(NamedTuple):
    """A flag that has an effect only where something else holds.

    Attributes:
        flag: as it is given.
        given: tells of a task's flags whether it is.
        met: tells whether it has an effect.
        advice: what to do otherwise.
    """

    flag: str
    given: Callable[[Any], Any]
    met: Callable[[Any], Any]
    advice: str


def _reallocates(args: Any) -> bool:
    return bool(args.reallocate_epochs)


def _carries(args: Any) -> bool:
    return bool(getattr(args, "carry_hidden_state", False))


def _field_of(flag: str) -> str:
    """Returns the name of a flag's value among fairseq's."""
    return flag.removeprefix("--").replace("-", "_")


def _needs_schedule(flag: str, default: str | None = None) -> Need:
    name = _field_of(flag)
    return Need(
        flag,
        lambda args: str(getattr(args, name)) not in ("None", str(default)),
        _reallocates,
        "is heeded by reallocations; give --reallocate-epochs too, or leave it out",
    )


def _needs_independent_texts(flag: str, given: Callable[[Any], Any] | None = None) -> Need:
    name = _field_of(flag)
    return Need(
        flag,
        given or (lambda args: getattr(args, name, False)),
        lambda args: not _carries(args),
        "has no effect with --carry-hidden-state, which reads --batch-size lanes in blocks of "
        "--tokens-per-sample; leave it out",
    )


NEEDS = (
    _needs_schedule("--reallocation-objective", "true-loss"),
    _needs_schedule("--reallocation-words"),
    _needs_schedule("--reallocation-memory", str(REALLOCATION_MEMORY)),
    Need(
        "--random-block-lengths",
        lambda args: getattr(args, "random_block_lengths", False),
        _carries,
        "draws the blocks of --carry-hidden-state; give that flag too, or neither",
    ),
    _needs_independent_texts("--max-tokens", lambda args: args.max_tokens is not None),
    _needs_independent_texts(
        "--max-tokens-valid", lambda args: args.max_tokens_valid not in (None, args.max_tokens)
    ),
    _needs_independent_texts(
        "--batch-size-valid", lambda args: args.batch_size_valid not in (None, args.batch_size)
    ),
    _needs_independent_texts("--skip-remainder-batch"),
    _needs_independent_texts(
        "--shorten-method", lambda args: str(getattr(args, "shorten_method", "none")) != "none"
    ),
    _needs_independent_texts("--shorten-data-split-list"),
    _needs_independent_texts("--pad-to-fixed-length"),
    _needs_independent_texts("--pad-to-fixed-bsz"),
    Need(
        "--update-ordered-indices-seed",
        lambda args: args.update_ordered_indices_seed,
        lambda args: args.update_epoch_batch_itr,
        "has no effect on batches that are made once; give --update-epoch-batch-itr True too, or "
        "leave it out",
    ),
    Need(
        "--sentence-avg",
        lambda args: args.sentence_avg,
        lambda args: False,
        "has no effect on a loss that is a mean over words; leave it out",
    ),
)
"""Flags of a training that would be without effect, silently, but for this table."""


def check_needs(args: Any, model: Any) -> None:
    """Refuses flags of a training that have no effect beside the others.

    Args:
        args: the task's flags.
        model: the model's.
    """
    for need in NEEDS:
        if need.given(args) and not need.met(args):
            raise UsageError(f"{need.flag} {need.advice}")
    if getattr(model, "keep_input_table", False) and not _reallocates(args):
        logger.warning(
            "--keep-input-table: no epoch of --reallocate-epochs moves words, so both tables stay "
            "the same until lightrnn-reallocate moves them"
        )


def check_checkpoints(*paths: str) -> None:
    """Refuses checkpoints that are damaged, which torch reads, or reports without their name."""
    for path in paths:
        damage = checkpoint_damage(path) if os.path.isfile(path) else None
        if damage:
            raise UsageError(
                f"{path}: the checkpoint {damage}; remove it, or go on from another one with "
                "--restore-file"
            )
