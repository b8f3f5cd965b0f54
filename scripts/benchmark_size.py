"""Takes a model of a very large vocabulary through everything that is done with one.

    python scripts/benchmark_size.py OUTPUT --words 10240000 --tokens 1000000

Each step is a command of a process of its own, with its seconds, those of the CPU and its peak
memory: a text is drawn by Zipf's law (of a dictionary of all the words, though most of them do not
occur in it), binarised, one epoch is trained on it (which makes the word table first) and saved,
the training is gone on with from the checkpoint, which reallocates the words, and the result is
evaluated by ``fairseq-eval-lm`` and ``lightrnn-score``. Finished steps are kept in OUTPUT, so an
interrupted run goes on. The perplexity of such a text tells nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from side_by_side import PLUGIN, keep_settings, machine, run_measured, write_results, write_whole

_LINE = 25  # words
_HELD_OUT = 20_000  # words
_AFTERWARDS = 20  # updates after the checkpoint


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUTPUT", help="folder to write to")
    add("--words", type=int, default=10_240_000, metavar="V", help="(default: %(default)s)")
    add("--tokens", type=int, default=1_000_000, help="of the training text (default: %(default)s)")
    add("--arch", default="lightrnn_lm", help="(default: %(default)s, the paper's)")
    add("--width", type=int, default=512, help="of vectors and LSTM (default: %(default)s)")
    add("--layers", type=int, default=2, help="of the LSTM (default: %(default)s)")
    add("--threads", type=int, default=2, help="of the CPU (default: %(default)s)")
    return parser.parse_args()


def write_text(out: Path, num_words: int, tokens: int) -> None:
    """Writes a dictionary of words ``w1``, ``w2`` …, and text drawn from it by Zipf's law."""
    import numpy as np

    steps = np.cumsum(1.0 / np.arange(1, num_words + 1))
    generator = np.random.default_rng(1)
    for split, size in (("train", tokens), ("valid", _HELD_OUT), ("test", _HELD_OUT)):
        drawn = 1 + np.searchsorted(steps, generator.random(size) * steps[-1])
        with open(out / f"{split}.txt", "w", encoding="utf-8") as file:
            for start in range(0, size, _LINE):
                file.write(" ".join(f"w{word}" for word in drawn[start : start + _LINE]) + "\n")
    counts = (tokens / steps[-1] / np.arange(1, num_words + 1)).astype(int).clip(min=1)
    with open(out / "dict.txt", "w", encoding="utf-8") as file:
        file.writelines(f"w{word} {count}\n" for word, count in enumerate(counts, 1))


def commands(args: argparse.Namespace) -> Iterator[tuple[str, list[Any]]]:
    """Yields the steps: a name, and the command."""
    out, python = args.out, [sys.executable, "-m"]
    data, run = out / "data", out / "run"
    texts = [part for split in ("train", "valid", "test")
             for part in (f"--{split}pref", out / f"{split}.txt")]  # fmt: skip
    yield "text drawn", [sys.executable, __file__, *sys.argv[1:], "--draw"]
    yield "fairseq-preprocess", [*python, "fairseq_cli.preprocess", "--only-source",
                                 "--srcdict", out / "dict.txt", *texts,
                                 "--destdir", data]  # fmt: skip
    updates = math.ceil(args.tokens * (1 + 1 / _LINE) / (35 * 64))
    ours = ["--user-dir", PLUGIN, "--task", "lightrnn_language_modeling"]
    train = [
        *python, "fairseq_cli.train", data, *ours, "--arch", args.arch,
        "--embed-dim", args.width, "--hidden-size", args.width, "--num-layers", args.layers,
        "--criterion", "two_component_cross_entropy", "--carry-hidden-state", "--cpu",
        "--tokens-per-sample", 35, "--batch-size", 64, "--optimizer", "adam", "--lr", 0.002,
        "--clip-norm", 1, "--save-dir", run, "--no-epoch-checkpoints", "--num-workers", 0,
        "--log-format", "json", "--log-interval", 20, "--reallocate-epochs", 1,
    ]  # fmt: skip
    yield "one epoch, after making the table", [*train, "--max-update", updates]
    yield "resumed: reallocation and 20 updates", [*train, "--max-update", updates + _AFTERWARDS]
    last = run / "checkpoint_last.pt"
    yield "fairseq-eval-lm", [*python, "fairseq_cli.eval_lm", data, *ours, "--path", last, "--cpu",
                              "--gen-subset", "test", "--batch-size", 64,
                              "--tokens-per-sample", 35]  # fmt: skip
    yield "lightrnn-score", [Path(sys.executable).with_name("lightrnn-score"), last, "--data", data,
                             out / "test.txt"]  # fmt: skip


def run(name: str, command: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    """Runs a step and returns its seconds and its peak memory."""
    log = args.out / f"{name.split(',')[0].replace(' ', '-')}.log"
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        status, used = run_measured(command, file, {"OMP_NUM_THREADS": str(args.threads)})
    if status:
        raise SystemExit(f"{name}: failed, see {log}")
    seconds = round(time.monotonic() - start, 1)
    cpu_seconds = round(used.ru_utime + used.ru_stime, 1)
    peak_gib = round(used.ru_maxrss / 2**20, 2)
    return {"step": name, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gib": peak_gib}


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the checkpoint holds, beside that of an ordinary LSTM (computed)."""
    import torch

    path = args.out / "run" / "checkpoint_last.pt"
    state = torch.load(path, map_location="cpu", weights_only=False)
    tensors = state["model"].values()
    floats = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    # Vectors of words for input and output, a bias, and Adam's two moments of each.
    ordinary = 3 * 4 * (args.words * (2 * args.width + 1))
    return {
        "parameters": floats,
        "table_bytes": sum(t.nbytes for t in tensors if not t.is_floating_point()),
        "checkpoint_bytes": path.stat().st_size,
        "vocabulary_of_an_ordinary_lstm_bytes": ordinary,
    }


def main() -> None:
    if "--draw" in sys.argv:
        sys.argv.remove("--draw")
        args = parse()
        write_text(args.out, args.words, args.tokens)
        return
    args = parse()
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    keep_settings(args.out, settings)
    kept = args.out / "steps.json"
    steps = json.loads(kept.read_text()) if kept.exists() else []
    for name, command in commands(args):
        if name not in {step["step"] for step in steps}:
            steps.append(run(name, command, args))
            write_whole(kept, json.dumps(steps))
            print(steps[-1], flush=True)
    found = {"settings": settings, **machine(), "steps": steps, **sizes(args)}
    lines = ["| step | seconds | of the CPU | peak GiB |", "|---|---|---|---|"]
    lines += [f"| {s['step']} | {s['seconds']:,.0f} | {s['cpu_seconds']:,.0f} | "
              f"{s['peak_gib']:.1f} |" for s in steps]  # fmt: skip
    lines += ["", f"{found['parameters']:,} parameters; checkpoint "
              f"{found['checkpoint_bytes'] / 2**30:.2f} GiB, of which the table "
              f"{found['table_bytes'] / 2**30:.2f}; the vocabulary of an ordinary LSTM alone: "
              f"{found['vocabulary_of_an_ordinary_lstm_bytes'] / 2**30:.1f} GiB"]  # fmt: skip
    write_results(args.out, found, "\n".join(lines))


if __name__ == "__main__":
    main()
