"""Compares exported language models on one core: bytes, memory, speed and perplexity.

    python scripts/benchmark_export.py FOLDER OUTPUT --seconds 200

FOLDER holds text as for ``benchmark_language_model.py``. OUTPUT receives the trained models,
their exports and what was measured, which a second run keeps, ``results.json`` and ``results.md``.

Every system is trained for so many seconds of the processor, tables made before. Then it is
exported, and measured in processes of its own, with one thread:

* ``bytes``: of all files, and of the vocabulary and the word tables among them;
* ``load``: seconds from the folder to a model that answers; ``import``: of numpy and onnxruntime;
  all times are those of the processor, in one thread, so that other processes do not count;
* ``memory``: MiB of the process at its peak beyond that after the imports;
* ``score``: words a second; ``perplexity``: of the test's first ``--test-words`` words as one text;
* ``suggest``: milliseconds from a further word of the test to the three most probable next ones,
  median and 99th percentile; ``complete``: those that begin with its first letter.

Systems are those of ``benchmark_language_model.py``: ``lstm_lm`` is fairseq's, exported by the same
exporter and quantiser, its words front-coded too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SYSTEMS = ("recommended", "gated-further-bias", "gated", "recurrent", "lstm_lm")
# Words of the test that ask for suggestions.
_ASKED = 400
_AT_ONCE = 64
_SAVED = 20  # updates between checkpoints


def parse() -> argparse.Namespace:
    from language_model_runs import add_training_flags

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_training_flags(parser, width=200, dropout=0.1, lanes=32)
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="(default: all)")
    add("--quantize", nargs="+", default=["none", "fp16", "int8", "int4"], metavar="HOW",
        help="(default: %(default)s)")  # fmt: skip
    add("--seconds", type=float, default=200, help="of training (default: %(default)s)")
    add("--initial-table", default="cooccurrence", help="(default: %(default)s)")
    add("--test-words", type=int, default=50_000, metavar="N", help="(default: %(default)s)")
    add("--train-only", action="store_true", help="export and measure nothing")
    return parser.parse_args()


def train(system: str, data: Path, folder: Path, args: argparse.Namespace) -> None:
    """Trains a system for so many seconds of the processor, unless that is done.

    The tables are made before: by a process of a single update, from whose checkpoint another goes
    on until the kernel ends it. So its last checkpoint counts.
    """
    from benchmark_language_model import LSTMS, model_flags
    from language_model_runs import training_flags
    from side_by_side import call

    if (folder / "trained").exists():
        return
    num_words = len((data / "dict.txt").read_text(encoding="utf-8").splitlines()) + 4
    flags = [*training_flags(system, args.seeds[0], data, args), "--lr", args.lr,
             *model_flags(system, args, num_words)]  # fmt: skip
    if system in LSTMS:
        flags += ["--initial-table", args.initial_table]
    folder.mkdir(parents=True, exist_ok=True)
    flags += ["--save-dir", folder, "--disable-validation", "--no-epoch-checkpoints",
              "--num-workers", 0, "--save-interval-updates", _SAVED, "--keep-interval-updates", 1,
              "--log-format", "json", "--log-interval", _SAVED]  # fmt: skip
    if not (folder / "checkpoint_last.pt").exists():
        call("train", *flags, "--max-update", 1, log=folder / "tables.txt")
    limit = round(args.seconds)
    with open(folder / "train.txt", "w") as log:
        subprocess.run(
            [sys.executable, "-m", "fairseq_cli.train", *map(str, flags), "--max-epoch", "1000"],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
            check=False,
        )
    updates = re.findall(r'"num_updates": "(\d+)"', (folder / "train.txt").read_text())
    if not updates:
        raise SystemExit(f"{folder}: not {_SAVED} updates in {limit} seconds; give more --seconds")
    (folder / "trained").write_text(updates[-1] + "\n")


def export(system: str, quantise: str, data: Path, folder: Path, out: Path) -> None:
    """Exports a trained system, unless that is done."""
    if (out / "model.json").exists():
        return
    checkpoint = folder / "checkpoint_last.pt"
    if system == "lstm_lm":
        export_lstm_lm(checkpoint, data, quantise, out)
        return
    from fairseq_lightrnn.export.model import export_model
    from fairseq_lightrnn.language_model import LanguageModel

    export_model(LanguageModel.from_pretrained(checkpoint, data), out, quantise=quantise)


def export_lstm_lm(checkpoint: Path, data: Path, quantise: str, out: Path) -> None:
    """Exports fairseq's language model as two graphs: of its network, and of its output layer."""
    import torch
    from fairseq.data import Dictionary
    from torch import nn

    from fairseq_lightrnn.export.formats import graph_files
    from fairseq_lightrnn.export.graphs import Graph
    from fairseq_lightrnn.runtime.folder import WORDS, pack, write_folder
    from fairseq_lightrnn.runtime.vocabulary import front_code

    half = quantise == "fp16"
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)["model"]
    dictionary = Dictionary.load(str(data / "dict.txt"))
    order, shared, rest = front_code(dictionary.symbols)
    order_of = torch.from_numpy(order)
    parts = [
        f"decoder.layers.0.{side}_{kind}" for side in ("weight", "bias") for kind in ("ih", "hh")
    ]

    def stored(value: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(value.half() if half else value, requires_grad=False)

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vectors = stored(state["decoder.embed_tokens.weight"][order_of])
            self.weights = nn.ParameterList([stored(state[name]) for name in parts])

        def forward(self, words: Any, hidden: Any, cell: Any) -> Any:
            inputs = self.vectors[words.long()].float()
            weights = [weight.float() for weight in self.weights]
            hx = hidden[None], cell[None]
            outputs, after, cells = torch._VF.lstm(
                inputs, hx, weights, True, 1, 0.0, False, False, True
            )
            return outputs, after[0], cells[0]

    class Predict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = stored(state["decoder.fc_out.weight"][order_of].T.contiguous())
            self.bias = stored(state["decoder.fc_out.bias"][order_of])

        def forward(self, outputs: Any) -> Any:
            return torch.log_softmax(outputs @ self.weight.float() + self.bias.float(), 1)

    width = state["decoder.fc_out.weight"].shape[1]
    zeros = torch.zeros(2, width)
    free = {0: "N"}
    graphs = {
        "read": Graph(
            Read().eval(),
            {"words": torch.zeros(2, 2, dtype=torch.int32), "hidden": zeros, "cell": zeros},
            ["outputs", "next_hidden", "next_cell"],
            {"words": {0: "N", 1: "T"}, "hidden": free, "cell": free},
        ),
        "predict": Graph(
            Predict().eval(), {"outputs": zeros}, ["log_probs"], {"outputs": free}
        ),
    }  # fmt: skip
    number_of = np.argsort(order)
    files = graph_files(graphs, "onnx", quantise, 17)
    files[WORDS] = pack({"shared": shared, "rest": rest})
    description = {
        "width": width, "quantize": quantise, "end": int(number_of[dictionary.eos()]),
        "unknown": int(number_of[dictionary.unk()]),
    }  # fmt: skip
    write_folder(out, files, description)


class LstmLm:
    """Asks fairseq's exported model as :class:`ExportedModel` asks ours."""

    def __init__(self, folder: Path) -> None:
        from fairseq_lightrnn.runtime.folder import WORDS, read_folder, unpack
        from fairseq_lightrnn.runtime.network import OnnxGraphs
        from fairseq_lightrnn.runtime.vocabulary import Vocabulary

        self.description, files = read_folder(folder)
        arrays = unpack(files[WORDS])
        self.vocabulary = Vocabulary(arrays["shared"], arrays["rest"])
        self.graphs = OnnxGraphs(files, 1)
        self.state = {
            name: np.zeros((1, self.description["width"]), np.float32)
            for name in ("hidden", "cell")
        }
        self.read([self.description["end"]])

    def read(self, words: list[int]) -> np.ndarray:
        found = self.graphs.run("read", {"words": np.array([words], np.int32), **self.state})
        self.state = {"hidden": found["next_hidden"], "cell": found["next_cell"]}
        self.outputs = found["outputs"][0]
        return self.outputs

    def ids(self, line: str) -> list[int]:
        found = (self.vocabulary.find(word) for word in line.split())
        unknown = self.description["unknown"]
        return [unknown if one is None else one for one in found] + [self.description["end"]]

    def log_prob(self, lines: list[str]) -> tuple[float, int]:
        """Scores lines as one text: the sum in nats, and the words."""
        total, count, before = 0.0, 0, self.outputs[-1:]
        for line in lines:
            ids = self.ids(line)
            outputs = np.concatenate([before, self.read(ids)])
            before = outputs[-1:]
            for start in range(0, len(ids), _AT_ONCE):
                some = np.array(ids[start : start + _AT_ONCE])
                inputs = {"outputs": outputs[start : start + len(some)]}
                log_probs = self.graphs.run("predict", inputs)["log_probs"]
                total += float(log_probs[np.arange(len(some)), some].sum(dtype=np.float64))
            count += len(ids)
        return total, count

    def suggest(self, word: str, within: np.ndarray | None = None) -> list[str]:
        self.read(self.ids(word)[:1])
        log_probs = self.graphs.run("predict", {"outputs": self.outputs[-1:]})["log_probs"][0]
        some = log_probs if within is None else log_probs[within]
        best = np.argpartition(-some, 3)[:3] if len(some) > 3 else np.arange(len(some))
        best = best[np.argsort(-some[best])]
        words = best if within is None else within[best]
        return [self.vocabulary[word] for word in words.tolist()]

    def complete(self, word: str) -> list[str]:
        return self.suggest(word, self.vocabulary.with_prefix(word[:1]))


class Ours:
    """Asks an exported model of the plugin."""

    def __init__(self, folder: Path) -> None:
        from fairseq_lightrnn.runtime.model import ExportedModel

        self.model = ExportedModel.load(folder)
        self.text = self.model.text()

    def log_prob(self, lines: list[str]) -> tuple[float, int]:
        scores = list(self.model.score_lines(lines, carry_hidden_state=True))
        return sum(one.log_prob for one in scores), sum(len(one.tokens) for one in scores)

    def suggest(self, word: str) -> list[str]:
        self.text.add(word)
        return [name for name, _ in self.text.next_words(3)[0]]

    def complete(self, word: str) -> list[str]:
        self.text.add(word)
        return [name for name, _ in self.text.complete(word[:1], 3)[0]]


def status(key: str) -> float:
    """Returns a figure of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def measure(folder: Path, text: Path, test_words: int) -> None:
    """Measures an export and prints what it found as JSON."""
    start = time.process_time()
    import onnxruntime  # noqa: F401

    imported = time.process_time()
    before = status("VmRSS")
    is_ours = (folder / "first.onnx").exists()
    model: Any = Ours(folder) if is_ours else LstmLm(folder)
    first = model.suggest("the")
    loaded = time.process_time()
    lines = some_lines(text, test_words)
    words = [word for line in lines for word in line.split()][:_ASKED]
    seconds = {}
    for kind in ("suggest", "complete"):
        ask, times = getattr(model, kind), []
        for word in words:
            begun = time.process_time()
            ask(word)
            times.append(time.process_time() - begun)
        seconds[kind] = [round(1000 * float(np.percentile(times, p)), 3) for p in (50, 99)]
    asked = status("VmHWM")
    model = Ours(folder) if is_ours else LstmLm(folder)
    begun = time.process_time()
    total, count = model.log_prob(lines)
    print(json.dumps({
        "import_seconds": round(imported - start, 3), "load_seconds": round(loaded - imported, 3),
        "memory_mib": round(asked - before, 1),
        "scoring_memory_mib": round(status("VmHWM") - before, 1),
        "suggest_ms": seconds["suggest"], "complete_ms": seconds["complete"],
        "words_per_second": round(count / (time.process_time() - begun)),
        "test_words": count, "perplexity": round(float(np.exp(-total / count)), 3), "first": first,
    }))  # fmt: skip


def some_lines(text: Path, words: int) -> list[str]:
    """Returns the first lines of a text that have so many words, ends of lines counted."""
    lines = []
    with open(text, encoding="utf-8") as file:
        for line in file:
            lines.append(line)
            words -= len(line.split()) + 1
            if words <= 0:
                break
    return lines


def sizes(folder: Path) -> dict[str, int]:
    """Returns the bytes of an export, and of its parts."""
    from fairseq_lightrnn.runtime.folder import WORDS, pack, unpack

    arrays = unpack((folder / WORDS).read_bytes())
    return {
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "vocabulary_bytes": len(pack({name: arrays[name] for name in ("shared", "rest")})),
        "words_bytes": (folder / WORDS).stat().st_size,
    }


def run(system: str, quantise: str, folder: Path, text: Path, args: argparse.Namespace) -> Any:
    """Measures an export in a process of its own, unless that is done."""
    kept = args.out / f"{system}-{quantise}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        f"from benchmark_export import measure; from pathlib import Path; "
        f"measure(Path({str(folder)!r}), Path({str(text)!r}), {args.test_words})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{system} {quantise}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    trained = args.out / f"{system}-{args.seeds[0]}" / "trained"
    updates = {"updates": int(trained.read_text())}
    result = {"system": system, "quantize": quantise, **updates, **sizes(folder), **found}
    kept.write_text(json.dumps(result) + "\n")
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as Markdown."""
    lines = [
        "| system | stored in | MB | of these words | perplexity | words/s | suggestion, ms "
        "(99 %) | completion, ms (99 %) | load, s | memory, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        lines.append(
            f"| {one['system']} | {one['quantize']} | {one['bytes'] / 1e6:.2f} | "
            f"{one['words_bytes'] / 1e6:.2f} | {one['perplexity']:.1f} | "
            f"{one['words_per_second']:,} | {one['suggest_ms'][0]:.2f} ({one['suggest_ms'][1]:.2f})"
            f" | {one['complete_ms'][0]:.2f} ({one['complete_ms'][1]:.2f}) | "
            f"{one['load_seconds']:.2f} | {one['memory_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    import fairseq_compat

    fairseq_compat.install()
    from language_model_runs import binarise, describe, find_text
    from side_by_side import write_results

    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    data, results = binarise(args.text, args.out), []
    for system in args.systems:
        train(system, data, args.out / f"{system}-{args.seeds[0]}", args)
    if args.train_only:
        return
    for system in args.systems:
        folder = args.out / f"{system}-{args.seeds[0]}"
        for quantise in args.quantize:
            exported = args.out / f"{system}-{quantise}"
            export(system, quantise, data, folder, exported)
            results.append(run(system, quantise, exported, find_text(args.text)["test"], args))
            report = describe(args)
            report["versions"] |= {one: version(one) for one in ("onnx", "onnxruntime")}
            write_results(args.out, {**report, "results": results}, table(results))


if __name__ == "__main__":
    main()
