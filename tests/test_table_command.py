"""``lightrnn-table``, on tables that training wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fairseq_run import train

from fairseq_lightrnn.commands.table import main
from fairseq_lightrnn.commands.table_page import read_dictionary
from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.language_model import LanguageModel


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with a reallocation after the first."""
    save_dir = tmp_path_factory.mktemp("trained")
    train(data, save_dir, max_epoch=2, reallocate_epochs=1, initial_table="random")
    return save_dir


@pytest.fixture
def file(trained: Path) -> Path:
    return trained / "word_table.txt"


def lines(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[str]:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.splitlines()


def load(data: Path, file: Path) -> tuple[WordTable, list[str], np.ndarray]:
    symbols, counts = read_dictionary(data / "dict.txt")
    return WordTable.load(file, symbols), symbols, counts


class TestShow:
    def test_every_word_once(
        self, data: Path, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table, symbols, _ = load(data, file)
        head, *rows = lines(capsys, "show", file, "--limit", 99)
        assert head == f"48 words in 7 × 7 = 49 cells, table {table.digest()}"
        words = [row.partition("): ")[2].split() for row in rows]
        assert sorted(word for row in words for word in row) == sorted(symbols)
        for number, row in enumerate(words):
            assert all(table.coordinates[symbols.index(word), 0] == number for word in row)

    def test_one_row_by_frequency(
        self, data: Path, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table, symbols, counts = load(data, file)
        _, row = lines(capsys, "show", file, "--data", data, "--row", 3, "--limit", 2)
        members = np.flatnonzero(table.coordinates[:, 0] == 3)
        best = sorted(members, key=lambda word: (-counts[word], word))
        expected = f"{symbols[best[0]]} {symbols[best[1]]} … and {len(best) - 2} more"
        assert row == f"row 3 ({len(best)} words): {expected}"

    def test_a_checkpoint_holds_the_same_table(
        self, trained: Path, data: Path, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        last = lines(capsys, "show", trained / "checkpoint_last.pt")
        assert last == lines(capsys, "show", file, "--data", data)


def test_search(data: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, symbols, _ = load(data, file)
    head, *found = lines(capsys, "search", file, "^w1.$")
    assert head == "10 words match"
    assert len(found) == 10
    for line in found:
        word, place = line.split("\t")
        row, column = table.coordinates[symbols.index(word)]
        assert place == f"row {row}, column {column}"
    assert lines(capsys, "search", file, "nothing") == ["0 words match"]


def test_words_that_look_like_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.txt"
    WordTable.from_cells(np.array([0, 1, 2]), (2, 2)).save(path, ["--", "-x", "y"])
    for word in ("--", "-x"):
        assert lines(capsys, "neighbours", path, "--", word)[0].startswith(f"{word}: row 0, ")
        assert lines(capsys, "neighbours", "--limit", 1, "--", path, word)[0].startswith(word)
    assert lines(capsys, "neighbours", path, "y")[0].startswith("y: row 1, ")


def test_a_dictionary_of_another_name(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a table file and a checkpoint alike, and not the dict.txt beside it."""
    for name, count in (("dict.txt", 1), ("dict.de.txt", 10**6)):
        first, *others = (data / "dict.txt").read_text().splitlines()
        rows = [f"{first.split()[0]} {count}", *others]
        (tmp_path / name).write_text("".join(f"{row}\n" for row in rows))
    given = "--data", tmp_path / "dict.de.txt"
    of_checkpoint = lines(capsys, "quality", trained / "checkpoint_last.pt", *given)
    assert of_checkpoint == lines(capsys, "quality", trained / "word_table.txt", *given)
    assert of_checkpoint != lines(capsys, "quality", trained, "--data", tmp_path)


def test_neighbours_in_the_table(
    data: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, symbols, _ = load(data, file)
    place, row, column, hint = lines(capsys, "neighbours", file, "w5")
    coordinates = table.coordinates[symbols.index("w5")]
    assert place == f"w5: row {coordinates[0]}, column {coordinates[1]}"
    for component, line in enumerate((row, column)):
        words = line.partition("): ")[2].split()
        numbers = [symbols.index(word) for word in words]
        assert "w5" not in words
        assert all(table.coordinates[numbers, component] == coordinates[component])
    assert "give a checkpoint" in hint


@pytest.mark.parametrize("further", [0, 2])
def test_neighbours_by_vectors(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], further: int
) -> None:
    """Of all that a word is read by, further tables and numbers of its own included."""
    if further:
        trained = tmp_path
        train(data, trained, max_epoch=1, further_tables=further, word_dim=3)
    model = LanguageModel.from_pretrained(trained)
    capsys.readouterr()
    found = lines(capsys, "neighbours", trained, "w5", "--limit", 47)[3:]
    assert len(found) == 47
    own = model.embedding("w5")
    apart = [float((model.embedding(word) - own).norm()) for word in model.dictionary.symbols]
    expected = sorted(apart)[1:]
    for line, distance in zip(found, expected, strict=True):
        shown, word, _ = line.split("\t")
        assert float(shown) == pytest.approx(distance, abs=1e-4)
        assert apart[model.dictionary.index(word)] == pytest.approx(distance, abs=1e-4)


def test_compare(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = trained / "word_table.epoch0.txt", trained / "word_table.epoch1.txt"
    found = lines(capsys, "compare", before, after, "--data", data)
    one, two = load(data, before)[0], load(data, after)[0]
    different = one.coordinates != two.coordinates
    moved = int(different.any(axis=1).sum())
    assert moved > 0
    assert found[0] == f"{moved} of 48 words moved ({moved / 48:.1%})"
    assert found[1].startswith(f"{different[:, 0].sum()} changed their row")
    assert found[2].startswith(f"{different[:, 1].sum()} changed their column")
    assert "still together" in found[3]
    same = lines(capsys, "compare", before, before)
    assert same[0] == "0 of 48 words moved (0.0%)"
    assert same[3].startswith("100.0%")


def test_quality(trained: Path, data: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = dict(line.split("\t") for line in lines(capsys, "quality", file, "--data", data))
    assert figures["shape"] == "7x7"
    assert float(figures["word_entropy"]) == pytest.approx(
        float(figures["row_entropy"]) + float(figures["entropy_in_row"]), abs=2e-4
    )
    text = data.parent / "train.txt"
    (line,) = lines(capsys, "quality", trained, "--text", text, "--json")
    counted = json.loads(line)
    assert 0 < counted["mutual_information_row"] < counted["row_entropy"]
    # The training text's own counts, but for the ends of sentences, which dict.txt lacks.
    assert counted["word_entropy"] > 0


class TestConversion:
    def test_cntk_and_back(
        self, data: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines(capsys, "export", file, "--format", "cntk", "--output", tmp_path / "cntk")
        back = tmp_path / "back.txt"
        lines(capsys, "import", tmp_path / "cntk", "--data", data, "--output", back)
        assert load(data, back)[0] == load(data, file)[0]

    def test_cntk_without_our_specials(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, symbols, _ = (None, *read_dictionary(data / "dict.txt"))
        names = ["</s>", "UNK", *symbols[4:]]
        (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n")
        square = np.full(49, -1)
        square[: len(names)] = np.arange(len(names))
        rows = (" ".join(map(str, row)) for row in square.reshape(7, 7))
        (tmp_path / "word-0.location").write_text("\n".join(rows) + "\n")
        out = tmp_path / "table.txt"
        lines(capsys, "import", tmp_path, "--data", data, "--output", out, "--special", "<unk>=UNK")
        table = load(data, out)[0]
        assert table.coordinates[[2, 3]].tolist() == [[0, 0], [0, 1]]
        assert table.coordinates[0].tolist() == [6, 4]

    def test_cntks_own_square_is_full(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Theirs are 10,000 words by default; fairseq's symbols and fillings go below."""
        names = [f"w{number}" for number in range(9_998)] + ["<unk>", "</s>"]
        (tmp_path / "vocab.txt").write_text("".join(f"{name}\n" for name in names))
        square = np.random.default_rng(0).permutation(10_000).reshape(100, 100)
        for number, cells in enumerate((square, square[::-1])):
            rows = ("".join(f"{word} " for word in row) + "\n" for row in cells)
            (tmp_path / f"word-{number}.location").write_text("".join(rows))
        words = [*names[:-2], *(f"madeupword{number:04d}" for number in range(6))]
        dictionary = tmp_path / "dict.txt"
        dictionary.write_text("".join(f"{word} 1\n" for word in words))
        out = tmp_path / "table.txt"
        for number, cells in ((1, square[::-1]), (0, square)):
            flags = [] if number else ["--round", 0]
            said = lines(capsys, "import", tmp_path, "--data", tmp_path, "--output", out, *flags)
            assert "101×100" in said[0]
            table, symbols, _ = load(tmp_path, out)
            row, column = table.coordinates[symbols.index("w77")]
            assert cells[row, column] == 77
            assert table.coordinates[[0, 1]].tolist() == [[100, 0], [100, 1]]
            assert table.coordinates[-6:, 0].tolist() == [100] * 6

    def test_counts_of_sentencepiece(
        self, file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its vocabularies hold logarithms, which are below zero."""
        dictionary = tmp_path / "dict.txt"
        words = [line.split()[0] for line in (data / "dict.txt").read_text().splitlines()]
        dictionary.write_text("".join(f"{word} -{n}\n" for n, word in enumerate(words)))
        assert len(lines(capsys, "show", file, "--data", dictionary)) == 8
        lines(capsys, "page", file, "--data", dictionary, "--output", tmp_path / "page.html")
        lines(capsys, "export", file, "--data", dictionary, "--format", "tsv", "--output", "-")

    def test_lines_for_other_programs(
        self, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table, symbols, counts = load(data, trained / "word_table.txt")
        for form in ("tsv", "json"):
            out = tmp_path / form
            source = trained / "checkpoint_last.pt"
            lines(capsys, "export", source, "--format", form, "--output", out)
        header, *rows = (tmp_path / "tsv").read_text().splitlines()
        assert header == "word\trow\tcolumn\tcount"
        records = [json.loads(line) for line in (tmp_path / "json").read_text().splitlines()]
        expected = zip(symbols, table.coordinates.tolist(), counts.tolist(), strict=True)
        for row, record, (symbol, place, count) in zip(rows, records, expected, strict=True):
            assert row.split("\t") == [symbol, *map(str, [*place, count])]
            assert record == {"word": symbol, "row": place[0], "column": place[1], "count": count}

    def test_table_of_a_checkpoint(
        self, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "table.txt"
        lines(capsys, "export", trained, "--output", out)
        best = LanguageModel.from_pretrained(trained).table.table()
        assert load(data, out)[0] == best

    def test_page(
        self, data: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "table.html"
        lines(capsys, "page", file, "--data", data, "--output", out, "--title", "My words")
        page = out.read_text()
        assert "<title>My words</title>" in page
        assert load(data, file)[0].digest() in page


class TestBadInput:
    def refused(self, message: str, *arguments: Any) -> None:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_each(self, data: Path, file: Path, tmp_path: Path) -> None:
        missing = tmp_path / "missing"
        self.refused(f"{missing}: no such table file or checkpoint", "show", missing)
        self.refused(f"{missing}/dict.txt: no such dictionary", "show", file, "--data", missing)
        self.refused("--row 9: the table has rows 0 to 6", "show", file, "--row", 9)
        self.refused("'w99' is not in the table", "neighbours", file, "w99")
        self.refused("is not a regular expression", "search", file, "(")
        self.refused("has no counts of words", "quality", file)
        self.refused(f"{missing}: no such text file", "quality", file, "--text", missing)
        self.refused("vocab.txt: no such file", "import", missing, "--data", data, "--output", "x")
        for action in ("export", "page"):
            self.refused(f"{file}: is what is read here", action, file, "--output", file)
        self.refused("there is no folder", "export", file, "--format", "tsv", "--output",
                     missing / "x")  # fmt: skip
        damaged = tmp_path / "damaged.txt"
        damaged.write_text("hello\n")
        self.refused(f"{damaged}: line 1 is not the header", "show", damaged)
        other = tmp_path / "other.txt"
        other.write_text(file.read_text().replace("\nw3 ", "\nx3 "))
        self.refused("hold different words", "compare", file, other)
