"""What all of our decoders have: words predicted as components of a word table, for fairseq."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq_lightrnn.core.conditioning import Context
from fairseq_lightrnn.core.distribution import next_word_log_probs
from fairseq_lightrnn.core.features import FurtherTables, find_feature
from fairseq_lightrnn.core.head import ComponentHead
from fairseq_lightrnn.core.reader import Reader
from fairseq_lightrnn.core.seats import PredictedTable, Seats
from fairseq_lightrnn.core.table import prefix_number
from fairseq_lightrnn.errors import LoadError, UsageError
from fairseq_lightrnn.models.next_words import FOUND, WANTED, Wanted, find

__all__ = ["Reallocations", "TableDecoder", "WordHead", "check_words"]


class Reallocations(nn.Module):
    """How far the words of a model were reallocated.

    Attributes:
        round: int64 scalar buffer; how often the words were reallocated, -1 before the initial
            table is seated. A buffer, since fairseq restores no state of tasks.
        epoch: int64 scalar buffer; the last epoch after which they were.
    """

    round: Tensor
    epoch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("round", torch.tensor(-1))
        self.register_buffer("epoch", torch.tensor(0))


class WordHead:
    """What a fairseq decoder predicts words with, and where they sit.

    No module: its parts are the decoder's.

    Args:
        head: predicts words from hidden states.
        reader: looks up the vectors that words are read by.
        dictionary: of the words.
        reallocations: of the words.
    """

    def __init__(
        self, head: ComponentHead, reader: Reader, dictionary: Any, reallocations: Reallocations
    ) -> None:
        self.head = head
        self.reader = reader
        self.dictionary = dictionary
        self.reallocations = reallocations

    @property
    def round(self) -> Tensor:
        """How often the words were reallocated; see :class:`Reallocations`."""
        return self.reallocations.round

    @property
    def epoch(self) -> Tensor:
        """The last epoch after which they were."""
        return self.reallocations.epoch

    @property
    def table(self) -> PredictedTable:
        """The word table in force."""
        return self.head.table

    @property
    def input_table(self) -> Seats | None:
        """The table that words are read by, where it is not the one in force."""
        return None if self.reader.seats is self.table else self.reader.seats

    @property
    def further_tables(self) -> list[Seats]:
        """Further tables of the words."""
        return [] if self._further is None else cast(list[Seats], [*self._further.tables])

    @property
    def further_input_tables(self) -> list[Seats]:
        """Those that words are read by, where they are others."""
        return [] if self._further is None else cast(list[Seats], [*self._further.kept_tables])

    @property
    def _further(self) -> Any:
        return find_feature(self.head.softmax.features, FurtherTables)

    def log_probs(self, features: Tensor, words: Tensor) -> Tensor:
        """Scores words by the features that predict them.

        Args:
            features: shape (..., k·d), as the decoder's ``forward`` returns them.
            words: of shape (...).

        Returns:
            Log-probabilities in nats, shape (..., k); a word's is their sum.
        """
        scores: Tensor = self.head.softmax(self.hidden(features), words.reshape(-1))
        return scores.view(*words.shape, scores.size(-1))

    def log_probs_and_means(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Does so, and averages over words; see :meth:`ComponentSoftmax.forward_with_mean`."""
        softmax = self.head.softmax
        scores, means = softmax.forward_with_mean(self.hidden(features), words.reshape(-1))
        shape = *words.shape, scores.size(-1)
        return scores.view(shape), means.view(shape)

    def hidden(self, features: Tensor) -> Tensor:
        """Returns the hidden states, shape (N, k, d), that features (..., k·d) hold."""
        dim = self.head.softmax.vectors.dim
        return features.reshape(-1, self.table.num_components, dim)

    def predict_next(
        self, context: Context, num_read: int, incremental_state: dict[str, Any] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Predicts the next words of B texts.

        Args:
            context: of the texts.
            num_read: how many words of each were read, the one that begins all texts included.
            incremental_state: fairseq's store of a generation's states.

        Returns:
            Log-probabilities in nats, (B, 1, V), or those of what was found of the words that the
            generation wants, which then stands in the store; and what
            :meth:`get_normalized_probs` has to know of them.
        """
        states = {} if incremental_state is None else incremental_state
        wanted: Wanted | None = states.get(WANTED)
        if wanted is not None and wanted.are_few(num_read, self.table):
            found = find(self.head, context, wanted)
            if found is not None:
                states[FOUND] = found
                return found.log_probs[:, None], {"features": False, "normalised": True}
        every = next_word_log_probs(self.head, context)
        return every[:, None], {"features": False}

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
        scores = self.log_probs(net_output[0], sample["target"]).sum(-1, keepdim=True)
        scores = scores if log_probs else scores.exp()
        return scores.expand(*sample["target"].shape, len(self.dictionary))

    def check_state(self, decoder: nn.Module, state_dict: dict[str, Any], name: str) -> None:
        """Refuses the state of a model of another dictionary or of other tables.

        A model that is to read words by a table of their own from now on begins with the table in
        force, if it has vectors to read by.

        Args:
            decoder: that this is the head of.
            state_dict: of a model; completed if need be.
            name: of the decoder in it.

        Raises:
            LoadError: if it is one of another dictionary or of other tables.
        """
        found = {
            key: value
            for key, value in state_dict.items()
            if key.startswith(f"{name}.") and key.endswith(".coordinates")
        }
        in_force = dict(decoder.named_buffers())
        for key, coordinates in found.items():
            check_words(coordinates, self.dictionary, "model")
            known = in_force.get(key.removeprefix(f"{name}."))
            # --store-ema loads the model's own tables at each update.
            if known is None or not torch.equal(known.to(coordinates), coordinates):
                _check_cells(coordinates, self.table.shape)
        beside = [key for key in found if ".kept_tables." in key]
        further = sorted(key for key in found if ".tables." in key)
        first = [key for key in found if key not in (*beside, *further)]
        if found and len(further) != len(self.further_tables):
            raise LoadError(
                f"the model was made with --further-tables {len(further)}, not "
                f"{len(self.further_tables)}: give it again"
            )
        if len(first) > 1 and self.input_table is None:
            raise LoadError(
                "the model reads words by a table of their own: give --keep-input-table again"
            )
        if self.input_table is None:
            return
        if len(first) == 1:
            if not any(key.endswith("softmax.vectors.weight") for key in state_dict):
                raise LoadError(
                    "the model reads and predicts words by the same vectors, which belong to one "
                    "table: give --component-vectors shared (transformers: "
                    "--share-decoder-input-output-embed), and no --keep-input-table"
                )
            for key, buffer in decoder.named_buffers():
                if buffer is self.table.coordinates:
                    state_dict[f"{name}.{key}"] = found[first[0]].clone()
        if further and not beside:
            for key in further:
                state_dict[key.replace(".tables.", ".kept_tables.")] = found[key].clone()


class TableDecoder:
    """What fairseq asks of a decoder with a :class:`WordHead`; to be mixed in before its class.

    Attributes:
        words: predicts words, and knows where they sit.
    """

    words: WordHead

    def get_normalized_probs(
        self, net_output: Any, log_probs: bool, sample: dict[str, Any] | None = None
    ) -> Tensor:
        """See :meth:`WordHead.get_normalized_probs`."""
        return self.words.get_normalized_probs(net_output, log_probs, sample)

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """Refuses the state of a model of another dictionary or of other tables."""
        self.words.check_state(cast(nn.Module, self), state_dict, name)
        super().upgrade_state_dict_named(state_dict, name)  # type: ignore[misc]
        return state_dict


def _check_cells(coordinates: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses tables of another shape, and those that averaging made of different ones."""
    sizes = "x".join(map(str, shape))
    if coordinates.size(1) != len(shape):
        raise LoadError(
            f"the model's words have {coordinates.size(1)} components, those of the shape {sizes} "
            f"{len(shape)}: give the --table-shape (or the table files) that it was made with"
        )
    if (coordinates.amax(0) >= coordinates.new_tensor(shape)).any():
        raise LoadError(
            f"the model's word table does not fit into the shape {sizes}: give the --table-shape "
            "(or the table files) that it was made with"
        )
    cells = prefix_number(coordinates.long(), shape)
    if len(cells.unique()) < len(cells):
        raise LoadError(
            "the checkpoint's word table has two words in one cell: was it averaged over "
            "checkpoints between which words were reallocated? Average those after the last "
            "reallocation only (reallocations.jsonl tells its epoch)"
        )


def check_words(words: Tensor | None, dictionary: Any, who: str) -> None:
    """Refuses the state of a model of another dictionary."""
    if words is not None and len(words) != len(dictionary):
        raise LoadError(
            f"the {who} has {len(words)} words, the dictionary {len(dictionary)}: give the "
            "binarised data that the model was trained on, with the same --source-lang and "
            "--target-lang, if any"
        )
