"""What fairseq sees of all models with a word table."""

from typing import Any

from fairseq_lightrnn.core.conditioning import Conditioner, Context, Gated
from fairseq_lightrnn.errors import value_errors
from fairseq_lightrnn.models.flags import TableSettings, settled

__all__ = ["TableModel"]


class TableModel:
    """To be mixed in before fairseq's class of a model.

    Attributes:
        conditioner: how components are conditioned on those before them.
        own_numbers: see :func:`~fairseq_lightrnn.models.flags.settled`.
    """

    conditioner: type[Conditioner]
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
    def can_keep_input_table(cls, cfg: Any) -> bool:
        """Tells whether words can be read by another table than they are predicted by.

        In the paper's model the row that is predicted is the row that is read.
        """
        return cls.conditioner is Gated and str(cfg.component_vectors) != "shared"

    def contexts(self, net_input: dict[str, Any]) -> Context:
        """Returns what is known before each word of a batch that is to be predicted.

        Args:
            net_input: the arguments of ``forward``.

        Returns:
            Contexts of B·T texts, those of a text side by side, padding among them.
        """
        decoder: Any = self.decoder  # type: ignore[attr-defined]
        context: Context = decoder.contexts(
            net_input["src_tokens"], carried=net_input.get("carried")
        )
        return context

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Returns fairseq's hub interface to a trained model, as its manual describes it."""
        with value_errors():
            return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
