"""``--arch lightrnn_lm``: the LightRNN language model of arXiv 1610.09893."""

# ruff: noqa: UP045  (fairseq reads flags from Optional[...], not from X | None)

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.models import (
    FairseqIncrementalDecoder,
    FairseqLanguageModel,
    register_model,
    register_model_architecture,
)
from torch import Tensor

from fairseq_lightrnn.components import ComponentEmbedding, ComponentSoftmax
from fairseq_lightrnn.composition import Composition, Context
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.further_tables import FurtherTables
from fairseq_lightrnn.gated import GatedComposition
from fairseq_lightrnn.models._carried_state import CarriedState
from fairseq_lightrnn.models._seated import SeatedDecoder
from fairseq_lightrnn.models._table import (
    TableConfig,
    check_input_table,
    check_numbers,
    check_task,
    frequent_size,
    further_tables,
    query_sizes,
    shared_residuals,
    table_shape,
)
from fairseq_lightrnn.recurrent import RecurrentComposition
from fairseq_lightrnn.table_lookup import TableLookup

if TYPE_CHECKING:
    from fairseq_lightrnn.language_model import LanguageModel

__all__ = [
    "LightRNNDecoder",
    "LightRNNLanguageModel",
    "LightRNNLanguageModelConfig",
    "build_composition",
    "build_embedding",
    "build_softmax",
    "check_config",
    "gated_architecture",
]

COMPOSITIONS: Mapping[str, type[Composition]] = {
    "recurrent": RecurrentComposition,
    "gated": GatedComposition,
}


@dataclass
class LightRNNLanguageModelConfig(TableConfig):
    composition: ChoiceEnum(["recurrent", "gated"]) = field(  # type: ignore[valid-type]
        default="recurrent",
        metadata={
            "help": "recurrent: one LSTM step for every component of a word, as in the paper; "
            "gated: one step a word, columns predicted through gates that the row opens"
        },
    )
    embed_dim: int = field(default=200, metadata={"help": "width of the input component vectors"})
    hidden_size: int = field(
        default=200, metadata={"help": "width of the LSTM and of the output component vectors"}
    )
    num_layers: int = field(default=1, metadata={"help": "layers of the LSTM"})
    dropout: float = field(
        default=0.1, metadata={"help": "dropout wherever a flag of its own does not say otherwise"}
    )
    dropout_in: Optional[float] = field(
        default=None, metadata={"help": "dropout on the input vectors (default: --dropout)"}
    )
    dropout_between: Optional[float] = field(
        default=None, metadata={"help": "dropout between the layers (default: --dropout)"}
    )
    dropout_out: Optional[float] = field(
        default=None, metadata={"help": "dropout on the LSTM's outputs (default: --dropout)"}
    )
    dropout_hidden: Optional[float] = field(
        default=None,
        metadata={
            "help": "dropout within the feed-forward layer, and on what is transformed to predict "
            "columns: 0 for small models that do not overfit (default: --dropout-out)"
        },
    )
    locked_dropout: bool = field(
        default=False,
        metadata={
            "help": "use one mask of each dropout for a text, shared over time (variational "
            "dropout); with --carry-hidden-state, for a block"
        },
    )
    component_dropout: float = field(
        default=0.0,
        metadata={
            "help": "dropout of whole input component vectors, for all their occurrences in a "
            "batch; input residuals are dropped word by word"
        },
    )
    weight_dropout: float = field(
        default=0.0,
        metadata={"help": "dropout on the recurrent matrices of the LSTM, one mask for each batch"},
    )
    share_component_vectors: bool = field(
        default=False,
        metadata={
            "help": "use the same component vectors for input and output; needs --embed-dim equal "
            "to --hidden-size"
        },
    )


def check_config(cfg: LightRNNLanguageModelConfig) -> None:
    """Refuses flags that have no meaning."""
    check_numbers(
        cfg,
        sizes=("embed_dim", "hidden_size", "num_layers"),
        dropouts=(
            "dropout",
            "dropout_in",
            "dropout_between",
            "dropout_out",
            "dropout_hidden",
            "component_dropout",
            "weight_dropout",
        ),
    )
    if cfg.share_component_vectors and cfg.embed_dim != cfg.hidden_size:
        raise UsageError(
            f"--share-component-vectors needs --embed-dim ({cfg.embed_dim}) equal to "
            f"--hidden-size ({cfg.hidden_size})"
        )


def build_embedding(
    cfg: LightRNNLanguageModelConfig, table: TableLookup, further: FurtherTables | None
) -> ComponentEmbedding:
    """Returns the input vectors that the flags ask for.

    Raises:
        UsageError: if words cannot be read by a table of their own.
    """
    check_input_table(cfg, "--share-component-vectors", cfg.share_component_vectors)
    if cfg.keep_input_table and str(cfg.composition) == "recurrent" and len(table.shape) > 1:
        raise UsageError(
            "--keep-input-table: --composition recurrent predicts a column with the step that read "
            "the row, so both need one table; use --composition gated"
        )
    return ComponentEmbedding(
        table.shape,
        cfg.embed_dim,
        table,
        cfg.input_residual_dim,
        cfg.component_dropout,
        frequent_size(cfg, table.num_words),
        cfg.keep_input_table,
        further,
    )


def build_composition(
    cfg: LightRNNLanguageModelConfig,
    embedding: ComponentEmbedding,
    kinds: Mapping[str, type[Composition]] = COMPOSITIONS,
    **more: Any,
) -> Any:
    """Returns the composition that the flags ask for.

    Args:
        cfg: the flags.
        embedding: the input vectors.
        kinds: the classes that ``--composition`` chooses from.
        more: further arguments of these classes.
    """

    def dropout(value: float | None, otherwise: float = cfg.dropout) -> float:
        return otherwise if value is None else value

    dropout_out = dropout(cfg.dropout_out)
    return kinds[str(cfg.composition)](
        embedding,
        cfg.hidden_size,
        cfg.num_layers,
        dropout_in=dropout(cfg.dropout_in),
        dropout_between=dropout(cfg.dropout_between),
        dropout_out=dropout_out,
        dropout_hidden=dropout(cfg.dropout_hidden, dropout_out),
        query_sizes=query_sizes(cfg, cfg.hidden_size),
        locked_dropout=cfg.locked_dropout,
        weight_dropout=cfg.weight_dropout,
        ffn_dim=cfg.output_ffn_dim,
        **more,
    )


def build_softmax(
    cfg: LightRNNLanguageModelConfig,
    table: TableLookup,
    embedding: ComponentEmbedding,
    further: FurtherTables | None,
) -> ComponentSoftmax:
    """Returns the output side that the flags ask for."""
    return ComponentSoftmax(
        table,
        cfg.hidden_size,
        embedding.weight if cfg.share_component_vectors else None,
        cfg.word_bias,
        cfg.output_residual_dim,
        frequent_size(cfg, table.num_words),
        shared_residuals(cfg, embedding),
        further,
        embedding.further_weight if cfg.share_component_vectors else None,
    )


class LightRNNDecoder(SeatedDecoder, FairseqIncrementalDecoder):
    """Predicts words as components of a word table."""

    returns_activations = True  # see :meth:`forward`

    def __init__(self, cfg: LightRNNLanguageModelConfig, dictionary: Any) -> None:
        super().__init__(dictionary)
        check_config(cfg)
        shape = table_shape(cfg, len(dictionary))

        self.table = TableLookup(len(dictionary), shape)
        self.further = further_tables(cfg, len(dictionary), shape)
        embedding = build_embedding(cfg, self.table, self.further)
        self.composition = build_composition(cfg, embedding)
        self.softmax = build_softmax(cfg, self.table, embedding, self.further)
        self.carried_state = CarriedState()
        self._register_reallocation()

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: dict[str, Any] | None = None,
        target_tokens: Tensor | None = None,
        src_lengths: Tensor | None = None,
        carried: dict[str, Any] | None = None,
        return_activations: bool = False,
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
            return_activations: put the outputs of the last layer into the extras, as
                ``activations``; see :meth:`Composition.forward`.

        Returns:
            With ``target_tokens``: features of shape (B, T, k·(d + e)) that
            :meth:`get_normalized_probs` turns into the targets' log-probabilities. Without:
            log-probabilities of all words after the last one given, (B, 1, V); that is all that
            generation and shallow fusion look at. And fairseq's dictionary of extras.
        """
        if target_tokens is not None:
            activations: dict[str, Tensor] | None = {} if return_activations else None
            hidden = self.extract_features(prev_output_tokens, target_tokens, carried, activations)
            extra = {"attn": None, "features": True}
            return hidden.flatten(2), extra | ({"activations": activations} if activations else {})
        incremental_state = {} if incremental_state is None else incremental_state
        context = self._read(prev_output_tokens, incremental_state)
        num_read = prev_output_tokens.size(1)
        log_probs, extra = self.predict_next(self.composition, context, num_read, incremental_state)
        return log_probs, {"attn": None, **extra}

    def extract_features(  # type: ignore[override]
        self,
        prev_output_tokens: Tensor,
        target_tokens: Tensor,
        carried: dict[str, Any] | None = None,
        activations: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Returns the outputs, (B, T, k, d + e), that predict the targets' components."""
        # A text's next source word is its target, but where padding begins it is not the last one.
        upcoming = torch.cat([prev_output_tokens[:, 1:], target_tokens[:, -1:]], dim=1)
        upcoming = torch.where(upcoming.eq(self.dictionary.pad()), target_tokens, upcoming)
        words = torch.cat([prev_output_tokens[:, :1], upcoming], dim=1)  # (B, T+1)
        state = None
        if carried is not None:
            state = self.carried_state.before(**carried, lanes=len(words))
        hidden, state = self.composition(self.table(words), state, activations)
        if carried is not None:
            self.carried_state.after(**carried, state=state)
        return hidden

    def _read(self, words: Tensor, incremental_state: dict[str, Any]) -> Context:
        context = self._stored(incremental_state)
        if context is not None:
            words = words[:, -1:]
        context = self.composition.read(self.table(words), context)
        self._store(incremental_state, context)
        return context

    def _stored(self, incremental_state: dict[str, Any]) -> Context | None:
        stored = self.get_incremental_state(incremental_state, "context")
        return stored and Context(stored["output"], (stored["hidden"], stored["cell"]))

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


@register_model("lightrnn_lm", dataclass=LightRNNLanguageModelConfig)
class LightRNNLanguageModel(FairseqLanguageModel):
    """The LightRNN language model as a fairseq model."""

    @classmethod
    def build_model(cls, cfg: LightRNNLanguageModelConfig, task: Any) -> "LightRNNLanguageModel":
        """Builds the model for a LightRNN task."""
        check_task(task, "lightrnn_lm", "lightrnn_language_modeling")
        return cls(LightRNNDecoder(cfg, task.target_dictionary))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | Path, data: str | Path | None = None, device: str = "cpu"
    ) -> "LanguageModel":
        """Loads a trained model to be asked from Python.

        Args:
            path: a checkpoint, or a folder of checkpoints, of which the best is taken.
            data: folder of ``dict.txt``; by default that which the model was trained on, or that
                of the checkpoint.
            device: where to compute.

        Returns:
            A :class:`fairseq_lightrnn.language_model.LanguageModel`.
        """
        from fairseq_lightrnn.language_model import LanguageModel

        return LanguageModel.from_pretrained(path, data, device)


def _preset(name: str, **values: Any) -> None:
    """Registers an architecture that sets what the user does not."""

    @register_model_architecture("lightrnn_lm", name)
    def preset(args: Namespace) -> None:
        for key, value in values.items():
            setattr(args, key, getattr(args, key, value))


# The sizes published in arXiv 1610.09893, table 4, and with the authors' release.
_preset("lightrnn_lm_500", embed_dim=500, hidden_size=500, num_layers=2, dropout=0.2)
_preset("lightrnn_lm_1000", embed_dim=1000, hidden_size=1000, num_layers=2, dropout=0.2)
_preset("lightrnn_lm_1500", embed_dim=1500, hidden_size=1500, num_layers=2, dropout=0.2)
_preset("lightrnn_lm_ptb", embed_dim=200, hidden_size=200, num_layers=1, dropout=0.2)
_preset("lightrnn_lm_wikitext2", embed_dim=400, hidden_size=400, num_layers=1, dropout=0.3)


@register_model_architecture("lightrnn_lm", "lightrnn_lm_gated")
def gated_architecture(args: Namespace) -> None:
    """The recommended composition; biases and residuals are flags of their own."""
    args.composition = getattr(args, "composition", "gated")
    hidden_size = getattr(args, "hidden_size", LightRNNLanguageModelConfig.hidden_size)
    args.output_ffn_dim = getattr(args, "output_ffn_dim", 4 * hidden_size)
