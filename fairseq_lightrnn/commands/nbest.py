"""n-best lists: reading and writing them, and choosing weights that make good first choices.

A line of the format that Moses made common is ``id ||| hypothesis ||| features ||| score``;
features and score may be missing. Lines of one id make a list.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = [
    "Hypothesis",
    "Weights",
    "format_hypothesis",
    "read_nbest",
    "read_references",
    "reference_format",
    "tune",
    "word_errors",
]

_BAR = re.compile(r"\s*\|\|\|\s*")
# Weights that a search starts from; 0 is among them, so tuning never makes its own text worse.
_LM_WEIGHTS = (0.0, *(2.0**power for power in range(-6, 5)))
_LENGTH_WEIGHTS = (0.0, *(sign * 2.0**power for power in range(-3, 4) for sign in (1, -1)))
_REFINEMENTS = 6

Metric = Literal["wer", "bleu"]
ReferenceFormat = Literal["moses", "kaldi"]


@dataclass(frozen=True)
class Hypothesis:
    """A line of an n-best list.

    Attributes:
        key: the id of the list that it belongs to.
        text: the words.
        features: as they stand in the line, perhaps nothing.
        score: of the system that made it; 0 if the line has none.
    """

    key: str
    text: str
    features: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class Weights:
    """How a hypothesis is scored anew: ``score + lm · log P(text) + length · words``.

    Attributes:
        lm: weight of the language model's log-probability, which is in nats.
        length: added for each word.
        kenlm: share of the KenLM model in the interpolated probability of a word.
    """

    lm: float = 0.5
    length: float = 0.0
    kenlm: float = 0.5


def read_nbest(lines: Iterable[str], name: str) -> list[list[Hypothesis]]:
    """Reads n-best lists, in the order in which their ids appear first.

    Raises:
        ValueError: if a line is malformed; the file and line are named.
    """
    lists: dict[str, list[Hypothesis]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = _BAR.split(line.strip())
        if not 2 <= len(fields) <= 4 or not fields[0]:
            raise ValueError(
                f"{name}: line {number} has {len(fields)} fields between '|||', expected "
                "'id ||| hypothesis [||| features] [||| score]'"
            )
        key, text, *rest = fields
        score = 0.0
        if rest:
            number_or_not = _number(rest[-1])
            if number_or_not is not None:
                score = number_or_not
                if not math.isfinite(score):
                    raise ValueError(
                        f"{name}: line {number} has the score {rest[-1]!r}; every score must be "
                        "finite"
                    )
                rest.pop()
            elif len(rest) == 2:
                raise ValueError(f"{name}: line {number} has the score {rest[-1]!r}, not a number")
        hypothesis = Hypothesis(key, text, rest[0] if rest else "", score)
        lists.setdefault(key, []).append(hypothesis)
    return list(lists.values())


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def format_hypothesis(hypothesis: Hypothesis, features: str, score: float) -> str:
    """Returns the line of a hypothesis with features added and another score."""
    features = f"{hypothesis.features} {features}".strip()
    return f"{hypothesis.key} ||| {hypothesis.text} ||| {features} ||| {score:.6f}"


def reference_format(lines: Sequence[str], keys: Sequence[str], name: str) -> ReferenceFormat:
    """Tells in which format references are.

    Args:
        lines: of the file.
        keys: ids of the n-best lists.
        name: of the file, for errors.

    Returns:
        ``kaldi`` if ids are no numbers, or if they are and each line begins with one of its own,
        those of all lists among them.

    Raises:
        ValueError: if a single line could be either.
    """
    if not all(key.isdecimal() for key in keys):
        return "kaldi"
    first = [words[0] for words in map(str.split, lines) if words]
    own = len(set(first)) == len(first) and all(word.isdecimal() for word in first)
    if not own or not set(keys) <= set(first):
        return "moses"
    if len(first) == 1:
        raise ValueError(
            f"{name}: its line begins with {first[0]!r}, an id or a word; say which with "
            "--reference-format kaldi or moses"
        )
    return "kaldi"


def read_references(
    lines: Sequence[str], keys: Sequence[str], name: str, form: ReferenceFormat
) -> list[list[str]]:
    """Finds the reference of each n-best list.

    Args:
        lines: in Moses' format, line ``id`` from 0; in Kaldi's, an id and the words after it.
        keys: ids of the lists.
        name: of the file, for errors.
        form: of the lines.

    Returns:
        The words of each list's reference.

    Raises:
        ValueError: if a list has no reference, or two.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines):
        words = line.split()
        if form == "moses":
            found[str(number)] = words
        elif words:
            if words[0] in found:
                raise ValueError(f"{name}: line {number + 1} is a second reference for {words[0]}")
            found[words[0]] = words[1:]
    if form == "moses":
        keys = [str(int(key)) if key.isdecimal() else key for key in keys]
    missing = next((key for key in keys if key not in found), None)
    if missing is not None:
        raise ValueError(f"{name}: has no reference for the n-best list {missing}")
    return [found[key] for key in keys]


def word_errors(hypothesis: Sequence[str], reference: Sequence[str]) -> int:
    """Counts the words to substitute, delete or insert to make one sequence of the other."""
    numbers: dict[str, int] = {}
    target = np.array([numbers.setdefault(word, len(numbers)) for word in reference])
    steps = np.arange(len(reference) + 1)
    row = steps.copy()
    for word in hypothesis:
        best = row + 1
        best[1:] = np.minimum(best[1:], row[:-1] + (target != numbers.get(word, -1)))
        # Insertions: from any position to the left, at 1 for each step.
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


def tune(
    lists: Sequence[Sequence[Hypothesis]],
    references: Sequence[Sequence[str]],
    lm_scores: Callable[[float], Sequence[Sequence[float]]],
    kenlm_weights: Sequence[float],
    metric: Metric = "wer",
) -> tuple[Weights, float, float]:
    """Searches the weights whose first choices are best.

    All pairs of a coarse grid are tried, then finer and finer steps about the best; of equally
    good weights the first tried (the smallest) stays.

    Args:
        lists: n-best lists.
        references: the words of the right sentence of each.
        lm_scores: for a share of KenLM, the language model's log-probabilities of all hypotheses.
        kenlm_weights: the shares to try.
        metric: word error rate, to be small, or BLEU, to be large; both in percent.

    Returns:
        The weights, the metric with them, and that of the lists' own scores.
    """
    loss = _loss(lists, references, metric)
    own, lengths = _padded([[h.score for h in nbest] for nbest in lists], -np.inf), _lengths(lists)
    before = loss(own.argmax(axis=1))
    best: tuple[float, Weights] | None = None
    for kenlm in kenlm_weights:
        lm = _padded(lm_scores(kenlm), 0.0)

        def evaluate(lm_weight: float, length_weight: float, lm: np.ndarray = lm) -> float:
            return loss((own + lm_weight * lm + length_weight * lengths).argmax(axis=1))

        value, lm_weight, length_weight = _search(evaluate)
        if best is None or value < best[0]:
            best = value, Weights(lm_weight, length_weight, kenlm)
    if best is None:
        raise ValueError("no share of KenLM to try")
    sign = -1 if metric == "bleu" else 1
    return best[1], sign * best[0], sign * before


def _search(evaluate: Callable[[float, float], float]) -> tuple[float, float, float]:
    tried = [
        (evaluate(lm, length), lm, length)
        for lm, length in itertools.product(_LM_WEIGHTS, _LENGTH_WEIGHTS)
    ]
    best = min(tried, key=lambda item: item[0])
    lm_step, length_step = max(best[1], _LM_WEIGHTS[1]) / 2, max(abs(best[2]), 0.25) / 2
    for _ in range(_REFINEMENTS):
        around = [
            (evaluate(lm, length), lm, length)
            for lm in (best[1], max(0.0, best[1] - lm_step), best[1] + lm_step)
            for length in (best[2], best[2] - length_step, best[2] + length_step)
        ]
        best = min([best, *around], key=lambda item: item[0])
        lm_step, length_step = lm_step / 2, length_step / 2
    return best


def _padded(rows: Sequence[Sequence[float]], value: float) -> np.ndarray:
    padded = np.full((len(rows), max(map(len, rows))), value)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _lengths(lists: Sequence[Sequence[Hypothesis]]) -> np.ndarray:
    return _padded([[len(h.text.split()) for h in nbest] for nbest in lists], 0.0)


def _loss(
    lists: Sequence[Sequence[Hypothesis]], references: Sequence[Sequence[str]], metric: Metric
) -> Callable[[np.ndarray], float]:
    """Returns a function of the chosen hypotheses that is to be made small."""
    rows = np.arange(len(lists))
    if metric == "wer":
        errors = _padded(
            [
                [word_errors(h.text.split(), reference) for h in nbest]
                for nbest, reference in zip(lists, references, strict=True)
            ],
            0.0,
        )
        words = max(1, sum(map(len, references)))
        return lambda chosen: 100 * float(errors[rows, chosen].sum()) / words
    return _bleu_loss(lists, references)


def _bleu_loss(
    lists: Sequence[Sequence[Hypothesis]], references: Sequence[Sequence[str]]
) -> Callable[[np.ndarray], float]:
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize="none", effective_order=True)  # single sentences give the counts alone
    size = max(map(len, lists))
    counts = np.zeros((len(lists), size, 10), dtype=np.int64)
    for nbest, reference, target in zip(lists, references, counts, strict=True):
        for hypothesis, row in zip(nbest, target, strict=False):
            score = bleu.sentence_score(hypothesis.text, [" ".join(reference)])
            row[:] = [*score.counts, *score.totals, score.sys_len, score.ref_len]

    def loss(chosen: np.ndarray) -> float:
        total = counts[np.arange(len(lists)), chosen].sum(axis=0).tolist()
        score = BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp")
        return -float(score.score)

    return loss
