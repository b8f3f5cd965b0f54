"""The page that shows a word table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fairseq_lightrnn.commands.table import main
from fairseq_lightrnn.commands.table_page import read_dictionary, write_table_page
from fairseq_lightrnn.core.table import WordTable, balanced_cells

SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "the", "</script><script>", "ünï", "rare", '"&']
COUNTS = [0, 0, 7, 2, 30, 1, 4, 1, 3]


def table_of(num_words: int, shape: tuple[int, ...], seed: int = 0) -> WordTable:
    cells = np.random.default_rng(seed).permutation(balanced_cells(num_words, shape))
    return WordTable.from_cells(cells, shape)


def page_data(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert len(found) == 1
    return json.loads(found[0])


@pytest.mark.parametrize("shape", [(9,), (3, 3), (2, 5), (5, 2), (2, 3, 2)])
def test_the_page_holds_every_word_at_its_coordinates(tmp_path, shape):
    table = table_of(len(SYMBOLS), shape)
    write_table_page(tmp_path / "table.html", table, SYMBOLS, COUNTS)
    data = page_data(tmp_path / "table.html")
    assert tuple(data["shape"]) == shape
    seen = set()
    for row in range(shape[0]):
        members = range(data["starts"][row], data["starts"][row + 1])
        counts = [data["counts"][i] for i in members]
        assert counts == sorted(counts, reverse=True)
        assert len(members) == data["rowSizes"][row]
        assert sum(counts) == data["rowCounts"][row]
        for i in members:
            word = SYMBOLS.index(data["words"][i])
            assert data["counts"][i] == COUNTS[word]
            later = np.unravel_index(data["rest"][i], shape[1:]) if shape[1:] else ()
            assert [row, *later] == table.coordinates[word].tolist()
            seen.add(word)
    assert seen == set(range(len(SYMBOLS)))


def test_no_word_or_title_becomes_markup_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "table.html"
    write_table_page(path, table_of(9, (3, 3)), SYMBOLS, COUNTS, title="<b>table & co")
    text = path.read_text(encoding="utf-8")
    assert "<b>" not in text
    assert "&lt;b&gt;table &amp; co" in text
    assert text.count("</script>") == 2  # the data and the page's own script
    assert "</script><script>" in page_data(path)["words"]
    assert "://" not in text
    assert not re.search(r"<link|\bsrc=|\bhref=|@import|url\(|\bfetch\b|XMLHttpRequest", text)
    assert "innerHTML" not in text  # words are put in as text
    assert 'type="search"' in text


def test_a_large_vocabulary_is_cut_to_its_most_frequent_words(tmp_path):
    write_table_page(tmp_path / "table.html", table_of(9, (3, 3)), SYMBOLS, COUNTS, max_words=3)
    data = page_data(tmp_path / "table.html")
    assert sorted(data["words"]) == ["</s>", "the", "ünï"]
    assert data["vocabulary"] == 9
    assert sum(data["rowSizes"]) == 9


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="9 words, but 8 symbols"):
        write_table_page(tmp_path / "t.html", table_of(9, (3, 3)), SYMBOLS[:-1], COUNTS)
    with pytest.raises(ValueError, match=r"counts of shape \(8,\)"):
        write_table_page(tmp_path / "t.html", table_of(9, (3, 3)), SYMBOLS, COUNTS[:-1])
    with pytest.raises(ValueError, match="max_words is 0"):
        write_table_page(tmp_path / "t.html", table_of(9, (3, 3)), SYMBOLS, COUNTS, max_words=0)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "table.html"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_table_page(path, table_of(9, (3, 3)), SYMBOLS, COUNTS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.html"]
    assert path.read_text() == "old"


def test_command_line(tmp_path):
    dictionary = tmp_path / "dict.txt"
    dictionary.write_text("the 30\nünï 4 #fairseq:overwrite\n#fairseq 1\n", encoding="utf-8")
    symbols, counts = read_dictionary(dictionary)
    assert symbols == ["<s>", "<pad>", "</s>", "<unk>", "the", "ünï", "#fairseq"]
    assert counts.tolist() == [0, 0, 0, 0, 30, 4, 1]
    table_of(7, (3, 3)).save(tmp_path / "table.txt", symbols)
    arguments = ["page", str(tmp_path / "table.txt"), "--data", str(dictionary)]
    assert main([*arguments, "--output", str(tmp_path / "table.html")]) == 0
    assert sorted(page_data(tmp_path / "table.html")["words"]) == sorted(symbols)

    dictionary.write_text("the 30\nother\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="line 2 is 'other'"):
        main([*arguments, "--output", str(tmp_path / "table.html")])


def test_the_dictionary_is_read_as_fairseq_reads_it(tmp_path):
    from fairseq.data import Dictionary

    path = tmp_path / "dict.txt"
    path.write_text("the 30\na 2\nünï 4\n", encoding="utf-8")
    dictionary = Dictionary.load(str(path))
    symbols, counts = read_dictionary(path)
    assert symbols == dictionary.symbols
    assert counts[dictionary.nspecial :].tolist() == dictionary.count[dictionary.nspecial :]
