"""Finds trained language models, the words that belong to them, and the device to run them on."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.damage import checkpoint_damage
from fairseq_lightrnn.errors import value_errors
from fairseq_lightrnn.files import whole_file
from fairseq_lightrnn.models.vocabulary import vocabulary_digest

__all__ = [
    "build_model",
    "find_checkpoint",
    "find_device",
    "find_dictionary",
    "forget_other_parameters",
    "language_model_tables",
    "load_state",
    "save_state",
]

logger = logging.getLogger(__name__)

_CHECKPOINT_NAMES = ("checkpoint_best.pt", "checkpoint_last.pt")
# What torch raises for files that are no checkpoints, or truncated ones.
_DAMAGE = (
    OSError, RuntimeError, EOFError, pickle.PickleError, zipfile.BadZipFile, LookupError, TypeError,
    AttributeError, ValueError, ImportError, AssertionError, MemoryError, OverflowError,
)  # fmt: skip
# Training writes the newest table here, and one of each round under the epoch's number.
_TABLE_FILES = ("word_table.txt", "word_table.epoch*.txt")


def find_checkpoint(path: str | Path) -> Path:
    """Returns a checkpoint file, or of a folder the best checkpoint.

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    for name in _CHECKPOINT_NAMES:
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise ValueError(f"{path}: this folder has none of {', '.join(_CHECKPOINT_NAMES)}")
    raise ValueError(f"{path}: no such checkpoint")


def save_state(state: dict[str, Any], checkpoint: str | Path) -> None:
    """Writes what fairseq saves of a training, whole or not at all."""
    flags = OmegaConf.to_container(state["cfg"], resolve=True, enum_to_str=True)
    with whole_file(checkpoint, binary=True) as file:
        torch.save({**state, "cfg": flags}, file)


def forget_other_parameters(state: dict[str, Any]) -> None:
    """Removes from a checkpoint what belongs to parameters of other shapes than it has now.

    Those are the optimiser's moments and ``--store-ema``'s average, which begins anew.
    """
    state["last_optimizer_state"] = None
    for name in ("ema", "ema_fp32_params"):
        state["extra_state"].pop(name, None)


def load_state(checkpoint: str | Path) -> dict[str, Any]:
    """Reads what fairseq saved of a training.

    Raises:
        ValueError: if the file is no checkpoint.
    """
    try:
        damage = checkpoint_damage(checkpoint)
    except OSError as error:
        raise ValueError(f"{checkpoint}: {error.strerror}") from None
    if damage:
        logger.debug("%s %s", checkpoint, damage)
        raise ValueError(f"{checkpoint}: not a checkpoint of fairseq, or a damaged one")
    try:
        state: dict[str, Any] = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
        # What is no checkpoint has none of these.
        if not all(isinstance(value, Tensor) for value in state["model"].values()):
            raise TypeError
        state["cfg"].model, state["cfg"].task
    except _DAMAGE:
        logger.debug("loading %s failed", checkpoint, exc_info=True)
        raise ValueError(f"{checkpoint}: not a checkpoint of fairseq, or a damaged one") from None
    return state


def build_model(task: Any, state: dict[str, Any], checkpoint: str | Path) -> Any:
    """Builds the model of a checkpoint.

    Args:
        task: knows its words.
        state: what :func:`load_state` read.
        checkpoint: for errors.

    Raises:
        ValueError: if the checkpoint does not hold the model that it describes.
    """
    flags = state["cfg"].model
    try:
        with value_errors():
            model = task.build_model(flags, from_checkpoint=True)
            model.load_state_dict(state["model"], strict=True, model_cfg=flags)
    except (
        RuntimeError, LookupError, AttributeError, TypeError, OmegaConfBaseException,
    ) as error:  # fmt: skip
        logger.debug("loading %s failed", checkpoint, exc_info=True)
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{checkpoint}: does not fit the model that it describes; was it written by "
            f"another version? ({reason})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    return model


def language_model_tables(checkpoint: str | Path, state: dict[str, Any]) -> list[np.ndarray]:
    """Returns the coordinates (V, k) of a language model's words in each of its tables.

    Raises:
        ValueError: if the checkpoint holds another model.
    """
    tables = [
        value.numpy() for name, value in state["model"].items() if name.endswith(".coordinates")
    ]
    if not tables:
        raise ValueError(
            f"{checkpoint}: holds no LightRNN language model (no word table); give a checkpoint of "
            "--task lightrnn_language_modeling"
        )
    if any(name.startswith("encoder.") for name in state["model"]):
        raise ValueError(
            f"{checkpoint}: holds a translation model, which fairseq-generate (for scores with "
            "--score-reference) and fairseq-interactive use; its word table is the "
            "word_table.txt in the same folder"
        )
    return tables


def find_device(name: str | torch.device) -> torch.device:
    """Returns a device.

    Raises:
        ValueError: if there is none of that name here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).splitlines()[:1])
        raise ValueError(f"there is no device {str(name)!r} here ({reason})") from None
    return device


def find_dictionary(
    checkpoint: Path,
    tables: list[np.ndarray],
    data: str | Path | None,
    recorded: str | None,
    digest: int | None = None,
) -> Dictionary:
    """Finds the words of a language model.

    Args:
        checkpoint: of the model.
        tables: where its words sit; see :func:`language_model_tables`.
        data: the folder of ``dict.txt``, or such a file. By default it is looked for where the
            training had its data, then beside the checkpoint. Failing that, words are taken from a
            word table file beside the checkpoint that seats as many words in the same cells.
        recorded: where the training had its data.
        digest: of the words, if it is known; see :func:`vocabulary_digest`.

    Raises:
        ValueError: if the words are not found, or are not the model's.
    """
    if data is not None:
        places = [Path(data)]
    else:
        places = [Path(part) for part in utils.split_paths(recorded or "")[:1]]
        places.append(checkpoint.parent)
    files = [place if place.is_file() else place / "dict.txt" for place in places]
    others = []
    for file in files:
        if not file.is_file():
            continue
        dictionary = _load_dictionary(file)
        reason = None
        if len(dictionary) != len(tables[0]):
            reason = f"has {len(dictionary)} words, the model of {checkpoint} has {len(tables[0])}"
        elif digest not in (None, vocabulary_digest(dictionary.symbols)):
            reason = f"has other words than the model of {checkpoint}, or in another order"
        if reason is None:
            return dictionary
        others.append(f"{file}: {reason}; give the dictionary that it was trained with")
    if data is not None:
        raise ValueError(
            others[0] if others else f"{files[0]}: no such dictionary; --data names its folder"
        )
    for file in _table_files(checkpoint.parent):
        found = _dictionary_of_table(file, tables)
        if found is not None:
            logger.info("the words are those of %s", file)
            return found
    tried = " nor ".join(map(str, files))
    raise ValueError(
        others[0]
        if others
        else f"{checkpoint}: its dictionary is neither {tried}, and no word table file of the "
        "model lies beside the checkpoint; name the folder of the binarised data with --data"
    )


def _load_dictionary(file: Path) -> Dictionary:
    try:
        return Dictionary.load(str(file))
    except (OSError, ValueError):
        raise
    except Exception as error:  # fairseq's own, of bytes that are not UTF-8 and of doubled words
        raise ValueError(f"{file}: {error}") from error


def _table_files(folder: Path) -> Iterator[Path]:
    for pattern in _TABLE_FILES:
        yield from sorted(folder.glob(pattern))


def _dictionary_of_table(file: Path, tables: list[np.ndarray]) -> Dictionary | None:
    """Returns the words of a table file if it is one of a model's tables, otherwise None."""
    dictionary = Dictionary()
    try:
        symbols, table = WordTable.load_with_symbols(file)
    except (OSError, ValueError):
        logger.debug("%s is no table", file, exc_info=True)
        return None
    if not any(np.array_equal(table.coordinates, coordinates) for coordinates in tables):
        return None
    special = dictionary.nspecial
    if symbols[:special] != dictionary.symbols:
        return None
    for symbol in symbols[special:]:
        dictionary.add_symbol(symbol, n=0, overwrite=True)
    return dictionary
