"""Reading and writing of word table files: a readable one of our own, and CNTK's pair.

Our file::

    # fairseq_lightrnn word table 1 words 10000 shape 100x100
    <s> 0 0
    <pad> 17 3
    ...
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

__all__ = ["read", "read_cntk", "write", "write_cntk"]

_MAGIC = "# fairseq_lightrnn word table 1 words"


def _write_whole(path: Path, lines: Iterable[str]) -> None:
    """Writes lines to a file that appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such word table file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a word table, its bytes are not UTF-8 ({error})") from error
    # Words may hold any Unicode separator: only newlines end a line.
    return text.removesuffix("\n").split("\n")


def _check_symbols(symbols: Sequence[str], count: int) -> None:
    if len(symbols) != count:
        raise ValueError(f"the table has {count} words, {len(symbols)} symbols were given")


def write(
    path: str | Path, symbols: Sequence[str], coordinates: np.ndarray, shape: Sequence[int]
) -> None:
    """Writes a table in our format."""
    _check_symbols(symbols, len(coordinates))
    header = f"{_MAGIC} {len(coordinates)} shape {'x'.join(map(str, shape))}"
    rows = (
        f"{symbol} {' '.join(map(str, row))}"
        for symbol, row in zip(symbols, coordinates.tolist(), strict=True)
    )
    _write_whole(Path(path), (line for part in ((header,), rows) for line in part))


def read(path: str | Path, symbols: Sequence[str]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Reads coordinates (V, k) and shape in our format; words must be ``symbols`` in order."""
    path = Path(path)
    lines = _read_lines(path)
    try:
        if not lines[0].startswith(_MAGIC):
            raise ValueError
        count_text, word, shape_text = lines[0][len(_MAGIC) :].split()
        if word != "shape":
            raise ValueError
        count = int(count_text)
        shape = tuple(int(size) for size in shape_text.split("x"))
    except ValueError:
        raise ValueError(
            f"{path}: line 1 is not the header of a word table ('{_MAGIC} N shape RxC')"
        ) from None
    if len(lines) - 1 != count:
        found = len(lines) - 1
        raise ValueError(f"{path}: the header promises {count} words, the file has {found}")
    coordinates = np.empty((count, len(shape)), dtype=np.int64)
    for word_id, line in enumerate(lines[1:]):
        symbol, *numbers = line.rsplit(" ", len(shape))
        if word_id >= len(symbols) or symbol != symbols[word_id]:
            expected = repr(symbols[word_id]) if word_id < len(symbols) else "no further word"
            raise ValueError(
                f"{path}: line {word_id + 2} holds {symbol!r} where the dictionary has {expected}; "
                "the table belongs to another dictionary"
            )
        try:
            coordinates[word_id] = [int(number) for number in numbers]
        except ValueError:
            raise ValueError(
                f"{path}: line {word_id + 2} is {line!r}, expected a word and {len(shape)} "
                "coordinates"
            ) from None
    if count < len(symbols):
        raise ValueError(
            f"{path}: the dictionary's word {symbols[count]!r} (id {count}) is missing; "
            "the table belongs to another dictionary"
        )
    return coordinates, shape


def write_cntk(
    directory: str | Path,
    symbols: Sequence[str],
    coordinates: np.ndarray,
    specials: Mapping[str, str],
) -> None:
    """Writes ``vocab.txt`` (a word a line) and ``word-k.location`` (N lines of N word ids)."""
    _check_symbols(symbols, len(coordinates))
    directory = Path(directory)
    names = [specials.get(symbol, symbol) for symbol in symbols]
    seen: dict[str, int] = {}
    for word, name in enumerate(names):
        if not name or any(character.isspace() for character in name):
            raise ValueError(
                f"word {word} would be {name!r} in vocab.txt, which holds words without spaces"
            )
        if seen.setdefault(name, word) != word:
            raise ValueError(f"words {seen[name]} and {word} would both be {name!r} in vocab.txt")
    size = int(coordinates.max(initial=0)) + 1
    while size * size < len(coordinates):
        size += 1
    square = np.full((size, size), -1, dtype=np.int64)
    square[coordinates[:, 0], coordinates[:, 1]] = np.arange(len(coordinates))
    directory.mkdir(parents=True, exist_ok=True)
    _write_whole(directory / "vocab.txt", names)
    rows = (" ".join(map(str, row)) for row in square.tolist())
    _write_whole(directory / "word-k.location", rows)


def _read_cntk_square(path: Path, num_names: int) -> np.ndarray:
    """Reads ``word-k.location`` into an (N, N) array of CNTK's word ids, -1 where empty."""
    lines = _read_lines(path)
    size = len(lines)
    square = np.empty((size, size), dtype=np.int64)
    for number, line in enumerate(lines):
        try:
            row = [int(entry) for entry in line.split()]
        except ValueError:
            raise ValueError(f"{path}: line {number + 1} holds something else than ids") from None
        if len(row) != size:
            raise ValueError(
                f"{path}: line {number + 1} has {len(row)} entries, the file has {size} lines; "
                "a table is square"
            )
        square[number] = row
    outside = (square < -1) | (square >= num_names)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        wrong = square[row, column]
        raise ValueError(
            f"{path}: line {row + 1} holds id {wrong}, vocab.txt has {num_names} words"
        )
    return square


def read_cntk(
    directory: str | Path, symbols: Sequence[str], specials: Mapping[str, str]
) -> tuple[np.ndarray, int]:
    """Reads CNTK's pair of files into coordinates (V, 2) for ``symbols``, and the square's size."""
    vocabulary = Path(directory) / "vocab.txt"
    location = Path(directory) / "word-k.location"
    names = _read_lines(vocabulary)
    cntk_ids: dict[str, int] = {}
    for number, name in enumerate(names):
        if cntk_ids.setdefault(name, number) != number:
            raise ValueError(
                f"{vocabulary}: {name!r} stands on lines {cntk_ids[name] + 1} and {number + 1}"
            )
    square = _read_cntk_square(location, len(names))
    rows, columns = np.nonzero(square >= 0)
    cell_of: np.ndarray = np.full((len(names), 2), -1, dtype=np.int64)
    for word, row, column in zip(square[rows, columns].tolist(), rows, columns, strict=True):
        if cell_of[word, 0] >= 0:
            raise ValueError(f"{location}: word {names[word]!r} (id {word}) has two cells")
        cell_of[word] = row, column

    empty = iter(np.argwhere(square < 0))
    coordinates = np.empty((len(symbols), 2), dtype=np.int64)
    for word, symbol in enumerate(symbols):
        name = specials.get(symbol, symbol)
        if name == "":
            cell = next(empty, None)
            if cell is None:
                raise ValueError(f"{location}: no empty cell is left for the word {symbol!r}")
            coordinates[word] = cell
            continue
        number = cntk_ids.pop(name, -1)
        if number < 0:
            raise ValueError(
                f"{vocabulary}: the dictionary's word {symbol!r} ({name!r} here) is missing"
            )
        if cell_of[number, 0] < 0:
            raise ValueError(f"{location}: the word {name!r} (id {number}) has no cell")
        coordinates[word] = cell_of[number]
    if cntk_ids:
        name, number = next(iter(cntk_ids.items()))
        raise ValueError(
            f"{vocabulary}: line {number + 1} holds {name!r}, which the dictionary does not"
        )
    return coordinates, len(square)
