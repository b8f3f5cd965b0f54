from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lightrnn.core.table import WordTable, balanced_cells, default_shape


@st.composite
def tables(draw: st.DrawFn) -> WordTable:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    cells = draw(st.permutations(range(int(np.prod(shape)))))
    words = draw(st.integers(1, len(cells)))
    return WordTable.from_cells(np.array(cells[:words]), shape)


def symbols(count: int) -> list[str]:
    # Words with characters that a careless reader of lines or fields would trip over.
    odd = ["<s>", "<pad>", "</s>", "#", "a b", "\u2028", "\x85", "é", "1"]
    return odd[:count] + [f"w{number}" for number in range(count - len(odd))]


@given(tables())
def test_words_and_coordinates_are_inverse(table: WordTable) -> None:
    words = np.arange(table.num_words)
    at = np.ravel_multi_index(tuple(table.coordinates_of(words).T), table.shape)
    assert (table.words[at] == words).all()
    assert sorted(table.words[table.words >= 0]) == words.tolist()
    assert (table.words < 0).sum() == table.num_cells - table.num_words
    assert WordTable(table.coordinates, table.shape) == table


@given(tables())
def test_occupied_counts_what_can_be_reached(table: WordTable) -> None:
    for component in range(table.num_components):
        occupied = table.occupied(component)
        reached = {tuple(row[: component + 1]) for row in table.coordinates.tolist()}
        assert occupied.sum() == len(reached)
        for prefix in reached:
            group = np.ravel_multi_index(prefix[:-1], table.shape[:component]) if component else 0
            assert occupied[group, prefix[-1]]


@given(table=tables())
def test_files_give_the_table_back(
    table: WordTable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("table") / "table.txt"
    table.save(path, symbols(table.num_words))
    assert WordTable.load(path, symbols(table.num_words)) == table
    assert [file.name for file in path.parent.iterdir()] == ["table.txt"]


ODD = ["\r", "a\r", "\xa0", "\u2028", "\ufeff", "\u200b", "e\u0301", "#fairseq:overwrite", "",
       " ", "a ", " 1 2", "\\n", "\x00", "\x1c", "# fairseq_lightrnn word table 1"]  # fmt: skip


@given(
    st.lists(
        st.one_of(
            st.sampled_from(ODD),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")),
        ),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 3),
)
def test_any_word_survives_a_file(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], components: int
) -> None:
    """Whatever a dictionary of fairseq's holds, which has a line for each word."""
    path = tmp_path_factory.mktemp("table") / "table.txt"
    shape = default_shape(len(words), components)
    table = WordTable.from_cells(balanced_cells(len(words), shape), shape)
    table.save(path, words)
    assert WordTable.load_with_symbols(path) == (words, table)
    assert WordTable.load(path, words) == table


def test_a_newline_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the word 'a\\nb' holds a newline"):
        WordTable.from_cells(np.array([0]), (1, 1)).save(tmp_path / "table.txt", ["a\nb"])
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_system_is_read(tmp_path) -> None:
    """With a byte-order mark and carriage returns, as an editor may save it."""
    path, table = tmp_path / "table.txt", WordTable.from_cells(np.array([3, 1, 0]), (2, 2))
    table.save(path, ["a", "é", "c"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert WordTable.load(path, ["a", "é", "c"]) == table


@given(st.integers(1, 3000), st.integers(1, 4))
def test_default_shape_is_the_smallest_cube(words: int, components: int) -> None:
    shape = default_shape(words, components)
    assert len(shape) == components
    assert np.prod(shape) >= words
    assert np.prod(shape) // shape[0] * (shape[0] - 1) < words  # no row is empty
    assert max(shape) <= int(np.ceil(words ** (1 / components) - 1e-9))


def test_default_shape_of_two_components_is_that_of_the_design() -> None:
    assert default_shape(793_471) == (891, 891)
    assert default_shape(10_240_000) == (3200, 3200)
    assert default_shape(33_278) == (183, 182)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_balanced_cells_fill_groups_evenly(sizes: list[int], data: st.DataObject) -> None:
    total = int(np.prod(sizes))
    words = data.draw(st.integers(1, total))
    cells = balanced_cells(words, sizes)
    assert len(set(cells.tolist())) == words
    assert (np.diff(cells) > 0).all()
    rows = np.bincount(cells // (total // sizes[0]), minlength=sizes[0])
    assert rows.max() - rows.min() <= 1


def test_digest_names_the_table() -> None:
    table = WordTable.from_cells(np.array([0, 1, 2]), (2, 2))
    assert table.digest() == WordTable.from_cells(np.array([0, 1, 2]), (2, 2)).digest()
    assert table.digest() != WordTable.from_cells(np.array([0, 2, 1]), (2, 2)).digest()
    assert table.digest() != WordTable.from_cells(np.array([0, 1, 2]), (4, 1)).digest()
    assert len(table.digest()) == 12


@pytest.mark.parametrize(
    ("coordinates", "shape", "message"),
    [
        ([[0, 0], [0, 0]], (2, 2), r"words 0 and 1 have the same cell \[0, 0\]"),
        ([[0, 0], [0, 2]], (2, 2), r"word 1 has coordinates \[0, 2\], outside"),
        ([[0, 0], [-1, 0]], (2, 2), r"word 1 has coordinates \[-1, 0\], outside"),
        ([[0], [1]], (2, 2), "1 components, the shape"),
        ([[0, 0], [0, 1], [1, 0]], (1, 2), "2 cells, too few for 3 words; 2x2 would do"),
        ([[0, 0]], (0, 2), "one positive size"),
        ([[0.5, 0]], (2, 2), "must be integers"),
    ],
)
def test_impossible_tables_are_refused(
    coordinates: list[list[int]], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WordTable(np.array(coordinates), shape)


def test_a_table_needs_words_and_components() -> None:
    with pytest.raises(ValueError, match="at least 1 component, got 0"):
        default_shape(10, 0)
    with pytest.raises(ValueError, match="at least 1 word, got 0"):
        default_shape(0)


class TestFileErrors:
    @pytest.fixture
    def lines(self, tmp_path) -> list[str]:
        path = tmp_path / "table.txt"
        WordTable.from_cells(np.array([3, 1, 0]), (2, 2)).save(path, ["a", "b", "c"])
        return path.read_text().splitlines()

    def check(self, tmp_path, lines: list[str], message: str) -> None:
        path = tmp_path / "damaged.txt"
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match=message) as caught:
            WordTable.load(path, ["a", "b", "c"])
        assert str(path) in str(caught.value)

    def test_the_undamaged_file_is_read(self, tmp_path, lines) -> None:
        assert lines == [
            "# fairseq_lightrnn word table 1 words 3 shape 2x2", "a 1 1", "b 0 1", "c 0 0",
        ]  # fmt: skip

    def test_other_word(self, tmp_path, lines) -> None:
        self.check(tmp_path, [*lines[:2], "x 0 1", lines[3]], "line 3 holds 'x' .* has 'b'")

    def test_other_order(self, tmp_path, lines) -> None:
        self.check(tmp_path, [lines[0], lines[2], lines[1], lines[3]], "line 2 holds 'b'")

    def test_missing_word(self, tmp_path, lines) -> None:
        header = lines[0].replace("words 3", "words 2")
        self.check(tmp_path, [header, *lines[1:3]], r"word 'c' \(id 2\) is missing")

    def test_further_word(self, tmp_path, lines) -> None:
        header = lines[0].replace("words 3", "words 4")
        self.check(tmp_path, [header, *lines[1:], "d 1 0"], "line 5 holds 'd' .* no further word")

    def test_truncated(self, tmp_path, lines) -> None:
        self.check(tmp_path, lines[:3], "promises 3 words, the file has 2")

    def test_truncated_in_a_line(self, tmp_path, lines) -> None:
        self.check(tmp_path, [*lines[:3], "c"], "line 4")

    def test_doubled_cell(self, tmp_path, lines) -> None:
        self.check(tmp_path, [*lines[:3], "c 1 1"], "words 0 and 2 have the same cell")

    def test_no_numbers(self, tmp_path, lines) -> None:
        self.check(tmp_path, [*lines[:3], "c 1 y"], "line 4 is 'c 1 y'")

    def test_no_header(self, tmp_path, lines) -> None:
        self.check(tmp_path, lines[1:], "line 1 is not the header")

    def test_not_text(self, tmp_path) -> None:
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="binary: not a word table"):
            WordTable.load(tmp_path / "binary", ["a"])

    def test_no_file(self, tmp_path) -> None:
        with pytest.raises(ValueError, match="absent: no such word table file"):
            WordTable.load(tmp_path / "absent", ["a"])

    def test_a_failed_write_leaves_the_old_file(self, tmp_path) -> None:
        path = tmp_path / "table.txt"
        table = WordTable.from_cells(np.array([0, 1]), (1, 2))
        table.save(path, ["a", "b"])
        before = path.read_text()
        with pytest.raises(ValueError, match="2 words, 3 symbols"):
            table.save(path, ["a", "b", "c"])
        with pytest.raises(UnicodeEncodeError):
            table.save(path, ["a", "\ud800"])
        assert path.read_text() == before
        assert [file.name for file in tmp_path.iterdir()] == ["table.txt"]


class TestCNTK:
    SPECIALS = {"<unk>": "UNK", "<pad>": "pad"}
    SYMBOLS = ["<pad>", "<unk>", "a", "b", "c"]

    @pytest.fixture
    def table(self) -> WordTable:
        return WordTable.from_cells(np.array([5, 0, 4, 2, 1]), (2, 3))

    def test_files_are_as_the_authors_have_them(self, tmp_path, table) -> None:
        table.save_cntk(tmp_path, self.SYMBOLS, self.SPECIALS)
        assert (tmp_path / "vocab.txt").read_text() == "pad\nUNK\na\nb\nc\n"
        assert (tmp_path / "word-0.location").read_text() == "1 4 3\n-1 2 0\n-1 -1 -1\n"

    def test_tables_of_its_own_are_not_mixed_with_ours(self, tmp_path, table) -> None:
        table.save_cntk(tmp_path, self.SYMBOLS, self.SPECIALS)
        table.save_cntk(tmp_path, self.SYMBOLS, self.SPECIALS)
        (tmp_path / "word-3.location").write_text("0\n")
        (tmp_path / "vocab.txt").write_text("theirs\n")
        with pytest.raises(ValueError, match=r"holds CNTK's word-3\.location already; give a new"):
            table.save_cntk(tmp_path, self.SYMBOLS, self.SPECIALS)
        assert (tmp_path / "vocab.txt").read_text() == "theirs\n"

    def test_files_give_the_table_back(self, tmp_path, table) -> None:
        table.save_cntk(tmp_path, self.SYMBOLS, self.SPECIALS)
        assert WordTable.load_cntk(tmp_path, self.SYMBOLS, (2, 3), self.SPECIALS) == table
        square = WordTable.load_cntk(tmp_path, self.SYMBOLS, specials=self.SPECIALS)
        assert square.shape == (3, 3)
        assert (square.coordinates == table.coordinates).all()

    def test_the_order_of_words_may_differ(self, tmp_path, table) -> None:
        table.save_cntk(tmp_path, self.SYMBOLS, self.SPECIALS)
        order = [3, 0, 4, 1, 2]
        read = WordTable.load_cntk(
            tmp_path, [self.SYMBOLS[word] for word in order], (2, 3), self.SPECIALS
        )
        assert (read.coordinates == table.coordinates[order]).all()

    def test_words_that_cntk_lacks_get_empty_cells(self, tmp_path, table) -> None:
        table.save_cntk(tmp_path, self.SYMBOLS, self.SPECIALS)
        specials = {**self.SPECIALS, "<s>": "", "</s>": ""}
        read = WordTable.load_cntk(tmp_path, ["<s>", *self.SYMBOLS, "</s>"], None, specials)
        assert (read.coordinates[1:-1] == table.coordinates).all()
        assert read.coordinates[[0, -1]].tolist() == [[1, 0], [2, 0]]

    @pytest.mark.parametrize(
        ("vocabulary", "location", "message"),
        [
            ("pad UNK a b", "1 4 3|-1 2 0|-1 -1 -1", "line 1 holds id 4, vocab.txt has 4 words"),
            ("pad UNK a b c d", "1 4 3|-1 2 0|-1 -1 -1", "line 6 holds 'd', which the dictionary"),
            ("pad UNK a b d", "1 4 3|-1 2 0|-1 -1 -1", "word 'c' .* is missing"),
            ("pad UNK a b b", "1 4 3|-1 2 0|-1 -1 -1", "'b' stands on lines 4 and 5"),
            ("pad UNK a b c", "1 4 3|1 2 0|-1 -1 -1", r"word 'UNK' \(id 1\) has two cells"),
            ("pad UNK a b c", "1 4 3|-1 2 -1|-1 -1 -1", r"'pad' \(id 0\) has no cell"),
            ("pad UNK a b c", "1 4 3|-1 2|-1 -1 -1", "line 2 has 2 entries"),
            ("pad UNK a b c", "1 4 3|-1 2 x|-1 -1 -1", "line 2 holds something else"),
        ],
    )
    def test_damaged_files_are_refused(self, tmp_path, vocabulary, location, message) -> None:
        (tmp_path / "vocab.txt").write_text(vocabulary.replace(" ", "\n") + "\n")
        (tmp_path / "word-0.location").write_text(location.replace("|", "\n") + "\n")
        with pytest.raises(ValueError, match=message):
            WordTable.load_cntk(tmp_path, self.SYMBOLS, None, self.SPECIALS)

    def authors_files(self, folder, words: int, rounds: int) -> list[str]:
        """Files laid out as the authors' programs write them, of each round another table."""
        names = [f"w{word}" for word in range(words - 2)] + ["<unk>", "</s>"]
        (folder / "vocab.txt").write_text("".join(f"{name}\n" for name in names))
        size = int(np.ceil(np.sqrt(words)))
        for number in range(rounds):
            cells = np.full(size * size, -1)
            cells[:words] = np.random.default_rng(number).permutation(words)
            square = cells.reshape(size, size)
            location = "".join("%d " * size % tuple(row) + "\n" for row in square)
            texts = [[names[word] if word >= 0 else "<null>" for word in row] for row in square]
            (folder / f"word-{number}.location").write_text(location)
            (folder / f"word-{number}.location.string").write_text(
                "".join("%s " * size % tuple(row) + "\n" for row in texts)
            )
        return names

    @pytest.mark.parametrize("words", [100, 93])
    def test_rounds_of_the_authors(self, tmp_path, words: int) -> None:
        """A full square gets one more row for the symbols that it lacks."""
        names = self.authors_files(tmp_path, words, 12)
        symbols = ["<s>", "<pad>", "</s>", "<unk>", *names[:-2], "madeupword0000"]
        lacking = {"<s>": "", "<pad>": "", "madeupword0000": ""}
        newest = WordTable.load_cntk(tmp_path, symbols, specials=lacking)
        assert newest.shape == ((11, 10) if words == 100 else (10, 10))
        for number in (None, 11, 0, 7):
            table = WordTable.load_cntk(tmp_path, symbols, specials=lacking, round=number)
            assert (table == newest) == (number in (None, 11))
            lines = (tmp_path / f"word-{number or 0}.location").read_text().splitlines()
            if number is not None:
                row, column = table.coordinates[symbols.index("w5")]
                assert lines[row].split()[column] == "5"
        assert newest.coordinates[0].tolist() == ([10, 0] if words == 100 else [9, 3])
        with pytest.raises(ValueError, match="holds no word-12.location, but rounds 0, 1, 2"):
            WordTable.load_cntk(tmp_path, symbols, specials=lacking, round=12)
        for file in tmp_path.glob("*.location"):
            file.unlink()
        with pytest.raises(ValueError, match="holds no word-0.location, nor one of another"):
            WordTable.load_cntk(tmp_path, symbols, specials=lacking)

    def test_words_with_spaces_are_refused(self, tmp_path, table) -> None:
        with pytest.raises(ValueError, match="without spaces"):
            table.save_cntk(tmp_path, ["a b", *self.SYMBOLS[1:]])

    def test_two_words_of_one_name_are_refused(self, tmp_path, table) -> None:
        with pytest.raises(ValueError, match="words 0 and 2 would both be 'a'"):
            table.save_cntk(tmp_path, self.SYMBOLS, {"<pad>": "a"})

    def test_other_numbers_of_components_are_refused(self, tmp_path) -> None:
        with pytest.raises(ValueError, match="two components, this table has 1"):
            WordTable.from_cells(np.array([0]), (1,)).save_cntk(tmp_path, ["a"])
