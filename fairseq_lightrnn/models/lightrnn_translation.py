"""``--arch lightrnn_translation``: an LSTM encoder and a LightRNN decoder with attention."""

# ruff: noqa: UP045  (fairseq reads flags from Optional[...], not from X | None)

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.models import (
    FairseqEncoderDecoderModel,
    FairseqIncrementalDecoder,
    register_model,
    register_model_architecture,
)
from fairseq.models.lstm import LSTMEncoder
from torch import Tensor, nn

from fairseq_lightrnn.attentive import (
    AttentiveComposition,
    AttentiveGatedComposition,
    AttentiveRecurrentComposition,
    Memory,
)
from fairseq_lightrnn.components import WordEmbedding
from fairseq_lightrnn.composition import State
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.models._seated import SeatedDecoder, SeatedTranslation, SourceEncoder
from fairseq_lightrnn.models._table import (
    SourceTableConfig,
    check_numbers,
    check_task,
    further_tables,
    source_embedding,
    table_shape,
)
from fairseq_lightrnn.models.lightrnn_lm import (
    LightRNNLanguageModelConfig,
    build_composition,
    build_embedding,
    build_softmax,
    check_config,
    gated_architecture,
)
from fairseq_lightrnn.table_lookup import TableLookup

__all__ = [
    "LightRNNTranslationDecoder",
    "LightRNNTranslationEncoder",
    "LightRNNTranslationModel",
    "LightRNNTranslationModelConfig",
]

_COMPOSITIONS: Mapping[str, type[AttentiveComposition]] = {
    "recurrent": AttentiveRecurrentComposition,
    "gated": AttentiveGatedComposition,
}


@dataclass
class LightRNNTranslationModelConfig(LightRNNLanguageModelConfig, SourceTableConfig):
    encoder_embed_dim: Optional[int] = field(
        default=None, metadata={"help": "width of the source vectors (default: --embed-dim)"}
    )
    encoder_hidden_size: Optional[int] = field(
        default=None,
        metadata={"help": "width of the encoder's LSTM in each direction (default: --hidden-size)"},
    )
    encoder_dropout_in: Optional[float] = field(
        default=None, metadata={"help": "dropout on the source vectors (default: --dropout)"}
    )
    encoder_dropout_out: Optional[float] = field(
        default=None,
        metadata={
            "help": "dropout between the encoder's layers and on its outputs (default: --dropout)"
        },
    )


class LightRNNTranslationEncoder(SourceEncoder, LSTMEncoder):
    """fairseq's bidirectional LSTM encoder, whose outputs keep the order of the source's padding.

    So what attends to them can be aligned with the source as it was given.
    """

    def forward(  # type: ignore[override]
        self, src_tokens: Tensor, src_lengths: Tensor, enforce_sorted: bool = False
    ) -> tuple[Tensor, ...]:
        """Encodes source texts.

        Args:
            src_tokens: words of shape (B, S).
            src_lengths: their numbers of words, shape (B,).
            enforce_sorted: the longest text comes first.

        Returns:
            Outputs (S, B, m), last hidden and cell states (layers, B, m), and padding (S, B).
        """
        padding = src_tokens.eq(self.padding_idx).t()
        # The LSTM reads no more than the longest text, its padding moved to the right.
        spare = len(padding) - int(src_lengths.max())
        words = src_tokens[:, spare:] if self.left_pad else src_tokens[:, : len(padding) - spare]
        outputs, hidden, cell, _ = super().forward(words, src_lengths, enforce_sorted)
        outputs = nn.functional.pad(outputs, (0, 0, 0, 0, 0, spare))
        if self.left_pad:
            places = torch.arange(len(padding), device=padding.device)[:, None]
            places = (places - padding.sum(0)) % len(padding)
            outputs = outputs.gather(0, places[..., None].expand_as(outputs))
        return outputs, hidden, cell, padding

    def reorder_encoder_out(  # type: ignore[override]
        self, encoder_out: tuple[Tensor, ...], new_order: Tensor
    ) -> tuple[Tensor, ...]:
        """Reorders, repeats or drops the texts of a batch."""
        return tuple(part.index_select(1, new_order) for part in encoder_out)


class LightRNNTranslationDecoder(SeatedDecoder, FairseqIncrementalDecoder):
    """Predicts the words of a translation as components of a word table.

    Args:
        cfg: the flags.
        dictionary: of the target.
        memory_dim: m, the width of the encoder's outputs and states.
        max_target_positions: the longest target.
    """

    def __init__(
        self,
        cfg: LightRNNTranslationModelConfig,
        dictionary: Any,
        memory_dim: int,
        max_target_positions: int = 1024,
    ) -> None:
        super().__init__(dictionary)
        check_config(cfg)
        shape = table_shape(cfg, len(dictionary))
        self.max_target_positions = max_target_positions
        self.table = TableLookup(len(dictionary), shape)
        self.further = further_tables(cfg, len(dictionary), shape)
        embedding = build_embedding(cfg, self.table, self.further)
        self.composition = build_composition(cfg, embedding, _COMPOSITIONS, memory_dim=memory_dim)
        self.softmax = build_softmax(cfg, self.table, embedding, self.further)
        self.first_hidden = nn.Linear(memory_dim, cfg.hidden_size)
        self.first_cell = nn.Linear(memory_dim, cfg.hidden_size)
        self._register_reallocation()

    def max_positions(self) -> int:
        """Returns the greatest number of words of a target."""
        return self.max_target_positions

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: dict[str, Any] | None = None,
        target_tokens: Tensor | None = None,
        src_lengths: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Predicts the word after each given word.

        Args:
            prev_output_tokens: words of shape (B, T), padding on the right.
            encoder_out: what the encoder returned.
            incremental_state: fairseq's store of states between the steps of a generation.
            target_tokens: the words to predict, shape (B, T).
            src_lengths: not used.

        Returns:
            With ``target_tokens``: features of shape (B, T, k·(d + e)) that
            :meth:`get_normalized_probs` turns into the targets' log-probabilities. Without:
            log-probabilities of all words after the last one given, (B, 1, V). And fairseq's
            dictionary of extras, in which ``attn`` (B, T or 1, S) says where in the source these
            words were looked up.
        """
        outputs, hidden, cell, padding = encoder_out
        memory = Memory(outputs.transpose(0, 1), padding.t())
        if target_tokens is not None:
            words = torch.cat([prev_output_tokens[:, :1], target_tokens], dim=1)
            state = self._first_state(hidden, cell)
            features, weights = self.composition.translate(self.table(words), state, memory)
            return features.flatten(2), {"attn": weights, "features": True}
        incremental_state = {} if incremental_state is None else incremental_state
        stored = self.get_incremental_state(incremental_state, "state")
        num_read = prev_output_tokens.size(1)
        if stored is None:
            state = self._first_state(hidden, cell)
        else:
            prev_output_tokens = prev_output_tokens[:, -1:]
            state = stored["hidden"], stored["cell"]
        coordinates = self.table(prev_output_tokens)
        context, weights = self.composition.read_beside(coordinates, state, memory)
        self._store(incremental_state, context.state)
        log_probs, extra = self.predict_next(self.composition, context, num_read, incremental_state)
        return log_probs, {"attn": weights, **extra}

    def _first_state(self, hidden: Tensor, cell: Tensor) -> State:
        return self.first_hidden(hidden), self.first_cell(cell)

    def _store(self, incremental_state: dict[str, Any], state: State) -> None:
        stored = {"hidden": state[0], "cell": state[1]}
        self.set_incremental_state(incremental_state, "state", stored)

    def reorder_incremental_state(
        self, incremental_state: dict[str, Any], new_order: Tensor
    ) -> None:
        """Reorders, repeats or drops the texts of a generation."""
        stored = self.get_incremental_state(incremental_state, "state")
        if stored is not None:
            state = tuple(stored[name].index_select(1, new_order) for name in ("hidden", "cell"))
            self._store(incremental_state, state)  # type: ignore[arg-type]


@register_model("lightrnn_translation", dataclass=LightRNNTranslationModelConfig)
class LightRNNTranslationModel(SeatedTranslation, FairseqEncoderDecoderModel):
    """An LSTM encoder and a LightRNN decoder with attention as a fairseq model."""

    @classmethod
    def build_model(
        cls, cfg: LightRNNTranslationModelConfig, task: Any
    ) -> "LightRNNTranslationModel":
        """Builds the model for a LightRNN translation task."""
        check_task(task, "lightrnn_translation", "lightrnn_translation")
        embed_dim, hidden_size, dropout_in, dropout_out = _encoder_numbers(cfg)
        decoder = LightRNNTranslationDecoder(
            cfg, task.target_dictionary, 2 * hidden_size, task.args.max_target_positions
        )
        vectors: WordEmbedding | None = source_embedding(
            cfg, task, embed_dim, decoder.table, decoder.composition.embedding
        )
        encoder = LightRNNTranslationEncoder(
            task.source_dictionary,
            embed_dim,
            hidden_size,
            cfg.num_layers,
            dropout_in,
            dropout_out,
            bidirectional=True,
            left_pad=task.args.left_pad_source,
            pretrained_embed=vectors,
            max_source_positions=task.args.max_source_positions,
        )
        return cls(encoder, decoder)


def _encoder_numbers(cfg: LightRNNTranslationModelConfig) -> tuple[int, int, float, float]:
    """Returns the encoder's sizes and dropouts; what its flags leave out the decoder's say."""
    check_numbers(
        cfg,
        sizes=tuple(
            name
            for name in ("encoder_embed_dim", "encoder_hidden_size")
            if getattr(cfg, name) is not None
        ),
        dropouts=("dropout", "encoder_dropout_in", "encoder_dropout_out"),
    )

    def value(own: Any, other: Any) -> Any:
        return other if own is None else own

    if cfg.num_layers < 1:
        raise UsageError(f"--num-layers {cfg.num_layers}: must be at least 1")
    return (
        value(cfg.encoder_embed_dim, cfg.embed_dim),
        value(cfg.encoder_hidden_size, cfg.hidden_size),
        value(cfg.encoder_dropout_in, cfg.dropout),
        value(cfg.encoder_dropout_out, cfg.dropout),
    )


register_model_architecture("lightrnn_translation", "lightrnn_translation_gated")(
    gated_architecture
)
