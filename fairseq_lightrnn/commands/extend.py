"""``lightrnn-extend``: new words for a trained model, or fewer."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary
from omegaconf import open_dict

from fairseq_lightrnn.checkpoint import (
    find_checkpoint,
    forget_other_parameters,
    load_state,
    save_state,
)
from fairseq_lightrnn.commands.run import command
from fairseq_lightrnn.commands.text import read_texts
from fairseq_lightrnn.core.decoder import Decoder
from fairseq_lightrnn.core.features import WordBias
from fairseq_lightrnn.core.seats import Seats
from fairseq_lightrnn.files import check_new_folder, whole_folder
from fairseq_lightrnn.language_model import LanguageModel
from fairseq_lightrnn.models.vocabulary import vocabulary_digest
from fairseq_lightrnn.models.word_head import WordHead
from fairseq_lightrnn.new_words import Seated, count_new_words, seat_new_words
from fairseq_lightrnn.perplexity import perplexity
from fairseq_lightrnn.resizing import grown_shape, resize
from fairseq_lightrnn.runtime.seating import nearest_empty

__all__ = ["main"]

logger = logging.getLogger(__name__)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lightrnn-extend",
        description="Give a trained model words that it does not know, seated by the text that "
        "they come from, or take words from it. Nothing else of the model changes.",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint file, or folder with checkpoint_best.pt")
    add("text", nargs="*", help="text with new words, a sentence a line, plain or .gz; a list, a "
        "word a line, will do, but tells nothing of their use; - is the standard input"
        )  # fmt: skip
    add("--drop", metavar="FILE", help="take the words of this file from the model")
    add("--min-count", type=int, metavar="N", help="add words that the text has so "
        "often (default: 1)")  # fmt: skip
    add("-o", "--output", required=True, metavar="DIR", help="a new folder: checkpoint_best.pt "
        "and the dictionary that belongs to it are written there")  # fmt: skip
    add("--data", metavar="DIR", help="folder with dict.txt (default: that of the training, or "
        "what lies beside the checkpoint)")  # fmt: skip
    return parser.parse_intermixed_args(arguments)


@command("lightrnn-extend", _parse)
def main(args: argparse.Namespace) -> None:
    """Adds and drops words as the flags ask for."""
    folder = Path(args.output)
    if not args.text and args.drop is None:
        raise ValueError("nothing to do: give text with new words, or --drop")
    check_new_folder(folder, "--output")
    if args.min_count is not None and not args.text:
        raise ValueError(f"--min-count {args.min_count} is for words of a text; give one")
    least = 1 if args.min_count is None else args.min_count
    if least < 1:
        raise ValueError(f"--min-count {least}: must be at least 1")
    checkpoint = find_checkpoint(args.checkpoint)
    model = LanguageModel.from_pretrained(checkpoint, args.data)
    if not isinstance(model.decoder, Decoder):
        raise ValueError(f"{checkpoint}: only models with an LSTM can be given words")
    state = load_state(checkpoint)
    lines = list(read_texts(args.text)) if args.text else []
    kept = _kept(model, args.drop)
    counts = count_new_words(model, lines)
    words = [word for word, count in counts.items() if count >= least]
    if args.text and not words and args.drop is None:
        rare = f" {least} times (--min-count)" if counts else ""
        raise ValueError(
            f"{', '.join(args.text)}: holds no word that the model does not know{rare}"
        )
    old = model.table.table()
    shape = grown_shape(old.shape, len(kept) + len(words))
    dictionary = _dictionary(model, kept, {word: counts[word] for word in words})
    state["model"] = _resized(model, state["model"], kept, words, lines, shape)
    state["model"] |= {
        name: torch.tensor(vocabulary_digest(dictionary.symbols))
        for name in state["model"]
        if name.endswith("vocabulary.digest")
    }
    with open_dict(state["cfg"]):
        state["cfg"].model.table_shape = "x".join(map(str, shape))
        state["cfg"].task.data = str(folder.resolve())
    forget_other_parameters(state)
    _forget_text(state["extra_state"])
    with whole_folder(folder) as partial:
        dictionary.save(str(partial / "dict.txt"))
        save_state(state, partial / "checkpoint_best.pt")
    _report(model, LanguageModel.from_pretrained(folder), lines, len(words), old.shape, shape)


def _forget_text(extra: dict[str, Any]) -> None:
    """Removes from a checkpoint what it says of the text, which has other words from now on.

    That is the loss that a better checkpoint must have, and the place in the epoch.
    """
    extra.pop("best", None)
    if "train_iterator" in extra:
        extra["train_iterator"]["iterations_in_epoch"] = 0


def _kept(model: LanguageModel, drop: str | None) -> torch.Tensor:
    """Returns the words that stay."""
    dictionary = model.dictionary
    dropped = set()
    lines = [] if drop is None else read_texts([drop])
    for word in filter(None, map(str.strip, lines)):
        number = dictionary.indices.get(word)
        if number is None:
            raise ValueError(f"--drop {drop}: {word!r} is not in the dictionary")
        if number < dictionary.nspecial:
            raise ValueError(f"--drop {drop}: {word!r} cannot be dropped")
        dropped.add(number)
    return torch.tensor([word for word in range(len(dictionary)) if word not in dropped])


def _dictionary(model: LanguageModel, kept: torch.Tensor, new: dict[str, int]) -> Dictionary:
    old, result = model.dictionary, Dictionary()
    if len(set(old.symbols)) < len(old):
        raise ValueError(
            "the model's dictionary has words twice (#fairseq:overwrite): make one without, and "
            "train on text that is binarised by it"
        )
    for word in kept[result.nspecial :].tolist():
        result.add_symbol(old[word], n=old.count[word], overwrite=True)
    for name, count in new.items():
        result.add_symbol(name, n=count)
    return result


def _resized(
    model: LanguageModel,
    state: dict[str, torch.Tensor],
    kept: torch.Tensor,
    words: Sequence[str],
    lines: Sequence[str],
    shape: tuple[int, ...],
) -> dict[str, torch.Tensor]:
    """Returns the parameters of the new model, its words seated."""
    decoder, tables = model.decoder, model.model.decoder.words.further_tables
    taken = [_cells(table, kept, shape) for table in (decoder.head.table, *tables)]
    seated = seat_new_words(model, words, lines, shape, taken[0], taken[1:]) if words else Seated(
        *(np.zeros((len(tables), 0) if i == 1 else 0, dtype=np.int64) for i in range(4))
    )  # fmt: skip
    cells = _new_cells(model.model.decoder.words, seated, kept, shape)
    columns = shape[-1] - decoder.head.table.shape[-1]
    result = resize(model.model, state, kept, len(words), columns)
    for name, module in model.model.named_modules(remove_duplicate=False):
        key = f"{name}.coordinates"
        if isinstance(module, Seats) and key in result and words:
            coordinates = np.stack(np.unravel_index(cells[module], shape), axis=1)
            result[key][-len(words) :] = torch.from_numpy(coordinates)
        if isinstance(module, WordBias) and f"{name}.bias" in result and words:
            result[f"{name}.bias"][-len(words) :] = torch.from_numpy(seated.biases)
        if module is decoder.head.softmax and columns and len(seated.column_biases):
            result[f"{name}.bias"][-columns:] = torch.from_numpy(seated.column_biases)
    return result


def _new_cells(
    words: WordHead, seated: Seated, kept: torch.Tensor, shape: tuple[int, ...]
) -> dict[Seats, np.ndarray]:
    """Returns the cells of the new words in each table."""
    cells = [seated.cells, *seated.further_cells]
    result = dict(zip([words.table, *words.further_tables], cells, strict=True))
    if words.input_table is not None:
        read_by = [words.input_table, *words.further_input_tables]
        for table, predicted in zip(read_by, cells, strict=True):
            result[table] = _beside(predicted, _cells(table, kept, shape), shape)
    return result


def _cells(seats: Seats, kept: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the cells of the words that stay, in the grown table."""
    coordinates = seats.coordinates[kept].numpy()
    return np.asarray(np.ravel_multi_index(tuple(coordinates.T), shape))


def _beside(cells: np.ndarray, taken: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Seats new words in a table that words are read by alone: where they are predicted, if empty.

    Otherwise as near as an empty cell is in row-major order.
    """
    free = np.ones(math.prod(shape), dtype=bool)
    free[taken] = False
    result = []
    for cell in cells.tolist():
        nearest = nearest_empty(free, cell)
        free[nearest] = False
        result.append(nearest)
    return np.array(result, dtype=np.int64)


def _report(
    old: LanguageModel,
    new: LanguageModel,
    lines: Sequence[str],
    added: int,
    before: tuple[int, ...],
    after: tuple[int, ...],
) -> None:
    def show(name: str, *values: Any) -> None:
        print(name, *values, sep="\t")

    show("words", len(old.dictionary), len(new.dictionary))
    show("new words", added)
    show("table", "x".join(map(str, before)), "x".join(map(str, after)))
    for model, name in ((old, "perplexity before, new words as <unk>"), (new, "perplexity after")):
        scores = model.score(list(lines)) if lines else []
        total = sum(score.log_prob for score in scores)
        size = sum(len(score.tokens) for score in scores)
        show(name, f"{perplexity(total, size):.3f}" if size else "NA")


if __name__ == "__main__":
    sys.exit(main())
