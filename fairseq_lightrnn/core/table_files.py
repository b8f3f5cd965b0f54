"""Reading and writing of word table files: a readable one of our own, and CNTK's.

Our file::

    # fairseq_lightrnn word table 1 words 10000 shape 100x100
    <s> 0 0
    <pad> 17 3
    ...

Only a newline ends a line, and the coordinates are what stands behind the last spaces, so that a
word may hold anything else, as in a dictionary of fairseq's.

CNTK's files are those of the authors' release (Examples/Text/LightRNN of microsoft/CNTK):
``vocab.txt``, a word a line, and for each round N of reallocation ``word-N.location``, a square of
word ids, with the words themselves beside it in ``word-N.location.string``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fairseq_lightrnn.files import read_lines, read_text, whole_file

__all__ = ["MOST_CELLS", "read", "read_cntk", "write", "write_cntk"]

MOST_CELLS = 1 << 30
"""Of a table, far beyond any vocabulary: a mistyped shape or a damaged header takes no memory."""

_MAGIC = "# fairseq_lightrnn word table 1 words"
_LOCATION = re.compile(r"word-(\d+)\.location")


def _check_symbols(symbols: Sequence[str], count: int) -> None:
    if len(symbols) != count:
        raise ValueError(f"the table has {count} words, {len(symbols)} symbols were given")


def write(
    path: str | Path, symbols: Sequence[str], coordinates: np.ndarray, shape: Sequence[int]
) -> None:
    """Writes a table in our format.

    Raises:
        ValueError: if a word holds a newline, which fairseq's own files cannot hold either.
    """
    _check_symbols(symbols, len(coordinates))
    with whole_file(path) as file:
        file.write(f"{_MAGIC} {len(coordinates)} shape {'x'.join(map(str, shape))}\n")
        for symbol, row in zip(symbols, coordinates.tolist(), strict=True):
            if "\n" in symbol:
                raise ValueError(f"{path}: the word {symbol!r} holds a newline")
            file.write(f"{symbol} {' '.join(map(str, row))}\n")


def _read_header(path: str | Path, line: str) -> tuple[int, tuple[int, ...]]:
    """Returns the number of words and the shape that the first line of a file promises."""
    try:
        if not line.startswith(_MAGIC):
            raise ValueError
        count_text, word, shape_text = line[len(_MAGIC) :].split()
        if word != "shape":
            raise ValueError
        shape = tuple(int(size) for size in shape_text.split("x"))
        if min(shape) < 1 or math.prod(shape) > MOST_CELLS:
            raise ValueError
        return int(count_text), shape
    except ValueError:
        raise ValueError(
            f"{path}: line 1 is not the header of a word table ('{_MAGIC} N shape RxC')"
        ) from None


def read(path: str | Path) -> tuple[list[str], np.ndarray, tuple[int, ...]]:
    """Reads a table in our format.

    Returns:
        The V words in the order of their ids, their coordinates (V, k), and the shape.
    """
    header, *lines = read_text(path, "word table file").removesuffix("\n").split("\n")
    count, shape = _read_header(path, header)
    if len(lines) != count:
        raise ValueError(f"{path}: the header promises {count} words, the file has {len(lines)}")
    coordinates = np.empty((count, len(shape)), dtype=np.int64)
    symbols = []
    for word, line in enumerate(lines):
        symbol, *numbers = line.rsplit(" ", len(shape))
        symbols.append(symbol)
        try:
            coordinates[word] = [int(number) for number in numbers]
        except (ValueError, OverflowError):
            raise ValueError(
                f"{path}: line {word + 2} is {line!r}, expected a word and {len(shape)} coordinates"
            ) from None
    return symbols, coordinates, shape


def write_cntk(
    directory: str | Path,
    symbols: Sequence[str],
    coordinates: np.ndarray,
    specials: Mapping[str, str],
) -> None:
    """Writes ``vocab.txt`` and ``word-0.location``.

    Raises:
        ValueError: if a word cannot be written, or the directory holds tables of CNTK's own.
    """
    _check_symbols(symbols, len(coordinates))
    directory = Path(directory)
    for path in directory.glob("word-*.location"):
        if path.name != "word-0.location":
            raise ValueError(f"{directory}: holds CNTK's {path.name} already; give a new folder")
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
    with whole_file(directory / "vocab.txt") as file:
        file.writelines(f"{name}\n" for name in names)
    with whole_file(directory / "word-0.location") as file:
        file.writelines(" ".join(map(str, row)) + "\n" for row in square.tolist())


def _read_cntk_square(path: Path, num_names: int) -> np.ndarray:
    """Reads a location file into an (N, N) array of CNTK's word ids, -1 where empty."""
    lines = list(read_lines(path))
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


def _location(directory: Path, round: int | None) -> Path:
    """Returns the location file of a round, or of the last one."""
    rounds = {
        int(found[1]): path
        for path in directory.iterdir()
        if (found := _LOCATION.fullmatch(path.name))
    }
    if not rounds:
        raise ValueError(f"{directory}: holds no word-0.location, nor one of another round")
    if round is None:
        return rounds[max(rounds)]
    if round not in rounds:
        known = ", ".join(map(str, sorted(rounds)))
        raise ValueError(f"{directory}: holds no word-{round}.location, but rounds {known}")
    return rounds[round]


def read_cntk(
    directory: str | Path,
    symbols: Sequence[str],
    specials: Mapping[str, str],
    round: int | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Reads CNTK's files.

    Args:
        directory: holds them.
        symbols: our V words.
        specials: our word to CNTK's, ``""`` for those that CNTK lacks.
        round: of which the location file is taken; None takes the last.

    Returns:
        Coordinates (V, 2) for ``symbols``, and the shape that holds them: the square, with rows
        below it for words that CNTK lacks and no empty cell is left for.
    """
    vocabulary = Path(directory) / "vocab.txt"
    names = list(read_lines(vocabulary, "file"))
    location = _location(Path(directory), round)
    cntk_ids: dict[str, int] = {}
    for number, name in enumerate(names):
        if cntk_ids.setdefault(name, number) != number:
            raise ValueError(
                f"{vocabulary}: {name!r} stands on lines {cntk_ids[name] + 1} and {number + 1}"
            )
    square = _read_cntk_square(location, len(names))
    cell_of = _cells_of(square, names, location)
    size = len(square)
    lacking = [word for word, symbol in enumerate(symbols) if specials.get(symbol, symbol) == ""]
    empty = np.argwhere(square < 0)[: len(lacking)]
    more = np.arange(len(lacking) - len(empty))
    below = np.stack([size + more // max(size, 1), more % max(size, 1)], axis=1)
    coordinates = np.empty((len(symbols), 2), dtype=np.int64)
    coordinates[lacking] = np.concatenate([empty, below])
    for word in sorted(set(range(len(symbols))) - set(lacking)):
        name = specials.get(symbols[word], symbols[word])
        number = cntk_ids.pop(name, -1)
        if number < 0:
            raise ValueError(
                f"{vocabulary}: the dictionary's word {symbols[word]!r} ({name!r} here) is missing"
            )
        if cell_of[number, 0] < 0:
            raise ValueError(f"{location}: the word {name!r} (id {number}) has no cell")
        coordinates[word] = cell_of[number]
    if cntk_ids:
        name, number = next(iter(cntk_ids.items()))
        raise ValueError(
            f"{vocabulary}: line {number + 1} holds {name!r}, which the dictionary does not"
        )
    return coordinates, (max(size, int(coordinates[:, 0].max(initial=0)) + 1), size)


def _cells_of(square: np.ndarray, names: Sequence[str], location: Path) -> np.ndarray:
    """Returns the cells of CNTK's words, (N, 2), -1 for those that have none."""
    rows, columns = np.nonzero(square >= 0)
    cell_of: np.ndarray = np.full((len(names), 2), -1, dtype=np.int64)
    for word, row, column in zip(square[rows, columns].tolist(), rows, columns, strict=True):
        if cell_of[word, 0] >= 0:
            raise ValueError(f"{location}: word {names[word]!r} (id {word}) has two cells")
        cell_of[word] = row, column
    return cell_of
