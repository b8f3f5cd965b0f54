"""What a network keeps of the words that it has read: states, or the words themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

__all__ = ["LookBack", "LstmState", "Memory", "State", "memory_of", "put_texts"]

State = dict[str, np.ndarray]
"""Arrays whose first axis is that of texts; where others differ, zeros stand for nothing."""


class Memory(Protocol):
    """Knows the state that the graph ``read`` goes on from.

    Attributes:
        carries: whether a state may be carried from sentence to sentence.
    """

    carries: bool

    def begin(self, texts: int) -> State:
        """Returns the state before any word."""

    def inputs(self, state: State, words: np.ndarray) -> State:
        """Returns what the graph takes of it to read words (N, T)."""

    def after(self, inputs: State, found: Mapping[str, np.ndarray]) -> State:
        """Returns the state after these words, by the inputs and outputs of the graph."""

    def full(self, state: State) -> np.ndarray:
        """Tells which of N texts cannot get longer, booleans (N,)."""


class LstmState:
    """An LSTM's state.

    Args:
        layers: of it.
        dim: their width.
    """

    carries = True

    def __init__(self, layers: int, dim: int) -> None:
        self._shape = layers, dim

    def begin(self, texts: int) -> State:
        """See :meth:`Memory.begin`."""
        zeros = np.zeros((texts, *self._shape), dtype=np.float32)
        return {"hidden": zeros, "cell": zeros}

    def inputs(self, state: State, words: np.ndarray) -> State:
        """See :meth:`Memory.inputs`."""
        return state

    def after(self, inputs: State, found: Mapping[str, np.ndarray]) -> State:
        """See :meth:`Memory.after`."""
        return {"hidden": found["next_hidden"], "cell": found["next_cell"]}

    def full(self, state: State) -> np.ndarray:
        """See :meth:`Memory.full`."""
        return np.zeros(len(state["hidden"]), dtype=bool)


class LookBack:
    """The words that a transformer looks back on; :mod:`fairseq_lightrnn.export.transformer_graph`.

    Args:
        layers: of the transformer.
        dim: their width.
        limit: how many words it can look back on.
        padding: a word that it does not look at.
    """

    carries = False

    def __init__(self, layers: int, dim: int, limit: int, padding: int) -> None:
        self._layers, self._dim = layers, dim
        self._limit, self._padding = limit, padding

    def begin(self, texts: int) -> State:
        """See :meth:`Memory.begin`."""
        none = np.zeros((texts, self._layers, 0, self._dim), dtype=np.float32)
        return {"keys": none, "values": none, "seen": np.zeros((texts, 0), dtype=np.float32)}

    def inputs(self, state: State, words: np.ndarray) -> State:
        """See :meth:`Memory.inputs`.

        Raises:
            ValueError: if a text gets longer than what the transformer can look back on.
        """
        shown = (words != self._padding).astype(np.float32)
        if (state["seen"].sum(axis=1) + shown.sum(axis=1)).max() > self._limit:
            raise ValueError(
                f"a text of more than {self._limit} words, its beginning included, is longer than "
                "the model can look back on; split it"
            )
        return {**state, "shown": shown}

    def after(self, inputs: State, found: Mapping[str, np.ndarray]) -> State:
        """See :meth:`Memory.after`."""
        return {
            "keys": np.concatenate([inputs["keys"], found["more_keys"]], axis=2),
            "values": np.concatenate([inputs["values"], found["more_values"]], axis=2),
            "seen": np.concatenate([inputs["seen"], inputs["shown"]], axis=1),
        }

    def full(self, state: State) -> np.ndarray:
        """See :meth:`Memory.full`."""
        return np.asarray(state["seen"].sum(axis=1) >= self._limit)


def memory_of(description: Mapping[str, Any]) -> Memory:
    """Returns the memory of the network that the JSON file of an exported model describes."""
    model = description["model"]
    if model.get("network") == "transformer":
        return LookBack(
            model["layers"], model["embed_dim"], model["positions"], description["padding"]
        )
    # Earlier exports have outputs of the LSTM's width.
    return LstmState(model["layers"], model.get("hidden_size", model["width"]))


def put_texts(part: np.ndarray, index: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Replaces what an array (N, …) holds of some texts; it grows where the new is larger."""
    sizes = np.maximum(part.shape[1:], new.shape[1:])
    result = np.zeros((len(part), *sizes), dtype=part.dtype)
    result[tuple(slice(size) for size in part.shape)] = part
    result[index] = 0
    place: list[Any] = [index, *(slice(size) for size in new.shape[1:])]
    result[tuple(place)] = new
    return result
