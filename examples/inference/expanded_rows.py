"""Counts the rows that a search for the most probable words expands, and checks some results.

python examples/inference/expanded_rows.py CHECKPOINT TEXT [SENTENCES]
"""

from __future__ import annotations

import sys

import torch

from fairseq_lightrnn.core.distribution import next_word_log_probs
from fairseq_lightrnn.core.search import top_words
from fairseq_lightrnn.language_model import LanguageModel

EVERY = 4  # query after every fourth word …
CHECKED = 100  # … and compare every hundredth query with the whole distribution


def main() -> None:
    model = LanguageModel.from_pretrained(sys.argv[1])
    with open(sys.argv[2], encoding="utf-8") as file:
        lines = file.readlines()[: int(sys.argv[3]) if len(sys.argv) > 3 else 200]
    words = [word for line in lines for word in (*model.start, *model.encode(line)[1].tolist())]
    expanded: dict[int, list[int]] = {1: [], 5: [], 10: [], 100: []}
    context = None
    with torch.no_grad():
        for number, word in enumerate(words):
            context = model.decoder.read(torch.tensor([[word]]), context)
            if number % EVERY:
                continue
            for count, rows in expanded.items():
                found = top_words(model.decoder.head, context, count)
                rows.append(int(found.expanded))
                if number % (EVERY * CHECKED) == 0:
                    every = next_word_log_probs(model.decoder.head, context)
                    best = every.topk(found.words.shape[1]).values
                    torch.testing.assert_close(found.log_probs, best, atol=1e-5, rtol=1e-5)
    for count, rows in expanded.items():
        median = sorted(rows)[len(rows) // 2]
        print(
            f"top {count}: mean {sum(rows) / len(rows):.1f}, median {median}, "
            f"most {max(rows)} of {model.table.shape[0]} rows ({len(rows)} queries)"
        )


if __name__ == "__main__":
    main()
