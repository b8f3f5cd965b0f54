"""``--arch lightrnn_lm``, the language model of arXiv 1610.09893, and ``lightrnn_lm_gated``."""

# ruff: noqa: UP045  (fairseq reads flags from Optional[...], not from X | None)

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel, register_model
from torch import Tensor

from fairseq_lightrnn.core.attention import Attention
from fairseq_lightrnn.core.conditioning import Conditioner, Context, Gated, Recurrent
from fairseq_lightrnn.core.decoder import Activations, Decoder
from fairseq_lightrnn.core.network import Dropout, LockedDropout, RegularisedLSTM
from fairseq_lightrnn.core.sharing import save_shared_once
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.models.carried_state import CarriedState
from fairseq_lightrnn.models.flags import (
    TableConfig,
    TableSettings,
    check_numbers,
    check_task,
    parse_regularisation,
    preset,
)
from fairseq_lightrnn.models.parts import build_words, feed_forward
from fairseq_lightrnn.models.table_model import TableModel
from fairseq_lightrnn.models.vocabulary import Vocabulary
from fairseq_lightrnn.models.word_head import Reallocations, TableDecoder, WordHead

__all__ = [
    "GatedLanguageModel",
    "LSTMConfig",
    "LightRNNDecoder",
    "LightRNNLanguageModel",
    "LSTMDecoder",
    "build_decoder",
    "dropouts",
]


@dataclass
class LSTMConfig(TableConfig):
    """Flags of all models with an LSTM."""

    embed_dim: int = field(default=200, metadata={"help": "width of the embeddings of components"})
    hidden_size: int = field(
        default=200,
        metadata={
            "help": "width of the LSTM, and of the output layer's vectors unless they are those "
            "of the input"
        },
    )
    num_layers: int = field(default=1, metadata={"help": "layers of the LSTM"})
    dropout: float = field(
        default=0.1, metadata={"help": "dropout wherever a flag of its own does not say otherwise"}
    )
    dropout_in: Optional[float] = field(
        default=None, metadata={"help": "dropout on the embeddings (default: --dropout)"}
    )
    dropout_out: Optional[float] = field(
        default=None,
        metadata={"help": "dropout on what predicts components (default: --dropout)"},
    )
    component_vectors: Optional[ChoiceEnum(["separate", "shared"])] = field(  # type: ignore[valid-type]
        default=None,
        metadata={
            "help": "vectors of rows and columns: separate ones for input and output, or the same, "
            "shared ones, of --embed-dim, to which outputs of another --hidden-size are projected "
            "(default: shared where these are equal and words have numbers of their own, but no "
            "table for input alone; otherwise separate)"
        },
    )
    regularise: Optional[str] = field(
        default=None,
        metadata={
            "help": "regularise as AWD-LSTM does (arXiv 1708.02182): awd, or awd with other "
            "values, such as awd,weight=0.5,component=0.1,activation=2,change=1 (these are its "
            "own): dropout with one mask for a text, dropout of the recurrent matrices and of "
            "whole embeddings, penalties on the mean square of the LSTM's outputs and of their "
            "change from word to word, which are logged beside the loss and never part of it"
        },
    )


def dropouts(cfg: LSTMConfig) -> tuple[float, float]:
    """Returns the dropout of inputs and of outputs."""
    given = cfg.dropout_in, cfg.dropout_out
    dropout_in, dropout_out = (cfg.dropout if rate is None else rate for rate in given)
    return dropout_in, dropout_out


def build_decoder(
    cfg: LSTMConfig,
    settings: TableSettings,
    num_words: int,
    conditioner: type[Conditioner],
    memory_dim: int = 0,
) -> Decoder:
    """Builds a recurrent decoder as flags ask for it.

    Args:
        cfg: the flags.
        settings: what those of the table come to.
        num_words: V.
        conditioner: how components are conditioned on those before them.
        memory_dim: width of what attention reads from a source; 0 for no source.

    Raises:
        UsageError: if a flag has no meaning.
    """
    check_numbers(
        cfg,
        sizes=("embed_dim", "hidden_size", "num_layers"),
        dropouts=("dropout", "dropout_in", "dropout_out"),
    )
    if settings.keep_input_table and conditioner is Recurrent and len(settings.shape) > 1:
        raise UsageError(
            "--keep-input-table: the paper's model predicts a column with the step that read the "
            "row, so both need one table; use a gated architecture"
        )
    regularisation = parse_regularisation(cfg.regularise)
    dropout_type = LockedDropout if regularisation.locked else Dropout
    shared = _shares_vectors(cfg, settings)
    dim = cfg.embed_dim if shared else cfg.hidden_size
    dropout_in, dropout_out = dropouts(cfg)
    dropout = dropout_type(dropout_out)
    reader, softmax = build_words(
        settings,
        num_words,
        cfg.embed_dim,
        dim,
        shared=shared,
        dropout=regularisation.component,
    )
    network = RegularisedLSTM(
        cfg.embed_dim,
        cfg.hidden_size,
        cfg.num_layers,
        cfg.dropout,
        dropout_in,
        regularisation.locked,
        regularisation.weight,
        dim,
    )
    attention = Attention(dim, memory_dim) if memory_dim else None
    ffn = feed_forward(dim, settings.output_ffn_dim, dropout)
    if conditioner is Recurrent:
        conditioned: Conditioner = Recurrent(reader, network, dropout, ffn, attention)
    else:
        conditioned = Gated(settings.shape, dim, dropout, ffn)
    return Decoder(reader, network, conditioned, softmax, attention)


def _shares_vectors(cfg: LSTMConfig, settings: TableSettings) -> bool:
    """Tells whether input and output have the same vectors of rows and columns."""
    if cfg.component_vectors is None:
        return (
            settings.word_dim > 1
            and cfg.embed_dim == cfg.hidden_size
            and not settings.keep_input_table
        )
    if str(cfg.component_vectors) == "separate":
        return False
    if settings.keep_input_table:
        raise UsageError(
            "--component-vectors shared and --keep-input-table: give one of them; rows and "
            "columns of two tables are of different words, and have nothing to share"
        )
    return True


class LSTMDecoder(TableDecoder, FairseqIncrementalDecoder):
    """What decoders with an LSTM have in common."""

    def make_generation_fast_(self, retain_dropout: bool = False, **kwargs: Any) -> None:
        """Refuses ``--retain-dropout``, by which fairseq's own modules drop in evaluation."""
        if retain_dropout:
            raise UsageError(
                "--retain-dropout: a LightRNN model with an LSTM predicts without dropout; leave "
                "the flag out"
            )


class LightRNNDecoder(LSTMDecoder):
    """Predicts words as components of a word table.

    Args:
        cfg: the flags.
        settings: what those of the table come to.
        dictionary: of the words.
        conditioner: how components are conditioned on those before them.
    """

    def __init__(
        self,
        cfg: LSTMConfig,
        settings: TableSettings,
        dictionary: Any,
        conditioner: type[Conditioner],
    ) -> None:
        super().__init__(dictionary)
        self.core = build_decoder(cfg, settings, len(dictionary), conditioner)
        self.vocabulary = Vocabulary(dictionary)
        self.reallocations = Reallocations()
        self.words = WordHead(self.core.head, self.core.reader, dictionary, self.reallocations)
        self.carried_state = CarriedState()
        self.penalties = parse_regularisation(cfg.regularise)
        save_shared_once(self)

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: dict[str, Any] | None = None,
        target_tokens: Tensor | None = None,
        src_lengths: Tensor | None = None,
        carried: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Predicts the word after each given word.

        Args:
            prev_output_tokens: words of shape (B, T), padding on the right.
            encoder_out: not used.
            incremental_state: fairseq's store of states between the steps of a generation.
            target_tokens: the words to predict, shape (B, T).
            src_lengths: not used.
            carried: name of the ``stream`` of text and number of its ``block``, if the words go on
                where its last block ended.

        Returns:
            With ``target_tokens``: features of shape (B, T, k·d) that
            :meth:`get_normalized_probs` turns into the targets' log-probabilities. Without:
            log-probabilities of all words after the last one given, (B, 1, V); that is all that
            generation and shallow fusion look at. And fairseq's dictionary of extras, with the
            network's :class:`Activations` as ``activations``.
        """
        if target_tokens is not None:
            hidden, activations = self.extract_features(prev_output_tokens, target_tokens, carried)
            return hidden.flatten(2), {
                "attn": None, "features": True, "activations": activations
            }  # fmt: skip
        incremental_state = {} if incremental_state is None else incremental_state
        context = self._read(prev_output_tokens, incremental_state)
        num_read = prev_output_tokens.size(1)
        log_probs, extra = self.words.predict_next(context, num_read, incremental_state)
        return log_probs, {"attn": None, **extra}

    def extract_features(  # type: ignore[override]
        self,
        prev_output_tokens: Tensor,
        target_tokens: Tensor,
        carried: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Activations | None]:
        """Returns the hidden states, (B, T, k, d), that predict the targets' components.

        With ``--add-bos-token`` the first target is the ``<s>`` that was read, not the word after
        it, and is conditioned on that word's components: the loss of this one place is no
        log-probability. ``fairseq-eval-lm`` leaves it out.
        """
        # A text's next source word is its target, but where padding begins it is not the last one.
        upcoming = torch.cat([prev_output_tokens[:, 1:], target_tokens[:, -1:]], dim=1)
        upcoming = torch.where(upcoming.eq(self.dictionary.pad()), target_tokens, upcoming)
        words = torch.cat([prev_output_tokens[:, :1], upcoming], dim=1)  # (B, T+1)
        state = None
        if carried is not None:
            state = self.carried_state.before(**carried, lanes=len(words))
        decoded = self.core(words, state)
        if carried is not None:
            self.carried_state.after(**carried, state=decoded.state)
        return decoded.hidden, decoded.activations

    def contexts(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        carried: dict[str, Any] | None = None,
    ) -> Context:
        """Returns what is known after each given word; see :meth:`TableModel.contexts`."""
        state = None
        if carried is not None:
            state = self.carried_state.before(**carried, lanes=len(prev_output_tokens))
        context, state = self.core.contexts(prev_output_tokens, state)
        if carried is not None:
            self.carried_state.after(**carried, state=state)
        return context

    def _read(self, words: Tensor, incremental_state: dict[str, Any]) -> Context:
        context = self._stored(incremental_state)
        if context is not None:
            words = words[:, -1:]
        context = self.core.read(words, context)
        self._store(incremental_state, context)
        return context

    def _stored(self, incremental_state: dict[str, Any]) -> Context | None:
        stored = self.get_incremental_state(incremental_state, "context")
        return stored and Context(stored["output"], state=(stored["hidden"], stored["cell"]))

    def _store(self, incremental_state: dict[str, Any], context: Context) -> None:
        assert context.state is not None
        hidden, cell = context.state
        stored = {"output": context.output, "hidden": hidden, "cell": cell}
        self.set_incremental_state(incremental_state, "context", stored)

    def reorder_incremental_state(
        self, incremental_state: dict[str, Any], new_order: Tensor
    ) -> None:
        """Reorders, repeats or drops the texts of a generation."""
        context = self._stored(incremental_state)
        if context is not None:
            self._store(incremental_state, context.select(new_order))


@register_model("lightrnn_lm", dataclass=LSTMConfig)
class LightRNNLanguageModel(TableModel, FairseqLanguageModel):
    """The paper's language model: words have nothing but rows and columns.

    Attributes:
        conditioner: how components are conditioned on those before them.
    """

    conditioner: type[Conditioner] = Recurrent

    @classmethod
    def build_model(cls, cfg: LSTMConfig, task: Any) -> "LightRNNLanguageModel":
        """Builds the model for a LightRNN task."""
        check_task(task, "lightrnn_lm", "lightrnn_language_modeling")
        dictionary = task.target_dictionary
        settings = cls.table_settings(cfg, len(dictionary))
        return cls(LightRNNDecoder(cfg, settings, dictionary, cls.conditioner))


@register_model("lightrnn_lm_gated", dataclass=preset(LSTMConfig, "GatedConfig"))
class GatedLanguageModel(LightRNNLanguageModel):
    """The recommended LSTM language model: one step a word, gates, a feed-forward layer."""

    conditioner = Gated
    own_numbers = 64


# The sizes published in arXiv 1610.09893, table 4, and with the authors' release.
for _size in (500, 1000, 1500):
    _config = preset(
        LSTMConfig, f"Published{_size}", embed_dim=_size, hidden_size=_size, num_layers=2,
        dropout=0.2,
    )  # fmt: skip
    _model = type(f"Published{_size}LanguageModel", (LightRNNLanguageModel,), {})
    register_model(f"lightrnn_lm_{_size}", dataclass=_config)(_model)
