"""fairseq's transformers with a word table, for translation and for language models."""

from collections.abc import Iterable
from typing import Any

import torch
from fairseq.models import FairseqEncoderDecoderModel, FairseqLanguageModel, register_model
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModelBase,
)
from fairseq.modules import FairseqDropout
from torch import Tensor, nn

from fairseq_lightrnn.core.conditioning import Context, Gated
from fairseq_lightrnn.core.decoder import Decoded
from fairseq_lightrnn.core.features import FurtherTables
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.reader import WordEmbedding
from fairseq_lightrnn.core.sharing import save_shared_once
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.models.flags import TableSettings, check_task
from fairseq_lightrnn.models.parts import build_words, feed_forward
from fairseq_lightrnn.models.source import SourceEncoder, TranslationForward, source_embedding
from fairseq_lightrnn.models.table_model import TableModel
from fairseq_lightrnn.models.transformer_flags import (
    IwsltConfig,
    TransformerLMConfig,
    TransformerMTConfig,
    transformer_config,
)
from fairseq_lightrnn.models.vocabulary import Vocabulary
from fairseq_lightrnn.models.word_head import Reallocations, TableDecoder, WordHead

__all__ = [
    "IwsltTransformerModel",
    "LightRNNTransformerDecoder",
    "LightRNNTransformerEncoder",
    "LightRNNTransformerLanguageModel",
    "LightRNNTransformerModel",
    "TransformerText",
]


class LightRNNTransformerEncoder(SourceEncoder, TransformerEncoderBase):
    """fairseq's transformer encoder."""

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """Refuses the state of a model of another dictionary."""
        super().upgrade_state_dict_named(state_dict, name)
        _fill_unused(state_dict.items())
        return state_dict


class LightRNNTransformerDecoder(TableDecoder, TransformerDecoderBase):
    """fairseq's transformer decoder, which reads and predicts words by their components.

    A word is read as the sum of its component vectors; the output after it predicts the first
    component of the next word, and the later ones through gates that the earlier ones open.

    Args:
        cfg: the transformer's flags.
        settings: what the table's flags come to.
        dictionary: of the words.
        no_encoder_attn: there is no source.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        settings: TableSettings,
        dictionary: Any,
        no_encoder_attn: bool = False,
    ) -> None:
        shared = cfg.share_decoder_input_output_embed
        width, dim = cfg.decoder.input_dim, cfg.decoder.output_dim
        reader, softmax = build_words(settings, len(dictionary), width, dim, shared=shared)
        # The sum of a word's vectors starts as the embeddings of fairseq's transformer do.
        std = (width * len(settings.shape) * (1 + settings.further_tables)) ** -0.5
        nn.init.normal_(reader.vectors.weight, std=std)
        for feature in reader.features:
            if isinstance(feature, FurtherTables):
                nn.init.normal_(feature.input_vectors, std=std)
        if not shared:
            nn.init.normal_(softmax.vectors.weight, std=dim**-0.5)
        embedding = WordEmbedding(reader, dictionary.pad())
        super().__init__(cfg, dictionary, embedding, no_encoder_attn=no_encoder_attn)
        dropout = FairseqDropout(cfg.dropout, module_name=type(self).__name__)
        ffn = feed_forward(dim, settings.output_ffn_dim, dropout)
        self.head = ComponentHead(Gated(settings.shape, dim, nn.Identity(), ffn), softmax)
        self.vocabulary = Vocabulary(dictionary)
        self.reallocations = Reallocations()
        self.words = WordHead(self.head, reader, dictionary, self.reallocations)

    def build_output_projection(self, cfg: Any, dictionary: Any, embed_tokens: Any) -> None:
        """Builds nothing as wide as the vocabulary."""

    def forward(  # type: ignore[override]
        self,
        prev_output_tokens: Tensor,
        encoder_out: dict[str, list[Tensor]] | None = None,
        incremental_state: dict[str, Any] | None = None,
        target_tokens: Tensor | None = None,
        src_lengths: Tensor | None = None,
        alignment_layer: int | None = None,
        alignment_heads: int | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Predicts the word after each given word.

        Args:
            prev_output_tokens: words of shape (B, T).
            encoder_out: what the encoder returned, if there is one.
            incremental_state: fairseq's store of states between the steps of a generation.
            target_tokens: the words to predict, shape (B, T).
            src_lengths: not used.
            alignment_layer: the layer whose attention is returned (default: the last).
            alignment_heads: how many of its heads are averaged (default: all).

        Returns:
            With ``target_tokens``: features of shape (B, T, k·d) that
            :meth:`get_normalized_probs` turns into the targets' log-probabilities. Without:
            log-probabilities of all words after the last one given, (B, 1, V). And fairseq's
            dictionary of extras.
        """
        outputs, extra = self.extract_features(
            prev_output_tokens,
            encoder_out=encoder_out,
            incremental_state=incremental_state,
            alignment_layer=alignment_layer,
            alignment_heads=alignment_heads,
        )
        head = self.words.head
        if target_tokens is not None:
            hidden = head.hidden(outputs[:, :, None], target_tokens)
            return hidden.flatten(2), {**extra, "features": True}
        context, num_read = head.start(outputs[:, -1]), prev_output_tokens.size(1)
        log_probs, more = self.words.predict_next(context, num_read, incremental_state)
        return log_probs, {**extra, **more}

    def contexts(
        self, prev_output_tokens: Tensor, encoder_out: Any = None, carried: None = None
    ) -> Context:
        """Returns what is known after each given word; see :meth:`TableModel.contexts`."""
        outputs, _ = self.extract_features(prev_output_tokens, encoder_out=encoder_out)
        return self.words.head.start(outputs.flatten(0, 1))

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """Refuses the state of another model, and fills what fairseq saves uninitialised."""
        super().upgrade_state_dict_named(state_dict, name)
        _fill_unused(state_dict.items())
        return state_dict


class TransformerText:
    """A transformer language model as something to score text and continue it with.

    Args:
        decoder: of the model.
    """

    carries_state = False

    def __init__(self, decoder: LightRNNTransformerDecoder) -> None:
        self.decoder = decoder

    @property
    def most_words(self) -> int:
        """How many words of a text, its beginning included, it can look back on."""
        return int(self.decoder.max_positions())

    @property
    def head(self) -> ComponentHead:
        """Predicts words."""
        return self.decoder.words.head

    @property
    def reader(self) -> Any:
        """Looks up the vectors that words are read by."""
        return self.decoder.words.reader

    def __call__(self, words: Tensor, state: Any = None) -> Decoded:
        """Predicts each word of a text, (B, T+1), but the first."""
        outputs = self._outputs(words[:, :-1])
        return Decoded(self.head.hidden(outputs[:, :, None], words[:, 1:]), None)

    def read(self, words: Tensor, context: Context | None = None) -> Context:
        """Reads words (B, T) that follow a context, and all words before them once more."""
        if context is not None and context.history is not None:
            words = torch.cat([context.history, words], dim=1)
        return self.head.start(self._outputs(words)[:, -1])._replace(history=words)

    def _outputs(self, words: Tensor) -> Tensor:
        if words.size(1) > self.most_words:
            raise ValueError(
                f"a text of {words.size(1)} words, its beginning included, is longer than the "
                f"{self.most_words} that the model can look back on; split it"
            )
        outputs: Tensor = self.decoder.extract_features(words, encoder_out=None)[0]
        return outputs


class TransformerTableModel(TableModel):
    """What fairseq sees of transformers with a word table."""

    @classmethod
    def width(cls, cfg: Any) -> int:
        """Returns the width of the hidden states that predict words."""
        return transformer_config(cfg).decoder.output_dim

    @classmethod
    def can_keep_input_table(cls, cfg: Any) -> bool:
        """See :meth:`TableModel.can_keep_input_table`."""
        return not transformer_config(cfg).share_decoder_input_output_embed


@register_model("lightrnn_transformer_lm", dataclass=TransformerLMConfig)
class LightRNNTransformerLanguageModel(TransformerTableModel, FairseqLanguageModel):
    """fairseq's transformer language model with a word table."""

    own_numbers = 64

    @classmethod
    def build_model(cls, cfg: TransformerLMConfig, task: Any) -> "LightRNNTransformerLanguageModel":
        """Builds the model for a LightRNN task."""
        check_task(task, "lightrnn_transformer_lm", "lightrnn_language_modeling")
        dictionary = task.target_dictionary
        settings = cls.table_settings(cfg, len(dictionary))
        decoder = LightRNNTransformerDecoder(
            transformer_config(cfg), settings, dictionary, no_encoder_attn=True
        )
        save_shared_once(decoder)
        _fill_unused(decoder.named_buffers())
        return cls(decoder)


@register_model("lightrnn_transformer", dataclass=TransformerMTConfig)
class LightRNNTransformerModel(
    TranslationForward, TransformerTableModel, FairseqEncoderDecoderModel
):
    """fairseq's transformer with a word table on the target side."""

    own_numbers = 36

    @classmethod
    def build_model(cls, cfg: TransformerMTConfig, task: Any) -> "LightRNNTransformerModel":
        """Builds the model for a LightRNN translation task."""
        check_task(task, "lightrnn_transformer", "lightrnn_translation")
        source, target = task.source_dictionary, task.target_dictionary
        flags, settings = transformer_config(cfg), cls.table_settings(cfg, len(target))
        decoder = LightRNNTransformerDecoder(
            flags, settings, target, no_encoder_attn=flags.no_cross_attention
        )
        dim = flags.encoder.embed_dim
        vectors: Any = source_embedding(cfg, task, dim, settings, decoder.words.reader)
        if vectors is None:
            vectors = TransformerModelBase.build_embedding(
                flags, source, dim, flags.encoder.embed_path
            )
        elif flags.encoder.embed_path:
            raise UsageError(
                f"--encoder-embed-path {flags.encoder.embed_path}: with --source-table "
                f"{cfg.source_table} source words have no vectors of their own to load; leave one "
                "of the flags out"
            )
        elif str(cfg.source_table) == "own":
            std = (dim * vectors.reader.num_components) ** -0.5
            nn.init.normal_(vectors.reader.vectors.weight, std=std)
        model = cls(LightRNNTransformerEncoder(flags, source, vectors), decoder)
        save_shared_once(model, "decoder.")
        _fill_unused(model.named_buffers())
        return model


def _fill_unused(state: Iterable[tuple[str, Tensor]]) -> None:
    """Gives a value to what fairseq saves of sinusoidal positions: whatever was in the memory.

    Checkpoints of equal trainings would differ, and averages of it not be finite.
    """
    for name, value in state:
        if name.endswith("_float_tensor"):
            value.zero_()


@register_model("lightrnn_transformer_iwslt_de_en", dataclass=IwsltConfig)
class IwsltTransformerModel(LightRNNTransformerModel):
    """fairseq's transformer with a word table, in the sizes of ``transformer_iwslt_de_en``."""
