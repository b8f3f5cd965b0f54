"""``--task lightrnn_translation``: fairseq's translation with a word table on the target side."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import data_utils
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import nn

from fairseq_lightrnn.core.table import INITIAL_TABLES
from fairseq_lightrnn.criterions import two_component_cross_entropy  # noqa: F401  (registers)
from fairseq_lightrnn.data.target_input import TargetInputDataset, consecutive_text
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.models.flags import further_files
from fairseq_lightrnn.tasks.flags import TableTaskConfig
from fairseq_lightrnn.tasks.table_task import TableTask

__all__ = ["LightRNNTranslationConfig", "LightRNNTranslationTask"]

logger = logging.getLogger(__name__)

_MADE = "cooccurrence"


@dataclass
class LightRNNTranslationConfig(TableTaskConfig, TranslationConfig):
    table_text: ChoiceEnum(["target", "both"]) = field(  # type: ignore[valid-type]
        default="target",
        metadata={
            "help": "text that tells which words --initial-table cooccurrence and further tables "
            "put together: the target's, or both sides, for questions and answers and other texts "
            "in one language; source words that the target lacks count as unknown there. "
            "--source-table shared always takes both"
        },
    )


@register_task("lightrnn_translation", dataclass=LightRNNTranslationConfig)
class LightRNNTranslationTask(TableTask, TranslationTask):
    """Translation, or any text from text, in which target words are seated in a table."""

    architectures = ("lightrnn_translation", "lightrnn_transformer")
    stock_task = "translation"
    threshold_flag = "--thresholdtgt"
    _source_table = "none"

    @property
    def args(self) -> Any:  # type: ignore[override]
        """The flags, under the name that fairseq's older tasks give them."""
        return self.cfg

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> Any:
        """Sets the task up, after checking the flags and the dictionaries."""
        if args.left_pad_target:
            raise UsageError(
                "--left-pad-target: a LightRNN decoder reads targets from their first word on; "
                "leave the flag out"
            )
        _check_data(args)
        return super().setup_task(args, **kwargs)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> nn.Module:
        """Builds a model; the initial tables are seated when training begins."""
        self._source_table = str(getattr(cfg, "source_table", "none"))
        model: Any = super().build_model(cfg, from_checkpoint)
        if hasattr(cfg, "table_shape") and not from_checkpoint:
            self._check_table_flags(cfg)  # of what they come to
        moving = self.args.reallocate_epochs and model.decoder.words.input_table is None
        if self._source_table == "shared" and moving and not from_checkpoint:
            logger.warning(
                "--source-table shared: reallocation heeds the loss of target words alone and "
                "moves words that occur in the source only wherever there is room"
            )
        return model

    def _check_table_flags(self, cfg: Any) -> None:
        """Refuses a text for tables that look at none."""
        kind = self.args.initial_table
        makes_further = str(cfg.further_tables or 0) not in ("0", "") and not further_files(cfg)
        looks = kind == _MADE or (makes_further and kind != "random")
        if str(self.args.table_text) == "both" and not looks:
            raise UsageError(
                f"--table-text both: --initial-table {kind} looks at no text; "
                f"use --initial-table {_MADE}"
            )

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> Any:
        """Loads a split."""
        sides = {
            self.args.source_lang: self.source_dictionary,
            self.args.target_lang: self.target_dictionary,
        }
        for language, dictionary in sides.items():
            self.check_parts(split, self._folders(split), dictionary, self._suffixes(language))
            for path in self._paths(split, language, epoch):
                if os.path.exists(f"{path}.bin") and os.path.getsize(f"{path}.bin") == 0:
                    raise UsageError(
                        f"{path}.bin: the split has no text; give fairseq-preprocess some"
                    )
        try:
            super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)
        except FileNotFoundError as error:
            raise UsageError(f"{error}; was it preprocessed?") from None
        self.datasets[split] = TargetInputDataset(self.datasets[split])

    def _paths(self, split: str, language: str, epoch: int = 1, part: int = 0) -> list[str]:
        """Returns where one side of a split, or of a further part, may lie, without the suffix."""
        folders = self._folders(split)
        name = f"{split}{part or ''}"  # as fairseq calls them: train, train1, train2 ...
        path = os.path.join(folders[(epoch - 1) % len(folders)], name)
        return [path + suffix for suffix in self._suffixes(language)]

    def _folders(self, split: str) -> list[str]:
        folders: list[str] = utils.split_paths(self.args.data)
        return folders if split == self.args.train_subset else folders[:1]

    def _suffixes(self, language: str) -> list[str]:
        source, target = self.args.source_lang, self.args.target_lang
        return [f".{pair}.{language}" for pair in (f"{source}-{target}", f"{target}-{source}")]

    def text(self, split: str) -> Iterator[np.ndarray]:
        """Yields the target side of a split as arrays of consecutive text."""
        return self._side(split, self.args.target_lang)

    def table_text(self) -> Iterator[np.ndarray]:
        """Yields the source side of the training text too, if ``--table-text`` asks for it.

        Or if its words share the table.
        """
        split = self.args.train_subset
        text = self.text(split)
        if self._source_table != "shared" and str(self.args.table_text) == "target":
            return text
        source, target = self.source_dictionary, self.target_dictionary
        in_target = np.array([target.index(word) for word in source.symbols])
        return chain(text, (in_target[piece] for piece in self._side(split, self.args.source_lang)))

    def _side(self, split: str, language: str) -> Iterator[np.ndarray]:
        at_target = language == self.args.target_lang
        dictionary = self.target_dictionary if at_target else self.source_dictionary
        training = split == self.args.train_subset
        for epoch in range(1, len(self._folders(split)) + 1):
            for part in count() if training else range(1):
                paths = self._paths(split, language, epoch, part)
                found = (
                    data_utils.load_indexed_dataset(path, dictionary, self.args.dataset_impl)
                    for path in paths
                )
                sentences = next((some for some in found if some is not None), None)
                if sentences is not None:
                    yield from consecutive_text(sentences)
                elif part:
                    break
                else:
                    raise UsageError(f"{' or '.join(paths)}: no such text; was it preprocessed?")

    def _seat_initial_tables(self, model: nn.Module) -> None:
        super()._seat_initial_tables(model)
        if self._source_table != "own":
            return
        encoder: Any = model.encoder
        source = self.source_dictionary
        kind = self.args.initial_table
        self.tables.seat(
            encoder.embed_tokens.reader.seats,
            kind if kind in INITIAL_TABLES else _MADE,
            None,
            self._table_maker(
                source, lambda: self._side(self.args.train_subset, self.args.source_lang)
            ),
            "source_word_table",
            symbols=source.symbols,
        )

    def _save_tables(self, model: Any) -> None:
        super()._save_tables(model)
        if self._source_table == "own":
            seats = model.encoder.embed_tokens.reader.seats
            self.tables.save_other(seats, 0, "source_word_table", self.source_dictionary.symbols)


def _check_data(args: Any) -> None:
    """Refuses data without a pair of dictionaries."""
    directory = utils.split_paths(args.data)[0]
    if args.source_lang is None or args.target_lang is None:
        if os.path.isdir(directory):
            args.source_lang, args.target_lang = data_utils.infer_language_pair(directory)
        if args.source_lang is None or args.target_lang is None:
            raise UsageError(
                f"{directory}: the language pair cannot be told from the files; give the folder of "
                "binarised data, or --source-lang and --target-lang"
            )
    for language in (args.source_lang, args.target_lang):
        path = os.path.join(directory, f"dict.{language}.txt")
        if not os.path.isfile(path):
            raise UsageError(f"{path}: no such dictionary; was the data preprocessed?")
