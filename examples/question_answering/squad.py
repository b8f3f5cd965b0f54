"""Turns a file in SQuAD's format into pairs of questions and answers, a line each.

    python examples/question_answering/squad.py train-v1.1.json OUTPUT/train

writes ``OUTPUT/train.q`` and ``OUTPUT/train.a``: lower-cased, words and punctuation apart. The
passages are left out, since the model answers from memory, and so are questions that SQuAD 2.0
marks as having no answer. Of several answers the first is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["main", "pairs", "split_words"]


def split_words(text: str) -> str:
    """Returns a text in lower case with its words and punctuation marks apart."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))


def pairs(squad: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the questions of a file that have an answer, and their first answers."""
    for article in squad["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                if question.get("is_impossible") or not question["answers"]:
                    continue
                asked = split_words(question["question"])
                answer = split_words(question["answers"][0]["text"])
                if asked and answer:
                    yield asked, answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("squad", type=Path, help="file in the format of SQuAD 1.1 or 2.0")
    parser.add_argument("prefix", type=Path, help="of the two files to write")
    args = parser.parse_args()
    try:
        found = list(pairs(json.loads(args.squad.read_text(encoding="utf-8"))))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SystemExit(f"{args.squad}: not in SQuAD's format ({error!r})") from None
    if not found:
        raise SystemExit(f"{args.squad}: has no question with an answer")
    args.prefix.parent.mkdir(parents=True, exist_ok=True)
    for number, suffix in enumerate(("q", "a")):
        path = Path(f"{args.prefix}.{suffix}")
        whole = path.with_name(path.name + ".part")
        whole.write_text("".join(f"{pair[number]}\n" for pair in found), encoding="utf-8")
        os.replace(whole, path)
    print(f"{len(found)} questions in {args.prefix}.q, answers in {args.prefix}.a")


if __name__ == "__main__":
    main()
