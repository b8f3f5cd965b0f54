from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from fairseq_lightrnn.commands.nbest import (
    Hypothesis,
    format_hypothesis,
    read_nbest,
    read_references,
    reference_format,
    tune,
    word_errors,
)


def test_lines_with_and_without_features_and_scores() -> None:
    lines = [
        "0 ||| a b ||| LM= -1 ||| -2.5",
        "1 ||| c ||| -1e1",
        "0 ||| a ||| LM= -2",
        "1 |||  ",
        "",
    ]
    lists = read_nbest(lines, "file")
    assert lists == [
        [Hypothesis("0", "a b", "LM= -1", -2.5), Hypothesis("0", "a", "LM= -2")],
        [Hypothesis("1", "c", score=-10.0), Hypothesis("1", "")],
    ]
    assert format_hypothesis(lists[0][0], "X= 1", 0.5) == "0 ||| a b ||| LM= -1 X= 1 ||| 0.500000"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("just words", "file: line 2 has 1 fields"),
        ("0 ||| a ||| b ||| 1 ||| 2", "file: line 2 has 5 fields"),
        ("0 ||| a ||| b ||| c", "file: line 2 has the score 'c', not a number"),
        ("0 ||| a ||| b ||| nan", "file: line 2 has the score 'nan'; every score must be finite"),
        ("0 ||| a ||| -inf", "file: line 2 has the score '-inf'; every score must be finite"),
    ],
)
def test_malformed_lines(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_nbest(["0 ||| a", line], "file")


def test_references_by_number_and_by_name() -> None:
    assert read_references(["x", "a b", "c"], ["1", "2"], "file", "moses") == [["a", "b"], ["c"]]
    assert read_references(["u2 c", "u1 a b", ""], ["u1", "u2"], "file", "kaldi") == [
        ["a", "b"],
        ["c"],
    ]
    with pytest.raises(ValueError, match="file: has no reference for the n-best list 3"):
        read_references(["x", "a b", "c"], ["1", "3"], "file", "moses")


def test_the_format_of_references_is_recognised() -> None:
    texts = ["egy nap", "7 és 8", ""]
    assert reference_format(texts, ["0", "1"], "file") == "moses"
    numbered = ["0 egy nap", "1 7 és 8", "", "2"]
    assert reference_format(numbered, ["0", "1", "2"], "file") == "kaldi"
    assert read_references(numbered, ["1", "2"], "file", "kaldi") == [["7", "és", "8"], []]
    # Ids of other lists, ids twice, or words among them.
    assert reference_format(numbered, ["0", "5"], "file") == "moses"
    assert reference_format(["0 a", "0 b"], ["0"], "file") == "moses"
    assert reference_format(["0 a", "b"], ["0"], "file") == "moses"
    assert reference_format(["b c"], ["utt1"], "file") == "kaldi"
    with pytest.raises(ValueError, match="file: its line begins with '0', an id or a word; say"):
        reference_format(["0 degrees"], ["0"], "file")
    with pytest.raises(ValueError, match="file: line 2 is a second reference for u"):
        read_references(["u a", "u b"], ["u"], "file", "kaldi")


def slow_word_errors(hypothesis: list[str], reference: list[str]) -> int:
    table = np.zeros((len(hypothesis) + 1, len(reference) + 1), dtype=int)
    table[:, 0], table[0] = range(len(hypothesis) + 1), range(len(reference) + 1)
    for i, j in itertools.product(range(1, len(table)), range(1, table.shape[1])):
        differs = hypothesis[i - 1] != reference[j - 1]
        table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + differs)
    return int(table[-1, -1])


@given(st.lists(st.sampled_from("abcd"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_word_errors(hypothesis: list[str], reference: list[str]) -> None:
    assert word_errors(hypothesis, reference) == slow_word_errors(hypothesis, reference)


def random_lists(seed: int) -> tuple[list[list[Hypothesis]], list[list[str]], list[list[float]]]:
    """Lists in which a language model's score tells good hypotheses from bad ones."""
    rng = np.random.default_rng(seed)
    references = [[f"w{n}" for n in rng.integers(9, size=rng.integers(4, 9))] for _ in range(30)]
    lists, scores = [], []
    for key, reference in enumerate(references):
        nbest, lm = [], []
        for _ in range(int(rng.integers(1, 8))):
            words = [word if rng.random() < 0.7 else "x" for word in reference]
            nbest.append(Hypothesis(str(key), " ".join(words), score=float(rng.normal())))
            lm.append(-2.0 * words.count("x") + float(rng.normal(scale=0.5)))
        lists.append(nbest)
        scores.append(lm)
    return lists, references, scores


def first_choices(
    lists: list[list[Hypothesis]], scores: list[list[float]], lm: float, length: float
) -> list[str]:
    """One hypothesis at a time."""
    chosen = []
    for nbest, row in zip(lists, scores, strict=True):
        totals = [
            h.score + lm * score + length * len(h.text.split())
            for h, score in zip(nbest, row, strict=True)
        ]
        chosen.append(nbest[totals.index(max(totals))].text)
    return chosen


def wer(texts: list[str], references: list[list[str]]) -> float:
    errors = [slow_word_errors(t.split(), r) for t, r in zip(texts, references, strict=True)]
    return 100 * sum(errors) / sum(map(len, references))


def bleu(texts: list[str], references: list[list[str]]) -> float:
    score = BLEU(tokenize="none", force=True).corpus_score(
        texts, [[" ".join(r) for r in references]]
    )
    return float(score.score)


@pytest.mark.parametrize("metric", ["wer", "bleu"])
def test_tuning_finds_weights_as_good_as_a_grid(metric: str) -> None:
    lists, references, scores = random_lists(1)
    function = {"wer": wer, "bleu": bleu}[metric]
    weights, value, before = tune(lists, references, lambda _: scores, [0.5], metric)
    assert before == pytest.approx(function(first_choices(lists, scores, 0, 0), references))
    chosen = first_choices(lists, scores, weights.lm, weights.length)
    assert value == pytest.approx(function(chosen, references))
    grid = [
        function(first_choices(lists, scores, lm, length), references)
        for lm in (0.1, 0.5, 1.0, 4.0)
        for length in (-1.0, 0.0, 1.0)
    ]
    if metric == "wer":
        assert value <= min(grid) < before
    else:
        assert value >= max(grid) - 1e-9 > before


def test_tuning_keeps_a_useless_model_out() -> None:
    lists, references, _ = random_lists(2)
    worst = [[-5.0 * (h.text.split().count("x") == 0) - h.score for h in nbest] for nbest in lists]
    _, value, before = tune(lists, references, lambda _: worst, [0.5])
    assert value <= before


def test_tuning_chooses_the_share() -> None:
    lists, references, scores = random_lists(3)
    noise = [[0.0] * len(row) for row in scores]
    weights, _, _ = tune(lists, references, lambda a: scores if a == 0.3 else noise, [0, 0.3, 1])
    assert weights.kenlm == 0.3
