"""Writes a text with ``<unk>`` for every word that its training part has less often than N times.

    python scripts/hide_rare_words.py FOLDER TO --least 2

FOLDER holds text as for ``benchmark_language_model.py``, TO receives it. Every system that is
trained on it then predicts the same words.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from language_model_text import UNKNOWN, count_words, find_text

from fairseq_lightrnn.files import whole_file


def hide_rare_words(text: Path, to: Path, least: int) -> None:
    """Writes the splits of a text.

    Args:
        text: folder of the splits.
        to: folder to write.
        least: how often a word must occur in the training text.

    Raises:
        SystemExit: if the text would be written over itself.
    """
    if to.resolve() == text.resolve():
        raise SystemExit(f"{to}: is where the text lies; give another folder to write to")
    files = find_text(text)
    counts = count_words(files["train"])
    to.mkdir(parents=True, exist_ok=True)
    for split, path in files.items():
        with (
            open(path, encoding="utf-8") as lines,
            whole_file(to / f"{split}.txt") as file,
        ):
            for line in lines:
                words = line.split()
                print(*(one if counts[one] >= least else UNKNOWN for one in words), file=file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("text", type=Path, metavar="FOLDER", help="of the text files")
    add("to", type=Path, metavar="TO", help="folder to write to")
    add("--least", type=int, default=2, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args()
    hide_rare_words(args.text, args.to, args.least)


if __name__ == "__main__":
    main()
