"""What all decoders have that predict words as components of a word table."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_lightrnn.components import ComponentEmbedding, ComponentSoftmax
from fairseq_lightrnn.composition import Context, Prediction
from fairseq_lightrnn.distribution import coordinate_log_probs, next_word_log_probs, top_words
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.further_tables import FurtherTables
from fairseq_lightrnn.table_lookup import TableLookup

__all__ = ["WANTED", "SeatedDecoder", "SeatedTranslation", "SourceEncoder", "Wanted"]

WANTED = "wanted words"
"""Under this name fairseq's store of a generation's states may hold a :class:`Wanted`."""
# A search for the most probable words costs more a prefix than a look at all. Predictions that are
# flat beyond this share of the prefixes are looked at whole.
_SEARCHED_SHARE = 0.25


class Wanted(NamedTuple):
    """Next words whose log-probabilities a search can make use of.

    Attributes:
        most_probable: so many of the most probable ones,
        words: and these.
        given: how many words of a text are given; until then all words are wanted.
    """

    most_probable: int
    words: tuple[int, ...]
    given: int

    def are_few(self, num_read: int, table: TableLookup) -> bool:
        """Tells whether a search beats a look at all words, after so many words of a text."""
        return (
            num_read > self.given
            and self.most_probable < table.num_words
            and table.num_components > 1
        )


class SeatedDecoder:
    """Scores words by the features that predict their components; to be mixed into a decoder.

    Attributes:
        table: the word table in force.
        softmax: predicts components.
        further: further tables, in which words have cells too, or None.
        reallocation_round: int64 scalar buffer; how often the words were reallocated, -1 before
            the initial table is seated. A buffer, since fairseq restores no state of tasks.
        reallocation_epoch: int64 scalar buffer; the last epoch after which they were.
    """

    dictionary: Any
    table: TableLookup
    softmax: ComponentSoftmax
    further: FurtherTables | None
    reallocation_round: Tensor
    reallocation_epoch: Tensor

    @property
    def input_vectors(self) -> ComponentEmbedding:
        """The vectors with which words are read."""
        vectors: ComponentEmbedding = self.composition.embedding  # type: ignore[attr-defined]
        return vectors

    def _register_reallocation(self) -> None:
        self.register_buffer("reallocation_round", torch.tensor(-1))  # type: ignore[attr-defined]
        self.register_buffer("reallocation_epoch", torch.tensor(0))  # type: ignore[attr-defined]

    def component_log_probs(self, features: Tensor, words: Tensor) -> Tensor:
        """Scores words by the features that predict them.

        Args:
            features: shape (..., k·(d + e)), as the decoder's ``forward`` returns them.
            words: of shape (...).

        Returns:
            Log-probabilities in nats, shape (..., k); a word's is their sum.
        """
        return self.softmax(*self._flat(features, words)).view(*words.shape, -1)

    def component_log_probs_and_means(
        self, features: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Does so, and averages over words; see :meth:`ComponentSoftmax.forward_with_mean`."""
        scores, means = self.softmax.forward_with_mean(*self._flat(features, words))
        return scores.view(*words.shape, -1), means.view(*words.shape, -1)

    def _flat(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        hidden = features.reshape(words.numel(), self.table.num_components, -1)
        return hidden, self.table(words.reshape(-1))

    def statistics_shape(self) -> tuple[int, int]:
        """Returns k and d, the sizes of the statistics that a reallocation needs of each word."""
        return self.table.num_components, self.softmax.weight.size(1)

    def predict_next(
        self,
        prediction: Prediction,
        context: Context,
        num_read: int,
        incremental_state: dict[str, Any] | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Predicts the next words of B texts.

        Args:
            prediction: conditions a context on components of the next word.
            context: of the texts.
            num_read: how many words of each were read, the one that begins all texts included.
            incremental_state: fairseq's store of a generation's states.

        Returns:
            Log-probabilities in nats, (B, 1, V), -inf for words that the generation does not want;
            and what :meth:`get_normalized_probs` has to know of them.
        """
        wanted: Wanted | None = (incremental_state or {}).get(WANTED)
        if wanted is not None and wanted.are_few(num_read, self.table):
            log_probs = self._log_probs_of(wanted, prediction, context)
            if log_probs is not None:
                return log_probs[:, None], {"features": False, "normalised": True}
        every = next_word_log_probs(prediction, self.softmax, context)
        return every[:, None], {"features": False}

    def _log_probs_of(
        self, wanted: Wanted, prediction: Prediction, context: Context
    ) -> Tensor | None:
        """Returns log-probabilities (B, V), -inf for others, or None if these are hard to find."""
        prefixes = math.prod(self.table.shape[:-1])
        budget = max(1, round(_SEARCHED_SHARE * prefixes))
        found = top_words(prediction, self.softmax, context, wanted.most_probable, budget)
        if found is None:
            return None
        shape = len(context.output), self.table.num_words
        log_probs = found.log_probs.new_full(shape, float("-inf"))
        log_probs.scatter_(1, found.words, found.log_probs)
        for word in wanted.words:
            words = found.words.new_full((len(log_probs),), word)
            scores = coordinate_log_probs(prediction, self.softmax, context, words)
            log_probs[:, word] = scores.sum(1)
        return log_probs

    def get_normalized_probs(
        self,
        net_output: tuple[Tensor, dict[str, Any] | None],
        log_probs: bool,
        sample: dict[str, Any] | None = None,
    ) -> Tensor:
        """Returns (log-)probabilities of shape (B, T, V), or (B, 1, V) of next words.

        After scoring, every entry of the last axis is the target's: a view that takes no memory,
        from which fairseq gathers the target. After generation, all words' own, normalised again
        since fairseq has divided them by the temperature; those of wanted words only as they are,
        since they are not asked for at temperatures other than 1.
        """
        extra = net_output[1] or {}
        if extra.get("normalised"):
            scores = net_output[0].float()
            return scores if log_probs else scores.exp()
        if not extra.get("features"):
            normalise = torch.log_softmax if log_probs else torch.softmax
            return normalise(net_output[0].float(), -1)
        if sample is None or sample.get("target") is None:
            raise UsageError(
                "this model scores the target words alone: train it with "
                "--criterion two_component_cross_entropy"
            )
        scores = self.component_log_probs(net_output[0], sample["target"]).sum(-1, keepdim=True)
        scores = scores if log_probs else scores.exp()
        return scores.expand(*sample["target"].shape, len(self.dictionary))

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """Refuses the state of a model of another dictionary.

        A model that had no input table of its own goes on with the word table that it had.
        """
        coordinates = state_dict.get(f"{name}.table.coordinates")
        _check_words(coordinates, self.dictionary, "model")
        if self.input_vectors.input_table is None and any(
            key.startswith(f"{name}.") and "input_table" in key for key in state_dict
        ):
            raise UsageError(
                "the model reads words by a table of their own: give --keep-input-table again"
            )
        _check_further_tables(state_dict, f"{name}.further.tables.", self.further)
        _add_input_tables(state_dict, name, self, coordinates)
        super().upgrade_state_dict_named(state_dict, name)  # type: ignore[misc]
        return state_dict


class SourceEncoder:
    """Encodes the source text alone; to be mixed into an encoder."""

    dictionary: Any

    def forward_torchscript(self, net_input: dict[str, Tensor]) -> Any:
        """Encodes the source of a batch, whatever else the batch has for the decoder."""
        return self(  # type: ignore[operator]
            src_tokens=net_input["src_tokens"], src_lengths=net_input["src_lengths"]
        )

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """Refuses the state of a model of another dictionary, as the decoder does."""
        _add_input_tables(state_dict, name, self, state_dict.get("decoder.table.coordinates"))
        for key in ("weight", "table.coordinates"):
            words = state_dict.get(f"{name}.embed_tokens.{key}")
            _check_words(words, self.dictionary, "model's encoder")
        super().upgrade_state_dict_named(state_dict, name)  # type: ignore[misc]
        return state_dict


class SeatedTranslation:
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


def _add_input_tables(
    state_dict: dict[str, Any], name: str, part: Any, coordinates: Tensor | None
) -> None:
    """Completes the state of a model that had no input tables, which knows its word table."""
    if coordinates is None:
        return
    for place, module in part.named_modules():
        if isinstance(module, ComponentEmbedding) and module.input_table is not None:
            state_dict.setdefault(f"{name}.{place}.input_table.coordinates", coordinates)


def _check_further_tables(
    state_dict: dict[str, Any], prefix: str, further: FurtherTables | None
) -> None:
    """Refuses the state of a model with another number of further tables."""
    tables = {key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)}
    expected = 0 if further is None else len(further.tables)
    if len(tables) != expected:
        raise UsageError(
            f"the model was made with --further-tables {len(tables)}, not {expected}: give it again"
        )


def _check_words(words: Tensor | None, dictionary: Any, who: str) -> None:
    if words is not None and len(words) != len(dictionary):
        raise UsageError(
            f"the {who} has {len(words)} words, the dictionary {len(dictionary)}: give the "
            "binarised data that the model was trained on, with the same --source-lang and "
            "--target-lang, if any"
        )
