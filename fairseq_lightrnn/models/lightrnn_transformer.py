"""``--arch lightrnn_transformer``: fairseq's transformer, its decoder with a word table."""

from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModel,
    base_architecture,
    transformer_iwslt_de_en,
)
from torch import Tensor, nn

from fairseq_lightrnn.components import ComponentEmbedding, ComponentSoftmax, WordEmbedding
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.gated import GatedPredictor
from fairseq_lightrnn.models._seated import SeatedDecoder, SeatedTranslation, SourceEncoder
from fairseq_lightrnn.models._table import (
    SourceTableConfig,
    check_input_table,
    check_numbers,
    check_task,
    frequent_size,
    further_tables,
    query_sizes,
    shared_residuals,
    source_embedding,
    table_shape,
)
from fairseq_lightrnn.table_lookup import TableLookup

__all__ = ["LightRNNTransformerDecoder", "LightRNNTransformerEncoder", "LightRNNTransformerModel"]

# What a table takes the place of, and the flag to be used.
_REFUSED = {
    "share_all_embeddings": "share the target's vectors with --source-table shared and "
    "--share-decoder-input-output-embed",
    "adaptive_softmax_cutoff": "a component softmax is no adaptive one; leave the flag out",
    "adaptive_input": "component vectors are no adaptive input; leave the flag out",
    "decoder_embed_path": "component vectors belong to no single word; leave the flag out",
}


class LightRNNTransformerEncoder(SourceEncoder, TransformerEncoderBase):
    """fairseq's transformer encoder."""


class LightRNNTransformerDecoder(SeatedDecoder, TransformerDecoderBase):
    """fairseq's transformer decoder, which reads and predicts words by their components.

    A word is read as the sum of its component vectors; the output after it predicts the first
    component of the next word, and the later ones through gates that the earlier ones open.

    Args:
        cfg: the transformer's flags.
        table_cfg: the table's flags.
        dictionary: of the target.
    """

    def __init__(self, cfg: TransformerConfig, table_cfg: Any, dictionary: Any) -> None:
        shape = table_shape(table_cfg, len(dictionary))
        table = TableLookup(len(dictionary), shape)
        dim = cfg.decoder.embed_dim
        frequent = frequent_size(table_cfg, len(dictionary))
        further = further_tables(table_cfg, len(dictionary), shape)
        embedding = ComponentEmbedding(
            shape,
            dim,
            table,
            table_cfg.input_residual_dim,
            frequent=frequent,
            own_table=table_cfg.keep_input_table,
            further=further,
        )
        # The sum of a word's vectors starts as the vectors of fairseq's transformer do.
        tables = 1 if further is None else 1 + len(further.tables)
        for weight in (embedding.weight, embedding.further_weight):
            if weight is not None:
                nn.init.normal_(weight, std=(dim * len(shape) * tables) ** -0.5)
        words = WordEmbedding(table, embedding, dictionary.pad())
        super().__init__(cfg, dictionary, words, no_encoder_attn=cfg.no_cross_attention)
        self.table = table
        self.further = further
        self.prediction = GatedPredictor(
            shape,
            self.output_embed_dim,
            query_sizes=query_sizes(table_cfg, self.output_embed_dim),
            ffn_dim=table_cfg.output_ffn_dim,
            ffn_dropout=cfg.dropout,
        )
        shared = cfg.share_decoder_input_output_embed
        check_input_table(table_cfg, "--share-decoder-input-output-embed", shared)
        self.softmax = ComponentSoftmax(
            table,
            self.output_embed_dim,
            embedding.weight if shared else None,
            table_cfg.word_bias,
            table_cfg.output_residual_dim,
            frequent,
            shared_residuals(table_cfg, embedding),
            further,
            embedding.further_weight if shared else None,
        )
        if not shared:
            nn.init.normal_(self.softmax.weight, std=self.output_embed_dim**-0.5)
        self._register_reallocation()

    @property
    def input_vectors(self) -> ComponentEmbedding:
        """The vectors with which words are read."""
        vectors: ComponentEmbedding = self.embed_tokens.embedding
        return vectors

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
            encoder_out: what the encoder returned.
            incremental_state: fairseq's store of states between the steps of a generation.
            target_tokens: the words to predict, shape (B, T).
            src_lengths: not used.
            alignment_layer: the layer whose attention is returned (default: the last).
            alignment_heads: how many of its heads are averaged (default: all).

        Returns:
            With ``target_tokens``: features of shape (B, T, k·(d + e)) that
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
        if target_tokens is not None:
            features = self.prediction.predict(outputs, self.table(target_tokens))
            return features.flatten(2), {**extra, "features": True}
        context = self.prediction.context(outputs[:, -1])
        num_read = prev_output_tokens.size(1)
        log_probs, more = self.predict_next(self.prediction, context, num_read, incremental_state)
        return log_probs, {**extra, **more}


@register_model("lightrnn_transformer")
class LightRNNTransformerModel(SeatedTranslation, TransformerModel):
    """fairseq's transformer with a word table on the target side."""

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        """Returns no model: none is published."""
        return {}

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Adds the flags of fairseq's transformer and of the word table."""
        super().add_args(parser)
        gen_parser_from_dataclass(parser, SourceTableConfig(), delete_default=True)

    @classmethod
    def build_model(cls, args: Namespace, task: Any) -> "LightRNNTransformerModel":
        """Builds the model for a LightRNN translation task."""
        check_task(task, "lightrnn_transformer", "lightrnn_translation")
        _base(args)
        for name, advice in _REFUSED.items():
            if getattr(args, name, None):
                raise UsageError(f"--{name.replace('_', '-')}: {advice}")
        for side in ("encoder", "decoder"):
            kept = getattr(args, f"{side}_layers_to_keep")
            if kept:
                setattr(args, f"{side}_layers", len(kept.split(",")))
        check_numbers(args, ("encoder_embed_dim", "decoder_embed_dim"))
        for name in ("max_source_positions", "max_target_positions"):
            if getattr(args, name, None) is None:
                setattr(args, name, getattr(task.args, name))
        cfg = TransformerConfig.from_namespace(args)
        if cfg.share_decoder_input_output_embed and cfg.decoder.output_dim != cfg.decoder.embed_dim:
            raise UsageError(
                "--share-decoder-input-output-embed needs --decoder-output-dim "
                f"({cfg.decoder.output_dim}) equal to --decoder-embed-dim ({cfg.decoder.embed_dim})"
            )
        decoder = LightRNNTransformerDecoder(cfg, args, task.target_dictionary)
        dictionary, dim = task.source_dictionary, cfg.encoder.embed_dim
        vectors = source_embedding(args, task, dim, decoder.table, decoder.embed_tokens.embedding)
        if vectors is None:
            vectors = cls.build_embedding(args, dictionary, dim, cfg.encoder.embed_path)
        elif str(args.source_table) == "own":
            std = (dim * len(vectors.embedding.shape)) ** -0.5
            nn.init.normal_(vectors.embedding.weight, std=std)
        return cls(args, LightRNNTransformerEncoder(cfg, dictionary, vectors), decoder)


@register_model_architecture("lightrnn_transformer", "lightrnn_transformer")
def _base(args: Namespace) -> None:
    base_architecture(args)
    for flag in fields(SourceTableConfig):
        if flag.name != "_name":
            setattr(args, flag.name, getattr(args, flag.name, flag.default))


@register_model_architecture("lightrnn_transformer", "lightrnn_transformer_iwslt_de_en")
def _iwslt_de_en(args: Namespace) -> None:
    transformer_iwslt_de_en(args)
    _base(args)
