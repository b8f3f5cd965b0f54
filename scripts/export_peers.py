"""What exported word tables are measured beside: fairseq's ``lstm_lm``, and KenLM's 5-grams.

Both are folders with words of their own numbering, and both are asked as our models are:
``log_prob`` of lines, ``suggest`` after a further word, ``complete`` of its first letter.
"""

from __future__ import annotations

import math
import resource
import shutil
import subprocess
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from language_model_text import UNKNOWN

__all__ = [
    "BEST",
    "Built",
    "Kenlm",
    "LstmLm",
    "Scored",
    "build_kenlm",
    "export_lstm_lm",
    "known",
]

BEST = 3
"""Words of a suggestion."""
# Words that are predicted at once.
_AT_ONCE = 64
_ORDER = 5
# Bits of numbers and of pointers in KenLM's tries, and memory to count in.
_QUANTISED = ("-q", 8, "-b", 8, "-a", 22)
_MEMORY = "2G"
# KenLM keeps the name for words that it does not know.
_KENLM_UNKNOWN = "<unknown>"


class Scored(NamedTuple):
    """What a system says of a text.

    Attributes:
        log_prob: in nats, of the words that it knows; ends of lines are words too.
        words: how many these are.
        unknown: how many others there are, whose probability means something else to each system.
    """

    log_prob: float
    words: int
    unknown: int

    @property
    def perplexity(self) -> float:
        """Of the words that are known."""
        return math.exp(-self.log_prob / self.words)


def known(words: Sequence[str], ids: Any, unknown: int) -> np.ndarray:
    """Tells which words a system knows: ``<unk>`` itself may be a word of a text."""
    named = np.array([word == UNKNOWN for word in words], dtype=bool)
    return named | (np.asarray(ids) != unknown)


def export_lstm_lm(checkpoint: Path, data: Path, quantise: str, out: Path) -> None:
    """Exports fairseq's language model, of full or adaptive softmax, as graphs.

    ``read`` is its network. ``head`` predicts frequent words, or all, and whether a word is in one
    of the clusters of the others; ``tail1`` … predict the words of a cluster.
    """
    import torch
    from fairseq.data import Dictionary

    from fairseq_lightrnn.export.formats import graph_files
    from fairseq_lightrnn.runtime.folder import WORDS, pack, write_folder
    from fairseq_lightrnn.runtime.vocabulary import front_code

    state = torch.load(checkpoint, map_location="cpu", weights_only=False)["model"]
    decoder = {name.removeprefix("decoder."): value for name, value in state.items()}
    dictionary = Dictionary.load(str(data / "dict.txt"))
    order, shared, rest = front_code(dictionary.symbols)
    starts = _starts(decoder)
    cluster = np.searchsorted(starts[1:], order, side="right")
    graphs = _graphs(decoder, order, cluster, starts, quantise == "fp16")
    files = graph_files(graphs, "onnx", quantise, 17)
    files[WORDS] = pack({"shared": shared, "rest": rest, "cluster": cluster})
    number_of = np.argsort(order)
    description = {
        "width": decoder["embed_tokens.weight"].shape[1],
        "quantize": quantise,
        "end": int(number_of[dictionary.eos()]),
        "unknown": int(number_of[dictionary.unk()]),
    }
    write_folder(out, files, description)


def _starts(decoder: dict[str, Any]) -> list[int]:
    """Returns the first word of each cluster; words are numbered by frequency."""
    if "fc_out.weight" in decoder:
        return [0]
    sizes = []
    while (name := f"adaptive_softmax.tail.{len(sizes)}.2.weight") in decoder:
        sizes.append(len(decoder[name]))
    head = len(decoder["adaptive_softmax.head.weight"]) - len(sizes)
    return [0, *np.cumsum([head, *sizes[:-1]]).tolist()]


def _graphs(
    decoder: dict[str, Any], order: np.ndarray, cluster: np.ndarray, starts: list[int], half: bool
) -> dict[str, Any]:
    import torch
    from torch import nn

    from fairseq_lightrnn.export.graphs import Graph

    def stored(value: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(value.half() if half else value, requires_grad=False)

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vectors = stored(decoder["embed_tokens.weight"][torch.from_numpy(order)])
            parts = [f"{one}_{kind}" for one in ("weight", "bias") for kind in ("ih", "hh")]
            self.weights = nn.ParameterList(stored(decoder[f"layers.0.{one}"]) for one in parts)

        def forward(self, words: Any, hidden: Any, cell: Any) -> Any:
            weights = [weight.float() for weight in self.weights]
            inputs, hx = self.vectors[words.long()].float(), (hidden[None], cell[None])
            found = torch._VF.lstm(inputs, hx, weights, True, 1, 0.0, False, False, True)
            return found[0], found[1][0], found[2][0]

    class Predict(nn.Module):
        def __init__(self, *weights: torch.Tensor, bias: torch.Tensor | None = None) -> None:
            super().__init__()
            self.weights = nn.ParameterList(stored(one.T.contiguous()) for one in weights)
            self.bias = None if bias is None else stored(bias)

        def forward(self, outputs: Any) -> Any:
            for weight in self.weights:
                outputs = outputs @ weight.float()
            if self.bias is not None:
                outputs = outputs + self.bias.float()
            return torch.log_softmax(outputs, 1)

    places = [torch.from_numpy(order[cluster == one] - start) for one, start in enumerate(starts)]
    if len(starts) == 1:
        bias = decoder["fc_out.bias"][places[0]]
        predict = {"head": Predict(decoder["fc_out.weight"][places[0]], bias=bias)}
    else:
        head = decoder["adaptive_softmax.head.weight"]
        predict = {"head": Predict(torch.cat([head[places[0]], head[starts[1] :]]))}
        for one in range(1, len(starts)):
            name = f"adaptive_softmax.tail.{one - 1}"
            inner, outer = decoder[f"{name}.0.weight"], decoder[f"{name}.2.weight"]
            predict[f"tail{one}"] = Predict(inner, outer[places[one]])
    zeros, free = torch.zeros(2, decoder["embed_tokens.weight"].shape[1]), {0: "N"}
    words = torch.zeros(2, 2, dtype=torch.int32)
    read = Graph(
        Read().eval(),
        {"words": words, "hidden": zeros, "cell": zeros},
        ["outputs", "next_hidden", "next_cell"],
        {"words": {0: "N", 1: "T"}, "hidden": free, "cell": free},
    )
    return {"read": read} | {
        name: Graph(module.eval(), {"outputs": zeros}, ["log_probs"], {"outputs": free})
        for name, module in predict.items()
    }


class LstmLm:
    """Asks an export of fairseq's ``lstm_lm``."""

    def __init__(self, folder: Path) -> None:
        from fairseq_lightrnn.runtime.folder import WORDS, read_folder, unpack
        from fairseq_lightrnn.runtime.network import OnnxGraphs
        from fairseq_lightrnn.runtime.vocabulary import Vocabulary

        self.description, files = read_folder(folder)
        arrays = unpack(files[WORDS])
        self.vocabulary = Vocabulary(arrays["shared"], arrays["rest"])
        self.graphs = OnnxGraphs(files, 1)
        self.cluster = arrays["cluster"].astype(np.int64)
        count = int(self.cluster.max()) + 1
        self.words = [np.flatnonzero(self.cluster == one) for one in range(count)]
        self.place = np.zeros(len(self.cluster), dtype=np.int64)
        for words in self.words:
            self.place[words] = np.arange(len(words))
        self.state = {
            name: np.zeros((1, self.description["width"]), np.float32)
            for name in ("hidden", "cell")
        }
        self.read([self.description["end"]])

    def read(self, words: list[int]) -> np.ndarray:
        found = self.graphs.run("read", {"words": np.array([words], np.int32), **self.state})
        self.state = {"hidden": found["next_hidden"], "cell": found["next_cell"]}
        self.outputs: np.ndarray = found["outputs"][0]
        return self.outputs

    def ids(self, line: str) -> list[int]:
        found = (self.vocabulary.find(word) for word in line.split())
        unknown = self.description["unknown"]
        return [unknown if one is None else one for one in found] + [self.description["end"]]

    def predict(self, name: str, outputs: np.ndarray) -> np.ndarray:
        return self.graphs.run(name, {"outputs": outputs})["log_probs"]

    def log_prob(self, lines: list[str]) -> Scored:
        """Scores lines as one text."""
        total, count, unknown, before = 0.0, 0, 0, self.outputs[-1:]
        for line in lines:
            ids = self.ids(line)
            outputs = np.concatenate([before, self.read(ids)])
            before = outputs[-1:]
            scores = np.concatenate([
                self._scores(outputs[start : start + len(some)], some)
                for start in range(0, len(ids), _AT_ONCE)
                for some in [np.array(ids[start : start + _AT_ONCE])]
            ])  # fmt: skip
            counted = known([*line.split(), ""], ids, self.description["unknown"])
            total += float(scores[counted].sum(dtype=np.float64))
            count += int(counted.sum())
            unknown += int((~counted).sum())
        return Scored(total, count, unknown)

    def _scores(self, outputs: np.ndarray, words: np.ndarray) -> np.ndarray:
        head, cluster, place = self.predict("head", outputs), self.cluster[words], self.place[words]
        first = len(self.words[0]) - 1
        column = np.where(cluster == 0, place, first + cluster)
        scores = head[np.arange(len(words)), column]
        for one in range(1, len(self.words)):
            inside = np.flatnonzero(cluster == one)
            if len(inside):
                tail = self.predict(f"tail{one}", outputs[inside])
                scores[inside] += tail[np.arange(len(inside)), place[inside]]
        return scores

    def suggest(self, word: str, within: range | None = None) -> list[str]:
        """Reads a word and returns the most probable next ones, of some or of all."""
        self.read(self.ids(word)[:1])
        within = range(len(self.vocabulary)) if within is None else within
        output = self.outputs[-1:]
        head = self.predict("head", output)[0]
        size = len(self.words[0])
        best = self._best(0, head[:size], within)
        # A word is at most as probable as its cluster.
        for one in 1 + np.argsort(-head[size:]):
            bound = float(head[size + one - 1])
            if len(best) < BEST or bound > best[-1][0]:
                tail = self.predict(f"tail{one}", output)[0]
                best = sorted(best + self._best(int(one), bound + tail, within), reverse=True)
        return [self.vocabulary[number] for _, number in best[:BEST]]

    def _best(self, cluster: int, scores: np.ndarray, within: range) -> list[tuple[float, int]]:
        words = self.words[cluster]
        low, high = np.searchsorted(words, [within.start, within.stop])
        some = scores[low:high]
        best = np.argpartition(-some, BEST)[:BEST] if len(some) > BEST else np.arange(len(some))
        found = [(float(some[one]), int(words[low + one])) for one in best]
        return sorted(found, reverse=True)

    def complete(self, word: str) -> list[str]:
        """Reads a word and returns the most probable next ones that begin with its letter."""
        found = self.vocabulary.with_prefix(word[:1])
        return self.suggest(word, range(found[0], found[-1] + 1) if len(found) else range(0))


class Built(NamedTuple):
    """What it took to count n-grams.

    Attributes:
        seconds: of the processor.
        numbers: probabilities of n-grams, and back-off weights of all but the longest.
        peak_mib: of memory.
    """

    seconds: float
    numbers: int
    peak_mib: int


def build_kenlm(text: Path, data: Path, out: Path, quantise: bool = True) -> Built:
    """Counts 5-grams of a text into a trie.

    Args:
        text: to count.
        data: folder of the dictionary.
        out: folder of the trie.
        quantise: keep numbers in eight bits.

    Raises:
        SystemExit: if KenLM's programs are missing.
    """
    from fairseq.data import Dictionary
    from side_by_side import process_used

    programs = [shutil.which(name) for name in ("lmplz", "build_binary")]
    if None in programs:
        raise SystemExit(
            "kenlm needs lmplz and build_binary on the PATH: build them with cmake from the "
            "source distribution of the package kenlm (pip download --no-binary kenlm kenlm)"
        )
    lmplz, build_binary = programs
    out.mkdir(parents=True, exist_ok=True)
    arpa, before = out.with_suffix(".arpa"), _children()
    # Discounts of small texts, whose counts are too few to estimate them, are KenLM's own.
    counts = [lmplz, "-o", _ORDER, "-S", _MEMORY, "-T", out.parent, "--discount_fallback",
              "--arpa", arpa]  # fmt: skip
    with (
        subprocess.Popen(
            list(map(str, counts)), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            encoding="utf-8",
        ) as process,
        open(text, encoding="utf-8") as lines,
    ):  # fmt: skip
        assert process.stdin is not None
        process.stdin.writelines(_as_kenlm_says(line) + "\n" for line in lines)
        process.stdin.close()
        status, used = process_used(process)
    if status:
        raise SystemExit(f"{lmplz} failed on {text}")
    trie = [build_binary, *(_QUANTISED if quantise else ()), "trie", arpa, out / "model.trie"]
    subprocess.run(list(map(str, trie)), check=True, capture_output=True)
    numbers = _numbers(arpa)
    arpa.unlink()
    dictionary = Dictionary.load(str(data / "dict.txt"))
    words = sorted(dictionary.symbols[dictionary.nspecial :])
    # The trie holds the words, but its library does not list them.
    out.with_suffix(".words").write_text("\n".join(map(_as_kenlm_says, words)), encoding="utf-8")
    return Built(_children() - before, numbers, used.ru_maxrss >> 10)


def _numbers(arpa: Path) -> int:
    """Returns how many numbers an ARPA file holds, as its head says."""
    found = 0
    with open(arpa, encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("ngram "):
                order, count = line.removeprefix("ngram ").split("=")
                found += int(count) * (1 if int(order) == _ORDER else 2)
            elif found:
                return found
    raise ValueError(f"{arpa} does not say how many n-grams it has")


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _as_kenlm_says(line: str) -> str:
    return " ".join(_KENLM_UNKNOWN if word == UNKNOWN else word for word in line.split())


class Kenlm:
    """Asks a model of KenLM, each line from its beginning."""

    def __init__(self, folder: Path) -> None:
        import kenlm

        words = folder.with_suffix(".words").read_text(encoding="utf-8")
        self.words = [*words.split("\n"), "</s>"]
        self.model = kenlm.Model(str(folder / "model.trie"))
        self.state, self.next = kenlm.State(), kenlm.State()
        self.model.BeginSentenceWrite(self.state)

    def log_prob(self, lines: list[str]) -> Scored:
        found = [
            one
            for line in lines
            for one in self.model.full_scores(_as_kenlm_says(line), bos=True, eos=True)
        ]
        scores = [score for score, _, is_unknown in found if not is_unknown]
        return Scored(math.log(10) * sum(scores), len(scores), len(found) - len(scores))

    def suggest(self, word: str, within: slice = slice(None)) -> list[str]:
        """Reads a word and asks for each next one in turn: KenLM has no search."""
        self.model.BaseScore(self.state, _as_kenlm_says(word), self.next)
        self.state, self.next = self.next, self.state
        score, state, after = self.model.BaseScore, self.state, self.next
        words = self.words[within]
        best = sorted(words, key=lambda one: score(state, one, after), reverse=True)
        return best[:BEST]

    def complete(self, word: str) -> list[str]:
        ends = [bisect_left(self.words, one, hi=len(self.words) - 1) for one in
                (word[:1], chr(ord(word[0]) + 1))]  # fmt: skip
        return self.suggest(word, slice(*ends))
