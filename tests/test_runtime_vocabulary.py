"""Front-coded words, against a plain list of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lightrnn.runtime.vocabulary import Vocabulary, front_code

LETTERS = st.text(st.sampled_from("abé\U0001f600"), max_size=6)
WORDS = st.lists(LETTERS | st.text("a", min_size=200, max_size=400), max_size=120, unique=True)


@given(WORDS, LETTERS)
def test_words_are_found_by_number_name_and_beginning(words: list[str], typed: str) -> None:
    order, shared, rest = front_code(words)
    vocabulary = Vocabulary(shared, rest)
    ordered = [words[place] for place in order]
    assert ordered == sorted(words, key=lambda word: word.encode())
    assert [vocabulary[number] for number in range(len(vocabulary))] == ordered
    assert [vocabulary.find(word) for word in ordered] == list(range(len(words)))
    assert (vocabulary.find(typed) is None) == (typed not in words)
    found = vocabulary.with_prefix(typed)
    assert list(found) == [n for n, word in enumerate(ordered) if word.startswith(typed)]


def test_of_equal_words_the_last_is_found() -> None:
    order, shared, rest = front_code(["b", "a", "b", "c", "b"])
    found = Vocabulary(shared, rest).find("b")
    assert found is not None and order[found] == 4


def test_numbers_out_of_range_and_newlines() -> None:
    _, shared, rest = front_code(["a"])
    for number in (-1, 1):
        with pytest.raises(IndexError):
            Vocabulary(shared, rest)[number]
    with pytest.raises(ValueError, match="holds a newline"):
        front_code(["a\nb"])


def test_damage_is_noticed() -> None:
    _, shared, rest = front_code(["a", "ab"])
    with pytest.raises(ValueError, match="damaged"):
        Vocabulary(shared[:1], rest)
    with pytest.raises(ValueError, match="damaged"):
        Vocabulary(np.ones_like(shared), rest)
