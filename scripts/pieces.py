"""Words split into the pieces of a sentencepiece model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["make_splitter", "write_pieces"]

# Bytes of a line; of longer ones nothing is learnt.
_LONGEST = 1 << 20


def make_splitter(model: Path, texts: Iterable[Path], count: int, **options: Any) -> Any:
    """Returns a splitter into so many pieces that some texts are made of, and keeps its model.

    Args:
        model: its file without suffix; what is there is loaded.
        texts: to learn the pieces of.
        count: of the pieces.
        **options: further ones of sentencepiece's trainer.

    Raises:
        SystemExit: the texts are not made of so many.
    """
    import sentencepiece

    if not model.with_suffix(".model").exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=list(map(str, texts)), model_prefix=str(model), vocab_size=count,
                num_threads=1, minloglevel=2, max_sentence_length=_LONGEST, **options,
            )  # fmt: skip
        except RuntimeError as error:
            raise SystemExit(f"{count} pieces: {error}") from None
    return sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")


def write_pieces(splitter: Any, text: Path, to: Path) -> None:
    """Writes a text split into pieces, line by line."""
    with open(text, encoding="utf-8") as lines, open(to, "w", encoding="utf-8") as file:
        for line in lines:
            print(*splitter.encode(" ".join(line.split()), out_type=str), file=file)
