"""Sums up a quickstart run: ``summary.json``, ``perplexity.png``, ``table.html`` and a text."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plot
import run_log
import torch
from torch import nn

from fairseq_lightrnn.commands.table_page import write_table_page
from fairseq_lightrnn.core.table import WordTable

__all__ = ["Model", "main", "ordinary_lstm_parameters", "report", "summarise", "table_rows"]

ROWS_SHOWN = 6
WORDS_SHOWN = 9


@dataclass
class Model:
    """What the summary needs of the trained model and its data.

    Attributes:
        symbols: the V words in order of their ids.
        counts: how often each occurs in the training split, shape (V,).
        table: the word table of the checkpoint.
        parameters: number of trained parameters.
        embed_dim, hidden_size, num_layers: the sizes.
        epoch: the epoch after which the checkpoint was written.
    """

    symbols: list[str]
    counts: np.ndarray
    table: WordTable
    parameters: int
    embed_dim: int
    hidden_size: int
    num_layers: int
    epoch: int


def load_model(checkpoint: Path, data: Path) -> Model:
    """Loads the checkpoint and counts the words of the binarised training split."""
    from fairseq import checkpoint_utils
    from fairseq.data import data_utils

    import fairseq_lightrnn.register  # noqa: F401

    logging.getLogger("fairseq").setLevel(logging.WARNING)
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], arg_overrides={"data": str(data)}
    )
    state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
    config = state["cfg"]["model"]
    position = state["extra_state"]["train_iterator"]
    decoder = models[0].decoder
    dictionary = task.source_dictionary
    counts = np.zeros(len(dictionary), dtype=np.int64)
    train = data_utils.load_indexed_dataset(str(data / "train"), dictionary)
    for index in range(len(train)):
        counts += np.bincount(train[index].numpy(), minlength=len(counts))
    return Model(
        symbols=list(dictionary.symbols),
        counts=counts,
        table=decoder.words.table.table(),
        parameters=sum(parameter.numel() for parameter in models[0].parameters()),
        embed_dim=config.embed_dim,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        # At the end of an epoch the iterator stands before the next one.
        epoch=int(position["epoch"]) - (position["iterations_in_epoch"] == 0),
    )


def ordinary_lstm_parameters(
    vocabulary: int, embed_dim: int, hidden_size: int, num_layers: int
) -> int:
    """Counts the parameters of an ordinary LSTM language model by building it.

    It has an input vector and an output vector of its own for every word, and a bias for each
    output. The model is built without memory for its values.

    Args:
        vocabulary: V, special symbols included.
        embed_dim: width of the input vectors.
        hidden_size: width of the LSTM and of the output vectors.
        num_layers: layers of the LSTM.
    """
    with torch.device("meta"):
        model = nn.ModuleList(
            [
                nn.Embedding(vocabulary, embed_dim),
                nn.LSTM(embed_dim, hidden_size, num_layers),
                nn.Linear(hidden_size, vocabulary),
            ]
        )
    return sum(parameter.numel() for parameter in model.parameters())


def table_rows(
    model: Model, rows: int = ROWS_SHOWN, words: int = WORDS_SHOWN
) -> dict[int, list[str]]:
    """Picks rows of the table to show, among the third that covers most of the text.

    Returns:
        The most frequent words of each row, by row number.
    """
    row_of = model.table.coordinates[:, 0]
    coverage = np.bincount(row_of, weights=model.counts, minlength=model.table.shape[0])
    ranked = np.argsort(-coverage, kind="stable")
    # Words of the later rows are too rare to tell whether they belong together.
    picked = ranked[np.unique(np.linspace(0, 0.3 * (len(ranked) - 1), rows).astype(int))]
    shown = {}
    for row in picked.tolist():
        members = np.flatnonzero(row_of == row)
        most_frequent = members[np.argsort(-model.counts[members], kind="stable")][:words]
        shown[row] = [model.symbols[word] for word in most_frequent.tolist()]
    return shown


def summarise(out: Path, model: Model, manifest: Mapping) -> dict:
    """Gathers the measured figures of a run.

    Args:
        out: the run's folder.
        model: the model that was evaluated.
        manifest: the corpus's manifest.

    Returns:
        What goes into ``summary.json``. Costs are nats per word; ``valid_ppl_by_epoch`` begins with
        epoch 1; words are counted as the model sees them, ends of sentences included.
    """
    log = run_log.read_training_log(out / "logs" / "train.log")
    return {
        "corpus_sha256": manifest["corpus_sha256"],
        "vocabulary": model.table.num_words,
        "train_words": int(model.counts.sum()),
        "test_ppl": run_log.read_test_perplexity(out / "logs" / "evaluate.log"),
        "valid_ppl_by_epoch": [log.valid_ppl[epoch] for epoch in sorted(log.valid_ppl)],
        "reallocations": run_log.read_reallocations(out / "checkpoints" / "reallocations.jsonl"),
        "parameters": model.parameters,
        "parameters_ordinary_lstm": ordinary_lstm_parameters(
            model.table.num_words, model.embed_dim, model.hidden_size, model.num_layers
        ),
        "words_per_second": round(log.speed(), 1),
        "table_shape": list(model.table.shape),
        "table_digest": model.table.digest(),
        "checkpoint_epoch": model.epoch,
        "generated": run_log.read_generated(out / "logs" / "continue.log"),
        "seconds": _step_seconds(out),
        "hardware": _hardware(),
        "versions": _versions(),
    }


def _step_seconds(out: Path) -> dict[str, int]:
    """Reads how long each step took when it was last done; see ``finish`` in quickstart.sh."""
    seconds = {}
    for path in sorted((out / "steps").glob("*.seconds")):
        seconds[path.stem] = int(path.read_text())
    return seconds


def _hardware() -> dict:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {"cores": len(os.sched_getaffinity(0)), "processor": processor, "gpus": gpus}


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("fairseq_lightrnn", "fairseq", "torch", "numpy", "scipy", "numba"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def report(summary: Mapping, rows: Mapping[int, list[str]], out: Path, prompt: str) -> str:
    """Puts the summary into words for somebody who sees it for the first time.

    Args:
        summary: from :func:`summarise`.
        rows: from :func:`table_rows`.
        out: the run's folder.
        prompt: the words that were continued.
    """
    shape = " × ".join(map(str, summary["table_shape"]))
    ordinary = summary["parameters_ordinary_lstm"]
    times = ordinary / summary["parameters"]
    continued = summary["generated"].split()[len(prompt.split()) :]
    valid = summary["valid_ppl_by_epoch"]
    lines = [
        "",
        f"Test perplexity   {summary['test_ppl']:.1f}",
        "                  On text it has not seen, the model hesitates at each word as if between",
        f"                  {summary['test_ppl']:.0f} equally likely ones, out of "
        f"{summary['vocabulary']:,}. Lower is better.",
        f"Parameters        {summary['parameters']:,}",
        f"                  An ordinary LSTM of the same width has {ordinary:,}, "
        f"{times:.{0 if times >= 10 else 1}f} times as many.",
        f"Word table        {summary['vocabulary']:,} words in {shape} cells",
        f"Training          {summary['train_words']:,} words × {len(valid)} epochs, "
        f"{summary['words_per_second']:,.0f} words per second",
        "Validation        "
        + ", ".join(f"{value:.1f}" for value in valid)
        + " (perplexity after each epoch)",
    ]
    for reallocation in summary["reallocations"]:
        lines.extend(_reallocation_lines(reallocation, valid))
    if not summary["reallocations"]:
        lines.append("Reallocation      none: every word keeps its cell of the initial table")
    lines.append("Rows of the learnt table, their most frequent words:")
    lines.extend(f"  row {row:3}  {'  '.join(words)}" for row, words in rows.items())
    lines.append("A prompt continued:")
    lines.append(f"  {prompt} → {' '.join(continued)}")
    lines.append("Files:")
    for name, what in (
        ("summary.json", "these figures"),
        ("perplexity.png", "the perplexity, epoch by epoch"),
        ("table.html", "the whole word table; open it in a browser"),
        ("checkpoints", "the model (checkpoint_best.pt) and the word tables"),
        ("corpus", "the text"),
        ("logs", "the complete output of every command"),
    ):
        lines.append(f"  {out / name}  {what}")
    return "\n".join(lines)


def _reallocation_lines(reallocation: Mapping, valid: list[float]) -> list[str]:
    epoch = reallocation["epoch"]
    before, after = (f"{valid[i]:.1f}" if i < len(valid) else "?" for i in (epoch - 1, epoch))
    return [
        f"Reallocation      after epoch {epoch}: {reallocation['moved']:,} words moved, "
        f"{reallocation['seconds']:.1f} s",
        f"                  training loss {reallocation['loss_before']:.4f} → "
        f"{reallocation['loss_after']:.4f} nats per word",
        f"                  validation perplexity before {before}, one epoch later {after}",
    ]


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="summary.py", description="Sum up a quickstart run.")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the run's folder"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--seed", type=int, required=True, help="the seed of the run, for the record"
    )
    parser.add_argument("--prompt", required=True, help="the words that were continued")
    args = parser.parse_args(arguments)
    out: Path = args.out
    try:
        manifest = json.loads((out / "corpus" / "manifest.json").read_text(encoding="utf-8"))
        model = load_model(args.checkpoint, out / "data")
        summary = {**summarise(out, model, manifest), "seed": args.seed}
        log = run_log.read_training_log(out / "logs" / "train.log")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    plot.plot_perplexity(
        out / "perplexity.png",
        log.valid_ppl,
        log.train_ppl,
        [reallocation["epoch"] for reallocation in summary["reallocations"]],
        summary["test_ppl"],
    )
    write_table_page(out / "table.html", model.table, model.symbols, model.counts)
    _write_whole(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(report(summary, table_rows(model), out, args.prompt))
    return 0


if __name__ == "__main__":
    sys.exit(main())
