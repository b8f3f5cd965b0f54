"""``--arch lightrnn_translation`` and ``_gated``: LSTM encoder, LightRNN decoder with attention."""

from dataclasses import dataclass
from typing import Any

import torch
from fairseq.models import FairseqEncoderDecoderModel, register_model
from fairseq.models.lstm import LSTMEncoder
from torch import Tensor, nn

from fairseq_lightrnn.core.attention import Memory
from fairseq_lightrnn.core.conditioning import Conditioner, Context, Gated, Recurrent
from fairseq_lightrnn.core.network import State
from fairseq_lightrnn.core.sharing import save_shared_once
from fairseq_lightrnn.models.flags import (
    TableSettings,
    check_task,
    parse_regularisation,
    preset,
)
from fairseq_lightrnn.models.lightrnn_lm import LSTMConfig, LSTMDecoder, build_decoder, dropouts
from fairseq_lightrnn.models.source import (
    SourceEncoder,
    SourceTableConfig,
    TranslationForward,
    source_embedding,
)
from fairseq_lightrnn.models.table_model import TableModel
from fairseq_lightrnn.models.vocabulary import Vocabulary
from fairseq_lightrnn.models.word_head import Reallocations, WordHead

__all__ = [
    "GatedTranslationModel",
    "LightRNNTranslationDecoder",
    "LightRNNTranslationEncoder",
    "LightRNNTranslationModel",
    "TranslationModelConfig",
]


@dataclass
class TranslationModelConfig(LSTMConfig, SourceTableConfig):
    """Flags of the decoder, which give the encoder its sizes and dropouts too."""


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


class LightRNNTranslationDecoder(LSTMDecoder):
    """Predicts the words of a translation as components of a word table.

    Args:
        cfg: the flags.
        settings: what those of the table come to.
        dictionary: of the target.
        conditioner: how components are conditioned on those before them.
        memory_dim: m, the width of the encoder's outputs and states.
        max_target_positions: the longest target.
    """

    def __init__(
        self,
        cfg: TranslationModelConfig,
        settings: TableSettings,
        dictionary: Any,
        conditioner: type[Conditioner],
        memory_dim: int,
        max_target_positions: int = 1024,
    ) -> None:
        super().__init__(dictionary)
        self.max_target_positions = max_target_positions
        self.core = build_decoder(cfg, settings, len(dictionary), conditioner, memory_dim)
        self.first_hidden = nn.Linear(memory_dim, cfg.hidden_size)
        self.first_cell = nn.Linear(memory_dim, cfg.hidden_size)
        self.vocabulary = Vocabulary(dictionary)
        self.reallocations = Reallocations()
        self.words = WordHead(self.core.head, self.core.reader, dictionary, self.reallocations)
        self.penalties = parse_regularisation(cfg.regularise)

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
            With ``target_tokens``: features of shape (B, T, k·d) that
            :meth:`get_normalized_probs` turns into the targets' log-probabilities. Without:
            log-probabilities of all words after the last one given, (B, 1, V). And fairseq's
            dictionary of extras, in which ``attn`` (B, T or 1, S) says where in the source these
            words were looked up.
        """
        outputs, hidden, cell, padding = encoder_out
        memory = Memory(outputs.transpose(0, 1), padding.t())
        if target_tokens is not None:
            words = torch.cat([prev_output_tokens[:, :1], target_tokens], dim=1)
            decoded = self.core(words, self._first_state(hidden, cell), memory, continued=False)
            extra = {
                "attn": decoded.attention, "features": True, "activations": decoded.activations
            }  # fmt: skip
            return decoded.hidden.flatten(2), extra
        incremental_state = {} if incremental_state is None else incremental_state
        stored = self.get_incremental_state(incremental_state, "state")
        num_read = prev_output_tokens.size(1)
        if stored is None:
            state = self._first_state(hidden, cell)
        else:
            prev_output_tokens = prev_output_tokens[:, -1:]
            state = stored["hidden"], stored["cell"]
        context, weights = self.core.read_beside(prev_output_tokens, state, memory)
        assert context.state is not None
        self._store(incremental_state, context.state)
        log_probs, more = self.words.predict_next(context, num_read, incremental_state)
        return log_probs, {"attn": weights, **more}

    def contexts(
        self, prev_output_tokens: Tensor, encoder_out: Any, carried: None = None
    ) -> Context:
        """Returns what is known after each given word; see :meth:`TableModel.contexts`."""
        outputs, hidden, cell, padding = encoder_out
        memory = Memory(outputs.transpose(0, 1), padding.t())
        return self.core.contexts(prev_output_tokens, self._first_state(hidden, cell), memory)[0]

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
            hidden, cell = (stored[name].index_select(1, new_order) for name in ("hidden", "cell"))
            self._store(incremental_state, (hidden, cell))


@register_model("lightrnn_translation", dataclass=TranslationModelConfig)
class LightRNNTranslationModel(TranslationForward, TableModel, FairseqEncoderDecoderModel):
    """The paper's composition in translation: an LSTM encoder, an LSTM decoder with attention.

    Attributes:
        conditioner: how components are conditioned on those before them.
    """

    conditioner: type[Conditioner] = Recurrent

    @classmethod
    def build_model(cls, cfg: TranslationModelConfig, task: Any) -> "LightRNNTranslationModel":
        """Builds the model for a LightRNN translation task."""
        check_task(task, "lightrnn_translation", "lightrnn_translation")
        settings = cls.table_settings(cfg, len(task.target_dictionary))
        decoder = LightRNNTranslationDecoder(
            cfg,
            settings,
            task.target_dictionary,
            cls.conditioner,
            2 * cfg.hidden_size,
            task.args.max_target_positions,
        )
        vectors = source_embedding(cfg, task, cfg.embed_dim, settings, decoder.core.reader)
        encoder = LightRNNTranslationEncoder(
            task.source_dictionary,
            cfg.embed_dim,
            cfg.hidden_size,
            cfg.num_layers,
            dropouts(cfg)[0],
            cfg.dropout,  # --dropout-out is of what predicts
            bidirectional=True,
            left_pad=task.args.left_pad_source,
            pretrained_embed=vectors,
            max_source_positions=task.args.max_source_positions,
        )
        model = cls(encoder, decoder)
        save_shared_once(model, "decoder.")
        return model


@register_model(
    "lightrnn_translation_gated", dataclass=preset(TranslationModelConfig, "GatedTranslationConfig")
)
class GatedTranslationModel(LightRNNTranslationModel):
    """The recommended translation model: one recurrent step a word, gates, a feed-forward layer."""

    conditioner = Gated
    own_numbers = 36
