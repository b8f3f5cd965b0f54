"""Prose out of docstrings: what is left out, where sentences end, what counts as a word."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator

__all__ = ["sentences", "tokenize"]

SHORTEST_SENTENCE = 4

_ABBREVIATION = r"\b(?:[^\W\d_]\.){2,}(?!\w)"
_WORD = r"[^\W\d]\w*(?:'[^\W\d_]+)?"
_NUMBER = r"\d+(?:\.\d+)*\w*"
_PUNCTUATION = r"([^\w\s])\1*"
_TOKEN = re.compile(f"{_PUNCTUATION}|{_ABBREVIATION}|{_WORD}|{_NUMBER}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\"'\[])")
_ROLE = re.compile(r":[a-z]+(?::[a-z]+)?:(?=`)")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(?=[^\s*])([^*]+)(?<=[^\s*])\1(?![\w*])")
_LINK_TARGET = re.compile(r"<[^<>`\s]+>(?=`)")
_DIRECTIVE = re.compile(r"\.\. +(?:([\w:-]+)::|\[\w+\]|_[^:]+:)\s*")
_VERBATIM = frozenset(
    ["autosummary", "code", "code-block", "currentmodule", "figure", "image", "ipython", "math"]
    + ["plot", "sourcecode", "table", "testcode", "testoutput", "testsetup", "toctree"]
)
_ITEM = re.compile(r"(?:[-*+•]|\d+[.)])\s+|[*`]*\w[\w.,* ]{0,40}(?:\([^()]*\))?[*`]*\s?:\s")
_HEADING = re.compile(r"[*`]*\w[\w.,* ]{0,40}\s:\s")


def tokenize(text: str) -> list[str]:
    """Splits a text into lower-case words, numbers and punctuation marks.

    A word is a run of letters, digits and underscores that does not begin with a digit, with at
    most one apostrophe part (``don't``); ``e.g.`` and the like are words too; a number keeps its
    decimal points and a letter suffix (``2.5``, ``3d``); a run of one punctuation mark is one token
    (``...``, ``==``). Case is dropped: most capitals here only mark the beginning of a sentence,
    and every spelling costs a cell of the table.

    Args:
        text: any text.

    Returns:
        The tokens in order; none is empty or holds white space.
    """
    return [match.group() for match in _TOKEN.finditer(text.lower())]


def sentences(docstring: str) -> list[str]:
    """Returns the prose of one docstring as tokenised sentences.

    Doctest examples, literal blocks, formulas and rules (``-----``) are left out, reST markup is
    reduced to its text, wrapped lines are joined, and the entries of a parameter list are kept
    apart. Sentences of fewer than four tokens, and those that are not mostly words, are dropped.

    Args:
        docstring: the text as written in the source, still indented.

    Returns:
        One string a sentence, tokens separated by single spaces.
    """
    found = []
    for passage in _passages(inspect.cleandoc(docstring).splitlines()):
        plain = _LINK_TARGET.sub("", _ROLE.sub("", passage)).replace("`", "")
        plain = _EMPHASIS.sub(r"\2", plain)
        for sentence in _SENTENCE_END.split(plain):
            tokens = tokenize(sentence)
            words = sum(token[0].isalpha() for token in tokens)
            if len(tokens) >= SHORTEST_SENTENCE and 2 * words >= len(tokens):
                found.append(" ".join(tokens))
    return found


def _passages(lines: Iterable[str]) -> Iterator[str]:
    """Joins the lines of a docstring that belong to one running text."""
    passage: list[str] = []
    start_indent = last_indent = 0
    heading = False
    for line in _prose_lines(lines):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        goes_on = (
            passage
            and text
            # A hanging indent belongs to its entry; coming back from one begins the next entry.
            and (indent > start_indent or indent == start_indent == last_indent)
            and not (heading and indent > last_indent)
            and not _ITEM.match(text)
        )
        if passage and not goes_on:
            yield " ".join(passage)
            passage = []
        if text:
            if not passage:
                start_indent = indent
                heading = _HEADING.match(text) is not None
            passage.append(text)
            last_indent = indent
    if passage:
        yield " ".join(passage)


def _prose_lines(lines: Iterable[str]) -> Iterator[str]:
    """Drops what is not running text: examples, literal blocks, formulas, rules."""
    in_doctest = False
    block_indent: int | None = None
    for line in lines:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if not text:
            in_doctest = False
            yield ""
            continue
        if block_indent is not None:
            if indent > block_indent:
                continue
            block_indent = None
        if in_doctest or text.startswith(">>>"):
            in_doctest = True
            continue
        if not any(character.isalnum() for character in text):
            yield ""
            continue
        directive = _DIRECTIVE.match(text)
        if directive is not None:
            if directive.group(1) in _VERBATIM or directive.group(1) is None:
                block_indent = indent
                yield ""
                continue
            line = " " * indent + text[directive.end() :]
        elif text.endswith("::"):
            block_indent = indent
            line = line.rstrip()[:-1]
        yield line
