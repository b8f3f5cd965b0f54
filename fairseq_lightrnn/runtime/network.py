"""The graphs of an exported model, put together: reads words, predicts the next one."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fairseq_lightrnn.runtime.learnt import Learnt
from fairseq_lightrnn.runtime.memory import Memory, State, put_texts
from fairseq_lightrnn.runtime.seating import Seating

__all__ = ["Context", "Graphs", "Network", "OnnxGraphs", "Position"]

_IMPOSSIBLE = np.float32(-np.inf)


class Graphs(Protocol):
    """Runs graphs by their names."""

    def has(self, name: str) -> bool:
        """Tells whether there is such a graph."""

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a graph's outputs by their names."""


class OnnxGraphs:
    """Graphs of ``.onnx`` files, run by onnxruntime.

    Args:
        files: their contents by name.
        threads: of the processor.

    Raises:
        ValueError: if onnxruntime cannot run one of them.
    """

    suffix = ".onnx"

    def __init__(self, files: Mapping[str, bytes], threads: int) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ValueError("onnxruntime is not installed: pip install onnxruntime") from None

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._sessions: dict[str, Any] = {}
        self._outputs: dict[str, list[str]] = {}
        for name, content in files.items():
            if not name.endswith(self.suffix):
                continue
            try:
                session = onnxruntime.InferenceSession(
                    content, options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime has a class of its own for each
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{name}: onnxruntime {onnxruntime.__version__} cannot run it ({reason})"
                ) from None
            graph = name.removesuffix(self.suffix)
            self._sessions[graph] = session
            self._outputs[graph] = [output.name for output in session.get_outputs()]

    def has(self, name: str) -> bool:
        """See :meth:`Graphs.has`."""
        return name in self._sessions

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`Graphs.run`."""
        values = self._sessions[name].run(None, dict(inputs))
        return dict(zip(self._outputs[name], values, strict=True))


class Position(NamedTuple):
    """Where N texts are after some words: all that the words so far have left behind.

    Attributes:
        output: of the network after the last word, (N, d).
        state: what it reads on from; see :class:`Memory`.
    """

    output: np.ndarray
    state: State

    def select(self, index: Any) -> Position:
        """Picks, repeats or reorders the texts."""
        state = {name: part[index] for name, part in self.state.items()}
        return Position(self.output[index], state)

    def put(self, index: np.ndarray, new: Position) -> Position:
        """Replaces some of the texts."""
        state = {name: put_texts(part, index, new.state[name]) for name, part in self.state.items()}
        return Position(put_texts(self.output, index, new.output), state)


class Context(NamedTuple):
    """What is known of the next component of N texts' next words.

    Attributes:
        log_probs: of its values, in nats, (N, R_i); -inf where one leads to no word.
        carried: what components after it are predicted with, each (N, …).
    """

    log_probs: np.ndarray
    carried: dict[str, np.ndarray]


class Network:
    """Reads words and predicts the next ones, component by component.

    Args:
        graphs: of :mod:`fairseq_lightrnn.export.graphs`.
        seating: of the words.
        composition: ``recurrent`` or ``gated``.
        memory: what it keeps of words.
        dim: d, the width of its outputs.
    """

    def __init__(
        self, graphs: Graphs, seating: Seating, composition: str, memory: Memory, dim: int
    ) -> None:
        self.graphs = graphs
        self.seating = seating
        self.recurrent = composition == "recurrent"
        self.memory = memory
        self.dim = dim
        self.components = len(seating.shape)
        self.steps = self.components if self.recurrent else 1
        # The words that graphs know of; further ones are numbered from there on.
        self._known = len(seating.coordinates)
        every = np.arange(self._known, dtype=np.int32)
        self.bias = graphs.run("bias", {"words": every})["bias"] if graphs.has("bias") else None
        # What is added to words' own numbers where they are predicted: the place of each word among
        # those that were moved, (V,), 0 for all others; and of each place its numbers.
        self._moved: tuple[np.ndarray, np.ndarray] | None = None
        # Behind all vectors that words are read by stands one of zeros.
        self._nothing = sum(seating.shape) * (1 + seating.further)
        self._places = self._input_places()
        # Where some values lead to no word: 0 or -inf, (prefixes, R_i).
        self._added = [self._masks(component) for component in range(self.components)]

    @property
    def own_numbers(self) -> int:
        """How many numbers of its own each word is predicted with where its row is known."""
        if self.components == 1 or not self.graphs.has("numbers"):
            return 0
        return int(self._numbers(np.zeros(1, dtype=np.int32)).shape[1])

    def with_learnt(self, learnt: Learnt) -> Network:
        """Returns this network, which has learnt nothing, with what was learnt."""
        result = copy.copy(self)
        result.seating = self.seating.with_words(learnt.cells)
        shipped = np.zeros(self._known, np.float32) if self.bias is None else self.bias
        result.bias = np.concatenate([shipped, learnt.biases])
        result.bias[learnt.moved] += learnt.added
        place = np.zeros(len(result.bias), dtype=np.int32)
        place[learnt.moved] = np.arange(1, len(learnt.moved) + 1)
        none = np.zeros((1, learnt.numbers.shape[1]), dtype=np.float32)
        result._moved = place, np.concatenate([none, learnt.numbers])
        result._places = result._input_places()
        result._added = [result._masks(component) for component in range(self.components)]
        return result

    def with_one_everywhere(self, further_cells: Sequence[int]) -> Network:
        """Returns this network with one more word in all empty cells, but not in empty rows.

        See :meth:`Seating.with_one_everywhere`. The word's bias is 0, and its number the last.
        """
        result = copy.copy(self)
        result.seating = self.seating.with_one_everywhere(further_cells)
        if self.bias is not None:
            result.bias = np.append(self.bias, np.float32(0))
        if self._moved is not None:
            result._moved = np.append(self._moved[0], np.int32(0)), self._moved[1]
        return result

    def _input_places(self) -> np.ndarray:
        """Returns where to read the vectors of each step of each word: (V, steps, P)."""
        every = self.seating.places
        if not self.recurrent:
            return every[:, None]
        own, others = np.split(every, [self.components], axis=1)
        shape = len(own), self.components, 1 + others.shape[1]
        places: np.ndarray = np.full(shape, self._nothing, dtype=np.int32)
        places[:, :, 0] = own
        places[:, -1, 1:] = others
        return places

    def _masks(self, component: int) -> np.ndarray | None:
        if component + 1 == self.components:
            return None  # known by its words
        prefixes = math.prod(self.seating.shape[:component])
        words = self.seating.words.reshape(prefixes, self.seating.shape[component], -1)
        return np.where((words >= 0).any(axis=2), np.float32(0), _IMPOSSIBLE)

    def begin(self, texts: int) -> Position:
        """Returns where texts are before any word, even before those that all texts begin with."""
        output = np.zeros((texts, self.dim), dtype=np.float32)
        return Position(output, self.memory.begin(texts))

    def read(self, position: Position, words: np.ndarray) -> tuple[Position, np.ndarray]:
        """Reads words (N, T).

        Returns:
            The position after them; and the outputs of the network that predict each component of
            each of them, (N, T, steps, d): those after the last word are in the position.

        Raises:
            ValueError: if a text gets longer than what the network can look back on.
        """
        texts, length = words.shape
        places = self._places[words]  # (N, T, steps, P)
        state = self.memory.inputs(position.state, words)
        inputs = {"places": places.reshape(texts, length * self.steps, -1), **state}
        if self.graphs.has("numbers"):
            numbers = self._numbers(words)
            of_steps = np.zeros((texts, length, self.steps, numbers.shape[-1]), dtype=np.float32)
            of_steps[:, :, -1] = numbers
            inputs["numbers"] = of_steps.reshape(texts, length * self.steps, -1)
        found = self.graphs.run("read", inputs)
        outputs = found["outputs"]
        after = Position(outputs[:, -1], self.memory.after(state, found))
        before = np.concatenate([position.output[:, None], outputs[:, :-1]], axis=1)
        return after, before.reshape(texts, length, self.steps, -1)

    def outputs(self, position: Position, words: np.ndarray) -> np.ndarray:
        """Returns the outputs that :meth:`read` does, and reads no more words than they need."""
        if self.steps > 1:
            return self.read(position, words)[1]
        before = np.zeros((len(words), 0, 1, self.dim), dtype=np.float32)
        if words.shape[1] > 1:
            position, before = self.read(position, words[:, :-1])
        return np.concatenate([before, position.output[:, None, None]], axis=1)

    def _numbers(self, words: np.ndarray) -> np.ndarray:
        flat = words.reshape(-1).astype(np.int32)
        known = flat < self._known
        numbers = self.graphs.run("numbers", {"words": np.where(known, flat, 0)})["numbers"]
        numbers[~known] = 0
        return numbers.reshape(*words.shape, -1)

    def to_predict(self, position: Position) -> Position:
        """Returns what of a position next words are predicted with."""
        return position if self.recurrent else Position(position.output, {})

    def first(self, position: Position) -> Context:
        """Predicts the first components of the next words."""
        context = self._first(position.output)
        context.carried.update(self.to_predict(position).state)
        return context

    def _first(self, outputs: np.ndarray) -> Context:
        added = self._added_logits(0, np.zeros((len(outputs), 0), dtype=np.int32))
        found = self.graphs.run("first", {"outputs": outputs, "added": added})
        return Context(found.pop("log_probs"), found)

    def extend(
        self, carried: Mapping[str, np.ndarray], texts: np.ndarray, prefix: np.ndarray
    ) -> Context:
        """Predicts the component after prefixes.

        Args:
            carried: of a context that predicts the last component of the prefixes.
            texts: which of its texts each prefix continues, integers of shape (N,).
            prefix: integers of shape (N, i), i > 0.
        """
        component = prefix.shape[1]
        chosen = {name: value[texts] for name, value in carried.items()}
        if not self.recurrent:
            hidden = chosen["projections"][:, component - 1]
            return Context(self._later(component, hidden, prefix, chosen), chosen)
        starts = np.cumsum([0, *self.seating.shape])
        shape = len(prefix), 1, self._places.shape[-1]
        places: np.ndarray = np.full(shape, self._nothing, dtype=np.int32)
        places[:, 0, 0] = starts[component - 1] + prefix[:, -1]
        inputs = {"places": places, "hidden": chosen["hidden"], "cell": chosen["cell"]}
        if self.graphs.has("numbers"):
            size = chosen["query"].shape[1]
            inputs["numbers"] = np.zeros((len(prefix), 1, size), dtype=np.float32)
        found = self.graphs.run("read", inputs)
        chosen.update(hidden=found["next_hidden"], cell=found["next_cell"])
        hidden = found["outputs"][:, 0]
        return Context(self._later(component, hidden, prefix, chosen), chosen)

    def _later(
        self,
        component: int,
        hidden: np.ndarray,
        prefix: np.ndarray,
        carried: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        inputs = {"hidden": hidden, "added": self._added_logits(component, prefix)}
        if not self.recurrent:
            inputs["prefix"] = prefix.astype(np.int32)
        if component + 1 == self.components:
            words = self.seating.words[self.seating.number(prefix)].clip(min=0)  # (N, C)
            if "query" in carried:
                numbers = self._numbers(words)
                if self._moved is not None:
                    place, moved = self._moved
                    numbers = numbers + moved[place[words]]
                inputs |= {"query": carried["query"], "numbers": numbers}
            if "scores" in carried:
                inputs |= {"scores": carried["scores"], "seats": self.seating.seats[words]}
        return self.graphs.run(f"expand{component}", inputs)["log_probs"]

    def _added_logits(self, component: int, prefix: np.ndarray) -> np.ndarray:
        """Returns what is added to the logits of a component after prefixes (N, i)."""
        group = self.seating.number(prefix)
        mask = self._added[component]
        if mask is not None:
            return mask[group]
        words = self.seating.words[group]
        bias = np.float32(0) if self.bias is None else self.bias[words]
        return np.where(words >= 0, bias, _IMPOSSIBLE)

    def score(self, outputs: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Scores words by the outputs that predict their components.

        Args:
            outputs: of :meth:`read`, (N, steps, d).
            words: integers of shape (N,).

        Returns:
            Log-probabilities of each component given those before it, in nats, float64 (N, k).
        """
        coordinates = self.seating.coordinates[words]
        every = np.arange(len(words))
        context = self._first(outputs[:, 0])
        scores = [context.log_probs[every, coordinates[:, 0]]]
        for component in range(1, self.components):
            if self.recurrent:
                hidden = outputs[:, component]
            else:
                hidden = context.carried["projections"][:, component - 1]
            prefix = coordinates[:, :component]
            log_probs = self._later(component, hidden, prefix, context.carried)
            scores.append(log_probs[every, coordinates[:, component]])
        return np.stack(scores, axis=1).astype(np.float64)
