"""The source side of translation: how its words are embedded and encoded."""

# ruff: noqa: UP045  (fairseq reads flags from Optional[...], not from X | None)

from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import Tensor

from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.features import OwnNumbers
from fairseq_lightrnn.core.reader import ComponentVectors, Reader, WordEmbedding
from fairseq_lightrnn.core.seats import Seats
from fairseq_lightrnn.core.table import default_shape
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.models.flags import TableSettings
from fairseq_lightrnn.models.vocabulary import Vocabulary
from fairseq_lightrnn.models.word_head import check_words

__all__ = ["SourceEncoder", "SourceTableConfig", "TranslationForward", "source_embedding"]


@dataclass
class SourceTableConfig(FairseqDataclass):
    source_table: ChoiceEnum(["none", "own", "shared"]) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "how source words are embedded: none gives each an embedding of its own; own "
            "seats them in a word table of theirs, made as --initial-table says (from "
            "co-occurrence if that is a file) and never reallocated; shared uses the table and "
            "embeddings of the target, for a joined dictionary"
        },
    )


def source_embedding(
    cfg: Any, task: Any, dim: int, settings: TableSettings, target: Reader
) -> WordEmbedding | None:
    """Returns what ``--source-table`` embeds source words with, or None for ordinary embeddings.

    Args:
        cfg: a :class:`SourceTableConfig`.
        task: knows the dictionaries.
        dim: the width of the encoder's input.
        settings: of the target's table.
        target: looks up the vectors that words of the target are read by.

    Raises:
        UsageError: if table and vectors cannot be shared.
    """
    source_words, target_words = task.source_dictionary, task.target_dictionary
    kind = str(cfg.source_table)
    if kind == "own":
        shape = default_shape(len(source_words), len(settings.shape))
        numbers = settings.word_dim - 1
        features = [OwnNumbers(len(source_words), numbers, dim, 0)] if numbers > 0 else []
        seats = Seats(len(source_words), shape)
        reader = Reader(seats, ComponentVectors(shape, dim), features)
        return WordEmbedding(reader, source_words.pad())
    if kind == "shared":
        if source_words.symbols != target_words.symbols:
            raise UsageError(
                f"--source-table shared: the dictionaries of {task.args.source_lang} "
                f"({len(source_words)} words) and {task.args.target_lang} ({len(target_words)} "
                "words) differ; preprocess with --joined-dictionary, or use --source-table own"
            )
        if target.vectors.dim != dim:
            raise UsageError(
                f"--source-table shared: the encoder's embeddings have width {dim}, the decoder's "
                f"{target.vectors.dim}; make them equal"
            )
        return WordEmbedding(target, source_words.pad())
    return None


class SourceEncoder:
    """Encodes the source text alone; to be mixed into an encoder of fairseq's."""

    dictionary: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vocabulary = Vocabulary(self.dictionary)

    def forward_torchscript(self, net_input: dict[str, Tensor]) -> Any:
        """Encodes the source of a batch, whatever else the batch has for the decoder."""
        return self(  # type: ignore[operator]
            src_tokens=net_input["src_tokens"], src_lengths=net_input["src_lengths"]
        )

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """Refuses the state of a model of another dictionary, as the decoder does."""
        for key in ("weight", "reader.seats.coordinates"):
            words = state_dict.get(f"{name}.embed_tokens.{key}")
            check_words(words, self.dictionary, "model's encoder")
        super().upgrade_state_dict_named(state_dict, name)  # type: ignore[misc]
        return state_dict


class TranslationForward:
    """Hands the words to be predicted to the decoder; to be mixed into an encoder-decoder model."""

    encoder: Any
    decoder: Any

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor,
        prev_output_tokens: Tensor,
        target_tokens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Encodes sources and predicts; see the decoder's ``forward``."""
        encoder_out = self.encoder(src_tokens, src_lengths)
        predicted: tuple[Tensor, dict[str, Any]] = self.decoder(
            prev_output_tokens, encoder_out=encoder_out, target_tokens=target_tokens
        )
        return predicted

    def contexts(self, net_input: dict[str, Any]) -> Context:
        """Encodes sources and reads the words beside them; see :meth:`TableModel.contexts`."""
        encoder_out = self.encoder(net_input["src_tokens"], net_input["src_lengths"])
        context: Context = self.decoder.contexts(net_input["prev_output_tokens"], encoder_out)
        return context
