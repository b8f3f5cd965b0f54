"""Measures what an exported model learns on the device from the beginning of a text about its rest.

    python scripts/benchmark_learning.py EXPORT wiki.test.tokens --output learning.json

The text holds articles, which lines such as `` = Title = `` begin; each stands for a user. The
model learns from the first half of an article, and from its first ``--words`` words, and the second
half is scored before and after, hidden states carried on from the first one if the model was
trained so. Then it forgets, and the next article comes. Reported are, over all articles:

* ``known``: the perplexity of the words of second halves that the model has known from the first;
* ``all``: of all words; before, those that it does not know are predicted as the unknown word;
* ``new``: of the words that were learnt alone;
* ``seconds``: of the processor, to learn: median and most of an article.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import checksum, machine, write_whole

from fairseq_lightrnn.files import read_lines
from fairseq_lightrnn.runtime.model import ExportedModel

_TITLE = re.compile(r" *= [^=].* = *")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("export", type=Path, metavar="EXPORT", help="folder that lightrnn-export wrote")
    add("text", type=Path, metavar="TEXT", help="articles")
    add("--words", type=int, metavar="N", default=200, help="(default: %(default)s)")
    add("--articles", type=int, metavar="N", help="look at so many (default: all)")
    add("--output", type=Path, metavar="FILE", help="JSON file to write to")
    return parser.parse_args()


def articles(text: Path) -> list[list[str]]:
    """Returns the lines of each article, the empty ones left out."""
    found: list[list[str]] = []
    for line in read_lines(text):
        if _TITLE.fullmatch(line) and "= =" not in line:
            found.append([])
        if found and line.strip():
            found[-1].append(line)
    return [lines for lines in found if first_half(lines) < len(lines)]


def first_half(lines: list[str]) -> int:
    """Returns how many lines have half of the words."""
    ends = np.cumsum([len(line.split()) for line in lines])
    return int(np.searchsorted(ends, ends[-1] / 2)) + 1


def first_words(lines: list[str], words: int) -> list[str]:
    """Returns the first words of a text, in their lines."""
    found = []
    for line in lines:
        some = line.split()[:words]
        words -= len(some)
        found.append(" ".join(some))
        if not words:
            break
    return found


class Counted:
    """Sums of log-probabilities."""

    def __init__(self) -> None:
        self.total = {name: np.zeros(2) for name in ("known", "all", "new")}
        self.count = dict.fromkeys(self.total, 0)

    def add(self, name: str, before: np.ndarray, after: np.ndarray) -> None:
        self.total[name] += [before.sum(), after.sum()]
        self.count[name] += len(before)

    def report(self) -> dict[str, Any]:
        return {
            name: {
                "words": self.count[name],
                "before": round(float(np.exp(-total[0] / max(self.count[name], 1))), 2),
                "after": round(float(np.exp(-total[1] / max(self.count[name], 1))), 2),
            }
            for name, total in self.total.items()
        }


def measure(model: ExportedModel, texts: list[list[str]], words: int | None) -> dict[str, Any]:
    """Learns from each article and scores the rest of it."""
    counted, seconds, sizes, new = Counted(), [], [], 0

    def score(lines: list[str], half: int) -> tuple[list[str], np.ndarray]:
        scores = model.score(lines, carry_hidden_state=model.carry_hidden_state)[half:]
        tokens = [token for one in scores for token in one.tokens]
        return tokens, np.concatenate([one.log_probs for one in scores])

    for lines in texts:
        half = first_half(lines)
        lesson = lines[:half] if words is None else first_words(lines[:half], words)
        model.forget()
        tokens, before = score(lines, half)
        known = np.array([model.vocabulary.find(token) is not None for token in tokens])
        begun = time.process_time()
        new += len(model.learn(lesson).new)
        seconds.append(time.process_time() - begun)
        sizes.append(sum(len(line.split()) for line in lesson))
        after = score(lines, half)[1]
        found = np.array([model.vocabulary.find(token) is not None for token in tokens])
        counted.add("known", before[known], after[known])
        counted.add("all", before, after)
        counted.add("new", before[found & ~known], after[found & ~known])
    return {
        "articles": len(texts),
        "words_learnt_from": round(float(np.mean(sizes))),
        "new_words": new,
        "perplexity": counted.report(),
        "seconds": [round(float(np.median(seconds)), 3), round(max(seconds), 3)],
    }


def main() -> None:
    args = parse()
    model = ExportedModel.load(args.export)
    texts = articles(args.text)[: args.articles]
    result = {
        **{name: model.description[name] for name in ("model", "quantize", "signature")},
        "sha256": checksum(args.text),
        **machine(),
        "first_words": measure(model, texts, args.words),
        "first_half": measure(model, texts, None),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if args.output is not None:
        write_whole(args.output, text)


if __name__ == "__main__":
    main()
