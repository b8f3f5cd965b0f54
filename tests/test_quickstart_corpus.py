"""The quickstart's text: what counts as prose, how it is split, when it is reused."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

TOOLS = Path(__file__).parents[1] / "scripts" / "quickstart"
VERSIONS = {"python": "3", "torch": "2"}


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


corpus = load("corpus")
prose = load("prose")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't split (this_word), please!", "don't split ( this_word ) , please !"),
        ("float32 is 2.5 times 1e-3", "float32 is 2.5 times 1e - 3"),
        ("torch.nn.Linear, i.e. a 2D map...", "torch . nn . linear , i.e. a 2d map ..."),
        ("x == y -> __init__", "x == y - > __init__"),
        ("Größe\u2028naïve", "größe naïve"),
        ("  \n\t ", ""),
    ],
)
def test_tokenize(text, tokens):
    assert prose.tokenize(text) == tokens.split()


@given(st.text())
def test_tokens_are_words_that_a_space_separated_file_can_hold(text):
    tokens = prose.tokenize(text)
    assert " ".join(tokens).split() == tokens
    assert all(token and not any(map(str.isspace, token)) for token in tokens)
    # Nothing but white space is lost, and tokenising again changes no letter.
    assert "".join(tokens) == "".join(text.lower().split())


def test_sentences_keep_prose_and_drop_code():
    found = prose.sentences(
        """Does a thing. Then **does** it *again now*, on
        the next line too.

        Args:
            first (Tensor): the first argument and
                its second line.
            second: another argument entirely

        Parameters
        ----------
        x : array_like of numbers
            The array that is used.

        Example::

            code = that.is_not(wanted)

        .. math:: a = b + c + d
        .. note:: See :class:`Tensor` and `the page <http://x.y/z>`__ for more.

        >>> shown(result)
        array of four numbers

        Too short.
        = = = = a b
        """
    )
    assert found == [
        "does a thing .",
        "then does it again now , on the next line too .",
        "first ( tensor ) : the first argument and its second line .",
        "second : another argument entirely",
        "x : array_like of numbers",
        "the array that is used .",
        "see tensor and the page __ for more .",
    ]


SOURCE = '''"""The module."""
import argparse
PARSER = argparse.ArgumentParser(description="What it does")
PARSER.add_argument("--flag", help="what the flag"
                    " does", default="no help text")
PARSER.add_argument("--other", help=argparse.SUPPRESS)
class A:
    """The class."""
    async def f(self):
        """The method."""
        "not a docstring"
def g():
    x = "not a docstring"
add_docstr(torch.abs, r"""The function
of C.""".format(x=1))
add_newdoc("module", "name", ("attribute", "The attribute of C."))
print(f"""{PARSER}""")
'''


def test_documentation_in_order_of_the_source():
    assert corpus.documentation(SOURCE) == [
        "The module.",
        "What it does",
        "what the flag does",
        "The class.",
        "The method.",
        "The function\nof C.",
        "The attribute of C.",
    ]


def test_docstrings_are_found_without_a_look_at_expressions():
    """As in most sources, which have no help texts; the docstrings are those of all nodes."""
    source = """class A:
    'The class.'
    if True:
        def f(self):
            'In a branch.'
            try:
                pass
            except ValueError:
                class B:
                    'In a handler.'
            else:
                def g(): 'In an else.'
            finally:
                async def h(): 'In the end.'
match 1:
    case 1:
        def i(): 'In a case.'
for _ in with_():
    with a, b:
        def j(): 'In a loop.'
"""
    expected = ["The class.", "In a branch.", "In a handler.", "In an else.", "In the end."]
    expected += ["In a case.", "In a loop."]
    assert corpus.documentation(source) == expected
    assert corpus.documentation(source + "f(help='More.')\n") == [*expected, "More."]


def test_split_is_a_fixed_function_of_the_module_path():
    # Written down so that a change of the rule cannot go unnoticed.
    paths = ["argparse", "json.decoder", "torch.nn.modules.rnn", "numpy.linalg._linalg"]
    parts = [
        int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100 for path in paths
    ]
    expected = ["train" if part < 90 else "valid" if part < 95 else "test" for part in parts]
    assert [corpus.split_of(path) for path in paths] == expected
    splits = [corpus.split_of(f"module{number}") for number in range(2000)]
    shares = {split: splits.count(split) / len(splits) for split in corpus.SPLITS}
    assert 0.85 < shares["train"] < 0.95
    assert 0.03 < shares["valid"] < 0.07
    assert 0.03 < shares["test"] < 0.07


def write_sources(root: Path, modules: int = 60) -> None:
    (root / "sub" / "tests").mkdir(parents=True)
    for number in range(modules):
        path = root / ("sub" if number % 3 else "") / f"m{number}.py"
        path.write_text(
            f'"""This is module {number} of many here.\n\nThe same in all of them."""\n'
        )
    (root / "broken.py").write_text("def f(:\n")
    (root / "nulls.py").write_bytes(b'"""A text with a null byte."""\0')
    (root / "latin.py").write_bytes(b'"""A text in Latin-1, \xe9."""\n')
    (root / "repeated.py").write_text('"""A text that occurs twice in here."""\n')
    (root / "sub" / "zzz.py").write_text('"""A text that   occurs\ntwice in here."""\n')
    (root / "sub" / "tests" / "test_x.py").write_text('"""Tests are not documentation here."""\n')
    (root / "notes.txt").write_text("Not Python at all here.\n")


def test_built_corpus(tmp_path):
    write_sources(tmp_path / "src")
    out = tmp_path / "corpus"
    manifest = corpus.build_corpus(out, {"pkg": tmp_path / "src"}, VERSIONS)
    texts = {split: (out / f"{split}.txt").read_text() for split in corpus.SPLITS}
    for number in range(60):
        module = f"pkg.sub.m{number}" if number % 3 else f"pkg.m{number}"
        line = f"this is module {number} of many here .\n"
        for split, text in texts.items():
            assert (line in text) == (split == corpus.split_of(module))
    everything = "".join(texts.values())
    assert everything.count("a text that occurs twice in here .") == 1
    assert "tests are not" not in everything
    assert manifest["files_left_out"] == ["pkg.broken", "pkg.latin", "pkg.nulls"]
    assert manifest["corpus_sha256"] == hashlib.sha256(everything.encode()).hexdigest()
    for split, text in texts.items():
        assert manifest["splits"][split]["words"] == len(text.split())
        assert manifest["splits"][split]["lines"] == text.count("\n")


IN_TWO_PROCESSES = """
import json, pathlib, sys
sys.path.insert(0, "")
import corpus
out, source, versions = sys.argv[1:]
corpus.build_corpus(pathlib.Path(out), {"": pathlib.Path(source)}, json.loads(versions), workers=2)
"""


def test_built_corpus_is_the_same_every_time_and_reused(tmp_path):
    write_sources(tmp_path / "src")
    roots = {"": tmp_path / "src"}
    first = corpus.build_corpus(tmp_path / "a", roots, VERSIONS)
    assert corpus.build_corpus(tmp_path / "b", roots, VERSIONS) == first
    script = [sys.executable, "-c", IN_TWO_PROCESSES, tmp_path / "c", tmp_path / "src"]
    subprocess.run([*map(str, script), json.dumps(VERSIONS)], check=True, cwd=TOOLS)
    assert json.loads((tmp_path / "c" / "manifest.json").read_text()) == first
    assert not first["reused"]
    again = corpus.build_corpus(tmp_path / "a", roots, VERSIONS)
    assert again == {**first, "reused": True}
    # Other versions, or files that somebody touched, are not reused.
    assert not corpus.build_corpus(tmp_path / "a", roots, {**VERSIONS, "torch": "3"})["reused"]
    assert not corpus.build_corpus(tmp_path / "a", roots, VERSIONS)["reused"]
    (tmp_path / "a" / "test.txt").write_text("something else\n")
    assert not corpus.build_corpus(tmp_path / "a", roots, VERSIONS)["reused"]
    (tmp_path / "a" / "manifest.json").write_text("{")
    assert not corpus.build_corpus(tmp_path / "a", roots, VERSIONS)["reused"]
    assert json.loads((tmp_path / "a" / "manifest.json").read_text()) == first


def test_too_little_documentation(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "m.py").write_text('"""The only text there is here."""\n')
    with pytest.raises(ValueError, match="no documentation for the valid split"):
        corpus.build_corpus(tmp_path / "out", {"": tmp_path / "src"}, VERSIONS)
    assert not (tmp_path / "out").exists()


def test_installed_roots_hold_the_documentation():
    roots = corpus.installed_roots()
    assert (roots[""] / "argparse.py").is_file()
    assert (roots["numpy"] / "linalg" / "_linalg.py").is_file()
    assert set(roots) == {"", "numpy", "scipy"}


def own_files(folder: Path) -> dict[str, Path]:
    files = {split: folder / f"{split}.own" for split in corpus.SPLITS}
    for split, path in files.items():
        path.write_text(f"Some Words, for {split} .\n\nand <unk> more\n", encoding="utf-8")
    return files


def test_own_files_are_taken_as_they_are_or_tokenised(tmp_path):
    files = own_files(tmp_path)
    manifest = corpus.own_corpus(tmp_path / "out", files)
    assert (tmp_path / "out" / "valid.txt").read_bytes() == files["valid"].read_bytes()
    assert manifest["splits"]["valid"]["words"] == 8
    assert corpus.own_corpus(tmp_path / "out", files)["reused"]
    assert not corpus.own_corpus(tmp_path / "out", files, tokenized=False)["reused"]
    lines = (tmp_path / "out" / "valid.txt").read_text().splitlines()
    assert lines == ["some words , for valid .", "", "and < unk > more"]
    files["test"].write_text("another text\n")
    assert not corpus.own_corpus(tmp_path / "out", files, tokenized=False)["reused"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b" \n\n", "has no words"), (b"caf\xe9\n", "not UTF-8")],
)
def test_own_files_with_mistakes(tmp_path, capsys, content, message):
    files = own_files(tmp_path)
    if content is None:
        files["valid"].unlink()
    else:
        files["valid"].write_bytes(content)
    names = [str(files[split]) for split in corpus.SPLITS]
    assert corpus.main(["own", *names, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: VALID file {files['valid']}")
    assert message in error
    assert not (tmp_path / "out").exists()
