"""What fairseq sees of all models with a word table."""

from typing import Any

from fairseq_lightrnn.errors import value_errors
from fairseq_lightrnn.models.flags import TableSettings, settled

__all__ = ["TableModel"]


class TableModel:
    """To be mixed in before fairseq's class of a model.

    Attributes:
        own_numbers: see :func:`~fairseq_lightrnn.models.flags.settled`.
    """

    own_numbers: int | None = None

    @classmethod
    def width(cls, cfg: Any) -> int:
        """Returns the width of the hidden states that predict words."""
        width: int = cfg.hidden_size
        return width

    @classmethod
    def table_settings(cls, cfg: Any, num_words: int) -> TableSettings:
        """Returns what the flags of the table come to for a vocabulary."""
        return settled(cfg, num_words, cls.own_numbers, cls.width(cfg))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Returns fairseq's hub interface to a trained model, as its manual describes it."""
        with value_errors():
            return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
