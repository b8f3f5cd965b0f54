"""``lightrnn-table``: look at word tables, search, compare, convert and judge them.

A table is a file that training wrote (``word_table.txt``) or a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fairseq_lightrnn.commands.run import command
from fairseq_lightrnn.commands.start import require_fairseq
from fairseq_lightrnn.commands.table_page import (
    DEFAULT_MAX_WORDS,
    SPECIAL_SYMBOLS,
    read_dictionary,
    write_table_page,
)
from fairseq_lightrnn.commands.text import read_texts
from fairseq_lightrnn.core.table import WordTable, component_names
from fairseq_lightrnn.core.table_statistics import (
    class_mutual_information,
    compare,
    quality,
    same_cell_part,
)
from fairseq_lightrnn.files import STANDARD, check_outputs, read_lines, whole_file

if TYPE_CHECKING:
    from fairseq_lightrnn.language_model import LanguageModel

__all__ = ["main"]

# Symbols of fairseq's that CNTK's vocabularies usually lack, and the words by which
# fairseq-preprocess fills a dictionary up to a multiple of 8.
_OFTEN_MISSING = ("<s>", "<pad>")
_FILLING = re.compile(r"madeupword\d{4}")
# What no argument of a command line begins with.
_WORD = "\0"


class Source(NamedTuple):
    """A table with its words, their counts (None if not known) and model, if any.

    The model is that of a checkpoint.
    """

    table: WordTable
    symbols: list[str]
    counts: np.ndarray | None
    model: LanguageModel | None = None

    def number(self, word: str) -> int:
        """Returns the id of a word."""
        try:
            return self.symbols.index(word)
        except ValueError:
            raise ValueError(
                f"{word!r} is not in the table; lightrnn-table search finds similar words"
            ) from None

    def by_frequency(self, words: Iterable[int]) -> list[int]:
        """Sorts words, the most frequent first; by id where counts are not known."""
        counts = self.counts
        return sorted(words, key=lambda word: (0 if counts is None else -counts[word], word))


def _load(path: str, data: str | None) -> Source:
    file = Path(path)
    if file.is_dir() or file.suffix == ".pt":
        require_fairseq("table")
        from fairseq_lightrnn.language_model import LanguageModel

        model = LanguageModel.from_pretrained(path, data)
        counts = np.array(model.dictionary.count)
        counts[: model.dictionary.nspecial] = 0
        known = counts if counts.any() else None  # words of a table file have none
        return Source(model.table.table(), model.dictionary.symbols, known, model)
    if path != STANDARD and not file.exists():
        raise ValueError(f"{path}: no such table file or checkpoint")
    if data is None:
        symbols, table = WordTable.load_with_symbols(path)
        return Source(table, symbols, None)
    symbols, counts = read_dictionary(_dictionary(data))
    return Source(WordTable.load(path, symbols), symbols, counts)


def _dictionary(data: str) -> str | Path:
    """Returns the dictionary that ``--data`` names, itself or by its folder."""
    if data == STANDARD or (Path(data).exists() and not Path(data).is_dir()):
        return data
    return Path(data) / "dict.txt"


def _place(source: Source, word: int) -> str:
    coordinates = source.table.coordinates[word].tolist()
    if len(coordinates) == 2:
        return f"row {coordinates[0]}, column {coordinates[1]}"
    return "cell " + ", ".join(map(str, coordinates))


def _words(source: Source, words: Iterable[int], limit: int) -> str:
    ordered = source.by_frequency(words)
    more = f" … and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return " ".join(source.symbols[word] for word in ordered[:limit]) + more


def _show(args: argparse.Namespace) -> Iterator[str]:
    """Writes rows with their words."""
    source = _load(args.table, args.data)
    table = source.table
    shape = " × ".join(map(str, table.shape))
    yield f"{table.num_words} words in {shape} = {table.num_cells} cells, table {table.digest()}"
    rows = table.coordinates[:, 0]
    members = np.split(np.argsort(rows, kind="stable"), np.cumsum(np.bincount(rows))[:-1])
    chosen = range(len(members)) if args.row is None else args.row
    for row in chosen:
        if not 0 <= row < table.shape[0]:
            raise ValueError(f"--row {row}: the table has rows 0 to {table.shape[0] - 1}")
        words = members[row].tolist() if row < len(members) else []
        yield f"row {row} ({len(words)} words): {_words(source, words, args.limit)}"


def _search(args: argparse.Namespace) -> Iterator[str]:
    """Writes the cells of words that match."""
    source = _load(args.table, args.data)
    try:
        pattern = re.compile(args.pattern)
    except re.error as error:
        raise ValueError(f"{args.pattern!r} is not a regular expression: {error}") from None
    found = [word for word, symbol in enumerate(source.symbols) if pattern.search(symbol)]
    yield f"{len(found)} words match"
    for word in source.by_frequency(found)[: args.limit]:
        yield f"{source.symbols[word]}\t{_place(source, word)}"


def _neighbours(args: argparse.Namespace) -> Iterator[str]:
    """Writes the words nearest to a word by their cells."""
    source = _load(args.table, args.data)
    word = source.number(args.word)
    yield f"{args.word}: {_place(source, word)}"
    for component, name in enumerate(component_names(source.table.num_components)):
        same = same_cell_part(source.table, word, component)
        yield f"same {name} ({len(same)} words): {_words(source, same, args.limit)}"
    if source.model is None:
        yield "nearest by vectors: give a checkpoint instead of a table file"
        return
    apart = source.model.distances(args.word).numpy()
    order = [other for other in np.argsort(apart, kind="stable").tolist() if other != word]
    for other in order[: args.limit]:
        yield f"{apart[other]:.4f}\t{source.symbols[other]}\t{_place(source, other)}"


def _quality(args: argparse.Namespace) -> Iterator[str]:
    """Writes figures about a table."""
    source = _load(args.table, args.data)
    figures: dict[str, Any] = {
        "table": source.table.digest(),
        "words": source.table.num_words,
        "shape": "x".join(map(str, source.table.shape)),
    }
    if source.counts is None and args.text is None:
        raise ValueError(
            f"{args.table}: has no counts of words; give --data, a checkpoint or --text"
        )
    texts = None if args.text is None else _encode(source, args.text)
    counts = source.counts
    if texts is not None:
        counts = np.bincount(np.concatenate(texts), minlength=len(source.symbols))
    if counts is not None:
        # Counts below zero are those of sentencepiece's vocabularies, which are logarithms.
        figures.update(quality(source.table, np.maximum(counts, 0))._asdict())
    if texts is not None:
        information = class_mutual_information(source.table, texts)
        for name, figure in zip(component_names(len(information)), information, strict=True):
            figures[f"mutual_information_{name}"] = figure
    if args.json:
        yield json.dumps(figures)
        return
    for name, figure in figures.items():
        yield f"{name}\t{figure:.4f}" if isinstance(figure, float) else f"{name}\t{figure}"


def _encode(source: Source, path: str) -> list[np.ndarray]:
    numbers = {symbol: word for word, symbol in enumerate(source.symbols)}
    for symbol in SPECIAL_SYMBOLS[2:]:
        if symbol not in numbers:
            raise ValueError(f"--text {path}: the table holds no {symbol!r}")
    unknown, end = (numbers[symbol] for symbol in (SPECIAL_SYMBOLS[3], SPECIAL_SYMBOLS[2]))
    texts = [
        np.array([*(numbers.get(word, unknown) for word in line.split()), end])
        for line in read_texts([path])
    ]
    if not texts:
        raise ValueError(f"--text {path}: is empty")
    return texts


def _compare(args: argparse.Namespace) -> Iterator[str]:
    """Writes what moved between two tables."""
    first, second = _load(args.table, args.data), _load(args.other, args.data)
    if first.symbols != second.symbols:
        raise ValueError(f"{args.table} and {args.other} hold different words; nothing to compare")
    found = compare(first.table, second.table)
    count = first.table.num_words
    yield f"{found.moved} of {count} words moved ({found.moved / count:.1%})"
    names = component_names(len(found.changed))
    for name, changed in zip(names, found.changed, strict=True):
        yield f"{changed} changed their {name} ({changed / count:.1%})"
    yield f"{found.kept_pairs:.1%} of the pairs of one row are still together"
    rows = np.flatnonzero(~np.isnan(found.row_shares))
    order = rows[np.argsort(-found.row_shares[rows], kind="stable")]
    for title, chosen in (("most stable", order), ("least stable", order[::-1])):
        yield f"{title} rows:"
        for row in chosen[: args.limit].tolist():
            words = np.flatnonzero(first.table.coordinates[:, 0] == row)
            shown = _words(first, words, 8)
            yield f"  row {row}: {found.row_shares[row]:.0%} together: {shown}"
    moved = np.flatnonzero((first.table.coordinates != second.table.coordinates).any(axis=1))
    yield "words that moved:"
    for word in first.by_frequency(moved.tolist())[: args.limit]:
        yield f"  {first.symbols[word]}: {_place(first, word)} -> {_place(second, word)}"


def _export(args: argparse.Namespace) -> Iterator[str]:
    """Writes a table in another format."""
    source = _load(args.table, args.data)
    if args.format == "table":
        source.table.save(args.output, source.symbols)
    elif args.format == "cntk":
        source.table.save_cntk(args.output, source.symbols)
    else:
        _export_lines(source, args.output, args.format)
    yield from _wrote(args.output)


def _wrote(output: str, what: str = "") -> Iterator[str]:
    """Writes where a result went, but for the standard output itself."""
    if output not in (STANDARD, "/dev/stdout"):
        yield f"wrote {output}{what}"


def _export_lines(source: Source, output: str, form: str) -> None:
    columns = component_names(source.table.num_components)
    counts = [None] * len(source.symbols) if source.counts is None else source.counts.tolist()
    with whole_file(output) as file:
        if form == "tsv":
            print("\t".join(["word", *columns, "count"]), file=file)
        rows = zip(source.symbols, source.table.coordinates.tolist(), counts, strict=True)
        for symbol, coordinates, count in rows:
            if form == "tsv":
                values = [symbol, *coordinates, "NA" if count is None else count]
                print("\t".join(map(str, values)), file=file)
            else:
                record = {"word": symbol, **dict(zip(columns, coordinates, strict=True)),
                          "count": count}  # fmt: skip
                print(json.dumps(record, ensure_ascii=False), file=file)


def _import(args: argparse.Namespace) -> Iterator[str]:
    """Reads CNTK's files into a table file."""
    names = set(read_lines(Path(args.directory) / "vocab.txt", "file"))
    symbols, _ = read_dictionary(_dictionary(args.data))
    specials = {
        symbol: ""
        for symbol in symbols
        if symbol not in names and (symbol in _OFTEN_MISSING or _FILLING.fullmatch(symbol))
    }
    for pair in args.special or []:
        ours, equals, theirs = pair.partition("=")
        if not equals:
            raise ValueError(f"--special {pair}: expected OURS=THEIRS, such as '<unk>=UNK'")
        specials[ours] = theirs
    shape = None
    if args.shape is not None:
        if not re.fullmatch(r"\d+x\d+", args.shape):
            raise ValueError(f"--shape {args.shape}: expected two sizes, such as 100x100")
        shape = tuple(map(int, args.shape.split("x")))
    table = WordTable.load_cntk(args.directory, symbols, shape, specials, args.round)
    table.save(args.output, symbols)
    yield from _wrote(args.output, f": {table}")


def _page(args: argparse.Namespace) -> Iterator[str]:
    """Writes a page for a browser."""
    source = _load(args.table, args.data)
    write_table_page(
        args.output, source.table, source.symbols, source.counts, title=args.title,
        max_words=args.max_words,
    )  # fmt: skip
    yield from _wrote(args.output)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, whose options may stand anywhere.

    argparse cannot do so for a command that has commands of its own.
    """
    parser, commands = _parsers()
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = next((at for at, argument in enumerate(given) if argument in commands), None)
    if at is None:
        return parser.parse_args(given)
    of_command = given[:at] + given[at + 1 :]
    # What follows a -- is no flag, though it looks like one: argparse would lose a word that is --.
    end = of_command.index("--") if "--" in of_command else len(of_command)
    words = [_WORD + word for word in of_command[end + 1 :]]
    args = commands[given[at]].parse_intermixed_args(of_command[:end] + words)
    for name, value in vars(args).items():
        if isinstance(value, str):
            setattr(args, name, value.removeprefix(_WORD))
    return args


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser of the command line, and those of its commands by name."""
    parser = argparse.ArgumentParser(
        prog="lightrnn-table", description="Look at word tables, compare and convert them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(
        name: str, run: Callable[[argparse.Namespace], Iterator[str]], text: str, table: bool = True
    ) -> Any:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        if table:
            sub.add_argument(
                "table", help="word table file (- is the standard input), or checkpoint"
            )
        sub.add_argument(
            "--data", metavar="DIR", required=not table,
            help="folder with dict.txt, or a dictionary such as dict.de.txt, for the words' counts",
        )  # fmt: skip
        return sub.add_argument

    def limit(add: Any, default: int) -> None:
        add("--limit", type=_positive, default=default, metavar="N",
            help="show so many words (default: %(default)s)")  # fmt: skip

    add = add_command("show", _show, "show the words of each row")
    add("--row", type=int, action="append", metavar="R", help="only this row (can be repeated)")
    limit(add, 20)
    add = add_command("search", _search, "find the cells of words that match a regular expression")
    add("pattern")
    limit(add, 50)
    add = add_command("neighbours", _neighbours, "show the words nearest to a word by its cell")
    add("word")
    limit(add, 20)
    add = add_command("quality", _quality, "say how well a table divides the words of a text")
    add("--text", metavar="FILE", help="text to count words and neighbours of rows in")
    add("--json", action="store_true", help="write JSON")
    add = add_command("compare", _compare, "show what moved between two tables")
    add("other", help="the other table")
    limit(add, 5)
    add = add_command("export", _export, "write a table in another format")
    add("--format", choices=("table", "cntk", "tsv", "json"), default="table",
        help="a word table file (default), a folder of CNTK's files, tab-separated values or a "
        "JSON object a line")  # fmt: skip
    add("--output", required=True, metavar="PATH", help="file, or with cntk folder, to write")
    add = add_command("import", _import, "make a word table file of CNTK's vocab.txt and "
                      "word-N.location", table=False)  # fmt: skip
    add("directory", help="folder of CNTK's files")
    add("--round", type=int, metavar="N", help="take word-N.location (default: the newest)")
    add("--output", required=True, metavar="FILE", help="word table file to write")
    add("--shape", metavar="RxC", help="keep this part of CNTK's square (default: all, and rows "
        "below it for symbols of fairseq's that find no empty cell)")  # fmt: skip
    add("--special", action="append", metavar="OURS=THEIRS", help="CNTK's name of a word of ours, "
        "or nothing if it has none: '<unk>=UNK', '<unk>=' (can be repeated)")  # fmt: skip
    add = add_command("page", _page, "write a page that shows a table in a browser")
    add("--output", required=True, metavar="FILE", help="HTML file to write")
    add("--title", default="Word table", help="heading of the page")
    add("--max-words", type=_positive, default=DEFAULT_MAX_WORDS, metavar="N",
        help="show only the N most frequent words (default: %(default)s)")  # fmt: skip
    return parser, dict(commands.choices)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


@command("lightrnn-table", _parse)
def main(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if "output" in args and getattr(args, "format", None) != "cntk":
        data = None if args.data is None else _dictionary(args.data)
        check_outputs({"--output": args.output}, [getattr(args, "table", None), data])
    for line in args.run(args):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
